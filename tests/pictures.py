"""Images made for tests, and transforms under a seed."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor

BILINEAR = InterpolationMode.BILINEAR


def noise(width, height):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain_colour(colour, size=(20, 20)):
    return Image.new("RGB", size, colour)


def black_and_white(width, height):
    """The left half black, the right half white."""
    image = plain_colour((0, 0, 0), (width, height))
    image.paste((255, 255, 255), (width // 2, 0, width, height))
    return image


def as_tensor(image):
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(image)


def seeded(seed, transform, image):
    torch.manual_seed(seed)
    return as_tensor(transform(image))


def photo(height, width, seed=0):
    """Smooth colours with some noise, uint8 (H, W, 3)."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return torch.from_numpy((smooth + draw.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def keys(count, epoch=0):
    """Keys of the first samples of an epoch."""
    return [(epoch, index, 0) for index in range(count)]
