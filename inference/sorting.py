"""Images sorted into folders, one for each class."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count

from inference.predictions import Prediction
from learning.checkpoint import UNFINISHED


class Sorter:
    """Copies images, or links to them, into the folder of their most probable class.

    The images themselves stay where they are, and nothing is overwritten: of two images of one name the second has its
    number before the ending.

    folder: new or empty
    by: "copy", or "link" for symbolic links
    """

    def __init__(self, folder: str, classes: Sequence[str], by: str):
        self.places = [os.path.join(folder, name) for name in folder_names(classes)]
        self.by = by

    def put(self, prediction: Prediction, number: int) -> bool:
        """Put an image into its folder; leave one that could not be read. Return False if it has gone since it was read.

        number: of the image among all

        Raises:
            OSError: that cannot be done.
        """
        if prediction.fault:
            return True
        place = self.places[prediction.classes[0]]
        os.makedirs(place, exist_ok=True)
        name = next(
            name for name in names_like(prediction.path, number) if not os.path.lexists(os.path.join(place, name))
        )
        to = os.path.join(place, name)
        if self.by == "link":
            os.symlink(os.path.abspath(prediction.path), to)
            return True
        unfinished = os.path.join(place, f".{number}{UNFINISHED}")
        try:
            shutil.copy2(prediction.path, unfinished)
            os.rename(unfinished, to)
        except BaseException as error:
            with suppress(OSError):
                os.remove(unfinished)
            if isinstance(error, FileNotFoundError) and error.filename == prediction.path:
                return False
            raise
        return True


def names_like(path: str, number: int) -> Iterator[str]:
    """Yield names for a copy of `path`: its own, and such with the image's number."""
    name = os.path.basename(path)
    yield name
    stem, ending = os.path.splitext(name)
    for again in count():
        yield f"{stem}-{number}{f'-{again}' if again else ''}{ending}"


def folder_names(classes: Sequence[str]) -> list[str]:
    """Name a folder for each class: its name, but for what a file system would not take or not tell apart."""
    names = [re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(" .") or "_" for name in classes]
    if len({name.casefold() for name in names}) < len(names):
        return [f"{number} {name}" for number, name in enumerate(names)]
    return names
