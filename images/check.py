"""A look at a data set before a long run: `python -m images.check DIR`.

    python -m images.check data               # data/train and data/val, or the class folders of data itself
    python -m images.check data --all         # every file that is found, not the first twenty of each kind

Every image is decoded, on all cores, so it takes as long as one epoch of reading. Found are files that cannot be read,
tiny and huge images, hidden files that are taken for images, pictures of kinds that are left out, classes of a single
image, classes that only one split has, and equal files: in training and validation, or in two classes. Links are followed.

Exit status: 0 nothing was found; 1 something was; 2 wrong input; 3 the look was cut off, as by memory that ran out.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from images.listing import FileList, scan
from images.verify import inspect
from settings.errors import ConfigError, RunError, outside_training, printable, tell

TINY = 32  # pixels; images of a shorter side hold little that a network could see
HUGE = 50_000_000  # pixels; the largest cameras. PIL warns of 89 million and refuses 179
MOST = 20  # lines of a kind
OTHER_PICTURES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".tga")


@dataclass(frozen=True)
class Looked:
    """What one split holds.

    sizes: width and height (N, 2), 0 of files that cannot be read
    digests: of the bytes (N,)
    bad: path and fault
    """

    files: FileList
    classes: list[str]
    sizes: NDArray[np.int64]
    digests: NDArray[np.uint64]
    bad: list[tuple[str, str]]

    def path(self, index: int) -> str:
        return self.files[index][0]

    def name_of(self, index: int) -> str:
        """Return the class of image `index`."""
        return self.classes[self.files.targets[index]]


def look(split: str, root: str) -> Looked:
    """Look at every image of a folder that holds one folder per class.

    Raises:
        ConfigError: no such folder, or what is in it cannot be listed.
    """
    found = scan(root)
    files, bad = found.files, list(found.bad)
    sizes, digests = np.zeros((len(files), 2), np.int64), np.zeros(len(files), np.uint64)
    with closing(inspect(files, f"looking at {split}", digests=True)) as findings:
        for finding in findings:
            sizes[finding.index] = finding.width, finding.height
            digests[finding.index] = finding.digest
            if finding.fault is not None:
                bad.append((files[finding.index][0], finding.fault))
    return Looked(files, found.classes, sizes, digests, bad)


def report(splits: dict[str, Looked]) -> dict[str, list[str]]:
    """List what was found, by kind, a line for each file, pair of files or class."""
    found: dict[str, list[str]] = {}
    for split, looked in splits.items():
        area = looked.sizes.prod(1)
        short = looked.sizes.min(1)
        of_size = {
            f"tiny, a side below {TINY} px": (short < TINY) & (area > 0),
            f"huge, above {HUGE:,} px": area > HUGE,
        }
        found[f"{split}: cannot be read"] = [f"{path}: {fault}" for path, fault in looked.bad]
        for kind, chosen in of_size.items():
            rows = np.flatnonzero(chosen).tolist()
            found[f"{split}: {kind}"] = [f"{looked.path(i)}: {'x'.join(map(str, looked.sizes[i]))}" for i in rows]
        found[f"{split}: hidden, or made by a program, and taken for images"] = [
            looked.path(i) for i in range(len(looked.files)) if is_hidden(os.fsdecode(looked.files.name(i)))
        ]
        found[f"{split}: pictures of a kind that is left out"] = left_out(looked.files.root)
        counts = np.bincount(looked.files.targets[area > 0], minlength=len(looked.classes))
        found[f"{split}: classes of a single image, or none that can be read"] = [
            looked.classes[number] for number in np.flatnonzero(counts < 2)
        ]
        found[f"{split}: one image in two classes"] = list(in_two_classes(looked))
    if len(splits) == 2:
        (one, train), (other, val) = splits.items()
        odd = sorted(set(train.classes) ^ set(val.classes))
        found[f"classes that only one of {one} and {other} has"] = odd
        found[f"equal files in {one} and {other}"] = list(in_both(train, val))
    return {kind: lines for kind, lines in found.items() if lines}


def is_hidden(name: str) -> bool:
    """Check whether a path below a folder of images is hidden, or of those that macOS and network disks write themselves."""
    return any(part.startswith((".", "@")) or part == "__MACOSX" for part in name.split("/"))


def left_out(root: str) -> list[str]:
    """List the files below `root` that are pictures to people, but whose ending is none that training takes."""
    found, seen = [], set[str]()
    for folder, inside, names in os.walk(root, followlinks=True):
        inside[:] = sorted(name for name in inside if os.path.realpath(os.path.join(folder, name)) not in seen)
        seen.update(os.path.realpath(os.path.join(folder, name)) for name in inside)  # a link may lead back
        pictures = (name for name in sorted(names) if name.lower().endswith(OTHER_PICTURES) and not is_hidden(name))
        found += [os.path.join(folder, name) for name in pictures]
    return found


def in_two_classes(looked: Looked) -> Iterable[str]:
    """Yield a line for each file that equals one of another class: a network cannot learn both."""
    order = np.lexsort((looked.files.targets, looked.digests))
    order = order[looked.sizes[order, 0] > 0]
    digests, targets = looked.digests[order], looked.files.targets[order]
    for i in np.flatnonzero((digests[1:] == digests[:-1]) & (targets[1:] != targets[:-1])).tolist():
        yield f"{looked.path(order[i])} = {looked.path(order[i + 1])}"


def in_both(train: Looked, val: Looked) -> Iterable[str]:
    """Yield a line for each validation image that is a training image too: accuracy on it says nothing."""
    readable = np.flatnonzero(train.sizes[:, 0] > 0)
    place = readable[np.argsort(train.digests[readable], kind="stable")]
    digests = train.digests[place]
    for i in np.flatnonzero(val.sizes[:, 0] > 0).tolist():
        at = int(np.searchsorted(digests, val.digests[i]))
        if at < len(digests) and digests[at] == val.digests[i]:
            yield f"{train.path(place[at])} = {val.path(i)}"


def find_splits(folder: str, train: str | None, val: str | None) -> dict[str, str]:
    """Find the splits of a data set: train/ and val/, or folders of other names, or, if there is none, the folder itself.

    Raises:
        ConfigError: no such folder; no split of a name that was given.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"no folder {folder}; give the folder of a data set, as --data-path takes it")
    for flag, name in (("--train-split", train), ("--val-split", val)):
        if name is not None and not os.path.isdir(os.path.join(folder, name)):
            raise ConfigError(
                f"{flag} {name}: no such folder in {folder}; give the name of a folder there, or leave it out"
            )
    names = dict.fromkeys((train or "train", val or "val"))
    there = {name: os.path.join(folder, name) for name in names if os.path.isdir(os.path.join(folder, name))}
    return there or {os.path.basename(os.path.abspath(folder)): folder}


