"""Operations on whole batches.

A crop is two matrix products; RandAugment applies each operation once, to the images that drew it. (A GPU applies all
to all: `augment/at_once.py`.)
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms import InterpolationMode

from augment.draws import Array, Boxes
from augment.pixels import IMAGENET_MEAN, IMAGENET_STD
from augment.randaugment import OPERATIONS

# ---- crops ----


def crop_tensor(pixels: Tensor, box: Sequence[int], size: int) -> Tensor:
    """Crop uint8 (H, W, 3) to `box` and resize it with antialiasing: (3, size, size), channels last in memory.

    box: top, left, height, width
    """
    top, left, height, width = box
    crop = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
    # torch would copy it so too, but then take the result apart into planes, which costs more than the copy.
    crop = crop.contiguous(memory_format=torch.channels_last)
    return interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def triangle_weights(
    lengths: Tensor, size: int, longest: int, reverse: Tensor | None = None, window: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Build the matrices (N, size, longest) that resize along one axis, bilinearly and with antialiasing.

    Row i of matrix n holds the shares of the first `lengths[n]` pixels in output pixel i; in output pixel
    size - 1 - i where `reverse` is True.

    window: the lengths to resize to, (N,), and which of the resized pixels is output pixel 0, (N,); output pixels before
        and after all of them are black. Without it, all are resized to `size`.
    """
    place = torch.arange(size, device=lengths.device).expand(len(lengths), size)
    if reverse is not None:
        place = torch.where(reverse[:, None], size - 1 - place, place)
    resized: Tensor | int = size
    if window is not None:
        resized, place = window[0], place + window[1][:, None]
    scale = (lengths / resized)[:, None, None]
    pixel = torch.arange(longest, device=lengths.device)
    away = (pixel + 0.5 - (place[:, :, None] + 0.5) * scale).abs() / scale.clamp(min=1)
    weights = (1 - away).clamp(min=0) * (pixel < lengths[:, None, None])
    weights = weights / weights.sum(dim=2, keepdim=True)
    if window is None:
        return weights
    return torch.where(((place >= 0) & (place < window[0][:, None]))[:, :, None], weights, 0.0)


CHUNK = 2**24  # pixels gathered at a time: with their indices about 0.2 GiB of device memory
ALIGNED = 32  # pixels: sides of what is gathered, so that products of float16 are fast and memory is found again


