"""The optimizer by name, its parameter groups, and the learning rate as a function of the epoch."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from settings.table import Config

if TYPE_CHECKING:
    from stages import Stage

NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch norm of every kind, instance norm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
EMBEDDINGS = ("class_token", "pos_embedding", "position_embedding", "relative_position_bias_table")

# FixRes fine-tunes ResNet-50 with 0.001 after a training with 0.02, both for 512 images a step (facebookresearch/FixRes).
FINETUNE_SHARE = 20


def parameter_groups(
    model: nn.Module, weight_decay: float, norm: float | None, bias: float | None, embedding: float | None
) -> list[dict[str, Any]]:
    """Group the trainable parameters by their weight decay.

    norm, bias, embedding: weight decay of normalisation layers, of biases, and of a transformer's class token and
        position embeddings; None: no rule for that kind, `weight_decay` applies

    A bias of a normalisation layer follows the rule for biases if there is one, as in the reference.
    """
    groups: dict[float, list[nn.Parameter]] = {weight_decay: []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decay: float | None = None
            if name == "bias":
                decay = bias
            elif name in EMBEDDINGS:
                decay = embedding
            if decay is None and isinstance(module, NORM_LAYERS):
                decay = norm
            if parameter.requires_grad:
                groups.setdefault(weight_decay if decay is None else decay, []).append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the settings name, with its parameter groups."""
    groups = parameter_groups(
        model,
        config.weight_decay,
        config.norm_weight_decay,
        config.bias_weight_decay,
        config.transformer_embedding_decay,
    )
    lr, momentum = config.lr, config.momentum
    # One kernel for all parameters; under float16's gradient scaler it skips a step by itself, where others have the
    # processor wait for the GPU in each. None: torch's choice.
    fused = True if next(model.parameters()).is_cuda else None
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    if config.opt == "rmsprop":  # eps and alpha of the reference; decay 0.9 is also the paper's; no fused form
        return torch.optim.RMSprop(groups, lr=lr, momentum=momentum, eps=0.0316, alpha=0.9)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=config.opt == "sgd_nesterov", fused=fused)
    return with_momentum(sgd) if fused else sgd


def with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Begin the momentum at zeros, which a first step makes of the gradients themselves.

    torch begins it at memory that its fused kernel is to fill, and the kernel skips a step in which float16 overflows, as
    a first one often does: what happened to lie there would be the momentum.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class LearningRate:
    """The learning rate as a function of the epoch, a whole number or, with `lr_update: step`, a fraction.

    It depends on nothing else: a stage's batch size moves none of its changes, and a resumed run needs no state. With
    `lr_clock: epochs` it is at whole epochs what the reference's chain of torch schedulers gives. With `compute` the
    schedule runs over the share of the run's compute that is spent, counted by area, as EfficientTrain++ (arXiv:2405.08768)
    has it: all of the run is `epochs` of the settings, so that with `stage_rule: compute` warm-up and falls are counted in
    passes at the last size. In fine-tuning it is constant.

    stages: of the whole run
    num_epochs: that they train, fine-tuning left out
    span: where the schedule ends, on its clock
    """

    def __init__(self, config: Config, stages: "Sequence[Stage]"):
        self.config = config
        stages = [stage for stage in stages if not stage.finetune]
        self.num_epochs = stages[-1].epochs.stop
        self.on_compute = config.lr_clock == "compute"
        self.span = config.epochs if self.on_compute else self.num_epochs
        self.ends = [0, *(stage.epochs.stop for stage in stages)]
        self.spent = [0, *accumulate(len(stage.epochs) * stage.image_size**2 for stage in stages)]  # by those ends

    def __call__(self, epoch: float) -> float:
        config = self.config
        if epoch >= self.num_epochs:
            return config.finetune_lr or config.lr / FINETUNE_SHARE
        time = self.clock(math.floor(epoch) if config.lr_update == "epoch" else epoch)
        warmup = config.lr_warmup_epochs
        if time >= warmup:
            return self.decayed(time - warmup)
        progress = time / warmup if config.lr_warmup_method == "linear" else 0.0
        return config.lr * (config.lr_warmup_decay + (1 - config.lr_warmup_decay) * progress)

    def clock(self, epoch: float) -> float:
        """Find where on its clock the schedule is, from 0 to `span`."""
        if not self.on_compute:
            return epoch
        return self.span * float(np.interp(epoch, self.ends, self.spent)) / self.spent[-1]

    def warming_up(self, epoch: float) -> bool:
        """Check whether `epoch` begins within warm-up."""
        return self.clock(epoch) < self.config.lr_warmup_epochs

    def decayed(self, time: float) -> float:
        """Compute the rate `time` after the end of warm-up, on the schedule's clock."""
        config = self.config
        if config.lr_scheduler == "steplr":
            return config.lr * config.lr_gamma ** (time // config.lr_step_size)
        if config.lr_scheduler == "exponentiallr":
            return config.lr * config.lr_gamma**time
        share = time / (self.span - config.lr_warmup_epochs)
        return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
