"""Checkpoints: what they hold, written so that a crash leaves a whole one, read without unpickling code."""

import argparse
import errno
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, Any, BinaryIO, Protocol

import torch
from torch import Tensor

from learning.state import RunState
from settings.errors import ConfigError, RunError

CHECKPOINT_FORMAT = 1
NOT_THERE = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # on this disk
UNFINISHED = ".tmp"  # ends the name of a file that is being written
TIMED = "fit_time"  # the name of a checkpoint that is written to be timed, and removed at once


@dataclass
class Checkpoint:
    """Everything a resume needs, as plain values and tensors on the CPU.

    model, optimizer, scaler, model_ema: state dicts; scaler's is empty where it is off, model_ema None without EMA
    ema_updates: of the average so far
    config: the settings, as `Config.as_dict` gives them
    classes, num_images: of the training data
    store_side: short side of images out of a decode-once store, pixels; None where files were read
    on_device: how many sets of images lay on the GPU: none, those to train on, or all; None in older files
    best: fingerprint of the file of the best weights that `state` tells of; None before there are any, and in older files
    read_from: the file it was read from, which is not part of it
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    state: RunState
    world_size: int
    config: dict[str, Any]
    classes: list[str]
    num_images: int
    store_side: int | None = None
    on_device: int | None = None
    model_ema: dict[str, Tensor] | None = None
    ema_updates: int = 0
    best: str | None = None
    read_from: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to what a file holds; without EMA its two fields are left out."""
        content = dict(vars(self), state=asdict(self.state), format=CHECKPOINT_FORMAT)
        del content["read_from"]
        if self.model_ema is None:
            del content["model_ema"], content["ema_updates"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Checkpoint":
        """Build a checkpoint from what `to_dict` returned.

        Raises:
            KeyError, TypeError: something is missing, or something is there that this version does not know.
        """
        parts = {name: value for name, value in content.items() if name != "format"}
        return cls(**parts | {"state": RunState(**parts["state"])})

    def save(self, path: str, keep: bool = True) -> None:
        """Write the checkpoint to `path`; keep the one that was there as `checkpoint_previous.pth`.

        A crash at any moment leaves a whole one.

        keep: False where the one in `path` is known to be damaged: it is replaced, the one before it stays

        Raises:
            RunError: it cannot be written.
        """
        write_beside(path, self.to_dict())
        if keep and os.path.exists(path):
            os.replace(path, previous_checkpoint(path))
        put_in_place(path)

    @classmethod
    def load(cls, path: str) -> "Checkpoint":
        """Read a checkpoint of this project.

        Raises:
            ConfigError: no such file, damaged, not a checkpoint, or one of another version.
        """
        try:
            content = read_safely(path)
        except FileNotFoundError as error:
            raise ConfigError(f"resume: no file {path}") from error
        except Damaged as error:
            raise ConfigError(f"resume: {path} is damaged or no checkpoint ({error})") from error
        if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
            raise ConfigError(
                f"resume: {path} is not a checkpoint of this script; to start from its weights use --weights"
            )
        try:
            return cls.from_dict(content | {"read_from": path})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"resume: {path} is of another version of this script ({error})") from error


def previous_checkpoint(path: str) -> str:
    """Build the path that the checkpoint before the one in `path` is kept at."""
    stem, extension = os.path.splitext(path)
    return f"{stem}_previous{extension}"


# ---- files ----


class Damaged(ValueError):
    """A file that is not as it was written, or was never written by torch.save."""


