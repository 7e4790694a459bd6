"""Which checkpoint a run continues from, and whether it may."""

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from images.datasets import Data
from learning.checkpoint import UNFINISHED, Checkpoint, previous_checkpoint
from learning.models import build_on_meta
from learning.optim import build_optimizer
from settings.errors import ConfigError, first_line
from settings.resolve import RUN_SETTINGS
from settings.sources import read_yaml
from settings.table import BEFORE, LAUNCH, PLACE, Config, plain
from utils import Runtime

# What an evaluation depends on, besides the weights.
EVALUATION = ("val_resize_size", "val_crop_size", "interpolation", "backend", "use_v2", "model_ema", "label_smoothing")


def find_checkpoint(config: Config, runtime: Runtime, own: str, num_epochs: int) -> tuple[Config, Checkpoint | None]:
    """Find the checkpoint that the run continues from.

    own: where a run in this output_dir saves its own
    num_epochs: that the run trains

    `resume: auto` continues the very run in output_dir: every setting that shapes it must be the same. A
    file by name starts a run of its own from that state, under the settings given; a line tells which differ. Where a
    run that began with a file has saved nothing yet, auto begins with that file again.

    Returns: the settings, with that file as `resume`, and as `weights` what the run of a file began with; the
        checkpoint, None if the run starts anew

    Raises:
        ConfigError: none that can be read, or settings that do not fit it.
    """
    checkpoint = None
    if config.resume == "auto":
        checkpoint = newest_whole(runtime, own)
        begun = runtime.from_main(began_with(config.output_dir))
        if checkpoint is None and begun and not config.test_only:
            runtime.say(f"{config.output_dir} has no checkpoint yet: it begins with {begun} again")
            config = replace(config, resume=begun)
        elif checkpoint is not None and checkpoint.state.first_epoch and config.weights is None:
            config = replace(config, weights=settings_of(checkpoint)["weights"])  # as below, when it began
    if config.resume not in ("", "auto"):
        checkpoint = Checkpoint.load(config.resume)
        check_whole(checkpoint)
        weights = settings_of(checkpoint)["weights"]
        if config.weights not in (None, weights):
            raise ConfigError(
                f"weights {config.weights} has no effect with resume {config.resume}, whose run began with {weights or 'none'}; "
                "leave one of them out"
            )
        config = replace(config, weights=weights)  # by which a GoogLeNet or Inception knows its images' normalisation
    if checkpoint is None:
        if config.test_only and not config.weights:
            raise ConfigError(f"resume: no run in {config.output_dir} to evaluate")
        return config, None
    check_same(config, runtime, checkpoint, num_epochs)
    return config, checkpoint


def began_with(folder: str) -> str:
    """Find the checkpoint of another run that the run in `folder` began with, by its settings; '' if none can be read."""
    with suppress(ConfigError):
        return read_yaml(os.path.join(folder, RUN_SETTINGS)).get("resume", "")
    return ""


def newest_whole(runtime: Runtime, own: str) -> Checkpoint | None:
    """Read the newest whole checkpoint of a run, and say so if it is not `own`; None if it has none.

    Raises:
        ConfigError: there are some, all of them damaged; processes read different ones.
    """
    found, troubles = find_whole(own)
    state = found and (found.state.epoch, found.state.step)
    if runtime.from_main(state) != state:
        raise ConfigError(f"resume: process {runtime.rank} reads another checkpoint than process 0; see to its disk")
    if found is None and any(map(os.path.exists, (own, previous_checkpoint(own)))):
        raise ConfigError("; ".join(troubles))
    if found is not None and found.read_from != own:
        kind = "was being written" if found.read_from == own + UNFINISHED else "is before it"
        runtime.say(f"{'; '.join(troubles)}; continuing from the one that {kind}")
    return found  # without one there is at most a first one, unfinished


def find_whole(own: str) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest whole checkpoint of a run; return it, or None, and what is wrong with those before it.

    One that was written to its end but not put in its place counts: it is the newest, where `own` is missing or damaged.
    """
    troubles = [] if os.path.exists(own) else [f"resume: no file {own}"]
    for path in filter(os.path.exists, (own, own + UNFINISHED, previous_checkpoint(own))):
        try:
            found = Checkpoint.load(path)
            check_whole(found)
            return found, troubles
        except ConfigError as error:
            troubles.append(str(error))
    return None, troubles


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings of a checkpoint as plain values; those that it does not know are what was done before them."""
    return {name: plain(value) for name, value in BEFORE.items()} | checkpoint.config


