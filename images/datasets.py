"""Data sets by name: folders of images, Imagenette and Imagewoof, handwritten digits."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torchvision.datasets import Imagenette
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.datasets.utils import download_and_extract_archive

from augment.pixels import to_rgb
from settings.errors import ConfigError
from settings.table import Config
from utils import Runtime


class Images(Protocol):
    """Item i is an RGB PIL image and its class number."""

    classes: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Data:
    """Training and validation images, which share `classes`: the names, in the order of their numbers.

    store_side: short side of images out of a decode-once store, pixels; None without one
    store_folder: where that lies
    """

    train: Images
    val: Images
    store_side: int | None = None
    store_folder: str | None = None

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    def __str__(self) -> str:
        return f"{len(self.train)} training and {len(self.val)} validation images of {len(self.classes)} classes"


class ImageTree:
    """The images of a folder that holds one folder per class, at any depth below it.

    only: text file of the images to use, others are left out; see `keep_listed`

    Raises:
        ConfigError: no such folder, no class folders, a class folder without images, a list that does not fit.
    """

    def __init__(self, root: str, keep_list: bool = False, only: str | None = None):
        if not os.path.isdir(root):
            raise ConfigError(
                f"no folder {root}; data_path and the names of its splits must lead to one folder per class"
            )
        try:
            folders, numbers = find_classes(root)
            listed = read_list(root, folders) if keep_list else None
            self.samples = listed or make_dataset(root, numbers, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:  # torchvision's message names the empty classes
            raise ConfigError(f"{root}: {str(error).splitlines()[0]}") from error
        if keep_list and listed is None:
            write_list(root, folders, self.samples)
        if only is not None:
            self.samples = keep_listed(self.samples, root, only)
        self.root, self.only = root, only
        self.classes = [WORDNET_NAMES.get(folder, folder) for folder in folders]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.opened(index) as (image, target):
            return to_rgb(image), target

    @contextmanager
    def opened(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        """Open image `index` as it lies in its file, and its class number.

        The image may have any mode, and is not decoded yet.

        Raises:
            ConfigError: what the caller does with it fails, and the file turns out to be damaged.
        """
        path, target = self.samples[index]
        try:
            with Image.open(path) as image:
                yield image, target
        except Exception:
            with naming_damage(path), Image.open(path) as image:
                to_rgb(image)
            raise  # the file is sound, the fault is the caller's


@contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Convert any error within to a ConfigError which says that `path` cannot be read as an image."""
    try:
        yield
    except Exception as error:  # what PIL raises on a damaged file varies with the damage
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} cannot be read as an image: {reason}; mend or remove it") from error


def opened(images: Images, index: int) -> AbstractContextManager[tuple[Image.Image, int]]:
    """Open image `index`, not decoded yet if it comes from a file, with its class number."""
    return images.opened(index) if isinstance(images, ImageTree) else nullcontext(images[index])


