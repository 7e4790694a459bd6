"""Decoding whole batches of files on the device: nvJPEG on CUDA, PIL for what it cannot read."""

import io
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from augment.pixels import to_rgb
from images.verify import check_opened, naming_damage
from settings.errors import ConfigError, first_line

JPEG = [0xFF, 0xD8, 0xFF]  # how such a file begins


@lru_cache
def check_decoder(device: torch.device) -> None:
    """Decode a small JPEG on the device, once per process.

    Raises:
        ConfigError: that cannot be done here; torchvision may have been built without nvJPEG, say.
    """
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        by_device([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except RuntimeError as error:
        raise ConfigError(
            f"decode_on device: torchvision decodes no JPEG on {device} here ({first_line(error)}); leave it out"
        ) from error


def decode_batch(
    files: Sequence[Tensor], paths: Sequence[str], device: torch.device, refused: Callable[[str, str], None]
) -> list[Tensor]:
    """Decode a batch of files to images on `device`, each uint8 (3, H, W).

    JPEGs are decoded in one batch, by nvJPEG on CUDA. PIL decodes other formats on the host, and JPEGs that nvJPEG
    refuses (CMYK, arithmetic coding), which are told to `refused`: path and reason.

    Raises:
        ConfigError: a file cannot be read; the message names it.
        RuntimeError: the device failed, or has no memory left.
    """
    is_jpeg = [file[:3].tolist() == JPEG for file in files]
    jpegs = [file for file, jpeg in zip(files, is_jpeg) if jpeg]
    decoded: list[Tensor | None] = []
    try:
        decoded += by_device(jpegs, device) if jpegs else []
    except RuntimeError as error:
        raise_failure(error)
        # One that was refused spoils its batch, and is found by decoding each alone.
        for file, path in ((file, path) for file, path, jpeg in zip(files, paths, is_jpeg) if jpeg):
            try:
                decoded += by_device([file], device)
            except RuntimeError as reason:
                raise_failure(reason)
                refused(path, first_line(reason))
                decoded.append(None)
    ready = iter(decoded)
    images = [next(ready) if jpeg else None for jpeg in is_jpeg]
    return [
        by_pil(file, path).permute(2, 0, 1).to(device) if image is None else image
        for file, path, image in zip(files, paths, images)
    ]


def by_device(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs to images (3, H, W) on `device`.

    Raises:
        RuntimeError: one of them was refused, or the device failed.
    """
    if device.type == "cuda":
        # nvJPEG writes in a stream of its own, which does not wait for this one, into memory that may have been freed
        # here a moment ago by a tensor that is still read.
        torch.cuda.current_stream(device).synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision moves decoding to another package
        return decode_jpeg(list(files), ImageReadMode.RGB, device)


def raise_failure(error: RuntimeError) -> None:
    """Raise an error again that does not come of a file: of the device's memory, or of the device."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
        raise error


def by_pil(file: Tensor, path: str) -> Tensor:
    """Decode a file of any format on the host, uint8 (H, W, 3).

    Raises:
        ConfigError: it cannot be read; the message names it.
    """
    with naming_damage(path):
        image = check_opened(Image.open(io.BytesIO(file.numpy().tobytes())))
        return torch.from_numpy(np.array(to_rgb(image)))
