"""Ways a batch of training images is made, each a `Source`: what workers load, and what the device makes of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, InterpolationMode

from augment.batch import crop_batch, crop_rows, crop_tensor, to_device
from augment.draws import Array, Boxes, uniforms
from augment.pixels import crop_pil
from images.datasets import Images, ImageTree, opened
from images.decode import decode_batch
from images.order import Draw, DrawSampler
from images.store import StoredImages
from images.verify import read_bytes
from images.workers import as_it_is, close_loader, make_loader
from presets import BatchPreset
from utils import SAMPLE, Runtime, drawing_from

# ---- what workers do ----


class DrawnImages(Dataset):
    """Images under a random transform whose draws follow from the key of the sample."""

    def __init__(self, images: Images, transform: Compose, seed: int):
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        with opened(self.images, draw[1]) as (image, target), drawing_from(self.seed, *draw, SAMPLE):
            return self.transform(image), target


class CroppedImages(Dataset):
    """Batches of images, cropped, resized and flipped as a batch preset draws; the rest is left to the device.

    A batch is uint8 (N, 3, S, S) at the preset's crop_size, channels last in memory, as crops come; class numbers (N,);
    and what is left to do (`BatchPreset.choose`).
    """

    def __init__(self, images: Images, preset: BatchPreset, seed: int):
        self.images = images
        self.preset = preset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """Load the batch of the samples with these keys."""
        size = self.preset.crop_size
        numbers = uniforms(self.seed, draws)
        indices = [index for _, index, _ in draws]
        if isinstance(self.images, StoredImages):
            crops = self.from_store(self.images, indices, numbers)
        else:
            crops = (self.from_file(index, numbers[i : i + 1]) for i, index in enumerate(indices))
        batch = torch.empty(len(draws), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
        targets = torch.empty(len(draws), dtype=torch.long)
        flips = self.preset.flips(numbers)
        for i, (crop, target) in enumerate(crops):
            batch[i] = crop.flip(2) if flips[i] else crop
            targets[i] = target
        return batch, targets, torch.from_numpy(self.preset.choose(numbers))

    def from_store(self, images: StoredImages, indices: list[int], numbers: Array) -> Iterator[tuple[Tensor, int]]:
        """Yield the crop (3, S, S) and the class number of each of `indices`, out of the store."""
        rows = images.index[indices]
        size = self.preset.crop_size
        *places, boxes = images.for_crops(rows, self.preset.boxes(numbers, rows["height"], rows["width"]), size)
        for index, place, box in zip(indices, zip(*(part.tolist() for part in places)), boxes.tolist()):
            yield crop_tensor(images.view(place), box, size), images.targets[index]

    def from_file(self, index: int, numbers: Array) -> tuple[Tensor, int]:
        """Crop one image out of its file: the crop (3, S, S) and the class number.

        numbers: the draws of this image, one row
        """
        with opened(self.images, index) as (image, target):
            (box,) = self.preset.boxes(numbers, np.array([image.height]), np.array([image.width])).tolist()
            crop = crop_pil(image, box, self.preset.crop_size, InterpolationMode.BILINEAR)
            return torch.from_numpy(np.array(crop)).permute(2, 0, 1), target


class Files(Dataset):
    """Batches of files as they are, for the device to decode.

    A batch is the bytes of all files, one after the other, uint8 (B,); how many each has (N,); class numbers (N,); keys
    of the samples (N, 3). One tensor, because each that a worker sends holds two file descriptors while it is under way.
    """

    def __init__(self, images: ImageTree):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read the files of the samples with these keys.

        Raises:
            ConfigError: a file cannot be read.
        """
        paths, targets = zip(*(self.images.samples[index] for _, index, _ in draws))
        files = [read_bytes(path) for path in paths]
        lengths = torch.tensor([len(file) for file in files])
        return torch.from_numpy(np.concatenate(files)), lengths, torch.tensor(targets), torch.tensor(draws)


