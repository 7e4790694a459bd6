"""Checkpoints: what they hold, written so that a crash leaves a whole one, read without unpickling code."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from learning.state import RunState
from settings.errors import ConfigError

CHECKPOINT_FORMAT = 1


@dataclass
class Checkpoint:
    """Everything a resume needs, as plain values and tensors on the CPU.

    model, optimizer, scaler, model_ema: state dicts; scaler's is empty where it is off, model_ema None without EMA
    ema_updates: of the average so far
    config: the settings, as `Config.as_dict` gives them
    classes, num_images: of the training data
    store_side: short side of images out of a decode-once store, pixels; None where files were read
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
    model_ema: dict[str, Tensor] | None = None
    ema_updates: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Convert to what a file holds; without EMA its two fields are left out."""
        content = dict(vars(self), state=asdict(self.state), format=CHECKPOINT_FORMAT)
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

    def save(self, path: str) -> None:
        """Write the checkpoint to `path`; keep the one that was there as `checkpoint_previous.pth`.

        A crash at any moment leaves a whole one.
        """
        write_safely(path, self.to_dict(), keep=previous_checkpoint(path))

    @classmethod
    def load(cls, path: str) -> "Checkpoint":
        """Read a checkpoint of this project.

        Raises:
            ConfigError: no such file, damaged, not a checkpoint, or one of another version.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ConfigError(f"resume: no file {path}") from error
        except Exception as error:  # what torch.load raises on a damaged file varies with the damage
            raise ConfigError(f"resume: {path} is damaged or no checkpoint ({type(error).__name__})") from error
        if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
            raise ConfigError(
                f"resume: {path} is not a checkpoint of this script; to start from its weights use --weights"
            )
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"resume: {path} is of another version of this script ({error})") from error


def previous_checkpoint(path: str) -> str:
    """Build the path that the checkpoint before the one in `path` is kept at."""
    stem, extension = os.path.splitext(path)
    return f"{stem}_previous{extension}"


def write_safely(path: str, content: Any, keep: str | None = None) -> None:
    """Save with torch.save by way of a temporary file, so that `path` never holds half a file.

    keep: where the file that is in `path` goes; without it, that file is replaced
    """
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk, say: leave no half file behind
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise
    if keep is not None and os.path.exists(path):
        os.replace(path, keep)
    os.replace(path + ".tmp", path)


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
    """Copy nested state, its tensors to the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    return [to_cpu(value) for value in state] if isinstance(state, list) else state
