"""The training preset for whole batches on the device: what `presets.train_preset` does image by image, on uint8
as long as possible, with each operation applied once to the images that drew it.

Every draw is a hash of (seed, epoch, index, repeat, number of the draw): an image's augmentation depends neither
on its batch nor on where it is computed, so that a worker may crop what the device then colours.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode

from presets import BINS_PER_UNIT, IMAGENET_MEAN, IMAGENET_STD, OPERATIONS
from utils import key_to_seed

Array = NDArray[np.float64]
Boxes = NDArray[np.int64]  # (N, 4): top, left, height, width; the last two 0 for none

# ---- draws ----

ATTEMPTS = 10  # of torchvision's RandomResizedCrop and RandomErasing to find a rectangle that fits
NUM_OPS = 2  # operations of RandAugment per image
RECTANGLE = 2 * ATTEMPTS + 2  # draws of a rectangle: areas, ratios, top, left

# Columns of an image's draws.
CROP = slice(0, RECTANGLE)
FLIP = CROP.stop
OPS = slice(FLIP + 1, FLIP + 1 + NUM_OPS)
SIGNS = slice(OPS.stop, OPS.stop + NUM_OPS)
ERASE = SIGNS.stop
ERASED = slice(ERASE + 1, ERASE + 1 + RECTANGLE)
NUM_DRAWS = ERASED.stop


def uniforms(seed: int, draws: Sequence[tuple[int, int, int]], columns: slice = slice(0, NUM_DRAWS)) -> Array:
    """Uniform numbers in [0, 1), a row for each of `draws` (epoch, index, repeat)."""
    epochs, indices, repeats = np.asarray(draws, dtype=np.uint64).reshape(-1, 3).T[:, :, None]
    numbers = np.arange(columns.start, columns.stop, dtype=np.uint64)
    return (key_to_seed(seed, epochs, indices, repeats, numbers) >> np.uint64(11)) * 2.0**-53


def rectangles(
    draws: Array, heights: NDArray, widths: NDArray, scale: tuple[float, float], ratio: tuple[float, float], margin: int
) -> Boxes:
    """The first rectangle of up to ten that fits, in each of N images: its share of the area uniform on `scale`, the
    logarithm of width over height on `ratio`, its place uniform too. 0 high and wide where none fits.

    draws: (N, RECTANGLE); heights, widths: (N,) of the images; margin: pixels it must be smaller than they are
    """
    areas = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :ATTEMPTS])
    logs = np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * draws[:, ATTEMPTS : 2 * ATTEMPTS]
    tall = np.rint(np.sqrt(areas / np.exp(logs))).astype(np.int64)
    wide = np.rint(np.sqrt(areas * np.exp(logs))).astype(np.int64)
    fits = (tall > 0) & (tall <= heights[:, None] - margin) & (wide > 0) & (wide <= widths[:, None] - margin)
    first = (np.arange(len(fits)), fits.argmax(axis=1))
    height, width = (np.where(fits[first], side[first], 0) for side in (tall, wide))
    top = (draws[:, -2] * (heights - height + 1)).astype(np.int64)
    left = (draws[:, -1] * (widths - width + 1)).astype(np.int64)
    return np.stack([top, left, height, width], axis=1)


def crop_boxes(
    draws: Array,
    heights: NDArray,
    widths: NDArray,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Boxes:
    """The boxes of RandomResizedCrop, by torchvision's rule: where no rectangle fits, the largest central one of
    an accepted aspect ratio."""
    boxes = rectangles(draws, heights, widths, scale, ratio, margin=0)
    shape = widths / heights
    width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    central = np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1)
    return np.where(boxes[:, 2:3] > 0, boxes, central)


def erase_boxes(draws: Array, size: int) -> Boxes:
    """The boxes of RandomErasing in images of size x size: torchvision's shares 0.02 to 0.33, ratios 0.3 to 3.3."""
    sides = np.full(len(draws), size)
    return rectangles(draws, sides, sides, (0.02, 0.33), (1 / 3.3, 1 / 0.3), margin=1)


# ---- crops ----


