"""RandAugment with continuous magnitudes on two scales, from one table of operations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

BINS_PER_UNIT = {"torchvision": 1.0, "paper": 3.0}  # of `ra_scale`, in torchvision's bins of 30


@lru_cache
def bins(start: float, end: float) -> list[float]:
    """Compute torchvision's 31 magnitudes from `start` to `end`: float32 numbers, as Python floats."""
    return torch.linspace(start, end, 31).tolist()


def on_range(start: float, end: float, level: float) -> float:
    """Compute the number `level` bins of 30 from `start` towards `end`, or beyond it.

    Level 45 is 1.5 times the range. At whole levels up to 30 this is torchvision's float32 number, to the bit: it goes
    on into `int` and comparisons, where a number a hair smaller would shift an image by a pixel.
    """
    if level <= 30 and level == int(level):
        return bins(start, end)[int(level)]
    return start + (end - start) * level / 30


@dataclass(frozen=True)
class Operation:
    """One of RandAugment's operations.

    apply: (image, amount, interpolation) to image, PIL or uint8 tensor (..., 3, H, W)
    amount: (level in bins of 30, height, width) to the operation's own unit
    signed: the amount is negated for half of the draws
    """

    apply: Callable[[Any, float, InterpolationMode], Any]
    amount: Callable[[float, int, int], float] = lambda level, height, width: 0.0
    signed: bool = False


def shear(image: Any, x: float, y: float, interpolation: InterpolationMode) -> Any:
    """Shear an image about its top left corner; `x` and `y` are tangents of the angles."""
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, interpolation=interpolation, center=[0, 0]
    )


def translate(image: Any, x: float, y: float, interpolation: InterpolationMode) -> Any:
    """Move an image `x` pixels to the right and `y` down, both rounded towards 0; fill with black."""
    right, down = int(x), int(y)
    if isinstance(image, Tensor):  # whole pixels: what `affine` gives, by copying, in a tenth of its time
        height, width = image.shape[-2:]
        moved = torch.zeros_like(image)
        kept = image[..., max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        moved[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = kept
        return moved
    return F.affine(image, angle=0.0, translate=[right, down], scale=1.0, shear=[0.0, 0.0], interpolation=interpolation)


def sharpen(image: Any, factor: float) -> Any:
    """Adjust the sharpness of an image: factor 0 blurs it, 1 leaves it as it is."""
    if isinstance(image, Tensor) and image.ndim == 4 and not image.is_cuda:
        # On a CPU its convolution is faster so, copies included. cuDNN would search anew for each number of images.
        image = image.contiguous(memory_format=torch.channels_last)
    return F.adjust_sharpness(image, factor)


def shift(level: float, side: int) -> float:
    """Compute the pixels of a translation of an image whose side in that direction is `side`."""
    # Beyond the range, stop while a quarter of the image is still to be seen.
    return min(on_range(0.0, 150.0 / 331.0 * side, level), 0.75 * side)


def factor(amount: float) -> float:
    """Compute the factor of brightness, saturation, contrast or sharpness from its signed amount."""
    return max(0.0, 1.0 + amount)  # below 0 an image would turn into its negative


def enhance(level: float, height: int, width: int) -> float:
    """Compute the amount of brightness, saturation, contrast or sharpness at a level."""
    return on_range(0.0, 0.9, level)


# In torchvision's order: the same draw picks the same operation. Ranges are torchvision's; the paper's
# scale goes beyond them where a setting above 10 says so, up to what an operation can take: one bit of
# colour, threshold 0, factor 0, three quarters of the image.
OPERATIONS: dict[str, Operation] = {
    "Identity": Operation(lambda image, amount, mode: image),
    "ShearX": Operation(lambda image, amount, mode: shear(image, amount, 0.0, mode), lambda m, h, w: on_range(0.0, 0.3, m), True),
    "ShearY": Operation(lambda image, amount, mode: shear(image, 0.0, amount, mode), lambda m, h, w: on_range(0.0, 0.3, m), True),
    "TranslateX": Operation(lambda image, amount, mode: translate(image, amount, 0.0, mode), lambda m, h, w: shift(m, w), True),
    "TranslateY": Operation(lambda image, amount, mode: translate(image, 0.0, amount, mode), lambda m, h, w: shift(m, h), True),
    "Rotate": Operation(lambda image, amount, mode: F.rotate(image, amount, interpolation=mode), lambda m, h, w: on_range(0.0, 30.0, m), True),
    "Brightness": Operation(lambda image, amount, mode: F.adjust_brightness(image, factor(amount)), enhance, True),
    "Color": Operation(lambda image, amount, mode: F.adjust_saturation(image, factor(amount)), enhance, True),
    "Contrast": Operation(lambda image, amount, mode: F.adjust_contrast(image, factor(amount)), enhance, True),
    "Sharpness": Operation(lambda image, amount, mode: sharpen(image, factor(amount)), enhance, True),
    "Posterize": Operation(lambda image, amount, mode: F.posterize(image, int(amount)), lambda m, h, w: max(1, 8 - round(m / 7.5))),
    "Solarize": Operation(lambda image, amount, mode: F.solarize(image, amount), lambda m, h, w: max(0.0, on_range(255.0, 0.0, m))),
    "AutoContrast": Operation(lambda image, amount, mode: F.autocontrast(image)),
    "Equalize": Operation(lambda image, amount, mode: F.equalize(image)),
}  # fmt: skip


class RandAugment(nn.Module):
    """Two operations drawn from `OPERATIONS` for each image, at one magnitude; PIL or uint8 (3, H, W).

    magnitude: any number from 0, in the units of `scale`: "torchvision" bins of 30, "paper" tenths of
        the range (15 rotates by 15 degrees on the one, by 45 on the other)

    At scale "torchvision" and whole magnitudes it equals torchvision's RandAugment draw for draw on PIL images
    (transforms.v1; v2 draws its signs in another order). On tensors each operation equals v2's; v1's Color and
    Sharpness differ from that by a grey level.

    Source: arXiv:1909.13719; magnitudes of EfficientNetV2: arXiv:2104.00298, Table 6.
    """

    def __init__(self, magnitude: float, scale: str, interpolation: InterpolationMode, num_ops: int = 2):
        super().__init__()
        self.level = magnitude * BINS_PER_UNIT[scale]
        self.interpolation = interpolation
        self.num_ops = num_ops

    def forward(self, image: Any) -> Any:
        height, width = F.get_size(image)
        operations = list(OPERATIONS.values())
        for _ in range(self.num_ops):
            operation = operations[int(torch.randint(len(operations), (1,)))]
            amount = operation.amount(self.level, height, width)
            if operation.signed and torch.randint(2, (1,)):
                amount = -amount
            image = operation.apply(image, amount, self.interpolation)
        return image
