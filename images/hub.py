"""Images of the Hugging Face Hub, or of a folder of Parquet, by way of the library `datasets`.

The library fetches a data set once and keeps it as tables in its cache, which are mapped into memory: all processes share
one copy, in the memory that the system uses to cache files. Nothing is decoded before a worker asks for it.
"""

import hashlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from images.encoded import EncodedImages
from images.verify import check_opened, find_bad, open_image
from settings.errors import ConfigError, printable
from settings.table import DEFAULTS, Config
from utils import Runtime

LABELS = ("label", "labels")  # names of a column of class numbers or names that has no type of its own
OTHER_NAMES = ("validation", "valid", "test")  # of a split that is not called "val"


def check_hub(config: Config) -> None:
    """Raise ConfigError if the package is not there, or data_path can be no data set; ask no one.

    It takes no time.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("dataset hub needs the package: pip install datasets, or give another --dataset")
    path = config.data_path
    if not os.path.isdir(path) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ConfigError(f"data_path {path} is neither a folder nor a data set's name on the Hub (owner/name)")


def load_hub(config: Config, runtime: Runtime) -> tuple["HubImages", "HubImages"]:
    """Load the training and the validation images of a data set.

    One process of each machine fetches it, and all open what it has kept.

    Raises:
        ConfigError: not there, not to be fetched, without such a split, without images or labels.
    """
    check_hub(config)
    runtime.on_each_machine(partial(prepare, config))
    builder = find_builder(config)
    there = list(builder.info.splits)
    names = [config.train_split, config.val_split]
    if config.val_split == DEFAULTS["val_split"] and config.val_split not in there:
        names[1] = next((name for name in OTHER_NAMES if name in there), config.val_split)
    if names[0] == names[1]:  # no error, as with folders
        runtime.say(f"warning: training and validation images are one split, {names[0]}; accuracy will say nothing new")
    tables = [open_split(config, builder, name) for name in names]
    image, label = find_columns(config, tables[0].features)
    classes = class_names(tables[0], label)
    train, val = (
        HubImages(f"{config.data_path}, split {name}", place_of(config, name), table, image, label, classes)
        for name, table in zip(names, tables)
    )
    if config.on_bad_image == "skip":
        for images in (train, val):
            images.leave_out(runtime.share(images.find_bad))
    runtime.say(
        f"{config.data_path}: images of column {image}, classes of column {label}, splits {' and '.join(names)}"
    )
    return train, val


def place_of(config: Config, split: str) -> str:
    """Build a path that stands for a split: of a name on the Hub one that no file has."""
    path = config.data_path
    return os.path.join(
        os.path.abspath(path) if os.path.isdir(path) else f"/hub/{path}", config.hub_config or "", split
    )


# ---- what the library does ----


def find_builder(config: Config) -> Any:
    """Find what builds the tables of the data set.

    Raises:
        ConfigError: no such data set or configuration, or it cannot be reached.
    """
    import datasets  # takes a second or two; other data sets need not wait

    try:
        return datasets.load_dataset_builder(config.data_path, config.hub_config)
    except Exception as error:  # of the library, the network, the file system: anything
        raise refused(config, error) from error


def prepare(config: Config) -> None:
    """Fetch the data set into the library's cache, unless it is there.

    Raises:
        ConfigError: as `find_builder`; or its files are damaged.
    """
    builder = find_builder(config)
    try:
        builder.download_and_prepare()
    except Exception as error:  # as above
        raise refused(config, error) from error


def refused(config: Config, error: Exception) -> ConfigError:
    """Make the error of a data set that the library does not load."""
    while type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    help = "see its page on the Hub, or give a folder of Parquet"
    if type(error).__name__ == "DatasetNotFoundError":
        help = "mind the spelling (owner/name); a private one needs `hf auth login`"
    elif isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in ("httpx", "requests", "aiohttp"):
        help = "without a network give a data set that was fetched before, or a folder of Parquet"
    elif "Config name is missing" in reason or "BuilderConfig" in reason:
        help = "name one with --hub-config"
    elif "script" in reason:
        help = "the library runs no code of a data set any more; give a data set in Parquet"
    return ConfigError(f"data_path {config.data_path} cannot be loaded by the library datasets: {reason}; {help}")


def open_split(config: Config, builder: Any, name: str) -> Any:
    """Map the table of a split, or of a slice of one such as `train[:90%]`, into memory.

    Raises:
        ConfigError: there is no such split, or nothing in it.
    """
    there = ", ".join(builder.info.splits)
    try:
        table = builder.as_dataset(split=name)
    except Exception as error:  # what the library raises for a wrong slice varies with the mistake
        raise ConfigError(
            f"data_path {config.data_path} has no split {name}, it has {there}; name them with --train-split and "
            "--val-split, slices too, as in train[:90%]"
        ) from error
    if not len(table):
        raise ConfigError(f"data_path {config.data_path}: split {name} has no rows")
    return table


def find_columns(config: Config, features: Any) -> tuple[str, str]:
    """Find the columns of images and of labels: as named by the settings, else by their type.

    Raises:
        ConfigError: none of that name; none of that type, or several.
    """
    import datasets

    def named(setting: str) -> str | None:
        name = getattr(config, setting)
        if name is not None and name not in features:
            raise ConfigError(f"{setting} {name}: data_path {config.data_path} has the columns {', '.join(features)}")
        return name

    def only(found: Sequence[str], what: str, setting: str) -> str:
        if len(found) == 1:
            return found[0]
        several = f"has several columns of {what} ({', '.join(found)})" if found else f"has no column of {what}"
        raise ConfigError(
            f"data_path {config.data_path} {several}; its columns are {', '.join(features)}; name one with "
            f"--{setting.replace('_', '-')}"
        )

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in LABELS if name in features]
    image = named("image_column") or only(images, "images", "image_column")
    return image, named("label_column") or only(labels, "labels", "label_column")


def class_names(table: Any, label: str) -> list[str]:
    """List the names of the classes: those that the column knows, else its values in the training images, sorted.

    Raises:
        ConfigError: the column's values are no whole numbers and no text, or are missing.
    """
    import datasets

    kind = table.features[label]
    if isinstance(kind, datasets.ClassLabel):
        return [printable(name) for name in kind.names]
    return [printable(str(value)) for value in np.unique(values_of(table, label)).tolist()]


def values_of(table: Any, label: str) -> NDArray:
    """Read a column of labels (N,), and no other.

    Raises:
        ConfigError: as `class_names`.
    """
    column = table.select_columns([label]).with_format("arrow")[:][label]
    missing = column.null_count
    values = column.to_numpy(zero_copy_only=False) if not missing else np.empty(0)
    if not missing and values.dtype.kind == "O" and all(isinstance(value, str) for value in values[:1000]):
        values = values.astype(str)
    if missing or values.dtype.kind not in "iuUb":
        why = f"{missing} of its {len(table)} values are missing" if missing else f"it holds {column.type}"
        raise ConfigError(f"label_column {label} has no classes, {why}; name another column or split")
    return values


# ---- the images ----


class HubImages(EncodedImages):
    """The images of a split.

    name: of the split, for messages
    rows: the numbers of those that are used, in the table (N,)

    Raises:
        ConfigError: the column holds no images; a label is of no class.
    """

    def __init__(self, name: str, root: str, table: Any, image: str, label: str, classes: list[str]):
        import datasets

        self.name, self.root, self.column, self.classes = name, root, image, classes
        self.key = f"{table._fingerprint} {image} {label}"  # of the library's files, and of a slice
        kind, values = table.features[label], values_of(table, label)
        if isinstance(kind, datasets.ClassLabel):
            numbers = values.astype(np.int64)
        else:
            number_of = {name: number for number, name in enumerate(classes)}
            numbers = np.array([number_of.get(printable(str(value)), -1) for value in values.tolist()])
        if len(unknown := np.flatnonzero((numbers < 0) | (numbers >= len(classes)))):
            raise ConfigError(
                f"{name}: {len(unknown)} of {len(values)} rows have a label of no training class, first row "
                f"{unknown[0]} ({values[unknown[0]]}); name another split or label_column"
            )
        try:
            self.table = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # what the library and Arrow raise varies with the column's type
            raise ConfigError(f"image_column {image} of {name} holds no images; name another") from error
        self.targets, self.rows = numbers, np.arange(len(numbers))
        self.skipped: list[tuple[str, str]] = []

    @contextmanager
    def open(self, index: int) -> Iterator[Image.Image]:
        value = self.table[int(self.rows[index])][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ValueError("it is empty")
        if value["bytes"] is None:
            with open_image(value["path"]) as image:
                yield image
        else:
            with Image.open(io.BytesIO(value["bytes"])) as image:
                yield check_opened(image)

    def describe(self, index: int) -> str:
        return f"row {self.rows[index]} of {self.name}"

    def fingerprint(self) -> str:
        key = hashlib.sha256(self.key.encode())
        for part in (self.targets, self.rows):
            key.update(part.tobytes())
        return key.hexdigest()[:32]

    def find_bad(self) -> list[tuple[int, str]]:
        """Find the images that cannot be read: their numbers, and why."""
        return find_bad(self, f"looking at {self.name}")

    def leave_out(self, bad: Sequence[tuple[int, str]]) -> None:
        """Leave out images.

        Raises:
            ConfigError: a class has no others.
        """
        self.skipped = [(self.describe(index), fault) for index, fault in bad]
        before, left_out = set(self.targets.tolist()), [index for index, _ in bad]
        self.targets, self.rows = np.delete(self.targets, left_out), np.delete(self.rows, left_out)
        lost = before - set(self.targets.tolist())
        if lost:
            name, first = self.classes[min(lost)], ": ".join(self.skipped[0])
            raise ConfigError(
                f"{self.name}: no image of class {name} can be read; of those left out the first is {first}"
            )
