"""The image files of a folder: found, listed in little memory, kept for the next start."""

import codecs
import hashlib
import json
import os
import stat
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from settings.errors import ConfigError

Entry = tuple[int, int]  # device and inode of a folder: two of one are the same one, by another name


class FileList(Sequence[tuple[str, int]]):
    """The images of a data set: item i is the path of a file and its class number.

    Names lie in one piece of memory: 1.3 million of them take 50 MB, where a list of tuples would take 300, and again in
    every worker, which copies what it counts references of.

    root: folder that the names begin in
    names: all of them, one after the other, with "/" between folders
    ends: where each ends (N,)
    targets: class numbers (N,)
    """

    def __init__(self, root: str, names: bytes, ends: NDArray[np.int64], targets: NDArray[np.int64]):
        self.root, self.names, self.ends, self.targets = root, names, ends, targets

    @classmethod
    def of(cls, root: str, names: Iterable[bytes], targets: Sequence[int] | NDArray[np.int64]) -> "FileList":
        """Make the list of these names and their class numbers."""
        joined, ends = bytearray(), np.empty(len(targets), np.int64)
        for i, name in enumerate(names):
            joined += name
            ends[i] = len(joined)
        return cls(root, bytes(joined), ends, np.asarray(targets, np.int64))

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> bytes:
        """Return the path of file `index` below the root."""
        return self.names[self.ends[index - 1] if index else 0 : self.ends[index]]

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return os.path.join(self.root, os.fsdecode(self.name(index))), int(self.targets[index])

    def choose(self, kept: NDArray) -> "FileList":
        """Make the list of the files whose numbers are in `kept`, in its order."""
        return FileList.of(self.root, map(self.name, kept.tolist()), self.targets[kept])

    def fingerprint(self) -> str:
        """Hash the names, sizes and times of the files, and what some of them hold: it changes when a file does.

        Folders on container layers have all times alike, and images that are not compressed have one size.

        Raises:
            ConfigError: one of them is gone.
        """
        found = np.empty((len(self), 2), np.int64)
        for i, (path, _) in enumerate(self):
            try:
                status = os.stat(path)
            except OSError as error:
                raise ConfigError(f"{path} cannot be read as an image: {error.strerror}; mend or remove it") from error
            found[i] = status.st_size, status.st_mtime_ns
        key = hashlib.sha256(self.names)
        for part in (self.ends, self.targets, found):
            key.update(part.tobytes())
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), 32)).astype(int)).tolist():
            with (
                suppress(OSError),
                open(self[i][0], "rb") as file,
            ):  # one that may not be read is found when it is decoded
                key.update(file.read(2**16))
        return key.hexdigest()[:32]


@dataclass
class Found:
    """What lies below a folder that holds one folder per class.

    folders: path below it, time of change and of status change (ns) of each folder, itself included, from before it was
        listed
    bad: path and fault of what is called as an image and is none
    """

    files: FileList
    classes: list[str]
    folders: list[tuple[str, int, int]]
    bad: list[tuple[str, str]]

    def numbers_of_bad(self) -> set[int]:
        """Find the class numbers of what is called as an image and is none."""
        return {self.classes.index(os.path.relpath(path, self.files.root).split(os.sep)[0]) for path, _ in self.bad}


def scan(root: str) -> Found:
    """List the images of a folder that holds one folder per class, at any depth below it, links followed.

    The order is torchvision's: of classes, of folders and in them by name. Files are not looked at, but for links, which
    may lead to anything.

    Raises:
        ConfigError: a folder cannot be read, lies within itself by a link, or is a link to nothing; no class folders,
            a class folder without images, or with a name that cannot be shown.
    """
    folders: list[tuple[str, int, int]] = []
    bad: list[tuple[str, str]] = []
    names, targets, empty = [], [], []
    inside, _ = read_folder(root, "", (), folders, [])
    classes = sorted(inside)
    if not classes:
        raise ConfigError(f"{root}: no class folder in it; it must hold one folder of images per class")
    for number, name in enumerate(classes):
        if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name):
            raise ConfigError(f"{os.path.join(root, name)}: a class needs a name that can be shown; rename the folder")
        listed = sorted(walk(root, name, inside[name], folders, bad))
        count = 0
        for folder, images in listed:
            names += [os.fsencode(f"{folder}/{image}") for image in images]
            count += len(images)
        targets.append(np.full(count, number))
        if not count:
            empty.append(name)
    found = Found(FileList.of(root, names, np.concatenate(targets)), classes, folders, bad)
    if empty := [name for name in empty if classes.index(name) not in found.numbers_of_bad()]:
        raise ConfigError(
            f"{root}: no images in class folder(s) {', '.join(empty[:5])}; fill or remove them (files that end in "
            f"{', '.join(IMG_EXTENSIONS)})"
        )
    return found


Inside = dict[str, tuple[Entry, ...]]  # folders in a folder, and what all of them lie in


