"""The error a user can mend, and how it is told."""

import errno
import os
import re
import sys


class ConfigError(ValueError):
    """An error that the user can mend, because it lies in what they wrote.

    The message is one line: what was given, what is accepted, what to do. The program prints it and ends with exit
    status 2.
    """

    def __init__(self, message: str):
        super().__init__(printable(own_line(type(self), message)))


class RunError(RuntimeError):
    """An error of the machine that a run is on: a disk, a worker, another process.

    The message is one line: the thing, where it is, what helps. The program prints it and ends with exit status 1.
    """

    def __init__(self, message: str):
        super().__init__(printable(own_line(type(self), message)))

    @classmethod
    def of_disk(cls, error: OSError, path: str) -> "RunError":
        """Build the error of a file or folder that cannot be written or read."""
        reason = error.strerror or type(error).__name__
        return cls(f"{path}: {reason}; {REMEDIES.get(error.errno, 'see to the disk')}, then --resume auto continues")


def outside_training(error: RunError | str) -> str:
    """Return an error's message without how a training goes on after it, for programs that train nothing."""
    return re.sub(r"[;,] (then )?--resume auto continues( from the last checkpoint)?$", "", str(error))


REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "allow larger files there",
    errno.EROFS: "make it writable again",
    errno.EACCES: "make it writable again",
    errno.EPERM: "make it writable again",
    errno.ENOENT: "the folder is gone: bring it back",
    errno.ENOTDIR: "the folder is gone: bring it back",
    errno.ESTALE: "connect its disk again",
    errno.EIO: "its disk fails: mend it",
    errno.EMFILE: "allow more open files (ulimit -n), or lower --workers",
    errno.ENFILE: "allow more open files, or lower --workers",
}


def own_line(kind: type[BaseException], message: str) -> str:
    """Return `message`, or its last line where it is the traceback of a worker process.

    torch's loader raises a worker's error again, as a new error of the same type whose message is the worker's
    traceback. That ends in the type's full name, which is removed here, and the first message.
    """
    if not message.startswith(f"Caught {kind.__name__} in "):
        return message
    return (
        message.strip()
        .splitlines()[-1]
        .removeprefix(f"{kind.__module__}.".replace("builtins.", ""))
        .removeprefix(f"{kind.__qualname__}: ")
    )


def printable(text: str) -> str:
    """Write a text on one line that any terminal and log can show.

    File names may hold line breaks, and bytes that are no UTF-8: these become escapes, as in `a\\nb` and `\\xff.jpg`.
    """
    if text.isprintable():
        return text

    def escape(char: str) -> str:
        if "\udc80" <= char <= "\udcff":  # how Python holds such a byte
            return f"\\x{ord(char) - 0xDC00:02x}"
        return char if char.isprintable() else char.encode("unicode_escape").decode()

    return "".join(map(escape, text))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, of a worker's that which it raised; without one, its type's name."""
    return (own_line(type(error), str(error)).strip() or type(error).__name__).splitlines()[0]


def process_rank(world_size: int = 1) -> int:
    """Find which of a run's processes this one is, by what launched it: torchrun, or, with that `world_size`, srun.

    A RANK without a WORLD_SIZE is not torchrun's: `utils.start_runtime` makes no process group of it either.
    """
    rank = os.environ.get("RANK") if "WORLD_SIZE" in os.environ else None
    rank = rank or (os.environ.get("SLURM_PROCID") if world_size > 1 else None) or "0"
    return int(rank) if rank.isdigit() else 0


def tell(error: Exception | str) -> None:
    """Print an error, or a line that says what happened, on stderr; of several processes, also say which it was."""
    tasks = os.environ.get("SLURM_NTASKS", "1")  # of srun, before it is known whether they are one run
    rank = process_rank(int(tasks) if tasks.isdigit() else 1)
    line = printable(error if isinstance(error, str) else f"error: {error}")
    print(f"{f'[rank {rank}] ' if rank else ''}{line}", file=sys.stderr)
