"""A stage's settings as image transforms: the training preset, the evaluation preset, RandAugment
with continuous magnitudes on two scales, mixup and cutmix.

Every transform here draws from torch's default CPU generator; `data.py` sets that from
(seed, epoch, index), so an image's augmentation depends on nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2
from torchvision.transforms import functional as v1_functional
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ---- RandAugment ----

BINS_PER_UNIT = {"torchvision": 1.0, "paper": 3.0}  # of `ra_scale`, in torchvision's bins of 30


@lru_cache
def bins(start: float, end: float) -> list[float]:
    return torch.linspace(start, end, 31).tolist()


def on_range(start: float, end: float, level: float) -> float:
    """`level` bins of 30 from `start` towards `end`, and on beyond it: level 45 is 1.5 times the range.

    At whole levels up to 30 this is torchvision's float32 number, to the bit: `int` and comparisons
    follow, and a number a hair smaller would shift an image by a pixel.
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
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, interpolation=interpolation, center=[0, 0]
    )


def translate(image: Any, x: float, y: float, interpolation: InterpolationMode) -> Any:
    right, down = int(x), int(y)
    if isinstance(image, Tensor):  # whole pixels: what `affine` gives, by copying, in a tenth of its time
        height, width = image.shape[-2:]
        moved = torch.zeros_like(image)
        kept = image[..., max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        moved[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = kept
        return moved
    return F.affine(image, angle=0.0, translate=[right, down], scale=1.0, shear=[0.0, 0.0], interpolation=interpolation)


def sharpen(image: Any, factor: float) -> Any:
    if isinstance(image, Tensor) and image.ndim == 4:  # on a CPU its convolution is faster so, copies included
        image = image.contiguous(memory_format=torch.channels_last)
    return F.adjust_sharpness(image, factor)


def shift(level: float, side: int) -> float:
    # Beyond the range, stop while a quarter of the image is still to be seen.
    return min(on_range(0.0, 150.0 / 331.0 * side, level), 0.75 * side)


def factor(amount: float) -> float:
    return max(0.0, 1.0 + amount)  # below 0 an image would turn into its negative


def enhance(level: float, height: int, width: int) -> float:
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
        the range (15 rotates by 15 and by 45 degrees)

    At scale "torchvision" and whole magnitudes it equals torchvision's RandAugment draw for draw on PIL images
    (transforms.v1; v2 draws its signs in another order). On tensors each operation equals v2's, which v1's Color and
    Sharpness miss by a grey level.

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


# ---- decoding and cropping ----


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and RGBA images as RGB; of 16 bits of grey the upper 8, where PIL would clip to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "RGB":
        image.load()  # `convert` would copy
        return image
    return image.convert("RGB")


def reduce_decoding(image: Image.Image, box: Sequence[int], size: int) -> int:
    """Have a JPEG that is not decoded yet decoded at 1/2, 1/4 or 1/8, where its crop `box` (top, left, height, width)
    has at least `size` pixels each way even so: libjpeg then leaves out most of the arithmetic. Returns the divisor."""
    divisor = next((divisor for divisor in (8, 4, 2) if min(box[2:]) >= divisor * size), 1)
    if divisor == 1 or image.draft(None, (image.width // divisor, image.height // divisor)) is None:
        return 1
    return divisor


def resized_crop(image: Image.Image, box: Sequence[int], size: int, interpolation: InterpolationMode) -> Image.Image:
    """The crop `box` (top, left, height, width) as RGB, size x size; of an image of any mode, decoded or not."""
    top, left, height, width = box
    averaging = interpolation != InterpolationMode.NEAREST  # which would pick among averages, not pixels
    divisor = reduce_decoding(image, box, size) if averaging else 1
    if divisor == 1:
        return v1_functional.resized_crop(to_rgb(image), top, left, height, width, [size, size], interpolation, True)
    region = (left / divisor, top / divisor, (left + width) / divisor, (top + height) / divisor)
    return to_rgb(image).resize((size, size), Image.Resampling[interpolation.value.upper()], box=region)


class RandomResizedCrop(v1.RandomResizedCrop):
    """torchvision's, draw for draw, of a PIL image that may not be decoded yet."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.log_ratio = torch.log(torch.tensor(self.ratio)).tolist()

    def forward(self, image: Image.Image) -> Image.Image:
        return resized_crop(image, self.box(image.height, image.width), self.size[0], self.interpolation)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height, width, as `get_params` draws them, in half of its time: that makes a tensor of every
        number, for each image anew."""
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            shape = torch.exp(torch.empty(1).uniform_(*self.log_ratio)).item()
            wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < wide <= width and 0 < tall <= height:
                top = int(torch.randint(height - tall + 1, (1,)))
                return top, int(torch.randint(width - wide + 1, (1,))), tall, wide
        low, high = self.ratio
        wide, tall = width, height
        if width / height < low:
            tall = round(width / low)
        elif width / height > high:
            wide = round(height * high)
        return (height - tall) // 2, (width - wide) // 2, tall, wide


# ---- presets ----


def train_preset(
    *,
    image_size: int,
    auto_augment: str | None = None,
    ra_magnitude: float | None = None,
    ra_scale: str = "torchvision",
    augmix_severity: int = 3,
    random_erase: float = 0.0,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    hflip_prob: float = 0.5,
    interpolation: str = "bilinear",
    backend: str = "pil",
    use_v2: bool = False,
) -> v1.Compose:
    """A PIL image, of any mode and perhaps not decoded yet, to a normalised float32 tensor
    (3, image_size, image_size): random resized crop, flip, policy, normalise, random erase; the reference's order.

    use_v2: take torchvision's own transforms from `transforms.v2`; the distribution is the same
    """
    lib: Any = v2 if use_v2 else v1
    mode = InterpolationMode(interpolation)
    crop = dict(scale=crop_scale, interpolation=mode, antialias=True)
    steps: list[Any]
    if backend == "tensor":
        steps = [to_rgb, lib.PILToTensor(), lib.RandomResizedCrop(image_size, **crop)]
    else:
        steps = [RandomResizedCrop(image_size, **crop)]
    if hflip_prob > 0:
        steps.append(lib.RandomHorizontalFlip(hflip_prob))
    if auto_augment == "ra":
        assert ra_magnitude is not None
        steps.append(RandAugment(ra_magnitude, ra_scale, mode))
    elif auto_augment == "ta_wide":
        steps.append(lib.TrivialAugmentWide(interpolation=mode))
    elif auto_augment == "augmix":
        steps.append(lib.AugMix(interpolation=mode, severity=augmix_severity))
    elif auto_augment is not None:
        steps.append(lib.AutoAugment(policy=AutoAugmentPolicy(auto_augment), interpolation=mode))
    steps += to_normalised(lib, backend)
    if random_erase > 0:
        steps.append(lib.RandomErasing(p=random_erase))
    return v1.Compose(steps)


def eval_preset(
    *, crop_size: int, resize_size: int, interpolation: str = "bilinear", backend: str = "pil", use_v2: bool = False
) -> v1.Compose:
    """An RGB PIL image to a normalised float32 tensor (3, crop_size, crop_size): short side to
    `resize_size`, centre crop, normalise."""
    lib: Any = v2 if use_v2 else v1
    steps = [lib.PILToTensor()] if backend == "tensor" else []
    steps += [
        lib.Resize(resize_size, interpolation=InterpolationMode(interpolation), antialias=True),
        lib.CenterCrop(crop_size),
    ]
    return v1.Compose(steps + to_normalised(lib, backend))


class ToNormalised:
    """An RGB PIL image as a normalised float32 tensor (3, H, W): torchvision's arithmetic to the bit, without the
    copy that each of its steps makes, which take as long as decoding a small JPEG."""

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return torch.empty(pixels.shape).copy_(pixels).div_(255).sub_(self.mean).div_(self.std)


def to_normalised(lib: Any, backend: str) -> list[Any]:
    if lib is v1 and backend == "pil":
        return [ToNormalised()]
    steps = [lib.PILToTensor()] if backend == "pil" else []
    steps.append(v2.ToDtype(torch.float32, scale=True) if lib is v2 else v1.ConvertImageDtype(torch.float32))
    return [*steps, lib.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)]


def denormalise(images: Tensor) -> Tensor:
    """Normalised (..., 3, H, W) back to uint8, for the eye."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


# ---- mixup, cutmix ----


def batch_mix(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> nn.Module | None:
    """Mixup or cutmix of a batch, one of the two per batch if both alphas are above 0; None if neither is.

    It takes images (N, 3, S, S) and class numbers (N,), and gives images and soft targets (N, K). Its draws
    come from the CPU generator, so nothing waits for the device. Label smoothing is the loss's.

    Source: arXiv:1710.09412 (mixup), arXiv:1905.04899 (cutmix).
    """
    mixes: list[nn.Module] = []
    if mixup_alpha > 0:
        mixes.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
    if cutmix_alpha > 0:
        mixes.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
    if len(mixes) == 2:
        return v2.RandomChoice(mixes)
    return mixes[0] if mixes else None
