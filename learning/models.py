"""Models by name: every torchvision classifier, and the EfficientNetV2 sizes torchvision lacks.

Also what a run does to a model: weights onto a head of another class count, drop rates changed in place, the layers
that fine-tuning trains.
"""

import difflib
import inspect
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, list_models
from torchvision.models._api import register_model  # as the registry of get_model; not exported higher up
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.ops import StochasticDepth

from learning.weights import find_weights, load_weights
from settings.errors import ConfigError
from settings.table import Config

# ---- EfficientNetV2-B0 to B3 and XL ----

# Rows: fused, expansion, stride of the first layer, channels in, channels out, layers. All kernels are
# 3 x 3; unfused blocks squeeze to a quarter of their input channels, which is torchvision's rule too.
# Source: google/automl, efficientnetv2/effnetv2_configs.py (v2_base_block, v2_xl_block).
BASE_BLOCKS = (
    (True, 1, 1, 32, 16, 1),
    (True, 4, 2, 16, 32, 2),
    (True, 4, 2, 32, 48, 2),
    (False, 4, 2, 48, 96, 3),
    (False, 6, 1, 96, 112, 5),
    (False, 6, 2, 112, 192, 8),
)
XL_BLOCKS = (
    (True, 1, 1, 32, 32, 4),
    (True, 4, 2, 32, 64, 8),
    (True, 4, 2, 64, 96, 8),
    (False, 4, 2, 96, 192, 16),
    (False, 6, 1, 192, 256, 24),
    (False, 6, 2, 256, 512, 32),
    (False, 6, 1, 512, 640, 8),
)


