"""Where a decode-once store lies, and whether there is room for one."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch

from images.datasets import Data
from images.encoded import EncodedImages
from images.locks import locked
from images.store import HEADER, StoredImages, held, open_store
from images.store_build import CannotStore, build, decode, estimate, origin, store_key, store_name
from images.workers import processes_for
from settings.errors import ConfigError, first_line, printable
from settings.table import Config
from utils import Runtime

# What `decode_cache auto` may take. Of the disk, so that checkpoints and other programs keep most of it. Of memory,
# because a store that the file cache cannot hold is read from disk in every epoch, in random order; the other half
# is for the processes that train. Of a GPU, because training's need is known from one step of each stage only.
DISK_SHARE = 0.25
MEMORY_SHARE = 0.5
DEVICE_SHARE = 0.5

LOCK = ".lock"  # held by whoever builds in the folder


def store_side(config: Config) -> int:
    """Compute the short side of stored images, pixels.

    It is twice the largest training crop (`augment_size`, if that is set), or what evaluation and fine-tuning resize to, if
    that is more. Smaller images stay as they are. `docs/performance.md` derives what this costs: nothing for images up to
    this size, detail in the tightest crops of larger ones.
    """
    largest = int(max(config.train_crop_size))
    evaluated = (
        max(largest, config.val_crop_size, config.finetune_size or 0) * config.val_resize_size / config.val_crop_size
    )
    largest = config.augment_size or largest
    return max(2 * largest, math.ceil(evaluated))


def store_halves(config: Config) -> bool:
    """Decide whether stored training images have a copy at half size: where it serves many crops of the first stage.

    Those are crops of twice its size, more than half of them in images three times as large as it. Only batches
    (augment_on device) are cropped out of it.
    """
    return config.augment_on == "device" and store_side(config) >= 3 * (
        config.augment_size or min(config.train_crop_size)
    )


def locked_folder(folder: str, wait: bool = True) -> AbstractContextManager[bool]:
    """Let only one process at a time build in `folder`, as `locked` does.

    Where files cannot be locked two runs may build the same file, and the later one replaces the other's.
    """
    return locked(
        os.path.join(folder, LOCK), f"another run decodes images into {folder}; waiting for it to finish", wait
    )


def remove_outdated(path: str, images: EncodedImages) -> None:
    """Remove the stores that the one in `path` replaces, unless a run still uses them, or no one can tell.

    They are of the same images and side, made from files that have changed since, or by an older version of this
    program.
    """
    folder, name = os.path.split(path)
    start = name.rsplit("-", 1)[0] + "-"
    for other in os.listdir(folder):
        place = os.path.join(folder, other)
        if other != name and other.startswith(start) and other.endswith(".images"):
            with suppress(OSError):
                if made_from(place) == origin(images) and (held(place) is False or os.name == "nt"):
                    os.remove(place)


def made_from(path: str) -> str | None:
    """Read where the images of a store are from, a digest; of any version of the file, also a damaged one, or None."""
    with suppress(ValueError, RecursionError, AttributeError), open(path, "rb") as file:
        return json.loads(file.read(HEADER)).get("root")
    return None


def remove_leftovers(folder: str) -> None:
    """Remove the unfinished stores in `folder` that no one builds any more: their builders were killed."""
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if re.fullmatch(r".*\.images\.[0-9a-f]{8}", name, re.DOTALL)]
        if not names:
            return
        with locked_folder(folder, wait=False) as alone:
            for name in names if alone else ():  # else someone builds there just now
                place = os.path.join(folder, name)
                with suppress(OSError):
                    building = held(place)
                    if building is None:  # where files cannot be locked: it has not been written to for an hour
                        building = time.time() - os.path.getmtime(place) < 3600
                    if not building:
                        os.remove(place)


def free_disk(folder: str) -> int:
    """Find the bytes that are free on the disk of `folder`, which need not exist yet."""
    while not os.path.exists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return shutil.disk_usage(folder).free


def available_memory() -> int:
    """Find the bytes of memory that processes may still take, what the file cache can give up included.

    That is what the machine has available, or what the container, or a scheduler's job, may still take if that is less.
    """
    return min([psutil.virtual_memory().available, *room_in_groups("/proc/self/cgroup", "/sys/fs/cgroup")])


# Of control groups by version: files of the limit and of what is used, and what memory.stat calls the file cache and,
# of that, the shared memory.
GROUP_FILES = {
    "": ("memory.max", "memory.current", "file", "shmem"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
}


def room_in_groups(own: str, root: str) -> Iterator[int]:
    """Find the bytes that each control group which holds this process, and has a limit, lets it take.

    own: file that names its groups: a line of number, controllers and path each
    root: folder that groups of version 2 are mounted on, and those of version 1 below their controller's name
    """
    with suppress(OSError), open(own, encoding="utf-8") as file:
        for _, controllers, path in (line.rstrip("\n").split(":", 2) for line in file):
            if controllers not in GROUP_FILES:
                continue
            most, now, cached, shared = GROUP_FILES[controllers]
            parts = path.strip("/").split("/")
            for depth in range(len(parts) + 1):  # a container may see its own group as the root, under its outer path
                place = os.path.join(root, controllers, *parts[:depth])
                with suppress(OSError, ValueError, KeyError):  # "max": no limit
                    limit, used = (int(read(os.path.join(place, name))) for name in (most, now))
                    counts = dict(line.split() for line in read(os.path.join(place, "memory.stat")).splitlines())
                    droppable = int(counts[cached]) - int(counts[shared])  # what lies in /dev/shm cannot be dropped
                    yield limit - max(0, used - droppable)


def read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def writable(folder: str) -> bool:
    """Check whether `folder` can be written to; create it if it is not there."""
    try:
        os.makedirs(folder, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False


def candidates(config: Config, roots: Sequence[str]) -> list[str]:
    """List the folders that a store may lie in, the preferred one first.

    With decode_cache auto that is beside the data, so that it serves everyone who sees them, and, where that cannot be
    written or the data are of the Hub, torch's folder for downloads.

    Raises:
        ConfigError: a folder was given that lies among the images, where it would be taken for a class.
    """

    def among_images(folder: str) -> bool:
        return any(Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)) for root in roots)

    if config.decode_cache != "auto":
        if among_images(config.decode_cache):
            raise ConfigError(
                f"decode_cache {config.decode_cache} lies among the images; give a folder outside of them"
            )
        return [config.decode_cache]
    beside = os.path.join(config.data_path, ".decode_cache")
    shared = os.path.join(torch.hub.get_dir(), "decode_cache")
    return [shared] if config.dataset == "hub" or among_images(beside) else [beside, shared]


def make_room(config: Config, sets: Sequence[EncodedImages], folders: Sequence[str], side: int) -> list[str] | str:
    """Build the stores that are missing, so that every set has a whole one in one of `folders`.

    Returns: their paths, or, with decode_cache auto, why not every set has one.

    Raises:
        ConfigError: an image is damaged; the folder given cannot be written, or has too little room.
    """
    halves = [store_halves(config), False]  # evaluation has one size
    keys = [store_key(images, side, half) for images, half in zip(sets, halves)]
    names = [store_name(images, side, half, key) for images, half, key in zip(sets, halves, keys)]
    for folder in folders:
        remove_leftovers(folder)
    there = [
        next((path for folder in folders if whole(path := os.path.join(folder, name), images, key)), None)
        for name, images, key in zip(names, sets, keys)
    ]
    missing = [i for i, path in enumerate(there) if path is None]
    bytes_needed = sum(estimate(sets[i], side, halves[i]) for i in missing)
    if config.decode_cache == "auto":
        in_memory = bytes_needed + sum(os.path.getsize(path) for path in there if path is not None)
        room = MEMORY_SHARE * available_memory()
        if in_memory > room:
            return f"it would take {human(in_memory)} of memory, half of what is free is {human(room)}"
    if not missing:
        return [path for path in there if path is not None]
    place = next((folder for folder in folders if writable(folder)), None)
    if place is None:
        if config.decode_cache == "auto":
            return f"neither {' nor '.join(folders)} can be written to"
        raise ConfigError(f"decode_cache {folders[0]} cannot be written to; give another folder, or off")
    free = free_disk(place)
    if config.decode_cache == "auto" and bytes_needed > DISK_SHARE * free:
        discard_empty(place)
        return (
            f"it would take {human(bytes_needed)} in {place}, a quarter of what is free is {human(DISK_SHARE * free)}"
        )
    try:
        if bytes_needed > free:
            raise CannotStore(
                f"decode_cache: {place} has {human(free)} free, the images need about {human(bytes_needed)}; give "
                "another folder, or off"
            )
        with locked_folder(place):
            for i in missing:
                path = there[i] = os.path.join(place, names[i])
                if not whole(path, sets[i], keys[i], tell=False):  # unless another run was faster
                    build(path, sets[i], side, keys[i], halves[i])
                    remove_outdated(path, sets[i])
    except CannotStore as error:
        discard_empty(place)
        if config.decode_cache == "auto":
            return str(error)
        raise
    return [path for path in there if path is not None]


def whole(path: str, images: EncodedImages, key: str, tell: bool = True) -> bool:
    """Check whether a whole store of these images lies in `path`; say why if a file lies there that is none."""
    try:
        open_store(path, images, key, check=True)
        return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        if tell:
            print(printable(f"decode cache {path} is made anew: {first_line(error)}"), flush=True)
        return False


def discard_empty(folder: str) -> None:
    """Remove `folder` if no store lies in it."""
    with suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            os.remove(os.path.join(folder, LOCK))
        os.rmdir(folder)


def human(size: float) -> str:
    """Format a number of bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def is_stored(config: Config) -> bool:
    """Decide whether images are decoded once, if there is room: not for `nearest`, which would pick among averages."""
    return config.decode_cache != "off" and config.interpolation != "nearest"


