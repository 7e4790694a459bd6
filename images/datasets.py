"""Data sets by name: folders of images, Imagenette and Imagewoof, those of the Hub, handwritten digits."""

import gzip
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import Imagenette
from torchvision.datasets.utils import download_url, extract_archive

from images.encoded import EncodedImages
from images.hub import check_hub, load_hub
from images.listing import FileList, keep_listed, read_list, scan, write_list
from images.locks import locked
from images.verify import find_bad, open_image, unreadable
from settings.errors import ConfigError, first_line, printable
from settings.table import Config
from utils import Runtime


class Images(Protocol):
    """Item i is an RGB PIL image and its class number; `targets` are the numbers of all of them."""

    classes: list[str]

    @property
    def targets(self) -> Sequence[int] | NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Data:
    """Training and validation images, which share `classes`: the names, in the order of their numbers.

    store_side: short side of images out of a decode-once store, pixels; None without one
    store_folder: where that lies
    skipped: of each split, the images left out because they cannot be read: path and fault
    """

    train: Images
    val: Images
    store_side: int | None = None
    store_folder: str | None = None
    skipped: Mapping[str, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    @property
    def on_device(self) -> int:
        """How many of the sets lie on the GPU, decoded; that to train on is the first."""
        return sum(getattr(images, "resident", None) is not None for images in (self.train, self.val))

    def __str__(self) -> str:
        """Say how many images there are; and how many were left out, with the first of them."""
        told = f"{len(self.train)} training and {len(self.val)} validation images of {len(self.classes)} classes"
        skipped = [image for images in self.skipped.values() for image in images]
        if not skipped:
            return told
        path, fault = skipped[0]
        return printable(f"{told}; {len(skipped)} left out that cannot be read, first {path}: {fault}")


class ImageTree(EncodedImages):
    """The images of a folder that holds one folder per class, at any depth below it.

    keep_list: take the list of images from the last start, where it still fits; keep it for the next
    only: text file of the images to use, others are left out; see `keep_listed`
    skip: leave out what cannot be read, which is found out here, once: so all processes of a run, every resume, and runs
        with and without a store have the same images. An image that is damaged later ends the run all the same.
    skipped: path and fault of each image that was left out

    Raises:
        ConfigError: no such folder, no class folders, a class folder without images, a list that does not fit, an image
            that is no file.
    """

    def __init__(self, root: str, keep_list: bool = False, only: str | None = None, skip: bool = False):
        if not os.path.isdir(root):
            raise no_folder(root)
        found = (read_list(root) if keep_list else None) or scan(root)
        if keep_list:
            write_list(root, found)
        if only is not None:
            found = keep_listed(found, only)
        if found.bad and not skip:
            raise unreadable(*found.bad[0])
        self.root, self.only = root, only
        self.classes = [WORDNET_NAMES.get(folder, folder) for folder in found.classes]
        self.samples, self.targets, self.skipped = found.files, found.files.targets, found.bad
        if skip:
            self.leave_out_bad(found.numbers_of_bad())

    def leave_out_bad(self, numbers: set[int]) -> None:
        """Look at all images, and leave out what cannot be read.

        numbers: class numbers of those that the list of files lacks already

        Raises:
            ConfigError: a class has no others.
        """
        files = self.samples
        bad = dict(find_bad(files, f"looking at {os.path.basename(self.root)}"))
        self.skipped = self.skipped + [(files[index][0], fault) for index, fault in bad.items()]
        if bad:
            self.samples = files.choose(np.setdiff1d(np.arange(len(files)), list(bad)))
            self.targets = self.samples.targets
        lost = (numbers | set(files.targets[list(bad)].tolist())) - set(np.unique(self.targets).tolist())
        if lost:
            name, first = self.classes[min(lost)], ": ".join(self.skipped[0])
            raise ConfigError(
                f"{self.root}: no image of class {name} can be read; of those left out the first is {first}"
            )

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        return open_image(self.samples[index][0])

    def describe(self, index: int) -> str:
        return self.samples[index][0]

    def fingerprint(self) -> str:
        return self.samples.fingerprint()


def opened(images: Images, index: int) -> AbstractContextManager[tuple[Image.Image, int]]:
    """Open image `index`, not decoded yet if it comes from a file or a row, with its class number."""
    return images.opened(index) if isinstance(images, EncodedImages) else nullcontext(images[index])


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


ASIDE = ".download-"  # begins the names of folders that downloads are unpacked in


def fastai_tree(config: Config) -> str:
    """Find the folder of Imagenette or Imagewoof below data_path.

    Raises:
        ConfigError: it is not there.
    """
    tree = fastai_path(config)
    if not os.path.isdir(tree):
        raise ConfigError(
            f"data_path {config.data_path} holds no {os.path.basename(tree)}; --download fetches it, or give the folder "
            "that holds it"
        )
    return tree


def fastai_path(config: Config) -> str:
    """Build the path of the folder of Imagenette or Imagewoof below data_path, there or not."""
    name, _, size = config.dataset.partition("-")
    return os.path.join(config.data_path, f"{name}2" + (f"-{size.removesuffix('px')}" if size else ""))


def download(config: Config) -> None:
    """Fetch Imagenette or Imagewoof into data_path, unless it is there.

    It is unpacked aside, and so never there in part; of several runs that want it one fetches it.

    Raises:
        ConfigError: it cannot be fetched.
    """
    tree = fastai_path(config)
    if os.path.isdir(tree):
        return
    waiting = f"another run fetches {config.dataset} into {config.data_path}; waiting for it to finish"
    try:
        os.makedirs(config.data_path, exist_ok=True)
        with locked(f"{tree}.lock", waiting):
            if os.path.isdir(tree):  # by another run meanwhile
                return
            remove_leftovers(config.data_path)
            with tempfile.TemporaryDirectory(dir=config.data_path, prefix=ASIDE) as aside:
                fetch(config, aside)
                os.replace(os.path.join(aside, os.path.basename(tree)), tree)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = first_line(error)
        raise ConfigError(f"download: {config.dataset} cannot be fetched into {config.data_path}: {reason}") from error


def fetch(config: Config, folder: str) -> None:
    """Fetch Imagenette or Imagewoof and unpack it in `folder`.

    Raises:
        OSError, RuntimeError, EOFError, TarError, zlib.error: it cannot be fetched, or comes damaged.
    """
    name, _, size = config.dataset.partition("-")
    if name == "imagenette":  # whose checksums torchvision knows
        Imagenette(folder, split="train", size=size or "full", download=True)
        return
    archive = f"{os.path.basename(fastai_path(config))}.tgz"
    download_url(f"https://s3.amazonaws.com/fast-ai-imageclas/{archive}", folder)  # beside Imagenette
    path = os.path.join(folder, archive)
    with gzip.open(path) as whole:  # to its end, where its checksum lies: unpacking stops before
        while whole.read(2**20):
            pass
    extract_archive(path, folder)


def remove_leftovers(folder: str) -> None:
    """Remove what downloads that were killed have left: folders aside that are more than a day old."""
    for name in os.listdir(folder):
        place = os.path.join(folder, name)
        with suppress(OSError):  # of another run, that has just removed it
            if name.startswith(ASIDE) and time.time() - os.path.getmtime(place) > 86_400:
                shutil.rmtree(place, ignore_errors=True)


def no_folder(root: str) -> ConfigError:
    """Make the error of a folder of images that is not there."""
    return ConfigError(f"no folder {root}; data_path and the names of its splits must lead to one folder per class")


def split_folders(config: Config) -> tuple[str, str]:
    """Find the folders of the training and the validation images.

    Raises:
        ConfigError: Imagenette or Imagewoof is not there.
    """
    if config.dataset != "imagefolder":
        tree = fastai_tree(config)
        return os.path.join(tree, "train"), os.path.join(tree, "val")
    return os.path.join(config.data_path, config.train_split), os.path.join(config.data_path, config.val_split)


def check_folders(config: Config) -> None:
    """Raise ConfigError if a folder of images is missing that is not to be downloaded; look at nothing in them.

    It takes no time, so that whatever does (to download weights) comes later.
    """
    if config.dataset == "hub":
        check_hub(config)
    if config.dataset in ("hub", "digits") or config.download:
        return
    for root in split_folders(config):
        if not os.path.isdir(root):
            raise no_folder(root)


def load_data(config: Config, runtime: Runtime) -> Data:
    """Load the data set of the run: lists of image files, tables of the Hub, or the digits themselves.

    Raises:
        ConfigError: not there, empty, too few validation images, or the two splits have different classes.
    """
    if config.dataset == "digits":
        return Data(train=Digits(train=True), val=Digits(train=False))
    if config.download:
        runtime.on_each_machine(partial(download, config))
    train, val = load_hub(config, runtime) if config.dataset == "hub" else load_trees(config, runtime)
    if len(val) < runtime.world_size:
        raise ConfigError(f"{len(val)} validation image(s) are too few for {runtime.world_size} processes")
    return Data(train=train, val=val, skipped={"train": train.skipped, "val": val.skipped})


def load_trees(config: Config, runtime: Runtime) -> tuple[ImageTree, ImageTree]:
    """Load the lists of the training and the validation images of folders.

    Rank 0 lists the files, and all take its list: the disk is asked once, and all have the same images in the same
    order.

    Raises:
        ConfigError: as `ImageTree`; or the two have different classes.
    """
    train_root, val_root = split_folders(config)
    skip = config.on_bad_image == "skip"
    train = runtime.share(partial(ImageTree, train_root, config.cache_dataset, config.train_list, skip))
    val = runtime.share(partial(ImageTree, val_root, config.cache_dataset, config.val_list, skip))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigError(
            f"{train_root} and {val_root} must hold the same class folders; only one has {', '.join(odd[:5])}"
        )
    if config.train_list is not None:
        check_listed(train, config.train_list)
    if runtime.is_main and (common := count_common(train.samples, val.samples)):
        # No error: to see whether a model can learn its training images by heart is a common test of a new data set.
        runtime.say(
            printable(f"warning: {common} of {len(val)} validation images are training images too, {train_root} and ")
            + printable(f"{val_root} are one folder; accuracy will say nothing about new images")
        )
    return train, val


def check_listed(train: ImageTree, path: str) -> None:
    """Raise ConfigError if a list of training images leaves a class without any."""
    counts = np.bincount(train.targets, minlength=len(train.classes))
    empty = [train.classes[number] for number in np.flatnonzero(counts == 0)]
    if empty:
        raise ConfigError(
            f"{path} lists no image of {len(empty)} of {len(counts)} classes, such as {empty[0]}; add some"
        )


def count_common(one: FileList, other: FileList) -> int:
    """Count the files that both lists name, if they are of one folder; else 0, without a look at the files.

    `python -m images.check` finds equal files of different folders, for which it has to read all.
    """
    if os.path.realpath(one.root) != os.path.realpath(other.root):
        return 0
    names = {one.name(i) for i in range(len(one))}
    return sum(other.name(i) in names for i in range(len(other)))
