"""A run's settings, merged and checked.

Order: defaults, the YAML file of `--config`, the command line, values changed in a dashboard. The result is checked
once, after the last of these, before any data is read and without torch.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from settings.errors import ConfigError
from settings.sources import convert_all, read_command_line, read_yaml
from settings.table import BEFORE, DEFAULTS, SCHEDULES, SETTINGS, Config, show
from settings.values import every, seconds

RUN_SETTINGS = "config.yaml"  # in a run's folder: what it was made with
FORECAST = "report/forecast.json"  # there, of a run that was fitted to a time
# What was chosen for it.
FITTED = (
    "epochs", "stage_epochs", "stage_rule",
    "lr_warmup_epochs", "lr_warmup_method", "lr_warmup_decay", "lr_step_size", "lr_gamma",
)  # fmt: skip


def resolve(
    argv: Sequence[str], overrides: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
) -> Config:
    """Merge and check the settings of a run.

    argv: the command line without the program's name
    overrides: values changed in a dashboard, which outrank all others
    base: the settings that those values were changed from; they replace the file and the command line

    Raises:
        ConfigError: unknown name, wrong type, value out of range, impossible combination.
    """
    command_line = read_command_line(argv)
    path = command_line.get("config")
    own = os.path.join(command_line.get("output_dir", DEFAULTS["output_dir"]), RUN_SETTINGS)
    values = dict(DEFAULTS)
    if path is None and command_line.get("resume") == "auto" and os.path.isfile(own):
        path = own  # a run is continued with the settings it has, no need to repeat them
        command_line.setdefault("output_dir", DEFAULTS["output_dir"])  # where it lies now: it may have been moved
        values = dict(BEFORE)
    given_here = (read_yaml(path) if path is not None else {}, command_line) if base is None else ()
    sources = [*given_here, convert_all(base or {}, "")]
    sources.append(convert_all(overrides or {}, ""))
    level = dict.fromkeys(DEFAULTS, -1)
    for i, given in enumerate(sources):
        values.update(given)
        level.update(dict.fromkeys(given, i))
    if values["stage_epochs"] and level["epochs"] < level["stage_epochs"]:
        values["epochs"] = sum(values["stage_epochs"])
    if values["fit_time"] is not None:
        keep_fitted(values, level)
    if not values["test_only"]:
        drop_or_reject_idle(values, level)
    config = Config(**values)
    check(config)
    return config


def keep_fitted(values: dict[str, Any], level: Mapping[str, int]) -> None:
    """Give a run that goes on the lengths that `fit_time` has chosen for it when it began, in place of `fit_time`.

    values, level: as for `drop_or_reject_idle`

    Raises:
        ConfigError: it began without; epochs are given by the same source as fit_time, or a later one.
    """
    folder = values["output_dir"]
    begun = os.path.join(folder, RUN_SETTINGS)
    if values["resume"] == "auto" and os.path.isfile(begun):
        if not os.path.isfile(os.path.join(folder, FORECAST)):
            raise ConfigError(f"the run in {folder} has its epochs already, fit_time would change them; leave it out")
        chosen = read_yaml(begun)
        values.update({name: chosen.get(name, DEFAULTS[name]) for name in FITTED}, fit_time=None)
    elif level["epochs"] >= level["fit_time"]:
        raise ConfigError(
            f"epochs {values['epochs']} has no effect with fit_time {values['fit_time']}, which chooses them; leave one of "
            "them out"
        )


def drop_or_reject_idle(values: dict[str, Any], level: dict[str, int]) -> None:
    """Reset or refuse each setting that cannot take effect because of the value of another one.

    It is refused, unless what it depends on was switched off by a later source (`--auto-augment ta_wide` over a file
    with `ra_magnitude`): then it goes back to its default, so that the run's record does not claim it.

    values: of all settings; changed in place
    level: of each setting, the number of the source that gave it, later ones higher; -1 for a default

    Raises:
        ConfigError: a setting that is refused.
    """
    needs = {name: row["needs"] for name, row in SETTINGS.items() if row["needs"]}
    if values["lr_warmup_epochs"] == 0:
        for name in ("lr_warmup_method", "lr_warmup_decay"):
            needs[name] = ("lr_warmup_epochs", ("1 or more",))
    if values["finetune_epochs"] == 0:
        for name in ("finetune_size", "finetune_lr"):
            needs[name] = ("finetune_epochs", ("1 or more",))
    if values["stages"] == 1:
        for name in ("stage_rule", "stage_epochs", "lr_clock"):
            needs[name] = ("stages", ("2 or more",))
    for name, (master, accepted) in needs.items():
        if values[name] == DEFAULTS[name] or values[master] in accepted:
            continue
        if level[master] > level[name]:
            values[name] = DEFAULTS[name]
        else:
            wanted = " or ".join(show(value) for value in accepted)
            raise ConfigError(
                f"{name} {show(values[name])} has no effect with {master} {show(values[master])}; "
                f"set {master} to {wanted}, or leave {name} out"
            )


def check(config: Config) -> None:
    """Raise ConfigError for what no single value shows: wrong combinations and paths."""
    check_stages(config)
    check_training(config)
    check_images(config)
    check_run(config)


def doubts(config: Config, span: int, several: bool) -> list[str]:
    """List what is likely a mistake in settings that can be carried out all the same.

    span: epochs that the learning rate's schedule has (`LearningRate.span`)
    several: processes train together
    """
    found = []
    if config.lr_warmup_epochs >= span:
        # No error: a short trial of a long recipe is a common thing, and its learning rates are what was asked for.
        schedule = f"warm-up never ends, and lr_scheduler {config.lr_scheduler} does nothing"
        found.append(f"lr_warmup_epochs {config.lr_warmup_epochs} of {span} epochs: {schedule}")
    if config.lr_scheduler == "steplr" and config.lr_step_size >= span - config.lr_warmup_epochs > 0:
        found.append(f"lr_step_size {config.lr_step_size} of {span} epochs: the learning rate never falls")
    if config.finetune_size not in (None, config.val_crop_size):
        sizes = f"finetune_size {config.finetune_size} with val_crop_size {config.val_crop_size}"
        found.append(f"{sizes}: the classifier is fitted to another size than it is evaluated at")
    if config.sync_bn and not several:
        found.append("sync_bn has no effect in one process, whose batch norm sees the whole batch")
    return found


def check_stages(config: Config) -> None:
    """Check how many values the scheduled settings have, and the epochs and image sizes of stages."""
    for name in SCHEDULES:
        values = getattr(config, name)
        accepted = {1, config.stages} | ({2} if config.stages > 1 else set())
        if values is not None and len(values) not in accepted:
            ways = f"one value, first and last, or one per stage ({config.stages})"
            ways = ways if config.stages > 1 else "one value (stages is 1)"
            raise ConfigError(f"{name} takes {ways}; got {len(values)} values")
        least = SCHEDULES[name].least
        small = [value for value in values or () if 0 < value < least]
        if small:
            raise ConfigError(f"{name} must be 0 or at least {least:g}, got {small[0]:g}")
    if config.stages > config.epochs:
        raise ConfigError(f"{config.stages} stages need at least {config.stages} epochs, epochs is {config.epochs}")
    if config.stage_epochs is not None:
        if config.stage_rule == "compute":
            raise ConfigError(
                "stage_epochs has no effect with stage_rule compute, which cuts the stages by their compute; leave one of "
                "them out"
            )
        if len(config.stage_epochs) != config.stages:
            raise ConfigError(
                f"stage_epochs takes one value per stage ({config.stages}); got {len(config.stage_epochs)}"
            )
        if sum(config.stage_epochs) != config.epochs:
            raise ConfigError(
                f"stage_epochs adds up to {sum(config.stage_epochs)}, epochs is {config.epochs}; make them agree or leave epochs out"
            )
    if config.stage_rule == "released" and len(config.train_crop_size) != 2:
        raise ConfigError(
            f"stage_rule released goes from a first to a last train_crop_size; got {len(config.train_crop_size)} value(s)"
        )
    if config.start_epoch >= config.epochs and config.stage_rule != "compute":  # which `stages.make_plan` checks
        raise ConfigError(f"start_epoch {config.start_epoch} is not below epochs {config.epochs}")
    if min(config.train_crop_size) < config.image_size_multiple:
        raise ConfigError(
            f"train_crop_size {min(config.train_crop_size):g} rounds down to 0 with image_size_multiple {config.image_size_multiple}"
        )


def check_training(config: Config) -> None:
    """Check the learning rate's lower end, and the momentum that Nesterov needs."""
    if config.lr_scheduler == "cosineannealinglr" and config.lr_min > config.lr:
        raise ConfigError(f"lr_min {config.lr_min} is above lr {config.lr}")
    if config.opt == "sgd_nesterov" and config.momentum == 0:
        raise ConfigError("opt sgd_nesterov needs a momentum above 0")


