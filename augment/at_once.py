"""RandAugment of a batch without groups, for a GPU: the same few kernels for every batch, and nothing waits.

Every image goes through one warp, one table of grey levels and one blend; the numbers of its own operation, its recipe,
make it change in one of them, and the others leave it as it is. Which kernels run, and on what shapes, depends on no
draw. A GPU has the arithmetic to spare; a CPU has not, and sorts the images by operation (`augment/batch.py`).
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample
from torchvision.transforms import InterpolationMode

from augment.randaugment import OPERATIONS, factor

# ---- recipes ----

# Columns of a recipe. An image that an operation does not concern has there what changes nothing.
LEVELS = slice(0, 256)  # what becomes of each grey level, where that does not depend on the image
ALONG_X, ALONG_Y, ORIGIN = slice(256, 258), slice(258, 260), slice(260, 262)  # the inverse of its affine map
DIVISOR, EQUALIZE, DARKEST, RANGE, MEAN, GREY, BLUR = range(262, 269)
WIDTH = 269


def inverse_map(name: str, amount: float, size: int) -> list[float]:
    """Compute where a warp fetches the pixels of an image of size x size from.

    Positions are counted from the middle of the image, in halves of `size`, as `grid_sample` counts them.

    Returns: x and y along x, along y, and of the middle itself.
    """
    if name == "ShearX":  # about the top left corner, which is at (-1, -1)
        return [1, 0, amount, 1, amount, 0]
    if name == "ShearY":
        return [1, amount, 0, 1, 0, amount]
    if name == "TranslateX":
        return [1, 0, 0, 1, -int(amount) / (size / 2), 0]
    if name == "TranslateY":
        return [1, 0, 0, 1, 0, -int(amount) / (size / 2)]
    angle = math.radians(amount) if name == "Rotate" else 0.0
    return [math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle), 0, 0]


def recipe(name: str, amount: float, size: int) -> NDArray[np.float32]:
    """Compute the recipe of an operation of `OPERATIONS`: (WIDTH,).

    amount: signed, in the operation's own unit

    Raises:
        NotImplementedError: the operation has no form here.
    """
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    row = np.zeros(WIDTH, np.float32)
    row[LEVELS] = levels[0].flatten()
    row[ALONG_X.start : ORIGIN.stop] = inverse_map(name, amount, size)
    row[DIVISOR] = 1
    match name:
        case "ShearX" | "ShearY" | "TranslateX" | "TranslateY" | "Rotate":
            pass
        case "Identity" | "Brightness" | "Posterize" | "Solarize":  # the operation itself, of every grey level
            row[LEVELS] = OPERATIONS[name].apply(levels, amount, InterpolationMode.BILINEAR)[0].flatten()
        case "Contrast":
            row[LEVELS] *= np.float32(factor(amount))
            row[MEAN] = factor(amount) - 1
        case "AutoContrast":
            row[[DIVISOR, DARKEST, RANGE]] = 0, 1, 1 / 255
        case "Equalize":
            row[LEVELS] = 0
            row[[DIVISOR, EQUALIZE]] = 0, 1
        case "Color":
            row[GREY] = 1 - factor(amount)
        case "Sharpness":
            row[BLUR] = 1 - factor(amount)
        case _:
            raise NotImplementedError(f"{name} has no form for a batch at once")
    return row


@lru_cache(maxsize=8)
def cookbook(level: float, size: int, device: torch.device) -> Tensor:
    """Return the recipes of all operations at a level, on `device`: (2 x operations, WIDTH) float32.

    Row 2 i is that of operation i, row 2 i + 1 that of its negative amount. Made once per stage.
    """
    rows = [
        recipe(name, operation.amount(level, size, size) * sign, size)
        for name, operation in OPERATIONS.items()
        for sign in (1, -1 if operation.signed else 1)
    ]
    return torch.from_numpy(np.stack(rows)).to(device)


@lru_cache(maxsize=8)
def constants(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels' positions as `grid_sample` counts them (size,), the grey levels (256,), and the number 1."""
    middle = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
    greys = torch.arange(256, dtype=torch.float32)
    return middle.to(device), greys.to(device), torch.ones((), dtype=torch.int32, device=device)


# ---- the three parts of every operation ----


