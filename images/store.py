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
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from images.datasets import Data, ImageTree
from presets import to_rgb
from settings.resolve import Config, ConfigError
from utils import Runtime, closing_loader, ignore_signals

FORMAT = 1
HEADER = 4096  # bytes
ALIGN = 192  # bytes; of each image's start: whole pixels of 3 bytes, and whole cache lines
INDEX = np.dtype([(name, "<i8") for name in ("offset", "height", "width")] + [("checksum", "<u8")])

# What `decode_cache auto` may take. Of the disk, so that checkpoints and other programs keep most of it. Of memory,
# because a store that the file cache cannot hold is read from disk in every epoch, in random order; the other half
# is for the processes that train. Of a GPU, because training's need is known from one step of each stage only.
DISK_SHARE = 0.25
MEMORY_SHARE = 0.5
DEVICE_SHARE = 0.5


def store_side(config: Config) -> int:
    """Short side of stored images, pixels: twice the largest training crop, and what evaluation resizes to, if
    that is more. Smaller images stay as they are. `docs/performance.md` derives what this costs: nothing for
    images up to this size, detail in the tightest crops of larger ones.
    """
    largest = int(max(config.train_crop_size))
    evaluated = max(largest, config.val_crop_size) * config.val_resize_size / config.val_crop_size
    return max(2 * largest, math.ceil(evaluated))


def stored_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of an image in a store: short side at most `side`, aspect ratio kept."""
    scale = min(1.0, side / min(height, width))
    return round(height * scale), round(width * scale)


def decode(images: ImageTree, index: int, side: int) -> NDArray[np.uint8]:
    """Image `index` at its stored size, (H, W, 3).

    Bicubic with antialiasing: it keeps what is below half of the stored resolution, all that a crop at training size
    can show, where a box filter would blur that, and rings less than Lanczos.
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
    """The sum of an array's 64-bit words and of the bytes that are left: a sixth of the time of CRC-32, which would
    add a tenth to the decoding of a small JPEG; it is to find damage, not forgery."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    whole = octets.size // 8 * 8
    return int(octets[:whole].view(np.uint64).sum()) + int(octets[whole:].sum()) & 2**64 - 1


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
        """Image `index`, uint8 (H, W, 3): a view of the file, not to be written to."""
        return self.view(self.index[index].tolist())

    def view(self, row: Sequence[int]) -> Tensor:
        """The image of a row of the index."""
        offset, height, width, _ = row
        return self.flat[offset : offset + 3 * height * width].view(height, width, 3)

    @property
    def flat(self) -> Tensor:
        if self.mapped is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it is read-only
                self.mapped = torch.from_numpy(
                    np.memmap(self.path, np.uint8, "r", HEADER, shape=(self.header["bytes"],))
                )
        return self.mapped

    def place_on(self, device: torch.device) -> None:
        """Copy all pixels to `device`, piece by piece."""
        resident = torch.empty(self.flat.numel(), dtype=torch.uint8, device=device)
        for at in range(0, resident.numel(), 2**28):
            resident[at : at + 2**28].copy_(self.flat[at : at + 2**28])
        self.resident = resident.view(-1, 3)

    def damaged(self) -> bool:
        """Whether any pixel differs from what was stored. Reads the whole file, which training wants in memory anyway;
        not through the map, which would count as this process's memory."""
        buffer = np.empty(int((3 * self.index["height"] * self.index["width"]).max()), np.uint8)
        rows = tqdm(self.index.tolist(), "checking the decode cache", unit="images", delay=2, leave=False, disable=None)
        with open(self.path, "rb", buffering=0) as file:
            for offset, height, width, expected in rows:
                pixels = buffer[: 3 * height * width]
                file.seek(HEADER + offset)
                if file.readinto(pixels) != pixels.size or checksum(pixels) != expected:
                    return True
        return False