def read_safely(path: str) -> Any:
    """Read what torch.save has written, every byte of it checked; no code is unpickled.

    A file holds the CRC-32 of each of its parts, which torch.load does not look at: a flipped bit of a weight would be
    trained on. Comparing them takes 0.3 s of one core for 1 GiB (AMD EPYC), reading them 0.7. Files in the format before torch
    1.6, and those written with CRCs switched off, have none.

    Raises:
        FileNotFoundError: no such file.
        Damaged: it cannot be read, or is not what was written.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                check_parts(file)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):  # the settings in checkpoints of the reference
                return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # what zipfile and torch raise on a damaged file varies with the damage
        raise Damaged(
            " ".join(str(error).split())[:80] if isinstance(error, Damaged) else type(error).__name__
        ) from error


FOLDER = 0x10  # of a zip file's attributes: torch.load then takes the part for empty, and leaves its tensor as it comes


def check_parts(file: BinaryIO) -> None:
    """Compare each part of a file of torch.save with its CRC-32.

    Raises:
        Damaged: one differs; others of zipfile where the file's order is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.external_attr & FOLDER:
                raise Damaged(f"its part {part.filename} is marked as a folder")
        if all(part.CRC == 0 for part in archive.infolist()):  # torch.serialization.set_crc32_options(False)
            return
        damaged = archive.testzip()
    if damaged is not None:
        raise Damaged(f"its part {damaged} is not what was written")


def fingerprint(path: str) -> str | None:
    """Compute from a file's own list of CRCs which file of torch.save it is; None if it has no such list."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = sorted((part.filename, part.CRC) for part in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return f"{zlib.crc32(repr(parts).encode()):08x}"


def write_safely(path: str, content: Any) -> None:
    """Save with torch.save by way of a temporary file, so that `path` never holds half a file.

    Raises:
        RunError: it cannot be written.
    """
    write_beside(path, content)
    put_in_place(path)


def write_beside(path: str, content: Any) -> None:
    """Save with torch.save to the temporary file beside `path`, down to the disk.

    Raises:
        RunError: it cannot be written; the temporary file is then removed.
    """
    try:
        with naming_fault(path), open(path + UNFINISHED, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk, say: leave no half file behind
        with suppress(OSError):
            os.remove(path + UNFINISHED)
        raise


@contextmanager
def appearing(path: str, mode: str, **how: Any) -> Iterator[IO[Any]]:
    """Open a file that takes its place in `path`, on the disk, when the block has ended, and never if an error ends it.

    mode, how: of `open`

    Raises:
        RunError: it cannot be written.
    """
    try:
        with naming_fault(path):
            file = open(path + UNFINISHED, mode, **how)  # noqa: SIM115, closed below
        with file:
            yield file
            with naming_fault(path):
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.remove(path + UNFINISHED)
        raise
    put_in_place(path)


def put_in_place(path: str) -> None:
    """Rename the temporary file beside `path` to it, so that it stands there after a loss of power, too."""
    with naming_fault(path):
        os.replace(path + UNFINISHED, path)
        sync_folder(os.path.dirname(path))


def sync_folder(folder: str) -> None:
    """Have the disk know the names of the files in `folder`; a file's own content is synced apart from that."""
    with suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
        finally:
            os.close(descriptor)


@contextmanager
def naming_fault(path: str) -> Iterator[None]:
    """Convert an error of the disk within the block to a RunError that names `path` and what helps.

    torch.save may raise an error of its own on top of the disk's.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise RunError.of_disk(cause, path) from error


# ---- states in memory ----


class Stateful(Protocol):
    """Anything with a state: a model, an optimizer, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@contextmanager
def undone(*parts: Stateful) -> Iterator[None]:
    """Restore every part (model, optimizer, scaler) to its state before the block, once that ends.

    The states are kept on the CPU, so that the device holds no more than in training.
    """
    saved = [to_cpu(part.state_dict()) for part in parts]
    try:
        yield
    finally:
        for part, state in zip(parts, saved):
            if state:  # a disabled scaler has none
                part.load_state_dict(state)


def to_cpu(state: Any) -> Any:
    """Copy nested state, its tensors to the CPU.

    Those of a GPU are copied into pinned memory, none waiting for the one before, and waited for together: an
    EfficientNetV2-S with EMA and optimizer has 3,000 of them. torch keeps that memory for the next time.
    """
    streams = set()

    def copy(part: Any) -> Any:
        if isinstance(part, Tensor):
            if part.device.type == "cuda":
                streams.add(torch.cuda.current_stream(part.device))
            return part.detach().to("cpu", non_blocking=True, copy=True)
        if isinstance(part, dict):
            return {key: copy(value) for key, value in part.items()}
        return [copy(value) for value in part] if isinstance(part, list) else part

    copies = copy(state)
    for stream in streams:
        stream.synchronize()
    return copies
