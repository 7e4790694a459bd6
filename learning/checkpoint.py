"""Checkpoints: written so that a crash leaves a whole one, read without unpickling code, and found again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from settings.errors import ConfigError
from settings.table import LAUNCH, PLACE, Config
from utils import Runtime

CHECKPOINT_FORMAT = 1


def save_checkpoint(path: str, parts: dict[str, Any]) -> None:
    """Write state dicts and plain values; the file that was there becomes `checkpoint_previous.pth`, and a
    crash at any moment leaves a whole one."""
    write_safely(path, {"format": CHECKPOINT_FORMAT, **parts}, keep=previous_checkpoint(path))


def previous_checkpoint(path: str) -> str:
    stem, extension = os.path.splitext(path)
    return f"{stem}_previous{extension}"


def write_safely(path: str, content: Any, keep: str | None = None) -> None:
    """torch.save by way of a temporary file; the old file goes to `keep`, if given."""
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


def load_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint of this project.

    Raises:
        ConfigError: no such file, damaged, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"resume: no file {path}") from error
    except Exception as error:  # what torch.load raises on a damaged file varies with the damage
        raise ConfigError(f"resume: {path} is damaged or no checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ConfigError(f"resume: {path} is not a checkpoint of this script; to start from its weights use --weights")
    return checkpoint


def find_checkpoint(config: Config, runtime: Runtime) -> dict[str, Any] | None:
    """The checkpoint the run continues from, None if it starts anew.

    `resume: auto` continues the very run in output_dir: every setting that shapes it must be the same. A
    file by name starts a run of its own from that state, under the settings given; what differs is said.

    Raises:
        ConfigError: none that can be read, or settings that do not fit it.
    """
    own = os.path.join(config.output_dir, "checkpoint.pth")
    if not config.resume or (
        config.resume == "auto" and not os.path.exists(own) and not os.path.exists(previous_checkpoint(own))
    ):
        if config.test_only and not config.weights:
            raise ConfigError(f"resume: no run in {config.output_dir} to evaluate")
        return None
    if config.resume == "auto":
        try:
            checkpoint = load_checkpoint(own)
        except ConfigError as error:
            checkpoint = load_checkpoint(previous_checkpoint(own))
            runtime.say(f"{error}; continuing from the one before it")
    else:
        checkpoint = load_checkpoint(config.resume)
    now, then, state = config.as_dict(), checkpoint["config"], checkpoint["state"]
    differing = [name for name in now if name not in LAUNCH + PLACE and now[name] != then.get(name)]
    listed = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in differing)
    for name in ("model", "opt"):
        if now[name] != then[name] and not (config.test_only and name == "opt"):
            raise ConfigError(
                f"resume: the checkpoint has {name} {then[name]}, not {now[name]}; to start from its weights use --weights"
            )
    if config.test_only:
        return checkpoint
    if config.resume == "auto":
        if differing:
            raise ConfigError(
                f"the run in {config.output_dir} has other settings ({listed}); leave them as they are, or start a new "
                f"run from it with --resume {own} and another --output-dir"
            )
        if state["step"] and checkpoint["world_size"] != runtime.world_size:
            raise ConfigError(
                f"the run in {config.output_dir} stopped inside an epoch with {checkpoint['world_size']} process(es); "
                f"continue it with as many, not {runtime.world_size}"
            )
    else:
        if differing:
            runtime.say(f"resuming from {config.resume} with other settings: {listed}")
        if state["epoch"] >= config.epochs:
            raise ConfigError(
                f"resume: {config.resume} has trained {state['epoch']} epochs already; epochs {config.epochs} must be more"
            )
        if state["step"]:
            raise ConfigError(
                f"resume: {config.resume} stopped inside epoch {state['epoch']}; only --resume auto can continue there"
            )
        state.update(best_top1=-1.0, best_epoch=-1)  # its best weights lie in another folder
    return checkpoint


def check_store(checkpoint: dict[str, Any], config: Config, store_side: int | None) -> None:
    """Raise ConfigError if a run would go on with other pixels: out of a decode-once store instead of the files, or
    the other way round."""
    before = checkpoint.get("store_side", store_side)
    if config.resume == "auto" and before != store_side:
        then, now = ("images of a decode-once store", "the files") if before else ("the files", "a decode-once store")
        mend = "make room for it, or give a folder as --decode-cache" if before else "use --decode-cache off"
        raise ConfigError(
            f"the run in {config.output_dir} was trained on {then}, now it would see those of {now}; {mend}"
        )


def check_data(checkpoint: dict[str, Any], classes: list[str], num_images: int) -> None:
    """Raise ConfigError unless the data set is the one the checkpoint was trained on, as far as it is known."""
    if checkpoint["classes"] != classes:
        raise ConfigError(
            f"resume: the checkpoint has {len(checkpoint['classes'])} classes, the data {len(classes)}, or with other names"
        )
    if checkpoint["num_images"] != num_images and checkpoint["state"]["step"]:
        raise ConfigError(
            f"resume: stopped inside an epoch of {checkpoint['num_images']} training images, now there are {num_images}"
        )


@contextmanager
def undone(*parts: Any) -> Iterator[None]:
    """Give every part (model, optimizer, scaler) afterwards the state it had before; kept on the CPU, so
    that the device holds no more than in training."""
    saved = [to_cpu(part.state_dict()) for part in parts]
    try:
        yield
    finally:
        for part, state in zip(parts, saved):
            if state:  # a disabled scaler has none
                part.load_state_dict(state)


def to_cpu(state: Any) -> Any:
    """A copy of nested state, its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    return [to_cpu(value) for value in state] if isinstance(state, list) else state