def walk(root: str, name: str, above: tuple[Entry, ...], folders: list, bad: list) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder from `name` on down, below `root`, with the names of its images."""
    ahead = [(name, above)]
    while ahead:
        name, above = ahead.pop()
        inside, images = read_folder(root, name, above, folders, bad)
        ahead += [(f"{name}/{folder}", above) for folder, above in inside.items()]
        yield name, images


def read_folder(root: str, name: str, above: tuple[Entry, ...], folders: list, bad: list) -> tuple[Inside, list[str]]:
    """List a folder: the folders in it, and its images by name.

    above: the folders it lies in
    folders, bad: of `Found`; what is found is added

    Raises:
        ConfigError: see `scan`.
    """
    path = os.path.join(root, name) if name else root
    try:
        status = os.stat(path)
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"folder {path} cannot be read: {error.strerror}; make it readable or remove it") from error
    own = (status.st_dev, status.st_ino)
    if own in above:
        raise ConfigError(f"{path} is a link to a folder that it lies in; remove it")
    folders.append((name, status.st_mtime_ns, status.st_ctime_ns))
    inside: Inside = {}
    images = []
    for entry in entries:
        is_image = entry.name.lower().endswith(IMG_EXTENSIONS)
        fault = None
        if entry.is_dir(follow_symlinks=False):
            inside[entry.name] = (*above, own)
        elif not entry.is_file(follow_symlinks=False):  # else there is no need to ask the disk
            try:
                mode = entry.stat().st_mode
                if stat.S_ISDIR(mode):
                    inside[entry.name] = (*above, own)
                    continue
                fault = fault_of(mode)
            except OSError as error:
                fault = "it is a link to nothing" if isinstance(error, FileNotFoundError) else str(error.strerror)
                if not is_image and (not name or "." not in entry.name):  # it may have led to a folder of images
                    raise ConfigError(f"{entry.path} cannot be read: {fault}; mend or remove it") from error
        if is_image and name and entry.name not in inside:
            if fault is None:
                images.append(entry.name)
            else:
                bad.append((entry.path, fault))
    return inside, images


def fault_of(mode: int) -> str | None:
    """Tell why something with this mode is no file to read from; None if it is one.

    To open a FIFO would wait for someone to write into it.
    """
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return f"it is a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file"


def keep_listed(found: Found, path: str) -> Found:
    """Choose the images that a text file lists: one path below the root a line, with "/" between folders.

    They stay in the order of the folder, so that a list's own order means nothing. Empty lines and lines that begin
    with # are left out. Bytes that are no UTF-8 stand for themselves, as in the names of files.

    Raises:
        ConfigError: the file cannot be read, lists nothing, or an image that is not there.
    """
    try:
        with open(path, "rb") as file:
            lines = [
                line.strip().removeprefix(b"./") for line in file.read().removeprefix(codecs.BOM_UTF8).split(b"\n")
            ]
    except OSError as error:
        raise ConfigError(f"cannot read the list of images {path}: {error.strerror}") from error
    names = {line for line in lines if line and not line.startswith(b"#")}
    files = found.files
    kept = [i for i in range(len(files)) if files.name(i) in names]
    bad = {os.fsencode(os.path.relpath(place, files.root)): (place, fault) for place, fault in found.bad}
    missing = names - {files.name(i) for i in kept} - bad.keys()
    if missing or not names:
        example = f", such as {os.fsdecode(min(missing))[:300]}" if missing else ""
        raise ConfigError(
            f"{path} lists {len(names)} images, {len(missing)} of them not in {files.root}{example}; a line is a path below "
            "that folder, with /"
        )
    chosen = files.choose(np.array(kept, np.int64))
    return replace(found, files=chosen, bad=[row for name, row in bad.items() if name in names])


# ---- kept for the next start ----

SETTLED = 2e9  # ns; the coarsest clock of a disk. A folder that changed less than this ago may do so again unnoticed


def kept_path(name: str) -> str:
    """Build the path of a file that keeps what was found out about images; it lies in torch's folder for downloads."""
    return os.path.join(torch.hub.get_dir(), "imagefolder", name)


def list_path(root: str) -> str:
    """Build the path of the file that keeps the list of images of `root`."""
    return kept_path(hashlib.sha1(os.fsencode(os.path.abspath(root))).hexdigest()[:16] + ".npz")


def read_list(root: str) -> Found | None:
    """Read the list of images kept for `root`; None if none fits its folders as they are now."""
    try:
        with np.load(list_path(root)) as kept:
            about = json.loads(kept["about"].tobytes())
            for folder, changed, status_changed in about["folders"]:
                now = os.stat(os.path.join(root, folder))
                if (now.st_mtime_ns, now.st_ctime_ns) != (changed, status_changed):
                    return None
            files = FileList(root, kept["names"].tobytes(), kept["ends"], kept["targets"])
        return Found(files, about["classes"], about["folders"], [])
    except Exception:  # none, or damaged: listed anew. What numpy raises varies with the damage
        return None


def write_list(root: str, found: Found) -> None:
    """Write the list of images of `root` to its file, with the times of every folder below `root`.

    A new image changes its folder's times, by which `read_list` knows that the list is out of date. Nothing is kept of
    folders that have changed just now, or hold what is no image.

    Raises:
        ConfigError: the file cannot be written.
    """
    if found.bad or max(max(times) for _, *times in found.folders) > time.time_ns() - SETTLED:
        return
    files = found.files
    about = json.dumps({"classes": found.classes, "folders": found.folders}).encode()
    names, about_them = (np.frombuffer(text, np.uint8) for text in (files.names, about))
    path = list_path(root)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "wb") as file:
            np.savez(file, about=about_them, names=names, ends=files.ends, targets=files.targets)
        os.replace(f"{path}.{os.getpid()}", path)
    except OSError as error:
        with suppress(OSError):
            os.remove(f"{path}.{os.getpid()}")
        raise ConfigError(f"cache_dataset: cannot write {path}: {error.strerror}; leave it out") from error
