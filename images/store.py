"""The decode-once store: the images of a folder as uint8, each decoded once and for all, in one memory-mapped file.

Files hold images back to back, at their own sizes: a header of 4 KiB (JSON), the pixels, an index. Workers and
processes that map the file share one copy of it, in the memory that the system uses to cache files.
"""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from tqdm import tqdm

from augment.pixels import to_rgb
from images.datasets import ImageTree
from images.workers import LOOK_EVERY, Loader, closing_loader, ignore_signals
from settings.errors import ConfigError

FORMAT = 1
HEADER = 4096  # bytes
ALIGN = 192  # bytes; of each image's start: whole pixels of 3 bytes, and whole cache lines
INDEX = np.dtype([(name, "<i8") for name in ("offset", "height", "width")] + [("checksum", "<u8")])


def stored_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Compute height and width of an image in a store: short side at most `side`, aspect ratio kept."""
    scale = min(1.0, side / min(height, width))
    return round(height * scale), round(width * scale)


def decode(images: ImageTree, index: int, side: int) -> NDArray[np.uint8]:
    """Decode image `index` at its stored size: uint8 (H, W, 3).

    It is resized by bicubic interpolation with antialiasing. That keeps what is below half of the stored resolution,
    which is all that a crop at training size can show, where a box filter would blur it; and it rings less than
    Lanczos.
    """
    with images.opened(index) as (image, _):
        height, width = stored_size(image.height, image.width, side)
        image.draft(
            None, (2 * width, 2 * height)
        )  # a much larger JPEG is halved as it is decoded, to no less than this
        pixels = np.array(to_rgb(image))
    if pixels.shape[:2] == (height, width):
        return pixels
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    small = interpolate(whole, (height, width), mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def checksum(values: NDArray) -> int:
    """Add up an array's 64-bit words and the bytes that are left, modulo 2**64.

    That takes a sixth of the time of CRC-32, which would add a tenth to the decoding of a small JPEG. It is to find
    damage, not forgery.
    """
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    whole = octets.size // 8 * 8
    return (int(octets[:whole].view(np.uint64).sum()) + int(octets[whole:].sum())) & (2**64 - 1)


# ---- reading ----


class StoredImages:
    """The images of `source` out of a store file.

    index: offset in bytes, height and width of each image, a record array
    resident: all pixels (P, 3) on a GPU, None unless placed there
    """

    def __init__(self, path: str, source: ImageTree):
        self.path = path
        self.source = source
        self.classes = source.classes
        self.targets = [target for _, target in source.samples]
        self.header = read_header(path)
        self.index = read_index(path, self.header)
        self.resident: Tensor | None = None
        self.mapped: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels(index).numpy()), self.targets[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mapped": None, "resident": None}  # a worker maps the file itself

    def pixels(self, index: int) -> Tensor:
        """Return image `index`, uint8 (H, W, 3): a view of the file, not to be written to."""
        return self.view(self.index[index].tolist())

    def view(self, row: Sequence[int]) -> Tensor:
        """Return the image of a row of the index, as a view of the file."""
        offset, height, width, _ = row
        return self.flat[offset : offset + 3 * height * width].view(height, width, 3)

    @property
    def flat(self) -> Tensor:
        """All pixels of the file, uint8 (bytes,), mapped into memory at the first use."""
        if self.mapped is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it is read-only
                self.mapped = torch.from_numpy(
                    np.memmap(self.path, np.uint8, "r", HEADER, shape=(self.header["bytes"],))
                )
        return self.mapped

    def fault(self) -> str | None:
        """Say what has become of the file, where that is why a worker died that read it; None: its size is right."""
        try:
            read_header(self.path)
        except (OSError, ValueError):
            return f"{self.path} was cut short or removed; --resume auto decodes the images anew, and continues"
        return None

    def place_on(self, device: torch.device) -> None:
        """Copy all pixels to `device`, piece by piece."""
        resident = torch.empty(self.flat.numel(), dtype=torch.uint8, device=device)
        for at in range(0, resident.numel(), 2**28):
            resident[at : at + 2**28].copy_(self.flat[at : at + 2**28])
        self.resident = resident.view(-1, 3)

    def damaged(self) -> bool:
        """Check whether any pixel differs from what was stored.

        Reads the whole file, which training wants in memory anyway. It is not read through the map, because that would
        count as this process's memory.
        """
        buffer = np.empty(int((3 * self.index["height"] * self.index["width"]).max()), np.uint8)
        rows = tqdm(self.index.tolist(), "checking the decode cache", unit="images", delay=2, leave=False, disable=None)
        with open(self.path, "rb", buffering=0) as file:
            for offset, height, width, expected in rows:
                pixels = buffer[: 3 * height * width]
                file.seek(HEADER + offset)
                if file.readinto(pixels.data) != pixels.size or checksum(pixels) != expected:
                    return True
        return False


def read_header(path: str) -> dict[str, Any]:
    """Read the header of a store file.

    Raises:
        ValueError: not one, or one that was not finished.
    """
    with open(path, "rb") as file:
        header = json.loads(file.read(HEADER))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} has another format")
    if os.path.getsize(path) != HEADER + header["bytes"] + header["images"] * INDEX.itemsize:
        raise ValueError(f"{path} has lost its end")
    return header


def read_index(path: str, header: dict[str, Any]) -> NDArray:
    """Read the index of a store file.

    Raises:
        ValueError: it is damaged.
    """
    index = np.fromfile(path, INDEX, header["images"], offset=HEADER + header["bytes"])
    if checksum(index) != header["checksum"]:
        raise ValueError(f"the index of {path} is damaged")
    return index


def open_store(path: str, images: ImageTree, check: bool = False) -> StoredImages | None:
    """Open the store in `path`; return None if there is none or it is damaged.

    check: also compare every pixel with what was stored
    """
    try:
        stored = StoredImages(path, images)
        return None if check and stored.damaged() else stored
    except (OSError, ValueError, KeyError):
        return None


# ---- building ----


class NoRoom(ConfigError):
    """The disk is full, or too full to begin."""


def store_name(images: ImageTree, side: int) -> str:
    """Build a file name that changes with all that a store is made from.

    That is the names, sizes and times of the files, the side and the format.
    """
    key = hashlib.sha256(f"{FORMAT} {side}".encode())
    for path, _ in images.samples:
        status = os.stat(path)
        key.update(f"{os.path.relpath(path, images.root)}\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return f"{split_name(images)}-{side}-{key.hexdigest()[:16]}.images"


def origin(images: ImageTree) -> str:
    """Compute the digest of where images are from; a store made from there earlier is outdated by a new one."""
    return digest(images.root if images.only is None else f"{images.root}\0{images.only}")


def split_name(images: ImageTree) -> str:
    return os.path.basename(os.path.abspath(images.root))


def estimate(images: ImageTree, side: int) -> int:
    """Estimate the bytes of a store from the sizes of some of its images: all below 1,000, else 500 to 750.

    Reading every header would take a good part of the time of decoding.
    """
    step = max(1, len(images) // 500)
    sample = range(0, len(images), step)
    total = 0
    for index in sample:
        with images.opened(index) as (image, _):
            height, width = stored_size(image.height, image.width, side)
        total += 3 * height * width + ALIGN
    return round(total / len(sample) * len(images)) + len(images) * INDEX.itemsize + HEADER


class Decoding(Dataset):
    """Item i: image i is decoded and written to `path`, at the next free place; the item is its row of the index."""

    def __init__(self, images: ImageTree, side: int, path: str):
        self.images = images
        self.side = side
        self.path = path
        self.end: Any = multiprocessing.Value("q", 0)  # bytes of pixels so far, of all processes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, int, int, int, int]:
        pixels = decode(self.images, index, self.side)
        with self.end.get_lock():
            offset = self.end.value
            self.end.value += math.ceil(pixels.size / ALIGN) * ALIGN
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(HEADER + offset)
                write_all(file, pixels.data.cast("B"))
        except OSError as error:
            raise full_or_same(error, self.path) from error
        return index, offset, *pixels.shape[:2], checksum(pixels)


def write_all(file: Any, content: memoryview) -> None:
    """Write all of `content` to an unbuffered file."""
    while content:
        content = content[file.write(content) :]  # the system may take a part


def full_or_same(error: OSError, path: str) -> Exception:
    """Convert an error in writing to NoRoom if the disk is full, else to a ConfigError with its reason."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"decode_cache: no space is left in {os.path.dirname(path)}; give another folder, or off")
    return ConfigError(f"decode_cache: cannot write {path}: {error.strerror}; give another folder, or off")