def building_seconds(config: Config, data: Data) -> float:
    """Estimate how long `with_store` will decode, from a few images of each set that has no store yet."""
    if not (is_stored(config) and isinstance(data.train, EncodedImages) and isinstance(data.val, EncodedImages)):
        return 0.0
    sets, side, total = [data.train, data.val], store_side(config), 0.0
    folders = candidates(config, [images.root for images in sets])
    for images, half in zip(sets, (store_halves(config), False)):
        name = store_name(images, side, half, store_key(images, side, half))
        if not any(os.path.exists(os.path.join(folder, name)) for folder in folders):
            chosen = range(0, len(images), max(1, len(images) // 20))
            started = time.perf_counter()
            for index in chosen:
                decode(images, index, side)
            each = (time.perf_counter() - started) / len(chosen)
            total += each * len(images) / max(1, processes_for(len(images)))
    return total


def with_store(config: Config, data: Data, runtime: Runtime, reserved: int = 0, most_on_device: int = 2) -> Data:
    """Replace the images of `data` by stored ones, decoded once, as decode_cache asks.

    `data` stays unchanged where that is off, where auto finds too little room, for images that are in memory anyway, and
    for interpolation nearest.

    reserved: bytes of the GPU's memory that training will take beyond what it holds now
    most_on_device: sets of images that are placed on the GPU, where it has room; that to train on is the first

    Raises:
        ConfigError: an image is damaged; the folder given cannot be written, or has too little room.
    """
    if not (is_stored(config) and isinstance(data.train, EncodedImages) and isinstance(data.val, EncodedImages)):
        return data
    sets = [data.train, data.val]
    side = store_side(config)
    folders = candidates(config, [images.root for images in sets])
    # One process per machine builds or looks through the files; the others wait for its answer
    found = runtime.on_each_machine(partial(make_room, config, sets, folders, side))
    if runtime.any(isinstance(found, str)):
        runtime.say(f"decode_cache off: {found if isinstance(found, str) else 'too little room on another machine'}")
        return data
    opened = [StoredImages(path, images) for path, images in zip(found, sets)]
    total = sum(stored.header["bytes"] for stored in opened)
    place = ""
    if runtime.device.type == "cuda" and config.augment_on != "worker":
        room = DEVICE_SHARE * (runtime.free_memory() - reserved)
        places = (", the training images on the GPU", ", all on the GPU")
        for stored, place_too in zip(opened[:most_on_device], places):
            room -= stored.header["bytes"]
            if runtime.any(room < 0):
                break
            stored.place_on(runtime.device)
            place = place_too
    folder = os.path.dirname(opened[0].path)
    runtime.say(f"images decoded once: {human(total)} in {folder}{place}")
    return replace(data, train=opened[0], val=opened[1], store_side=side, store_folder=folder)