def warp(images: Tensor, recipes: Tensor, positions: Tensor) -> Tensor:
    """Shear, move and rotate images, bilinearly, onto black: float32 (N, 3, S, S), whole numbers.

    The positions are not a matrix product, which a GPU may be set to compute in TF32: to a tenth of a pixel.
    """
    along_x, along_y, origin = (recipes[:, None, None, part] for part in (ALONG_X, ALONG_Y, ORIGIN))
    rows = torch.addcmul(origin, along_y, positions[:, None, None])  # (N, S, 1, 2)
    grid = torch.addcmul(rows, along_x, positions[:, None])  # (N, S, S, 2)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).round_()


def luminance(images: Tensor) -> Tensor:
    """Convert to grey as torchvision does: (N, 1, S, S), whole numbers."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def map_levels(images: Tensor, recipes: Tensor, grey: Tensor, greys: Tensor, one: Tensor) -> Tensor:
    """Replace grey levels, through one table per image and channel: (N, 3, S, S), to be clamped and rounded down.

    A table is (levels - offset) / divisor. Equalize puts the number of darker pixels for the levels; AutoContrast has
    the darkest level for an offset and their range for a divisor; Contrast has the mean of the image for an offset.

    grey: (N, 1, S, S), the images in grey; greys: (256,) all levels; one: the number, int32
    """
    pixels = images.flatten(2)  # (N, 3, S * S)
    index = pixels.long()
    count = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device)
    count.scatter_add_(2, index, one.expand_as(index))
    darker = count.cumsum(2, dtype=torch.int32).sub_(count).float()  # in int32, which needs no special care to repeat
    low, high = pixels.aminmax(dim=2, keepdim=True)  # (N, 3, 1)
    step = torch.div(darker.gather(2, high.long()), 255, rounding_mode="floor")
    half = torch.div(step, 2, rounding_mode="floor")
    column = recipes[:, None, :, None]  # its parts are (N, 1, 1)
    divisor = torch.addcmul(column[:, :, DIVISOR], column[:, :, EQUALIZE], step)
    divisor.addcmul_(column[:, :, RANGE], high - low)
    offset = torch.addcmul(column[:, :, DARKEST] * low, column[:, :, MEAN], grey.mean((2, 3))[..., None])
    offset.addcmul_(column[:, :, EQUALIZE], half, value=-1)
    levels = torch.addcmul(recipes[:, None, LEVELS], column[:, :, EQUALIZE], darker)
    # An image of one grey level can be neither equalized nor stretched, and stays.
    table = torch.where(divisor > 0, levels.sub_(offset).div_(divisor), greys)
    return table.gather(2, index).view_as(images)


def blend(images: Tensor, recipes: Tensor, grey: Tensor) -> Tensor:
    """Move images, in place, towards their grey or blurred form or away from it: (N, 3, S, S), as `map_levels` does."""
    share_of_grey, share_of_blur = (recipes[:, part, None, None, None] for part in (GREY, BLUR))
    inner = images[..., 1:-1, 1:-1]  # torchvision leaves the border as it is
    if inner.numel() > 0:
        # Means of 3 x 3 in which the middle counts five times. Not a convolution: cuDNN's may round to TF32.
        blurred = avg_pool2d(images, 3, stride=1, divisor_override=13).add_(inner, alpha=4 / 13).round_()
        inner.lerp_(blurred, share_of_blur)
    return images.lerp_(grey, share_of_grey)


CHUNK = 2**23  # pixels augmented at a time: 128 images of 256 x 256, in about 0.5 GiB of device memory


def augment_at_once(images: Tensor, groups: Tensor, level: float) -> Tensor:
    """Apply RandAugment to a batch, with as many operations as `groups` has columns.

    groups: (N, layers), twice the number of each operation, and one more if its amount is negated; on the device
    images: uint8 (N, 3, S, S); level: in bins of 30

    Returns: (N, 3, S, S), float32: whole numbers from 0 to 255.
    """
    size = images.shape[-1]
    book, fixed = cookbook(level, size, images.device), constants(size, images.device)
    chunks = min(len(images), math.ceil(len(images) * size**2 / CHUNK))
    parts = [augment_part(part, group, book, *fixed) for part, group in zip(images.chunk(chunks), groups.chunk(chunks))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def augment_part(images: Tensor, groups: Tensor, book: Tensor, positions: Tensor, greys: Tensor, one: Tensor) -> Tensor:
    """Augment images as `augment_at_once` does; book: of `cookbook`, the rest of `constants`."""
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    for group in groups.unbind(1):
        recipes = book.index_select(0, group)
        pixels = warp(pixels, recipes, positions)
        grey = luminance(pixels)
        pixels = map_levels(pixels, recipes, grey, greys, one)
        pixels = blend(pixels, recipes, grey).clamp_(0, 255).floor_()
    return pixels