def resized_crop(pixels: Tensor, box: Sequence[int], size: int) -> Tensor:
    """One crop (top, left, height, width) of uint8 (H, W, 3), resized with antialiasing: (3, size, size)."""
    top, left, height, width = box
    crop = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
    return interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def triangle_weights(lengths: Tensor, size: int, longest: int, reverse: Tensor | None = None) -> Tensor:
    """What antialiased bilinear resizing is along one axis, as matrices (N, size, longest): row i holds the shares of
    the first `lengths[n]` pixels in output pixel i, or size - 1 - i where `reverse` says so."""
    scale = (lengths / size)[:, None, None]
    place = torch.arange(size, device=lengths.device).expand(len(lengths), size)
    if reverse is not None:
        place = torch.where(reverse[:, None], size - 1 - place, place)
    pixel = torch.arange(longest, device=lengths.device)
    away = (pixel + 0.5 - (place[:, :, None] + 0.5) * scale).abs() / scale.clamp(min=1)
    weights = (1 - away).clamp(min=0) * (pixel < lengths[:, None, None])
    return weights / weights.sum(dim=2, keepdim=True)


CHUNK = 2**24  # pixels gathered at a time: with their indices about 0.3 GiB of device memory


def resized_crops(
    flat: Tensor, starts: NDArray, strides: NDArray, boxes: Boxes, flips: NDArray[np.bool_], size: int
) -> Tensor:
    """Crops of many images at once, resized with antialiasing and flipped: uint8 (N, 3, size, size).

    Resizing is linear along each axis, so a crop is two matrix products; their float16 (on CUDA; products add
    up in float32) keeps a grey level.

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


# ---- the preset ----


def to_device(values: NDArray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def rand_augment(images: Tensor, choices: Array, signs: Array, level: float) -> Tensor:
    """`presets.RandAugment` of a batch, uint8 (N, 3, S, S), with as many operations as `choices` has columns.

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


class BatchPreset:
    """A stage's training preset for batches, in two parts: where to crop and whether to flip, which whoever holds the
    pixels applies, and `finish`, on the device."""

    def __init__(
        self,
        *,
        image_size: int,
        ra_magnitude: float | None = None,
        ra_scale: str = "torchvision",
        random_erase: float = 0.0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        hflip_prob: float = 0.5,
    ):
        self.image_size = image_size
        self.level = None if ra_magnitude is None else ra_magnitude * BINS_PER_UNIT[ra_scale]
        self.random_erase = random_erase
        self.crop_scale = crop_scale
        self.hflip_prob = hflip_prob

    def boxes(self, draws: Array, heights: NDArray, widths: NDArray) -> Boxes:
        """Where to crop images of these sizes, (N, 4)."""
        return crop_boxes(draws[:, CROP], heights, widths, self.crop_scale)

    def flips(self, draws: Array) -> NDArray[np.bool_]:
        return draws[:, FLIP] < self.hflip_prob

    def finish(self, images: Tensor, draws: Array) -> Tensor:
        """Policy, normalise, erase: uint8 (N, 3, S, S) to float32.

        draws: (N, NUM_DRAWS)
        """
        if self.level is not None:
            images = rand_augment(images, draws[:, OPS], draws[:, SIGNS], self.level)
        mean, std = (np.array(values, dtype=np.float32).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        scale, shift = (to_device(values, images.device) for values in (1 / (255 * std), mean / std))
        out = torch.empty_like(images, dtype=torch.float32)
        # On a CPU in pieces that stay in its cache: three passes over a whole batch take three times as long.
        piece = len(images) if images.is_cuda else 8
        for pixels, part in zip(images.split(piece), out.split(piece)):
            part.copy_(pixels).mul_(scale).sub_(shift)
        erased = draws[:, ERASE] < self.random_erase
        if erased.any():
            boxes = erase_boxes(draws[:, ERASED], images.shape[-1]) * erased[:, None]
            top, left, height, width = to_device(boxes, images.device)[:, :, None].unbind(1)
            place = torch.arange(images.shape[-1], device=images.device)
            rows = (place >= top) & (place < top + height)
            columns = (place >= left) & (place < left + width)
            out.masked_fill_((rows[:, None, :, None] & columns[:, None, None, :]), 0.0)
        return out