def as_flags(values: Mapping[str, Any]) -> str:
    """Format plain values of settings as one would type them on the command line."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, list) else ["none" if value is None else value]
            words += [f"--{flag}", *map(shlex.quote, map(str, items))]
    return " ".join(words)


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the weights are those of the checkpoint's own model, and the optimizer's state fits them.

    The model is built as shapes alone.
    """
    then = cast(Any, SimpleNamespace(**settings_of(checkpoint)))
    try:
        model = build_on_meta(then.model, len(checkpoint.classes))
        for state in (checkpoint.model_ema, checkpoint.model):
            if state is not None:
                model.load_state_dict(state, assign=True)
        build_optimizer(then, model).load_state_dict(checkpoint.optimizer)
    except Exception as error:  # what torch raises on stray state varies with the state
        raise ConfigError(
            f"resume: {checkpoint.read_from} is damaged ({type(error).__name__}: {first_line(error)[:80]})"
        ) from error


def check_same(config: Config, runtime: Runtime, checkpoint: Checkpoint, num_epochs: int) -> None:
    """Raise ConfigError unless the run may go on from the checkpoint under these settings."""
    state, now = checkpoint.state, config.as_dict()
    then = settings_of(checkpoint)
    # What says auto is of a version that did not write down what it came to.
    differing = [name for name in now if name not in LAUNCH + PLACE and now[name] != then[name] != "auto"]
    listed = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in differing)
    for name in ("model", "opt"):
        if now[name] != then[name] and not (config.test_only and name == "opt"):
            raise ConfigError(
                f"resume: the checkpoint has {name} {then[name]}, not {now[name]}; give --{name} {then[name]} or the run's "
                "--config; to start another run from its weights use --weights"
            )
    if config.test_only:
        listed = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in differing if name in EVALUATION)
        if listed:
            runtime.say(f"evaluating {checkpoint.read_from} with other settings than its run: {listed}")
        return
    if config.resume == "auto":
        if differing:
            if not os.path.exists(os.path.join(config.output_dir, RUN_SETTINGS)):
                raise ConfigError(
                    f"the run in {config.output_dir} has lost its {RUN_SETTINGS}, its checkpoint has the settings; give "
                    f"them again: {as_flags({name: then[name] for name in differing})}"
                )
            raise ConfigError(
                f"the run in {config.output_dir} has other settings ({listed}); leave them as they are, or start a new "
                f"run from it with --resume {checkpoint.read_from} and another --output-dir"
            )
        if state.step and checkpoint.world_size != runtime.world_size:
            raise ConfigError(
                f"the run in {config.output_dir} stopped inside an epoch with {checkpoint.world_size} process(es); "
                f"continue it with as many, not {runtime.world_size}"
            )
    else:
        if differing:
            runtime.say(f"resuming from {config.resume} with other settings: {listed}")
        if state.epoch >= num_epochs:
            raise ConfigError(
                f"resume: {config.resume} has trained {state.epoch} epochs already; the {num_epochs} of this run must be more"
            )
        if state.step:
            raise ConfigError(
                f"resume: {config.resume} stopped inside epoch {state.epoch}; only --resume auto can continue there"
            )
        state.best_top1, state.best_epoch = -1.0, -1  # its best weights lie in another folder, and its epochs' records
        state.first_epoch = state.epoch
        checkpoint.best = None


def most_on_device(checkpoint: Checkpoint | None, config: Config) -> int:
    """Find how many sets of images may lie on the GPU: no more than before, in a run that goes on, for the same pixels."""
    before = checkpoint.on_device if checkpoint is not None and config.resume == "auto" else None
    return 2 if before is None else before


def check_store(checkpoint: Checkpoint, config: Config, data: Data, runtime: Runtime) -> None:
    """Raise ConfigError if the run in output_dir would go on with other pixels than before.

    That is with images out of a decode-once store instead of the files, or the other way round. Where the GPU has no
    room for them any more, a line says so: a crop that is made there differs by up to a grey level.
    """
    before = checkpoint.store_side
    if config.resume == "auto" and checkpoint.on_device is not None and data.on_device < checkpoint.on_device:
        runtime.say(
            "warning: images that lay on the GPU find no room there now; the run goes on, its images differ by up to a grey "
            "level from those of before"
        )
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
