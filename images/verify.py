"""Images that can be read, and those that cannot."""

import errno
import json
import os
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import numpy as np
import PIL
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from augment.pixels import to_rgb
from images.listing import FileList, fault_of, kept_path
from images.workers import closing_loader, loader_on_all_cores
from settings.errors import ConfigError, RunError


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image file, whose pixels are not decoded yet.

    Raises:
        Exception: it cannot be opened; of what type varies with the fault.
    """
    fault = fault_of(os.stat(path).st_mode)
    if fault is not None:
        raise ValueError(fault)
    with Image.open(path) as image:
        yield check_opened(image)


def check_opened(image: Image.Image) -> Image.Image:
    """Return an image that was opened; raise ValueError if it must not be decoded."""
    if image.format == "EPS":  # PIL would start Ghostscript, which runs the program that the file is
        raise ValueError("it is PostScript")
    if 0 in image.size:
        raise ValueError("it has no pixels")
    return image


def read_bytes(path: str) -> NDArray[np.uint8]:
    """Read an image file as it is.

    Raises:
        ConfigError: it cannot be read.
    """
    with naming_damage(path):
        fault = fault_of(os.stat(path).st_mode)
        if fault is not None:
            raise ValueError(fault)
        return np.fromfile(path, np.uint8)


def unreadable(path: str, reason: str) -> ConfigError:
    """Make the error of an image that cannot be read."""
    return ConfigError(f"{path} cannot be read as an image: {reason}; mend or remove it")


# Errors of the system that are of the file: it is gone, may not be read, or is no file.
OF_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO, errno.ENODEV}  # fmt: skip


def of_machine(error: Exception) -> TypeGuard[OSError]:
    """Check whether an error is of the disk or the system (too many open files), not of the image that was to be read."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in OF_FILE


@contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Convert any error within to a ConfigError which says that `path` cannot be read as an image.

    Raises:
        RunError: the disk fails, or the system.
        MemoryError: as it is.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # what PIL raises on a damaged file varies with the damage
        if of_machine(error):
            raise RunError.of_disk(error, path) from error
        raise unreadable(path, reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Say why a file could not be read; what system and PIL say of its name is left out, it is said already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Finding:
    """What one image file holds.

    fault: why it cannot be read; None if it can, and the rest is known
    lasting: the fault is the file's own, not one of the disk or the rights to it, which may pass
    width, height: pixels
    digest: of its bytes
    """

    index: int
    fault: str | None = None
    width: int = 0
    height: int = 0
    digest: int = 0
    lasting: bool = True


class Rows(Protocol):
    """Images that lie in something else than files."""

    def __len__(self) -> int: ...
    def open(self, index: int) -> AbstractContextManager[Image.Image]: ...
    def fingerprint(self) -> str: ...


class Inspecting(Dataset):
    """Item i: what file or row i holds, decoded whole.

    digests: also hash the bytes of files
    """

    def __init__(self, files: FileList | Rows, digests: bool):
        self.files = files
        self.digests = digests

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Finding:
        digest = 0
        try:
            with self.open(index) as image:
                width, height = image.size
                to_rgb(image)
            if self.digests and isinstance(self.files, FileList):
                digest = xxhash.xxh3_64_intdigest(np.fromfile(self.files[index][0], np.uint8).data)
        except Exception as error:  # what PIL raises on a damaged file varies with the damage
            lasting = error.errno is None if isinstance(error, OSError) else not isinstance(error, MemoryError)
            return Finding(index, reason_of(error), lasting=lasting)
        return Finding(index, None, width, height, digest)

    def open(self, index: int) -> AbstractContextManager[Image.Image]:
        return open_image(self.files[index][0]) if isinstance(self.files, FileList) else self.files.open(index)


def inspect(files: FileList | Rows, title: str, digests: bool = False) -> Generator[Finding, None, None]:
    """Look at every file, on all cores, behind a progress bar; yield what each holds, in order.

    digests: also hash the bytes
    """
    loader = loader_on_all_cores(Inspecting(files, digests))
    bar = tqdm(total=len(files), desc=title, unit="images", delay=1, leave=False, disable=None)
    with bar, closing_loader(loader):
        for findings in loader:
            yield from findings
            bar.update(len(findings))


def find_bad(files: FileList | Rows, title: str) -> list[tuple[int, str]]:
    """Find the files or rows that cannot be read: their numbers, and why.

    What was found is kept, so that the next start looks only at files that have changed: not at one, or at all. It is
    not kept where the fault was the system's.
    """
    path = kept_path(f"{files.fingerprint()}-{PIL.__version__}.json")  # another one may know more formats
    with suppress(OSError, ValueError, TypeError), open(path, encoding="utf-8") as file:
        return [(int(index), str(fault)) for index, fault in json.load(file)]
    with closing(inspect(files, title)) as findings:
        found = [finding for finding in findings if finding.fault is not None]
    # A fault of the disk may have passed: each image that it cost would be another data set.
    again = Inspecting(files, digests=False)
    found = [finding for finding in found if finding.lasting or again[finding.index].fault is not None]
    bad = [(finding.index, str(finding.fault)) for finding in found]
    if not all(finding.lasting for finding in found):
        return bad
    with suppress(OSError):  # the next start has to look again
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
            json.dump(bad, file)
        os.replace(f"{path}.{os.getpid()}", path)
    return bad
