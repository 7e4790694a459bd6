"""Random draws of a batch, by key: each image's numbers, and the rectangles they choose.

Every draw is a hash of (seed, epoch, index, repeat, number of the draw): an image's augmentation depends neither
on its batch nor on where it is computed, so that a worker may crop an image and the device do the rest.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from utils import keys_to_seeds

Array = NDArray[np.float64]
Boxes = NDArray[np.int64]  # (N, 4): top, left, height, width; the last two 0 for none

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
    """Compute uniform numbers in [0, 1), a row for each of `draws` (epoch, index, repeat).

    columns: which of an image's NUM_DRAWS numbers
    """
    epochs, indices, repeats = np.asarray(draws, dtype=np.uint64).reshape(-1, 3).T[:, :, None]
    numbers = np.arange(columns.start, columns.stop, dtype=np.uint64)
    return (keys_to_seeds(seed, epochs, indices, repeats, numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def rectangles(
    draws: Array, heights: NDArray, widths: NDArray, scale: tuple[float, float], ratio: tuple[float, float], margin: int
) -> Boxes:
    """Choose in each of N images the first rectangle of up to ten that fits.

    Its share of the area is uniform on `scale`, the logarithm of its width over height on that of `ratio`, and its
    place is uniform too. Where none fits it is 0 high and wide.

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
    """Choose the boxes of RandomResizedCrop, by torchvision's rule.

    Where no rectangle fits, that is the largest central one of an accepted aspect ratio.
    """
    boxes = rectangles(draws, heights, widths, scale, ratio, margin=0)
    shape = widths / heights
    width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    central = np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1)
    return np.where(boxes[:, 2:3] > 0, boxes, central)


def erase_boxes(draws: Array, size: int) -> Boxes:
    """Choose the boxes of RandomErasing in images of size x size.

    Shares of the area are torchvision's 0.02 to 0.33, aspect ratios 0.3 to 3.3.
    """
    sides = np.full(len(draws), size)
    return rectangles(draws, sides, sides, (0.02, 0.33), (1 / 3.3, 1 / 0.3), margin=1)
