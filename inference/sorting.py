"""Images sorted into folders, one for each class."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from uuid import uuid4

from inference.predictions import Prediction
from learning.checkpoint import UNFINISHED

LONGEST = 255  # bytes of a file's name


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
        self.own = uuid4().hex[:8]  # of its unfinished copies, so that another program may fill the same folder

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
        try:
            with self.whole(prediction.path, place, number) as source:
                for name in names_like(prediction.path, number):
                    with suppress(FileExistsError):
                        give_name(source, os.path.join(place, name), link=self.by == "link")
                        break
        except FileNotFoundError as error:
            if error.filename != prediction.path:
                raise
            return False
        return True

    @contextmanager
    def whole(self, path: str, place: str, number: int) -> Iterator[str]:
        """Make a whole copy of an image in a folder, for the time of the block; of a link only what it leads to is named."""
        if self.by == "link":
            yield os.path.abspath(path)
            return
        copy = os.path.join(place, f".{number}.{self.own}{UNFINISHED}")
        try:
            shutil.copy2(path, copy)
            yield copy
        finally:
            with suppress(OSError):
                os.remove(copy)


def give_name(source: str, to: str, link: bool) -> None:
    """Give a file a name that nothing has, or make a symbolic link to it.

    Raises:
        FileExistsError: something has that name.
        OSError: it cannot be done.
    """
    if link:
        os.symlink(source, to)
        return
    try:
        os.link(source, to)
    except FileExistsError:
        raise
    except OSError:  # a file system that gives a file one name only
        if os.path.lexists(to):
            raise FileExistsError(to) from None
        os.rename(source, to)


def names_like(path: str, number: int) -> Iterator[str]:
    """Yield names for a copy of `path`: its own, and such with the image's number, cut to what a file system takes."""
    name = os.path.basename(path)
    yield name
    stem, ending = os.path.splitext(name)
    for again in count():
        suffix = f"-{number}{f'-{again}' if again else ''}{ending}"
        while stem and len(os.fsencode(stem + suffix)) > LONGEST:
            stem = stem[:-1]
        while len(os.fsencode(stem + suffix)) > LONGEST:  # all of it is ending
            suffix = suffix[:-1]
        yield stem + suffix


def folder_names(classes: Sequence[str]) -> list[str]:
    """Name a folder for each class: its name, but for what a file system would not take or not tell apart."""
    names = [re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(" .") or "_" for name in classes]
    if len({name.casefold() for name in names}) < len(names):
        return [f"{number} {name}" for number, name in enumerate(names)]
    return names
