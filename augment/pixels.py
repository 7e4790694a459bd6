"""Pixels: decoding as far as a crop needs, cropping, normalising and back."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as v1_functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a grey, palette, CMYK or RGBA image to RGB.

    Of 16 bits of grey the upper 8 are kept, where PIL would clip to white.

    Raises:
        ValueError: its pixels are numbers of no known range.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if (image.format == "TIFF" and image.mode == "I") or grey.min() < 0 or grey.max() >= 2**16:
            raise ValueError("its pixels are signed, or of 32 bits; save them with 8 or 16 bits, unsigned")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save them with 8 or 16 bits")
    if image.mode == "RGB":
        image.load()  # `convert` would copy
        return image
    return image.convert("RGB")


def reduce_decoding(image: Image.Image, box: Sequence[int], size: int) -> int:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size where its crop allows it; return the divisor.

    The crop `box` (top, left, height, width) has at least `size` pixels each way even so; libjpeg then leaves out
    most of the arithmetic. The divisor is 1 where that is impossible: for a small crop, an image of another format, or
    one that is decoded already.
    """
    divisor = next((divisor for divisor in (8, 4, 2) if min(box[2:]) >= divisor * size), 1)
    if divisor == 1 or image.draft(None, (image.width // divisor, image.height // divisor)) is None:
        return 1
    return divisor


def crop_pil(image: Image.Image, box: Sequence[int], size: int, interpolation: InterpolationMode) -> Image.Image:
    """Crop an image of any mode, decoded or not, to `box` and resize it: RGB, size x size.

    box: top, left, height, width
    """
    top, left, height, width = box
    averaging = interpolation != InterpolationMode.NEAREST  # which would pick among averages, not pixels
    divisor = reduce_decoding(image, box, size) if averaging else 1
    if divisor == 1:
        return v1_functional.resized_crop(to_rgb(image), top, left, height, width, [size, size], interpolation, True)
    region = (left / divisor, top / divisor, (left + width) / divisor, (top + height) / divisor)
    return to_rgb(image).resize((size, size), Image.Resampling[interpolation.value.upper()], box=region)


class RandomResizedCrop(v1.RandomResizedCrop):
    """torchvision's RandomResizedCrop, draw for draw, for a PIL image that may not be decoded yet."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.log_ratio = torch.log(torch.tensor(self.ratio)).tolist()

    def forward(self, image: Image.Image) -> Image.Image:
        return crop_pil(image, self.box(image.height, image.width), self.size[0], self.interpolation)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw top, left, height and width as torchvision's `get_params` does, in half of its time.

        That function makes a tensor of every number, for each image anew.
        """
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


class ToNormalised:
    """The conversion of an RGB PIL image to a normalised float32 tensor (3, H, W).

    It is torchvision's arithmetic to the bit, without the copy that each of its steps makes; those take as long as
    decoding a small JPEG.
    """

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return torch.empty(pixels.shape).copy_(pixels).div_(255).sub_(self.mean).div_(self.std)


def to_normalised(lib: Any, backend: str) -> list[Any]:
    """Build the steps that make a normalised float32 tensor of an image: PIL, or uint8 for backend tensor.

    lib: torchvision's `transforms` or `transforms.v2`
    """
    if lib is v1 and backend == "pil":
        return [ToNormalised()]
    steps = [lib.PILToTensor()] if backend == "pil" else []
    steps.append(v2.ToDtype(torch.float32, scale=True) if lib is v2 else v1.ConvertImageDtype(torch.float32))
    return [*steps, lib.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)]


def denormalise(images: Tensor) -> Tensor:
    """Convert normalised images (..., 3, H, W) back to uint8, to be looked at."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
