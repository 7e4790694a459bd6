"""The names of the images asked for: files, what lies in folders, names on standard input; in batches, as they come."""

import codecs
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread

from torchvision.datasets.folder import IMG_EXTENSIONS

from inference.options import STDIN
from settings.errors import ConfigError

# Path of an image, and why it can be none, "" where that is not known yet.
Named = tuple[str, str]

LONGEST = 1 << 16  # bytes of a name on standard input; a system's own limit is 4,096
AHEAD = 50_000  # names read ahead, at most; some 10 MB
LINGER = 0.05  # seconds that a batch waits for more names, once it has one


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is not there, and for a folder in which no image is."""
    for path in arguments:
        if path != STDIN and not os.path.lexists(path):
            raise ConfigError(f"no file or folder {path}; give folders, files, or - for names on standard input")
        if os.path.isdir(path) and next(below(path), None) is None:
            raise ConfigError(f"{path}: no images in it or below (files that end in {', '.join(IMG_EXTENSIONS)})")


def names_of(arguments: Iterable[str], separator: bytes = b"\n", descriptor: int = 0) -> Iterator[Named]:
    """Yield the images that the arguments of the command line stand for, in their order.

    separator: ends a name on standard input
    descriptor: of standard input
    """
    for path in arguments:
        if path == STDIN:
            yield from ((name, "") for name in names_on(descriptor, separator))
        elif os.path.isdir(path):
            yield from below(path)
        else:
            yield path, ""


def names_on(descriptor: int, separator: bytes) -> Iterator[str]:
    """Yield the names that come through a pipe, each as soon as it is whole; empty ones are left out.

    A byte-order mark, with which Windows begins its lists, is no part of a name.

    Raises:
        ConfigError: what comes is no list of names, or cannot be read.
    """
    rest, mark = b"", codecs.BOM_UTF8
    while True:
        try:
            # Not sys.stdin: a thread that waits in its buffer hinders the program's end.
            chunk = os.read(descriptor, LONGEST)
        except OSError as error:
            raise ConfigError(f"standard input cannot be read: {error.strerror}") from error
        *names, rest = (rest + chunk).split(separator) if chunk else [rest, b""]
        if len(rest) > LONGEST:
            raise ConfigError(f"standard input is no list of names: one is longer than {LONGEST:,} bytes")
        for name in names:
            if separator == b"\n":
                name, mark = name.removeprefix(mark).removesuffix(b"\r"), b""
                if b"\0" in name:
                    raise ConfigError(
                        "names on standard input hold zero bytes; where these end the names, add --null (-0)"
                    )
            if name:
                yield os.fsdecode(name)
        if not chunk:
            return


def below(folder: str) -> Iterator[Named]:
    """Yield the images in a folder by name, then those of the folders in it, at any depth, links followed.

    What a folder named like an image holds is found as well. A folder that cannot be read is yielded with the reason.
    """
    ahead: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, ())]
    while ahead:
        path, above = ahead.pop()
        images, inside, fault = [], [], ""
        try:
            status = os.stat(path)
            own = (status.st_dev, status.st_ino)
            if own in above:
                fault = "it is a link to a folder that it lies in"
            with os.scandir(path) as entries:
                for entry in () if fault else entries:
                    if is_folder(entry):
                        inside.append(entry.name)
                    elif entry.name.lower().endswith(IMG_EXTENSIONS):
                        images.append(entry.name)
        except OSError as error:
            fault = f"the folder cannot be read: {error.strerror}"
        if fault:
            yield path, fault
        yield from ((os.path.join(path, name), "") for name in sorted(images))
        ahead += [(os.path.join(path, name), (*above, own)) for name in sorted(inside, reverse=True)]


def is_folder(entry: os.DirEntry) -> bool:
    """Check whether an entry is a folder, or a link to one; a link that leads nowhere is none."""
    with suppress(OSError):
        return entry.is_dir()
    return False


class NamedBatches:
    """Batches of names, as they come: what a loader takes for its batch_sampler.

    A batch is full, or holds what has come for now, perhaps nothing: a loader asks for many batches ahead, and the rows
    of the first ones should not wait for names that come later. It is waited for names only where no row is to come.

    under_way: images handed to the loader whose rows have not come yet
    total: images in all, None as long as that is not known
    """

    def __init__(self, names: Iterable[Named], batch_size: int):
        self.names, self.batch_size = names, batch_size
        self.queue: Queue[Named | Exception | None] = Queue(AHEAD)
        self.under_way = 0
        self.total: int | None = None
        self.started = self.ended = False

    def start(self) -> None:
        """Begin to read names; before that batches are empty, so that a loader can start without waiting for one."""
        self.started = True
        Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        """Put the names into the queue, and None after the last, or the error that ended them."""
        count = 0
        try:
            for name in self.names:
                self.queue.put(name)
                count += 1
            self.total = count
            self.queue.put(None)
        except Exception as error:  # raised where the names are taken
            self.queue.put(error)

    def done(self, count: int) -> None:
        """Note that the rows of so many images have come."""
        self.under_way -= count

    def __iter__(self) -> Iterator[list[Named]]:
        while not self.ended:
            batch = self.take()
            self.under_way += len(batch)
            if batch or not self.ended:
                yield batch

    def take(self) -> list[Named]:
        """Take a batch of names from the queue.

        Raises:
            ConfigError: of standard input.
        """
        batch: list[Named] = []
        until = 0.0
        while self.started and len(batch) < self.batch_size:
            try:
                if not batch:
                    name = self.queue.get(block=self.under_way == 0)
                    until = time.monotonic() + LINGER
                else:
                    name = self.queue.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            if isinstance(name, Exception):
                raise name
            if name is None:
                self.ended = True
                break
            batch.append(name)
        return batch
