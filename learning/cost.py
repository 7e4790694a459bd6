"""What a model costs in arithmetic."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from settings.errors import ConfigError, first_line


def gflops_per_image(model: nn.Module, image_sizes: Sequence[int]) -> list[float]:
    """Count the billions of multiply-adds of one image's forward pass, at each size.

    They are counted as papers and torchvision do (EfficientNetV2-S at 384: 8.37).

    model: on the meta device, so that only shapes are computed; of no other use afterwards, its batch norms are gone

    Raises:
        ConfigError: the model cannot take a size.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]  # no product, and half of the time
    counts: dict[int, float] = {}
    for size in image_sizes:
        if size not in counts:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                try:
                    model(torch.empty(1, 3, size, size, device="meta"))
                except (RuntimeError, AssertionError, ValueError) as error:
                    reason = first_line(error)
                    raise ConfigError(f"{type(model).__name__} cannot take images of {size} px: {reason}") from error
            counts[size] = counter.get_total_flops() / 2 / 1e9  # it counts a multiply-add as two
    return [counts[size] for size in image_sizes]
