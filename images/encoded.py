"""Images that are decoded when they are asked for, wherever they lie."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from augment.pixels import to_rgb
from images.verify import naming_damage, of_machine
from settings.errors import RunError


class EncodedImages(ABC):
    """Images in files or rows; item i is an RGB PIL image and its class number.

    classes: names, in the order of their numbers
    targets: class numbers (N,)
    root: where they are from
    only: text file of those that are used, None for all
    skipped: where each image that was left out lies, and its fault
    """

    classes: list[str]
    targets: NDArray[np.int64]
    root: str
    only: str | None = None
    skipped: list[tuple[str, str]]

    @abstractmethod
    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        """Open image `index` as it lies there: of any mode, and not decoded yet."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Say where image `index` lies."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Compute what changes with the images, their order or their classes."""

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.opened(index) as (image, target):
            return to_rgb(image), target

    @contextmanager
    def opened(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        """Open image `index`, and its class number.

        Raises:
            ConfigError: what the caller does with it fails, and the image turns out to be damaged.
            RunError: the disk fails, or the system.
        """
        try:
            with self.open(index) as image:
                yield image, int(self.targets[index])
        except Exception as error:
            if of_machine(error):
                raise RunError.of_disk(error, self.describe(index)) from error
            with naming_damage(self.describe(index)), self.open(index) as image:
                to_rgb(image)
            raise  # the image is sound, the fault is the caller's