def scaled_channels(channels: int, width: float) -> int:
    """Round `channels * width` to the nearest multiple of 8, at least 8.

    This is not torchvision's rule, which never goes down by more than a tenth.
    """
    return max(8, int(channels * width + 4) // 8 * 8)


def efficientnet_v2(
    blocks: Sequence[tuple[bool, int, int, int, int, int]], width: float, depth: float, dropout: float, **kwargs: Any
) -> EfficientNet:
    """Build an EfficientNetV2 of torchvision's own blocks.

    It maps images (N, 3, S, S) to logits (N, num_classes).

    width, depth: factors on channels and on layers per row; layers round up
    """
    rows = []
    for fused, expansion, stride, channels_in, channels_out, layers in blocks:
        make = FusedMBConvConfig if fused else MBConvConfig
        rows.append(
            make(
                expand_ratio=expansion,
                kernel=3,
                stride=stride,
                input_channels=scaled_channels(channels_in, width),
                out_channels=scaled_channels(channels_out, width),
                num_layers=math.ceil(layers * depth),
            )
        )
    kwargs.setdefault("norm_layer", partial(nn.BatchNorm2d, eps=1e-3))
    return EfficientNet(rows, dropout=dropout, last_channel=scaled_channels(1280, width), **kwargs)


def register(
    name: str, blocks: Sequence[tuple[bool, int, int, int, int, int]], width: float, depth: float, dropout: float
) -> None:
    """Register a model by name with torchvision, so that `get_model` builds it."""

    def build(*, weights: None = None, progress: bool = True, **kwargs: Any) -> EfficientNet:
        return efficientnet_v2(blocks, width, depth, kwargs.pop("dropout", dropout), **kwargs)

    build.__name__ = name
    register_model(name)(build)


# Source: effnetv2_configs.py (efficientnetv2_params): width, depth, dropout.
EXTRA_MODELS = {
    "efficientnet_v2_b0": (BASE_BLOCKS, 1.0, 1.0, 0.2),
    "efficientnet_v2_b1": (BASE_BLOCKS, 1.0, 1.1, 0.2),
    "efficientnet_v2_b2": (BASE_BLOCKS, 1.1, 1.2, 0.3),
    "efficientnet_v2_b3": (BASE_BLOCKS, 1.2, 1.4, 0.3),
    "efficientnet_v2_xl": (XL_BLOCKS, 1.0, 1.0, 0.4),
}
for _name, _row in EXTRA_MODELS.items():
    register(_name, *_row)


def available() -> list[str]:
    """List the names that `build_model` takes."""
    return sorted([*list_models(module=torchvision.models), *EXTRA_MODELS])


def check_model(config: Config) -> None:
    """Raise ConfigError unless the settings name a model, and weights that are a file or that model's.

    A run that goes on has its own, and does not need those that it began with any more.
    """
    check_name(config.model)
    if config.weights is not None and not config.resume and not os.path.isfile(config.weights):
        find_weights(config.model, config.weights)


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a model; the message names the nearest ones."""
    names = available()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        raise ConfigError(
            f"unknown model {name!r}; {'nearest: ' + ', '.join(near) if near else 'any torchvision classification model is accepted'}"
        )


# ---- building, weights ----


class Classifier(nn.Linear):
    """A classifier that is evaluated at the precision of its weights, also where autocast has the rest in half of it.

    The reference evaluates in float32. In bfloat16, whose numbers from 8 to 16 lie 0.06 apart, 2 to 3 % of images have
    several of 1,000 classes tied at the top. The layer is a thousandth of the network's arithmetic.
    """

    def forward(self, features: Tensor) -> Tensor:
        if self.training or features.is_meta:  # where only shapes and operations are counted
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def evaluate_precisely(model: nn.Module, num_classes: int) -> None:
    """Make the last linear layer of `num_classes` outputs a `Classifier`; a model that ends otherwise stays as it is."""
    heads = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.out_features == num_classes
    ]
    if heads:
        parent, _, name = heads[-1].rpartition(".")
        head = model.get_submodule(heads[-1])
        assert isinstance(head, nn.Linear)
        precise = Classifier(head.in_features, num_classes, bias=head.bias is not None, device="meta")  # draws nothing
        precise.weight, precise.bias = head.weight, head.bias
        setattr(model.get_submodule(parent), name, precise)


def build_model(
    name: str,
    num_classes: int,
    weights: dict[str, Tensor] | None = None,
    bn_momentum: float | None = None,
    new_head: bool = True,
) -> tuple[nn.Module, str]:
    """Build the model, and a line that says what of `weights` (of `read_weights`) it holds.

    The head is made for `num_classes` and keeps its Dropout. Auxiliary heads (GoogLeNet, Inception)
    are left out: training sees one output.

    new_head: False refuses weights of another class count

    Raises:
        ConfigError: weights of another architecture; no batch norm to give a momentum.
    """
    kwargs: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their published weights expect images normalised anew inside.
        kwargs.update(aux_logits=False, init_weights=True, transform_input=weights is not None)
    model = get_model(name, weights=None, num_classes=num_classes, **kwargs)
    remember_depth_shares(model)
    if isinstance(model, EfficientNet):
        shrink_head(model, num_classes)
    loaded = f"{name}: random weights"
    if weights is not None:
        loaded = f"{name}: {load_weights(model, name, weights, num_classes, new_head)}"
    evaluate_precisely(model, num_classes)
    if bn_momentum is not None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            raise ConfigError(f"bn_momentum has no effect: {name} has no batch norm; leave it out")
        for norm in norms:
            norm.momentum = bn_momentum
    return model, loaded


def as_trained(model: nn.Module, published: bool) -> nn.Module:
    """Have a GoogLeNet or Inception see images normalised as in its training; `build_model` goes by whether it has weights.

    published: the run began with weights; those that are published began on images normalised otherwise
    """
    if hasattr(model, "transform_input"):
        model.transform_input = published  # type: ignore[assignment]
    return model


def build_on_meta(name: str, num_classes: int = 1000) -> nn.Module:
    """Build the model as shapes alone, which takes no memory and no time for weights."""
    try:
        with torch.device("meta"):
            return build_model(name, num_classes)[0]
    except NotImplementedError:  # RegNet looks at numbers while it is built
        return build_model(name, num_classes)[0].to("meta")


def shrink_head(model: EfficientNet, num_classes: int) -> None:
    """Draw the weights of a head of few classes anew, as small as those of ImageNet's 1,000 classes.

    The published rule, uniform in +-1/sqrt(num_classes), was made for 1,000 classes. For 10 it gives logits
    of standard deviation 4: training spends its first epochs unlearning them (docs/differences.md).
    """
    head = model.classifier[-1]
    assert isinstance(head, nn.Linear)
    bound = 1 / math.sqrt(max(num_classes, 1000))
    nn.init.uniform_(head.weight, -bound, bound)


# ---- drop rates, fine-tuning ----


def tuned_layers(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Find what fine-tuning to the test size adapts: the classifier, and the last batch norm, None if there is none.

    Raises:
        ConfigError: the model ends in no linear layer.

    Source: arXiv:1906.06423 (FixRes), section 4: the last layers, and the batch norm that precedes the global pooling.
        In a network of parallel branches (Inception) that is the batch norm of the last branch.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    heads = [module for module in model.modules() if isinstance(module, Classifier)]
    if not heads:
        raise ConfigError(
            f"finetune_epochs has no effect: {type(model).__name__} ends in no linear layer that could be trained alone; "
            "leave it out"
        )
    return heads[-1], norms[-1] if norms else None


def set_dropout(model: nn.Module, p: float) -> None:
    """Set every Dropout of `model` to probability `p`; weights and optimizer state stay.

    Raises:
        ConfigError: the model has no Dropout, so the setting could not take effect.
    """
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if not dropouts:
        raise ConfigError(f"dropout {p:g} has no effect: {type(model).__name__} has no Dropout layer; leave it out")
    for module in dropouts:
        module.p = p


def remember_depth_shares(model: nn.Module) -> None:
    """Record on each StochasticDepth layer its share of the model's drop probability p.

    torchvision fixes the probabilities when it builds the model: block k of n gets p * k / n in an
    EfficientNet, so that the last one has a little less than p, and p * k / (n - 1) in the others, so
    that the last one has p. The share is recorded because it cannot be read back once p was set to 0.
    """
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if layers:
        default = inspect.signature(EfficientNet).parameters["stochastic_depth_prob"].default
        whole = default if isinstance(model, EfficientNet) else max(layer.p for layer in layers)
        for layer in layers:
            layer.depth_share = layer.p / whole


def set_stochastic_depth(model: nn.Module, p: float) -> None:
    """Set the stochastic depth of `model`: block k drops with its share of `p`, the first never.

    Raises:
        ConfigError: the model has none, so the setting could not take effect.
    """
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if not layers:
        raise ConfigError(
            f"stochastic_depth_prob {p:g} has no effect: {type(model).__name__} has no stochastic depth; leave it out"
        )
    for layer in layers:
        layer.p = p * layer.depth_share
