"""The making of a decode-once store: what its key is made from, and all images decoded into one file on all cores."""

import errno
import hashlib
import json
import multiprocessing
import os
import uuid
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from tqdm import tqdm

from augment.pixels import to_rgb
from images.encoded import EncodedImages
from images.store import ALIGN, FORMAT, HEADER, INDEX, aligned, bytes_of, checksum, header_checksum, hold
from images.workers import closing_loader, loader_on_all_cores
from settings.errors import ConfigError


def stored_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Compute height and width of an image in a store: short side at most `side`, aspect ratio kept."""
    scale = min(1.0, side / min(height, width))
    return round(height * scale), round(width * scale)


def decode(images: EncodedImages, index: int, side: int) -> NDArray[np.uint8]:
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


def with_half(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Append its copy at half size to an image, as a store holds the two: uint8 (bytes,).

    Of an odd height or width the copy leaves out the last pixel. An image a single pixel thin has none.
    """
    height, width, _ = pixels.shape
    block = np.zeros(bytes_of(height, width, half=True), np.uint8)
    block[: pixels.size] = pixels.ravel()
    if min(height, width) > 1:
        even = torch.from_numpy(pixels[: height // 2 * 2, : width // 2 * 2]).permute(2, 0, 1)[None]
        small = interpolate(even, (height // 2, width // 2), mode="bicubic", antialias=True)
        block[aligned(pixels.size) :] = small[0].permute(1, 2, 0).reshape(-1).numpy()
    return block


class CannotStore(ConfigError):
    """A store cannot be written: the disk is full, or too full to begin, or does not take it."""


def store_key(images: EncodedImages, side: int, half: bool = False) -> str:
    """Build a key that changes with all that a store is made from.

    That is the names, sizes and times of the files, or the table, their order and classes, the side, copies at half size,
    the format.
    """
    return hashlib.sha256(f"{FORMAT} {side} {half} {images.fingerprint()}".encode()).hexdigest()[:16]


def store_name(images: EncodedImages, side: int, half: bool, key: str) -> str:
    """Build the name of the file of a store."""
    return f"{split_name(images)}-{side}{'+half' if half else ''}-{key}.images"


def origin(images: EncodedImages) -> str:
    """Compute the digest of where images are from; a store made from there earlier is outdated by a new one."""
    return digest(images.root if images.only is None else f"{images.root}\0{images.only}")


def split_name(images: EncodedImages) -> str:
    return os.path.basename(os.path.abspath(images.root))


def estimate(images: EncodedImages, side: int, half: bool = False) -> int:
    """Estimate the bytes of a store from the sizes of some of its images: all below 1,000, else 500 to 750.

    Reading every header would take a good part of the time of decoding.
    """
    step = max(1, len(images) // 500)
    sample = range(0, len(images), step)
    total = 0
    for index in sample:
        with images.opened(index) as (image, _):
            height, width = stored_size(image.height, image.width, side)
        total += bytes_of(height, width, half) + ALIGN
    return round(total / len(sample) * len(images)) + len(images) * INDEX.itemsize + HEADER


class Decoding(Dataset):
    """Item i: image i is decoded and written to `path`, at the next free place; the item is its row of the index."""

    def __init__(self, images: EncodedImages, side: int, half: bool, path: str):
        self.images = images
        self.side = side
        self.half = half
        self.path = path
        self.end: Any = multiprocessing.Value("q", 0)  # bytes of pixels so far, of all processes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, int, int, int, int]:
        pixels = decode(self.images, index, self.side)
        block = with_half(pixels) if self.half else pixels
        with self.end.get_lock():
            offset = self.end.value
            self.end.value += aligned(block.size)
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(HEADER + offset)
                write_all(file, block.data.cast("B"))
        except OSError as error:
            raise cannot_store(error, self.path) from error
        return index, offset, *pixels.shape[:2], checksum(block, index)


def write_all(file: Any, content: memoryview) -> None:
    """Write all of `content` to an unbuffered file."""
    while content:
        content = content[file.write(content) :]  # the system may take a part


def cannot_store(error: OSError, path: str) -> CannotStore:
    """Convert an error in writing, with its reason."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CannotStore(f"decode_cache: no space is left in {os.path.dirname(path)}; give another folder, or off")
    return CannotStore(f"decode_cache: cannot write {path}: {error.strerror}; give another folder, or off")


def build(path: str, images: EncodedImages, side: int, key: str, half: bool = False) -> None:
    """Decode all `images` into a store file, on all cores; with copies at half size if asked.

    The file appears whole or not at all. If the machine fails before the disk has all of it, its checksums show that.

    Raises:
        ConfigError: an image is damaged; CannotStore: the disk is full, or fails. Nothing is left behind.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}"
    index = np.zeros(len(images), INDEX)
    decoding = Decoding(images, side, half, temporary)
    batches = loader_on_all_cores(decoding)
    bar = tqdm(
        total=len(images), desc=f"decoding {split_name(images)}", unit="images", delay=1, leave=False, disable=None
    )
    try:
        with open(temporary, "w+b") as file, bar, closing_loader(batches):
            hold(file)  # until it ends, however it ends; NFS lets readers alone hold, so that it can be read, too
            file.truncate(HEADER)
            for rows in batches:
                for i, *row in rows:
                    index[i] = tuple(row)
                bar.update(len(rows))
            size = decoding.end.value
            file.seek(HEADER + size)
            file.write(index.tobytes())
            header = dict(format=FORMAT, images_key=key, root=origin(images), side=side, half=half, images=len(images))
            header |= {"bytes": size, "index": checksum(index)}
            file.seek(0)
            file.write(json.dumps(header | {"header": header_checksum(header)}).ljust(HEADER).encode())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_store(error, path) from error
    finally:
        with suppress(OSError):
            os.remove(temporary)


def digest(root: str) -> str:
    """Hash the absolute path of a folder, to 16 hexadecimal digits."""
    return hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
