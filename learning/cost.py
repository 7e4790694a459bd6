"""What a model costs in arithmetic."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from settings.errors import ConfigError, first_line

FEW = 30  # sizes; so many are counted one by one, which takes some 20 ms each


def gflops_per_image(
    model: nn.Module, image_sizes: Sequence[int], known: dict[int, float] | None = None
) -> list[float]:
    """Count the billions of multiply-adds of one image's forward pass, at each size.

    They are counted as papers and torchvision do (EfficientNetV2-S at 384: 8.37). Of a plan with hundreds of sizes, 30
    are counted, and the others follow from them if the arithmetic is seen to be a sum over layer areas, as that of most
    convolutional networks is (EfficientNet, ResNet, RegNet, ConvNeXt; not DenseNet, not Swin).

    model: on the meta device, so that only shapes are computed; of no other use afterwards, its batch norms are gone
    known: what was counted before, by size, which is added to

    Raises:
        ConfigError: the model cannot take a size.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]  # no product, and half of the time
    sizes = np.unique(image_sizes)
    counted = sizes[np.unique(np.linspace(0, len(sizes) - 1, FEW).round().astype(int))]
    counts = {} if known is None else known
    counts.update({size: count(model, size) for size in counted.tolist() if size not in counts})
    rest = np.setdiff1d(sizes, counted)
    if len(rest):
        fitted, checked = counted[::2], counted[1::2]
        weights = np.linalg.lstsq(areas(fitted), [counts[size] for size in fitted.tolist()])[0]
        holds = np.allclose(areas(checked) @ weights, [counts[size] for size in checked.tolist()], rtol=1e-9, atol=0)
        found = (areas(rest) @ weights).tolist() if holds else [count(model, size) for size in rest.tolist()]
        counts.update(zip(rest.tolist(), found))
    return [counts[size] for size in image_sizes]


def areas(sizes: NDArray) -> NDArray[np.float64]:
    """Compute the areas that layers may have at image sizes (N,): 1, and the side halved up to five times, (N, 12).

    Halved sides are rounded up (convolutions with padding) or down (without). The unit is 1,000 x 1,000 pixels, so that
    the columns stay of one order.
    """
    halved = [sizes / 2**k for k in range(6)]
    sides = np.stack([*map(np.ceil, halved), *map(np.floor, halved[1:])], 1)
    return np.concatenate([np.ones((len(sizes), 1)), (sides / 1000) ** 2], 1)


def count(model: nn.Module, size: int) -> float:
    """Count the billions of multiply-adds of a forward pass of one image of `size` pixels a side.

    Raises:
        ConfigError: the model cannot take it.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            model(torch.empty(1, 3, size, size, device="meta"))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = first_line(error)
            raise ConfigError(f"{type(model).__name__} cannot take images of {size} px: {reason}") from error
    return counter.get_total_flops() / 2 / 1e9  # it counts a multiply-add as two