def keep_listed(samples: Sequence[tuple[str, int]], root: str, path: str) -> list[tuple[str, int]]:
    """Choose the images that a text file lists: one path below `root` a line, with "/" between folders.

    They stay in the order of the folder, so that a list's own order means nothing. Empty lines and lines that begin
    with # are left out.

    Raises:
        ConfigError: the file cannot be read, lists nothing, or an image that is not there.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"cannot read the list of images {path}: {reason}") from error
    names = {line for line in lines if line and not line.startswith("#")}
    kept = [(file, target) for file, target in samples if os.path.relpath(file, root).replace(os.sep, "/") in names]
    if len(kept) < len(names) or not names:
        missing = names - {os.path.relpath(file, root).replace(os.sep, "/") for file, _ in kept}
        example = f", such as {min(missing)}" if missing else ""
        raise ConfigError(f"{path} lists {len(names)} images, {len(missing)} of them not in {root}{example}")
    return kept


def list_path(root: str) -> str:
    """Build the path of the file that keeps the list of images of `root`.

    It lies in torch's folder for downloads.
    """
    name = hashlib.sha1(os.path.abspath(root).encode()).hexdigest()[:16]
    return os.path.join(torch.hub.get_dir(), "imagefolder", f"{name}.json")


def read_list(root: str, classes: Sequence[str]) -> list[tuple[str, int]] | None:
    """Read the list of images kept for `root`; None if none fits its folders as they are now."""
    try:
        with open(list_path(root), encoding="utf-8") as file:
            kept = json.load(file)
        unchanged = all(os.stat(os.path.join(root, folder)).st_mtime_ns == time for folder, time in kept["folders"])
        if unchanged and kept["classes"] == list(classes):
            return [(os.path.join(root, path), target) for path, target in kept["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or damaged: listed anew
    return None


def write_list(root: str, classes: Sequence[str], samples: Sequence[tuple[str, int]]) -> None:
    """Write the list of images of `root` to its file, with the time of every folder below `root`.

    A new image changes its folder's time, by which `read_list` knows that the list is out of date.

    Raises:
        ConfigError: the file cannot be written.
    """
    folders = [folder for folder, _, _ in os.walk(root)]
    times = [(os.path.relpath(folder, root), os.stat(folder).st_mtime_ns) for folder in folders]
    relative = [(os.path.relpath(file, root), target) for file, target in samples]
    path = list_path(root)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
            json.dump({"classes": list(classes), "folders": times, "samples": relative}, file)
        os.replace(f"{path}.{os.getpid()}", path)
    except OSError as error:
        raise ConfigError(f"cache_dataset: cannot write {path}: {error.strerror}; leave it out") from error


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels: real images that need no download.

    Source: E. Alpaydin, C. Kaynak, UCI ML hand-written digits (test part), by way of sklearn.datasets.
    """

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits  # takes a second; other data sets need not wait
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        halves = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
        pixels, targets = (halves[0], halves[2]) if train else (halves[1], halves[3])
        # 0..16 to 0..240. Not to 255: torchvision's Solarize turns that black even at strength 0.
        self.images = [Image.fromarray((image * 15).astype("uint8")).convert("RGB") for image in pixels]
        self.targets = [int(target) for target in targets]
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]


# The folders of Imagenette and Imagewoof are WordNet numbers.
WORDNET_NAMES = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle", "n02089973": "English foxhound",
    "n02093754": "Border terrier", "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # fmt: skip


def fastai_tree(config: Config, runtime: Runtime) -> str:
    """Find the folder of Imagenette or Imagewoof below data_path; download it first if that is asked for.

    Raises:
        ConfigError: it cannot be downloaded, or is not there.
    """
    name, _, size = config.dataset.partition("-")
    folder = f"{name}2" + (f"-{size.removesuffix('px')}" if size else "")
    tree = os.path.join(config.data_path, folder)
    if config.download and runtime.local_rank == 0 and not os.path.isdir(tree):
        try:
            if name == "imagenette":
                Imagenette(config.data_path, split="train", size=size or "full", download=True)
            else:  # torchvision has no Imagewoof; it lies beside Imagenette
                url = f"https://s3.amazonaws.com/fast-ai-imageclas/{folder}.tgz"
                download_and_extract_archive(url, config.data_path)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"download: {config.dataset} cannot be fetched into {config.data_path}: {reason}"
            ) from error
    runtime.barrier()
    if not os.path.isdir(tree):
        raise ConfigError(
            f"data_path {config.data_path} holds no {folder}; --download fetches it, or give the folder that holds it"
        )
    return tree


def load_data(config: Config, runtime: Runtime) -> Data:
    """Load the data set of the run: lists of image files, or the digits themselves.

    Raises:
        ConfigError: not there, empty, too few validation images, or the two splits have different classes.
    """
    if config.dataset == "digits":
        return Data(train=Digits(train=True), val=Digits(train=False))
    if config.dataset == "imagefolder":
        train_root, val_root = (
            os.path.join(config.data_path, split) for split in (config.train_split, config.val_split)
        )
    else:
        tree = fastai_tree(config, runtime)
        train_root, val_root = os.path.join(tree, "train"), os.path.join(tree, "val")
    data = Data(
        train=ImageTree(train_root, config.cache_dataset, config.train_list),
        val=ImageTree(val_root, config.cache_dataset, config.val_list),
    )
    if len(data.val) < runtime.world_size:
        raise ConfigError(f"{val_root} has {len(data.val)} images, too few for {runtime.world_size} processes")
    if data.train.classes != data.val.classes:
        odd = sorted(set(data.train.classes) ^ set(data.val.classes))
        raise ConfigError(
            f"{train_root} and {val_root} must hold the same class folders; only one has {', '.join(odd[:5])}"
        )
    return data
