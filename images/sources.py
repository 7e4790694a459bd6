"""Ways a batch of training images is made."""

import io
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import Compose, InterpolationMode

from augment import pixels
from augment.batch import resized_crop
from augment.draws import FLIP, Array, uniforms
from augment.pixels import to_rgb
from images.datasets import Images, ImageTree, opened
from images.order import Draw
from images.store import StoredImages
from presets import BatchPreset
from settings.errors import ConfigError
from utils import SAMPLE, drawing_from


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
    """Batches of images cropped, resized and flipped as a batch preset draws, the rest of it left to the device:
    uint8 (N, 3, S, S), class numbers (N,), keys of the samples (N, 3)."""

    def __init__(self, images: Images, preset: BatchPreset, seed: int):
        self.images = images
        self.preset = preset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        size = self.preset.image_size
        numbers = uniforms(self.seed, draws, slice(0, FLIP + 1))
        indices = [index for _, index, _ in draws]
        if isinstance(self.images, StoredImages):
            crops = self.from_store(self.images, indices, numbers)
        else:
            crops = (self.from_file(index, numbers[i : i + 1]) for i, index in enumerate(indices))
        batch = torch.empty(len(draws), 3, size, size, dtype=torch.uint8)
        targets = torch.empty(len(draws), dtype=torch.long)
        flips = self.preset.flips(numbers)
        for i, (crop, target) in enumerate(crops):
            batch[i] = crop.flip(2) if flips[i] else crop
            targets[i] = target
        return batch, targets, torch.tensor(draws)

    def from_store(self, images: StoredImages, indices: list[int], numbers: Array) -> Iterator[tuple[Tensor, int]]:
        rows = images.index[indices]
        boxes = self.preset.boxes(numbers, rows["height"], rows["width"]).tolist()
        for index, row, box in zip(indices, rows.tolist(), boxes):
            yield resized_crop(images.view(row), box, self.preset.image_size), images.targets[index]

    def from_file(self, index: int, numbers: Array) -> tuple[Tensor, int]:
        with opened(self.images, index) as (image, target):
            (box,) = self.preset.boxes(numbers, np.array([image.height]), np.array([image.width])).tolist()
            crop = pixels.resized_crop(image, box, self.preset.image_size, InterpolationMode.BILINEAR)
            return torch.from_numpy(np.array(crop)).permute(2, 0, 1), target


class Files(Dataset):
    """Batches of files as they are, for the device to decode: bytes of each, a list of uint8 (n,), class numbers (N,),
    keys of the samples (N, 3)."""

    def __init__(self, images: ImageTree):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[list[Tensor], Tensor, Tensor]:
        paths, targets = zip(*(self.images.samples[index] for _, index, _ in draws))
        try:
            files = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths]
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read: {error.strerror}; mend or remove it") from error
        return files, torch.tensor(targets), torch.tensor(draws)


def decode_batch(files: Sequence[Tensor], paths: Sequence[str], device: torch.device) -> list[Tensor]:
    """Images on `device`, uint8 (H, W, 3). JPEGs in one batch, by nvJPEG on CUDA; other formats, and a batch with a
    JPEG that it refuses, by PIL on the host.

    Raises:
        ConfigError: one cannot be read, by its path.
    """

    def by_pil(file: Tensor, path: str) -> Tensor:
        try:
            return torch.from_numpy(np.array(to_rgb(Image.open(io.BytesIO(file.numpy().tobytes()))))).to(device)
        except Exception as error:  # what PIL raises on a damaged file varies with the damage
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{path} cannot be read as an image: {reason}; mend or remove it") from error

    is_jpeg = [file[:3].tolist() == [0xFF, 0xD8, 0xFF] for file in files]
    jpegs = [file for file, jpeg in zip(files, is_jpeg) if jpeg]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision moves decoding to another package
            decoded = decode_jpeg(jpegs, ImageReadMode.RGB, device) if jpegs else []
    except RuntimeError:
        is_jpeg, decoded = [False] * len(files), []
    ready = iter(decoded)
    return [
        next(ready).permute(1, 2, 0) if jpeg else by_pil(file, path) for file, path, jpeg in zip(files, paths, is_jpeg)
    ]
