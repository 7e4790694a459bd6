"""Operations on whole batches.

A crop is two matrix products; RandAugment applies each operation once, to the images that drew it.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode

from augment.draws import Array, Boxes
from augment.randaugment import OPERATIONS

# ---- crops ----


def crop_tensor(pixels: Tensor, box: Sequence[int], size: int) -> Tensor:
    """Crop uint8 (H, W, 3) to `box` and resize it with antialiasing: (3, size, size).

    box: top, left, height, width
    """
    top, left, height, width = box
    crop = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
    return interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def triangle_weights(lengths: Tensor, size: int, longest: int, reverse: Tensor | None = None) -> Tensor:
    """Build the matrices (N, size, longest) that resize along one axis, bilinearly and with antialiasing.

    Row i of matrix n holds the shares of the first `lengths[n]` pixels in output pixel i; in output pixel
    size - 1 - i where `reverse` is True.
    """
    scale = (lengths / size)[:, None, None]
    place = torch.arange(size, device=lengths.device).expand(len(lengths), size)
    if reverse is not None:
        place = torch.where(reverse[:, None], size - 1 - place, place)
    pixel = torch.arange(longest, device=lengths.device)
    away = (pixel + 0.5 - (place[:, :, None] + 0.5) * scale).abs() / scale.clamp(min=1)
    weights = (1 - away).clamp(min=0) * (pixel < lengths[:, None, None])
    return weights / weights.sum(dim=2, keepdim=True)


CHUNK = 2**24  # pixels gathered at a time: with their indices about 0.3 GiB of device memory


def crop_batch(
    flat: Tensor, starts: NDArray, strides: NDArray, boxes: Boxes, flips: NDArray[np.bool_], size: int
) -> Tensor:
    """Crop many images at once, resize them with antialiasing and flip them: uint8 (N, 3, size, size).

    Resizing is linear along each axis, so a crop is two matrix products. On CUDA they are products of float16 that
    add up in float32; that is precise to one grey level.

    flat: (P, 3) uint8, pixels of all images in rows; starts, strides: (N,) first pixel and width of each image
    """
    half = torch.float16 if flat.is_cuda else torch.float32
    per_chunk = max(1, CHUNK // int(boxes[:, 2].max() * boxes[:, 3].max()))
    table = to_device(np.column_stack([starts, strides, boxes, flips]).astype(np.int64), flat.device)
    parts = []
    for at in range(0, len(boxes), per_chunk):
        start, stride, top, left, height, width, flip = table[at : at + per_chunk].unbind(1)
        tallest, widest = (int(side.max()) for side in boxes[at : at + per_chunk, 2:].T)
        # Beyond an image's own box the index stays inside, and the weight is 0.
        row = torch.arange(tallest, device=flat.device).minimum(height[:, None] - 1)
        column = torch.arange(widest, device=flat.device).minimum(width[:, None] - 1)
        row_start = (start + left)[:, None] + (top[:, None] + row) * stride[:, None]
        index = (row_start[:, :, None] + column[:, None, :]).flatten()
        pixels = flat.index_select(0, index).view(-1, tallest, widest * 3).to(half)
        vertical = triangle_weights(height, size, tallest).to(half)
        horizontal = triangle_weights(width, size, widest, flip.bool()).to(half)
        rows = torch.bmm(vertical, pixels).view(-1, size, widest, 3)
        rows = rows.transpose(1, 2).reshape(-1, widest, size * 3)
        crops = torch.bmm(horizontal, rows).view(-1, size, size, 3)  # N, x, y, channel
        parts.append(crops.permute(0, 3, 2, 1).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def to_device(values: NDArray, device: torch.device) -> Tensor:
    """Copy an array to a device; the processor does not wait for a copy to CUDA, out of pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def rand_augment(images: Tensor, choices: Array, signs: Array, level: float) -> Tensor:
    """Apply `RandAugment` to a batch, uint8 (N, 3, S, S), with as many operations as `choices` has columns.

    choices, signs: (N, layers) uniform in [0, 1); level: in bins of 30
    """
    size = images.shape[-1]
    operations = list(OPERATIONS.values())
    signed = np.array([operation.signed for operation in operations])
    place = np.arange(len(images))  # which image lies where: they are sorted by operation, and the result sorted back
    for layer in range(choices.shape[1]):
        number = (choices[place, layer] * len(operations)).astype(np.int64)
        group = 2 * number + ((signs[place, layer] < 0.5) & signed[number])  # operation and sign
        order = np.argsort(group, kind="stable")
        place = place[order]
        images = images.index_select(0, to_device(order, images.device))
        bounds = np.searchsorted(group[order], np.arange(2 * len(operations) + 1)).tolist()
        for i, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                operation = operations[i // 2]
                amount = operation.amount(level, size, size) * (-1 if i % 2 else 1)
                images[start:stop] = operation.apply(images[start:stop], amount, InterpolationMode.BILINEAR)
    return images.index_select(0, to_device(np.argsort(place), images.device))