def build(path: str, images: ImageTree, side: int) -> None:
    """Decode all `images` into a store file, on all cores.

    The file appears whole or not at all. If the machine fails before the disk has all of it, its checksums show that.

    Raises:
        ConfigError: an image is damaged; NoRoom: the disk is full. Nothing is left behind.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}"
    index = np.zeros(len(images), INDEX)
    decoding = Decoding(images, side, temporary)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(images) // 100)  # a few images are decoded before a process has started
    batches = Loader(
        decoding,
        min(32, len(images)),
        num_workers=workers,
        timeout=LOOK_EVERY if workers else 0,
        persistent_workers=workers > 0,
        collate_fn=list,
        worker_init_fn=ignore_signals,
    )
    bar = tqdm(
        total=len(images), desc=f"decoding {split_name(images)}", unit="images", delay=1, leave=False, disable=None
    )
    try:
        with open(temporary, "wb") as file, bar, closing_loader(batches):
            file.truncate(HEADER)
            for rows in batches:
                for i, *row in rows:
                    index[i] = tuple(row)
                bar.update(len(rows))
            size = decoding.end.value
            file.seek(HEADER + size)
            file.write(index.tobytes())
            header = dict(format=FORMAT, root=origin(images), side=side, images=len(images), bytes=size)
            file.seek(0)
            file.write(json.dumps(header | {"checksum": checksum(index)}).ljust(HEADER).encode())
        os.replace(temporary, path)
    except OSError as error:
        raise full_or_same(error, path) from error
    finally:
        with suppress(OSError):
            os.remove(temporary)


def digest(root: str) -> str:
    """Hash the absolute path of a folder, to 16 hexadecimal digits."""
    return hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16]