def read_header(path: str) -> dict[str, Any]:
    """The header of a store file.

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
    index = np.fromfile(path, INDEX, header["images"], offset=HEADER + header["bytes"])
    if checksum(index) != header["checksum"]:
        raise ValueError(f"the index of {path} is damaged")
    return index


def open_store(path: str, images: ImageTree, check: bool = False) -> StoredImages | None:
    """The store in `path`, None if there is none or it is damaged. check: look at every pixel."""
    try:
        stored = StoredImages(path, images)
        return None if check and stored.damaged() else stored
    except (OSError, ValueError, KeyError):
        return None


# ---- building ----


class NoRoom(ConfigError):
    """The disk is full, or too full to begin."""


def store_name(images: ImageTree, side: int) -> str:
    """A file name that changes with all a store is made from: names, sizes and times of the files, side, format."""
    key = hashlib.sha256(f"{FORMAT} {side}".encode())
    for path, _ in images.samples:
        status = os.stat(path)
        key.update(f"{os.path.relpath(path, images.root)}\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return f"{split_name(images)}-{side}-{key.hexdigest()[:16]}.images"


def split_name(images: ImageTree) -> str:
    return os.path.basename(os.path.abspath(images.root))


def estimate(images: ImageTree, side: int) -> int:
    """Bytes of a store, from the sizes of up to 500 of its images: reading every header would take a good part of
    the time of decoding."""
    step = max(1, len(images) // 500)
    sample = range(0, len(images), step)
    total = 0
    for index in sample:
        with images.opened(index) as (image, _):
            height, width = stored_size(image.height, image.width, side)
        total += 3 * height * width + ALIGN
    return round(total / len(sample) * len(images)) + len(images) * INDEX.itemsize + HEADER


class Decoding(Dataset):
    """Item i: image i decoded and written to `path`, at the next free place; its row of the index."""

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
                write_all(file, memoryview(pixels).cast("B"))
        except OSError as error:
            raise full_or_same(error, self.path) from error
        return index, offset, *pixels.shape[:2], checksum(pixels)


def write_all(file: Any, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]  # the system may take a part


def full_or_same(error: OSError, path: str) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"decode_cache: no space is left in {os.path.dirname(path)}; give another folder, or off")
    return ConfigError(f"decode_cache: cannot write {path}: {error.strerror}; give another folder, or off")


def build(path: str, images: ImageTree, side: int) -> None:
    """Decode all `images` into a store file, on all cores. The file appears whole or not at all; if the machine
    fails before the disk has it, its checksums tell.

    Raises:
        ConfigError: an image is damaged; NoRoom: the disk is full. Nothing is left behind.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}"
    index = np.zeros(len(images), INDEX)
    decoding = Decoding(images, side, temporary)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(images) // 100)  # a few images are decoded before a process has started
    batches = DataLoader(
        decoding,
        min(32, len(images)),
        num_workers=workers,
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
            header = dict(format=FORMAT, root=digest(images.root), side=side, images=len(images), bytes=size)
            file.seek(0)
            file.write(json.dumps(header | {"checksum": checksum(index)}).ljust(HEADER).encode())
        os.replace(temporary, path)
    except OSError as error:
        raise full_or_same(error, path) from error
    finally:
        with suppress(OSError):
            os.remove(temporary)


def digest(root: str) -> str:
    return hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16]


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Only one process of this machine at a time. Where a folder cannot be locked (Windows, some network disks) two
    runs may build the same file, and the later one replaces the other's."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def remove_outdated(path: str, images: ImageTree) -> None:
    """Remove stores of the same images and side as the one in `path`, made from files that have changed since, and
    what a killed run has left."""
    folder, name = os.path.split(path)
    start = name.rsplit("-", 1)[0] + "-"
    for other in os.listdir(folder):
        if other == name or not other.startswith(start):
            continue
        place = os.path.join(folder, other)
        with suppress(OSError, ValueError, KeyError):
            if other.endswith(".images"):
                outdated = read_header(place)["root"] == digest(images.root)
            else:
                outdated = time.time() - os.path.getmtime(place) > 3600  # no one writes to it any more
            if outdated:
                os.remove(place)


# ---- where, and whether ----


def free_disk(folder: str) -> int:
    while not os.path.exists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return shutil.disk_usage(folder).free


def available_memory() -> int:
    """Bytes that processes may still take, or the file cache give up: of the machine, or the container's limit."""
    found = [sys.maxsize]
    with suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError), open(limit, encoding="ascii") as file:  # "max": none
            found.append(int(file.read()))
    if len(found) == 1 and hasattr(os, "sysconf"):
        with suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found)


def writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False


