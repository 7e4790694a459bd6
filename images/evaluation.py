"""Validation images: transformed one by one by workers, or in batches on the device."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from augment.batch import crop_batch, crop_rows, normalise, to_device, window_rows
from images.datasets import Images
from images.store import StoredImages
from utils import Runtime

LARGE_EVALUATION = "large evaluation"  # in `Runtime.proven`: there is memory for batches of `large_batch`


def large_batch(batch_size: int, crop_size: int) -> int:
    """Choose how many images a GPU evaluates at once: more than it trains on, which are too few to keep it at work.

    512, but no more than 2**25 pixels, so that memory is bounded at every size. large_batch(128, 224) == 512,
    large_batch(128, 300) == 372.
    """
    return max(batch_size, min(512, 2**25 // crop_size**2))


class EvalImages(Dataset):
    """One process's share of the validation images, under a fixed transform.

    It is every world_size-th image from number `rank` on, so that no image is evaluated twice.
    """

    def __init__(self, images: Images, transform: Compose, rank: int, world_size: int):
        self.images = images
        self.transform = transform
        self.indices = range(rank, len(images), world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.images[self.indices[index]]
        return self.transform(image), target


class EvalOnDevice:
    """The same share out of a decode-once store, resized, cropped and normalised on the device, batch by batch.

    Pixels are those of `presets.eval_preset` to a grey level. Images that do not lie on the device are copied there out
    of the store's file, a batch while the one before is evaluated.
    """

    def __init__(self, images: StoredImages, runtime: Runtime, *, crop_size: int, resize_size: int, batch_size: int):
        self.images = images
        self.runtime = runtime
        self.crop_size = crop_size
        self.resize_size = resize_size
        self.batch_size = batch_size
        self.indices = np.arange(runtime.rank, len(images), runtime.world_size)

    def __len__(self) -> int:
        """Count the batches."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(0, len(self.indices), self.batch_size):
            yield self.runtime.aside(partial(self.load, self.indices[at : at + self.batch_size]))

    def load(self, indices: NDArray) -> tuple[Tensor, Tensor]:
        """Make a batch: images (N, 3, crop_size, crop_size) float32, normalised; class numbers (N,)."""
        rows = self.images.index[indices]
        heights, widths = rows["height"], rows["width"]
        if self.images.resident is not None:
            flat, starts = self.images.resident, rows["offset"] // 3
        else:
            flat, starts = self.send(rows)
        boxes = np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)
        where = crop_rows(starts, widths, boxes, np.zeros(len(rows), bool))
        windows = window_rows(heights, widths, self.resize_size, self.crop_size)
        targets = np.array([self.images.targets[index] for index in indices])
        packed = to_device(np.column_stack([where, windows, targets]), flat.device)
        crops = crop_batch(flat, packed[:, :-1], (int(heights.max()), int(widths.max())), self.crop_size)
        return normalise(crops, self.runtime.memory_format), packed[:, -1].contiguous()

    def send(self, rows: NDArray) -> tuple[Tensor, NDArray]:
        """Copy the images of these rows of the index to the device; return their pixels (P, 3), and where each begins."""
        ends = np.cumsum(rows["height"] * rows["width"])
        device = self.runtime.device
        joined = torch.empty(int(ends[-1]), 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
        starts = np.concatenate([[0], ends[:-1]])
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist()):
            joined[start:end] = self.images.view(row).view(-1, 3)
        return joined.to(device, non_blocking=True), starts
