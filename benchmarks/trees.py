"""Folders of images to measure on, made of links to a user's own."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import common  # noqa: F401, makes the program's modules known
from torchvision.datasets.folder import IMG_EXTENSIONS

from settings.errors import ConfigError


@contextmanager
def image_tree(data: str, limit: int, scratch: str | None = None) -> Iterator[str]:
    """Make a temporary folder of links to at most `limit` images of folder `data`; yield its path.

    It has `train/` and `val/`. In `val/` lies the first image of each class, so that evaluation costs nothing.

    data: with `train/` in it, with one folder per class, or flat, which is then one class

    Raises:
        ConfigError: no such folder, no images.
    """
    images = find_images(data, limit)  # a mistake shows before a folder is made
    try:
        folder = tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch)
    except OSError as error:
        raise ConfigError(f"--scratch {scratch}: {error.strerror}; give a folder that can be written to") from error
    with folder as tree:
        link_images(images, tree)
        yield tree


def find_images(data: str, limit: int) -> list[tuple[str, Path]]:
    """Find at most `limit` images of a folder, evenly spread over it, and the class of each.

    Raises:
        ConfigError: no such folder, no images.
    """
    root = Path(data, "train") if Path(data, "train").is_dir() else Path(data)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise ConfigError(f"--data {data}: no images there; give a folder of images, in class folders or not")
    limit = min(limit, len(files))
    files = [files[i * len(files) // limit] for i in range(limit)]
    parts = [file.relative_to(root).parts for file in files]
    return [(part[0] if len(part) > 1 else "images", file) for part, file in zip(parts, files)]


def link_images(images: Sequence[tuple[str, Path]], tree: str) -> None:
    """Link to images from `train/` in `tree`, and to the first of each class from `val/`."""
    for number, (name, file) in enumerate(images):
        for split in ("train", "val"):
            place = Path(tree, split, name)
            if split == "val" and place.is_dir():
                continue
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:07}_{file.name}").symlink_to(file.resolve())


def link_again(images: Sequence[tuple[str, Path]], tree: str) -> None:
    """Link to images as `link_images` does, unless as many are linked to: the folder may have grown meanwhile."""
    if sum(len(files) for _, _, files in os.walk(os.path.join(tree, "train"))) == len(images):
        return
    for place in (tree, f"{tree}.new"):
        shutil.rmtree(place, ignore_errors=True)
    link_images(images, f"{tree}.new")
    os.rename(f"{tree}.new", tree)


def read_files(tree: str) -> None:
    """Read every training image once, so that all ways find the files in memory."""
    for path in Path(tree, "train").rglob("*.*"):
        path.read_bytes()
