"""Which checkpoint a run continues from, and whether it may."""

import os

from images.datasets import Data
from learning.checkpoint import Checkpoint, previous_checkpoint
from settings.errors import ConfigError
from settings.table import DEFAULTS, LAUNCH, PLACE, Config, plain
from utils import Runtime


def find_checkpoint(config: Config, runtime: Runtime, own: str) -> Checkpoint | None:
    """Find the checkpoint that the run continues from; None if it starts anew.

    own: where a run in this output_dir saves its own

    `resume: auto` continues the very run in output_dir: every setting that shapes it must be the same. A
    file by name starts a run of its own from that state, under the settings given; a line tells which differ.

    Raises:
        ConfigError: none that can be read, or settings that do not fit it.
    """
    if not config.resume or (
        config.resume == "auto" and not os.path.exists(own) and not os.path.exists(previous_checkpoint(own))
    ):
        if config.test_only and not config.weights:
            raise ConfigError(f"resume: no run in {config.output_dir} to evaluate")
        return None
    if config.resume == "auto":
        try:
            checkpoint = Checkpoint.load(own)
        except ConfigError as error:
            checkpoint = Checkpoint.load(previous_checkpoint(own))
            runtime.say(f"{error}; continuing from the one before it")
    else:
        checkpoint = Checkpoint.load(config.resume)
    state, now = checkpoint.state, config.as_dict()
    then = {name: plain(default) for name, default in DEFAULTS.items()} | checkpoint.config  # newer ones were not set
    # What says auto is of a version that did not write down what it came to.
    differing = [name for name in now if name not in LAUNCH + PLACE and now[name] != then[name] != "auto"]
    listed = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in differing)
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
        if state.step and checkpoint.world_size != runtime.world_size:
            raise ConfigError(
                f"the run in {config.output_dir} stopped inside an epoch with {checkpoint.world_size} process(es); "
                f"continue it with as many, not {runtime.world_size}"
            )
    else:
        if differing:
            runtime.say(f"resuming from {config.resume} with other settings: {listed}")
        if state.epoch >= config.epochs:
            raise ConfigError(
                f"resume: {config.resume} has trained {state.epoch} epochs already; epochs {config.epochs} must be more"
            )
        if state.step:
            raise ConfigError(
                f"resume: {config.resume} stopped inside epoch {state.epoch}; only --resume auto can continue there"
            )
        state.best_top1, state.best_epoch = -1.0, -1  # its best weights lie in another folder
    return checkpoint


def check_store(checkpoint: Checkpoint, config: Config, data: Data) -> None:
    """Raise ConfigError if the run in output_dir would go on with other pixels than before.

    That is with images out of a decode-once store instead of the files, or the other way round.
    """
    before = checkpoint.store_side
    if config.resume == "auto" and before != data.store_side:
        then, now = ("images of a decode-once store", "the files") if before else ("the files", "a decode-once store")
        mend = "make room for it, or give a folder as --decode-cache" if before else "use --decode-cache off"
        raise ConfigError(
            f"the run in {config.output_dir} was trained on {then}, now it would see those of {now}; {mend}"
        )


def check_data(checkpoint: Checkpoint, data: Data) -> None:
    """Raise ConfigError unless the data set is the one the checkpoint was trained on.

    Compared are the classes and, if it was saved inside an epoch, the number of training images.
    """
    if checkpoint.classes != data.classes:
        raise ConfigError(
            f"resume: the checkpoint has {len(checkpoint.classes)} classes, the data {len(data.classes)}, or with other names"
        )
    if checkpoint.num_images != len(data.train) and checkpoint.state.step:
        raise ConfigError(
            f"resume: stopped inside an epoch of {checkpoint.num_images} training images, now there are {len(data.train)}"
        )