# ---- sources ----


class Source(ABC):
    """A way to make the batches of a stage.

    What `batches` yields is for `finish` alone: its form differs from source to source.
    """

    @abstractmethod
    def batches(self, sampler: DrawSampler) -> Iterator[Any]:
        """Load the batches that the sampler draws, from where it stands.

        A source is always given the same sampler.
        """

    @abstractmethod
    def finish(self, loaded: Any) -> tuple[Tensor, Tensor]:
        """Turn what `batches` yielded into images and class numbers, both on the device.

        Returns: images (N, 3, S, S) float32, normalised; class numbers (N,).
        """

    @abstractmethod
    def samples(self, draws: Sequence[Draw]) -> Tensor:
        """Make augmented images by their keys, on the CPU: (N, 3, S, S) float32, normalised."""

    @abstractmethod
    def close(self) -> None:
        """End the processes that still work for this source."""


class WorkerSource(Source):
    """A source whose batches are loaded by worker processes, or in this one if `workers` is 0."""

    def __init__(self, dataset: Dataset, seed: int, runtime: Runtime, workers: int, **loading: Any):
        self.dataset: Any = dataset
        self.seed = seed
        self.runtime = runtime
        self.workers = workers
        self.loading = loading  # further arguments of the DataLoader
        self.loader: DataLoader | None = None

    def batches(self, sampler: DrawSampler) -> Iterator[Any]:
        if self.loader is None:
            self.loader = make_loader(self.dataset, self.runtime, self.workers, batch_sampler=sampler, **self.loading)
        return iter(self.loader)

    def close(self) -> None:
        if self.loader is not None:
            close_loader(self.loader)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device; the processor does not wait for it, if the tensor is pinned."""
        return tensor.to(self.runtime.device, non_blocking=True)


class AugmentedByWorkers(WorkerSource):
    """Workers do everything, image by image: the reference's way, for any transform."""

    def __init__(self, images: Images, transform: Compose, seed: int, runtime: Runtime, workers: int):
        super().__init__(DrawnImages(images, transform, seed), seed, runtime, workers)

    def finish(self, loaded: Any) -> tuple[Tensor, Tensor]:
        images, targets = loaded
        return self.to_device(images), self.to_device(targets)

    def samples(self, draws: Sequence[Draw]) -> Tensor:
        return torch.stack([self.dataset[draw][0] for draw in draws])


class CroppedByWorkers(WorkerSource):
    """Workers crop, resize and flip; the device does the rest, for the whole batch at once."""

    def __init__(self, images: Images, preset: BatchPreset, seed: int, runtime: Runtime, workers: int):
        self.preset = preset
        super().__init__(CroppedImages(images, preset, seed), seed, runtime, workers, collate_fn=as_it_is)

    def finish(self, loaded: Any) -> tuple[Tensor, Tensor]:
        images, targets, choices = (self.to_device(part) for part in loaded)
        return self.preset.finish(images, choices, self.runtime.memory_format), targets

    def samples(self, draws: Sequence[Draw]) -> Tensor:
        return self.finish(self.dataset.__getitems__(draws))[0].cpu()