def candidates(config: Config, roots: Sequence[str]) -> list[str]:
    """Folders a store may lie in, the preferred one first: beside the data, so that it serves everyone who sees
    them; where that cannot be written, in torch's folder for downloads.

    Raises:
        ConfigError: a folder was given that lies among the images, where it would be taken for a class.
    """

    def among_images(folder: str) -> bool:
        place = os.path.realpath(folder)
        return any(os.path.commonpath([place, os.path.realpath(root)]) == os.path.realpath(root) for root in roots)

    if config.decode_cache != "auto":
        if among_images(config.decode_cache):
            raise ConfigError(
                f"decode_cache {config.decode_cache} lies among the images; give a folder outside of them"
            )
        return [config.decode_cache]
    beside = os.path.join(config.data_path, ".decode_cache")
    shared = os.path.join(torch.hub.get_dir(), "decode_cache")
    return [shared] if among_images(beside) else [beside, shared]


def make_room(config: Config, images: dict[str, ImageTree], folders: Sequence[str], side: int) -> str | None:
    """Have a whole store of every set in one of `folders`; or, with decode_cache auto, why there is none.

    images: by the name of their file

    Raises:
        ConfigError: an image is damaged; the folder given cannot be written, or has too little room.
    """
    there = {}
    for name, source in images.items():
        for folder in folders:
            path = os.path.join(folder, name)
            if os.path.exists(path) and open_store(path, source, check=True) is not None:
                there[name] = path
                break
    missing = {name: source for name, source in images.items() if name not in there}
    needed = {name: estimate(source, side) for name, source in missing.items()}
    bytes_needed = sum(needed.values())
    if config.decode_cache == "auto":
        in_memory = bytes_needed + sum(os.path.getsize(path) for path in there.values())
        room = MEMORY_SHARE * available_memory()
        if in_memory > room:
            return f"it would take {human(in_memory)} of memory, half of what is free is {human(room)}"
    if not missing:
        return None
    folder = next((folder for folder in folders if writable(folder)), None)
    if folder is None:
        if config.decode_cache == "auto":
            return f"neither {' nor '.join(folders)} can be written to"
        raise ConfigError(f"decode_cache {folders[0]} cannot be written to; give another folder, or off")
    free = free_disk(folder)
    if config.decode_cache == "auto" and bytes_needed > DISK_SHARE * free:
        discard_empty(folder)
        return (
            f"it would take {human(bytes_needed)} in {folder}, a quarter of what is free is {human(DISK_SHARE * free)}"
        )
    try:
        if bytes_needed > free:
            raise NoRoom(
                f"decode_cache: {folder} has {human(free)} free, the images need about {human(bytes_needed)}; give "
                "another folder, or off"
            )
        with locked(folder):
            for name, source in missing.items():
                path = os.path.join(folder, name)
                if open_store(path, source, check=True) is None:  # unless another run was faster
                    build(path, source, side)
                    remove_outdated(path, source)
    except NoRoom as error:
        discard_empty(folder)
        if config.decode_cache == "auto":
            return str(error)
        raise
    return None


def discard_empty(folder: str) -> None:
    with suppress(OSError):
        os.rmdir(folder)


def human(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def with_store(config: Config, data: Data, runtime: Runtime, reserved: int = 0) -> Data:
    """`data` with its images decoded once and kept, as decode_cache asks; unchanged where that is off, where auto
    finds too little room, and for images that are in memory anyway.

    reserved: bytes of the GPU's memory that training will take beyond what it holds now

    Raises:
        ConfigError: an image is damaged; the folder given cannot be written, or has too little room.
    """
    sets = [data.train, data.val]
    if config.decode_cache == "off" or not all(isinstance(images, ImageTree) for images in sets):
        return data
    side = store_side(config)
    names = [store_name(images, side) for images in sets]
    folders = candidates(config, [images.root for images in sets])
    # One process per machine builds or looks through the files; the others wait for it in `any`.
    problem = make_room(config, dict(zip(names, sets)), folders, side) if runtime.local_rank == 0 else None
    if runtime.any(problem is not None):
        runtime.say(f"decode_cache off: {problem or 'too little room on another machine'}")
        return data
    opened = [
        next(found for folder in folders if (found := open_store(os.path.join(folder, name), images)) is not None)
        for name, images in zip(names, sets)
    ]
    total = sum(stored.header["bytes"] for stored in opened)
    place = ""
    if runtime.device.type == "cuda":
        free = torch.cuda.mem_get_info(runtime.device)[0] - reserved
        if not runtime.any(opened[0].header["bytes"] > DEVICE_SHARE * free):
            opened[0].place_on(runtime.device)
            place = ", the training images on the GPU"
    runtime.say(f"images decoded once: {human(total)} in {os.path.dirname(opened[0].path)}{place}")
    return replace(data, train=opened[0], val=opened[1], store_side=side)