def crop_rows(starts: NDArray, strides: NDArray, boxes: Boxes, flips: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Join what `crop_batch` needs of each image: (N, 7).

    starts, strides: (N,) first pixel and width of each image
    """
    return np.column_stack([starts, strides, boxes, flips]).astype(np.int64)


def window_rows(heights: NDArray, widths: NDArray, resize_size: int, crop_size: int) -> NDArray[np.int64]:
    """Compute how images are resized and cropped for evaluation, as `presets.eval_preset` does: (N, 4).

    They are the resized height and width, of which the short side is `resize_size`, then the first row and the first
    column of the central crop; below 0 where the crop is larger than the image, which has a black margin then.
    """
    sides = np.stack([heights, widths], axis=1)
    short = sides.min(axis=1, keepdims=True)
    resized = np.where(sides == short, resize_size, (resize_size * sides / short).astype(np.int64))
    room = resized - crop_size
    first = np.where(room >= 0, np.rint(room / 2).astype(np.int64), -(-room // 2))
    return np.concatenate([resized, first], axis=1)


def crop_batch(flat: Tensor, rows: Tensor, extent: Sequence[int], size: int) -> Tensor:
    """Crop many images at once, resize them with antialiasing and flip them: uint8 (N, 3, size, size).

    Resizing is linear along each axis, so a crop is two matrix products. On CUDA they are products of float16 that
    add up in float32; that is precise to one grey level.

    flat: (P, 3) uint8, pixels of all images in rows
    rows: (N, 7) of `crop_rows`, or with the columns of `window_rows` after them (N, 11), on the same device
    extent: height and width of the largest box in each direction, known to the host
    """
    half = torch.float16 if flat.is_cuda else torch.float32
    tallest, widest = (-(-side // ALIGNED) * ALIGNED for side in extent)
    rows = rows.to(torch.int32 if len(flat) < 2**31 else torch.int64)  # indices take more memory than pixels
    parts = []
    for part in rows.chunk(max(1, min(len(rows), math.ceil(len(rows) * tallest * widest / CHUNK)))):
        start, stride, top, left, height, width, flip, *windows = part.unbind(1)
        # Beyond an image's own box the index stays inside, and the weight is 0.
        row = torch.arange(tallest, dtype=rows.dtype, device=flat.device).minimum(height[:, None] - 1)
        column = torch.arange(widest, dtype=rows.dtype, device=flat.device).minimum(width[:, None] - 1)
        row_start = (start + left)[:, None] + (top[:, None] + row) * stride[:, None]
        index = (row_start[:, :, None] + column[:, None, :]).flatten()
        pixels = flat.index_select(0, index).view(-1, tallest, widest * 3).to(half)
        down, across = ((windows[0], windows[2]), (windows[1], windows[3])) if windows else (None, None)
        vertical = pad(triangle_weights(height, size, tallest, None, down).to(half), (0, 0, 0, -size % 8))
        horizontal = triangle_weights(width, size, widest, flip.bool(), across).to(half)
        lines = torch.bmm(vertical, pixels).view(-1, size + -size % 8, widest, 3)
        lines = lines.transpose(1, 2).reshape(len(part), widest, -1)
        crops = torch.bmm(horizontal, lines).view(len(part), size, -1, 3)[:, :, :size]  # N, x, y, channel
        parts.append(crops.permute(0, 3, 2, 1).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def reduce(images: Tensor, size: int) -> Tensor:
    """Reduce square images of grey levels with antialiasing, bilinearly: (N, 3, S, S) to (N, 3, size, size).

    Returns: uint8; of a GPU, which reduces no whole numbers, float32 of whole numbers.
    """
    if images.is_cuda:
        return interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round_()
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def to_device(values: NDArray, device: torch.device) -> Tensor:
    """Copy an array to a device; the processor does not wait for a copy to CUDA, out of pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---- normalising ----


@lru_cache
def normalisers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factor and the offset of each channel, of grey levels, on a device: (1, 3, 1, 1) each."""
    mean, std = (np.array(values, dtype=np.float32).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.from_numpy(1 / (255 * std)).to(device), torch.from_numpy(-mean / std).to(device)


def normalise(images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Normalise grey levels (N, 3, S, S), uint8 or float32: float32, laid out in `memory_format`."""
    factor, offset = normalisers(images.device)
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device, memory_format=memory_format)
    if images.is_cuda:
        return torch.addcmul(offset, images.float(), factor, out=out)
    for pixels, part in zip(images.split(8), out.split(8)):  # pieces that stay in the cache: a third of the time
        part.copy_(pixels).mul_(factor).add_(offset)
    return out


# ---- RandAugment ----


def draw_groups(choices: Array, signs: Array) -> NDArray[np.int64]:
    """Choose operations and their signs: twice the number of each, and one more if its amount is negated.

    choices, signs: (N, layers) uniform in [0, 1)
    """
    signed = np.array([operation.signed for operation in OPERATIONS.values()])
    number = (choices * len(signed)).astype(np.int64)
    return 2 * number + ((signs < 0.5) & signed[number])


def augment_by_group(images: Tensor, groups: NDArray[np.int64], level: float) -> Tensor:
    """Apply RandAugment to a batch, uint8 (N, 3, S, S), each operation once, to the images that drew it.

    groups: (N, layers) of `draw_groups`; level: in bins of 30
    """
    size = images.shape[-1]
    operations = list(OPERATIONS.values())
    place = np.arange(len(images))  # which image lies where: they are sorted by operation, and the result sorted back
    for layer in range(groups.shape[1]):
        group = groups[place, layer]
        order = np.argsort(group, kind="stable")
        place = place[order]
        images = images.index_select(0, torch.from_numpy(order))
        bounds = np.searchsorted(group[order], np.arange(2 * len(operations) + 1)).tolist()
        for i, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                operation = operations[i // 2]
                amount = operation.amount(level, size, size) * (-1 if i % 2 else 1)
                images[start:stop] = operation.apply(images[start:stop], amount, InterpolationMode.BILINEAR)
    return images.index_select(0, torch.from_numpy(np.argsort(place)))