class DecodedOnDevice(WorkerSource):
    """Workers read files; the device decodes, crops and augments them."""

    def __init__(self, images: ImageTree, preset: BatchPreset, seed: int, runtime: Runtime, workers: int):
        self.images = images
        self.preset = preset
        self.told = False  # that a JPEG was refused
        super().__init__(Files(images), seed, runtime, workers, collate_fn=as_it_is)

    def finish(self, loaded: Any) -> tuple[Tensor, Tensor]:
        joined, lengths, targets, keys = loaded
        draws = keys.tolist()
        paths = [self.images.samples[index][0] for _, index, _ in draws]
        decoded = decode_batch(joined.split(lengths.tolist()), paths, self.runtime.device, self.tell)
        heights, widths = np.array([image.shape[1:] for image in decoded]).T
        starts = np.cumsum(heights * widths) - heights * widths
        flat = torch.cat([image.flatten(1) for image in decoded], dim=1).t().contiguous()  # few kernels for all images
        numbers = uniforms(self.seed, draws)
        boxes = self.preset.boxes(numbers, heights, widths)
        return augment_whole(flat, starts, widths, boxes, targets.numpy(), self.preset, numbers, self.runtime)

    def tell(self, path: str, reason: str) -> None:
        """Say, once, that PIL decodes what the device refuses."""
        if not self.told:
            self.runtime.say(f"decode_on device: {path} was refused ({reason}); PIL decodes such files, more slowly")
        self.told = True

    def samples(self, draws: Sequence[Draw]) -> Tensor:
        return self.finish(self.dataset.__getitems__(draws))[0].cpu()


class ResidentOnDevice(Source):
    """All images lie on the device, which does everything; nothing is loaded but the keys of the samples."""

    def __init__(self, images: StoredImages, preset: BatchPreset, seed: int, runtime: Runtime):
        self.images = images
        self.preset = preset
        self.seed = seed
        self.runtime = runtime

    def batches(self, sampler: DrawSampler) -> Iterator[Any]:
        return iter(sampler)

    def finish(self, loaded: Any) -> tuple[Tensor, Tensor]:
        store = self.images
        assert store.resident is not None
        indices = [index for _, index, _ in loaded]
        rows = store.index[indices]
        targets = np.array([store.targets[index] for index in indices])
        numbers = uniforms(self.seed, loaded)
        boxes = self.preset.boxes(numbers, rows["height"], rows["width"])
        offsets, _, widths, boxes = store.for_crops(rows, boxes, self.preset.crop_size)
        return augment_whole(store.resident, offsets // 3, widths, boxes, targets, self.preset, numbers, self.runtime)

    def samples(self, draws: Sequence[Draw]) -> Tensor:
        return self.finish(draws)[0].cpu()

    def close(self) -> None:
        """Do nothing: no process works for it."""


def augment_whole(
    flat: Tensor,
    starts: NDArray,
    widths: NDArray,
    boxes: Boxes,
    targets: NDArray,
    preset: BatchPreset,
    draws: Array,
    runtime: Runtime,
) -> tuple[Tensor, Tensor]:
    """Crop and augment whole images that lie one after the other on the device; return them and their class numbers.

    All that the host has decided goes to the device in one copy.

    flat: (P, 3) uint8; starts, widths, targets: (N,) first pixel, width and class number of each; boxes: (N, 4)
    draws: (N, NUM_DRAWS)
    """
    rows = crop_rows(starts, widths, boxes, preset.flips(draws))
    packed = to_device(np.column_stack([rows, preset.choose(draws), targets]), flat.device)
    crops, choices, classes = packed.split([rows.shape[1], preset.CHOICES, 1], dim=1)
    images = crop_batch(flat, crops, boxes[:, 2:].max(axis=0).tolist(), preset.crop_size)
    return preset.finish(images, choices, runtime.memory_format), classes.flatten()


def find_source(
    images: Images,
    transform: Compose | BatchPreset,
    seed: int,
    runtime: Runtime,
    workers: int = 0,
    decode_on_device: bool = False,
) -> Source:
    """Choose the source of batches for a transform.

    A transform of one image is applied by workers. Of a transform of batches the device does as much as it can, which
    depends on where `images` lie.
    """
    if not isinstance(transform, BatchPreset):
        return AugmentedByWorkers(images, transform, seed, runtime, workers)
    if isinstance(images, StoredImages) and images.resident is not None:
        return ResidentOnDevice(images, transform, seed, runtime)
    if decode_on_device:
        assert isinstance(images, ImageTree)  # `augment_on` has refused the rest
        return DecodedOnDevice(images, transform, seed, runtime, workers)
    return CroppedByWorkers(images, transform, seed, runtime, workers)