def check_images(config: Config) -> None:
    """Check settings of augmentation, crops and the decode cache against each other."""
    if len(config.train_crop_scale) != 2 or config.train_crop_scale[0] > config.train_crop_scale[1]:
        raise ConfigError(f"train_crop_scale takes smallest and largest share, got {show(config.train_crop_scale)}")
    if config.augment_size is not None and config.augment_size < int(max(config.train_crop_size)):
        raise ConfigError(
            f"augment_size {config.augment_size} is below train_crop_size {max(config.train_crop_size):g}; images are only "
            "reduced from it, so give that size or more"
        )
    if config.val_crop_size > config.val_resize_size:
        raise ConfigError(
            f"val_crop_size {config.val_crop_size} is larger than val_resize_size {config.val_resize_size}; "
            "the crop would have black borders"
        )
    if config.backend == "tensor" and config.interpolation == "bicubic" and config.auto_augment is not None:
        raise ConfigError(
            f"backend tensor has no bicubic warps, which auto_augment {config.auto_augment} needs; use backend pil or "
            "interpolation bilinear"
        )
    if config.augment_on == "device":
        if config.auto_augment not in (None, "ra"):
            raise ConfigError(
                f"augment_on device has no batch form of auto_augment {config.auto_augment}, only of ra; use augment_on worker"
            )
        if config.interpolation != "bilinear":
            raise ConfigError(f"augment_on device is bilinear; use augment_on worker for {config.interpolation}")
    if config.decode_on == "device" and config.augment_on == "worker":
        raise ConfigError("decode_on device leaves no image for augment_on worker; use augment_on device")
    if config.dataset == "digits" and config.decode_cache not in ("auto", "off"):
        raise ConfigError("decode_cache has no effect with dataset digits, which is in memory; leave it out")
    if config.interpolation == "nearest" and config.decode_cache not in ("auto", "off"):
        raise ConfigError(
            "decode_cache has no effect with interpolation nearest, which takes pixels as they are in the files; leave it out"
        )
    if not config.decode_cache:
        raise ConfigError("decode_cache must be auto, off or a folder, got ''")


def check_run(config: Config) -> None:
    """Check resume, overwrite, test_only, time_budget and fit_time."""
    if config.resume and config.overwrite:
        raise ConfigError("resume continues a run, overwrite starts again; give one of them")
    if config.resume not in ("", "auto") and not os.path.isfile(config.resume):
        raise ConfigError(f"resume: no file {config.resume}; give a checkpoint, or auto")
    if config.start_epoch > 0 and config.resume not in ("", "auto"):
        raise ConfigError(
            f"start_epoch {config.start_epoch} has no effect with resume, whose checkpoint knows its own; leave it out"
        )
    if config.test_only and not (config.weights or config.resume):
        raise ConfigError("test_only needs something to evaluate: --weights or --resume")
    if config.time_budget is not None:
        seconds(config.time_budget)
    if config.fit_time is not None:
        seconds(config.fit_time, "fit_time")
        if config.plan is not None:
            raise ConfigError(
                "plan needs neither data nor time, fit_time measures both; leave one of them out: with fit_time the plan "
                "is printed before the first epoch"
            )
        if config.start_epoch > 0 or config.resume not in ("", "auto"):
            raise ConfigError("fit_time plans a whole run; leave start_epoch and a checkpoint to start from out")
    every(config.checkpoint_every)