def main(argv: Sequence[str]) -> int:
    """Run the program; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m images.check", description="Look at a data set before a long run.")
    parser.add_argument("folder", metavar="DIR", help="folder of the data set, as --data-path takes it")
    parser.add_argument("--train-split", metavar="TEXT", help="as train.py takes it (default: train)")
    parser.add_argument("--val-split", metavar="TEXT", help="as train.py takes it (default: val)")
    parser.add_argument("--all", action="store_true", help=f"list all that is found, not the first {MOST} of each kind")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # not every terminal is UTF-8
    try:
        roots = find_splits(options.folder, options.train_split, options.val_split)
        splits = {split: look(split, root) for split, root in roots.items()}
    except ConfigError as error:
        tell(error)
        return 2
    except RunError as error:  # a worker was killed, perhaps by an image that needs more memory than there is
        tell(f"error: {outside_training(error)}")
        return 3
    found = report(splits)
    if len(roots) == 1 and options.folder not in roots.values():
        print(f"only {', '.join(roots)} was looked at: {options.folder} has no other split of the names given")
    for kind, lines in found.items():
        print(f"{kind}: {len(lines)}")
        for line in lines if options.all else lines[:MOST]:
            print(f"  {printable(line)}")
        if not options.all and len(lines) > MOST:
            print(f"  and {len(lines) - MOST} more (--all lists them)")
    counts = ", ".join(
        f"{split} {len(looked.files)} in {len(looked.classes)} classes" for split, looked in splits.items()
    )
    print(f"{counts}: " + (f"{sum(map(len, found.values()))} findings" if found else "nothing found"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
