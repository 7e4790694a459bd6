"""Settings: one table (the fields of `Config`), and how a run gets its values.

Order: defaults, the YAML file of `--config`, the command line, values changed in a
dashboard. The result is checked once, after the last of these, before any data is read.
"""

import argparse
import difflib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

import yaml


class ConfigError(ValueError):
    """What a user wrote cannot be done. The message is one line: what was given, what is
    accepted, what to do. `main` prints it and ends with exit status 2."""

    def __init__(self, message: str):
        super().__init__(own_line(type(self), message))


def own_line(kind: type[Exception], message: str) -> str:
    """`message`, or what is left of it when torch's loader has raised a worker's error anew: a new error of the same
    type, whose message is the worker's traceback, which ends in the type's full name and the first message."""
    if not message.startswith(f"Caught {kind.__name__} in "):
        return message
    return message.strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")


def setting(
    default: Any,
    help: str,
    *,
    kind: str,
    group: str,
    choices: Sequence[str] | None = None,
    interval: str | None = None,
    optional: bool = False,
    scheduled: bool = False,
    flags: Sequence[str] = (),
) -> Any:
    """One row of the table.

    kind: "int", "float", "str", "bool", or a list of them: "ints", "floats", "strs"
    interval: accepted numbers, as in "[0, 1)"
    optional: may be None
    scheduled: takes one value, first and last, or one per stage
    flags: short forms besides --name-with-dashes
    """
    metadata: dict[str, Any] = dict(help=help, kind=kind, group=group, choices=choices, interval=interval)
    metadata.update(optional=optional, scheduled=scheduled, flags=tuple(flags))
    return field(default=default, metadata=metadata)


DATASETS = (
    "imagefolder", "imagenette", "imagenette-320px", "imagenette-160px",
    "imagewoof", "imagewoof-320px", "imagewoof-160px", "digits",
)  # fmt: skip
POLICIES = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")
RA_SCALE_END = {"torchvision": 30.0, "paper": 30.0}  # bins of 30; tenths, three times the range


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run, under the one name it has in YAML (`lr_warmup_epochs`), on the
    command line (`--lr-warmup-epochs`), in code and in reports. Made by `resolve`."""

    # fmt: off
    # The data
    data_path: str = setting("data", "folder of the data set; the reference's own default is a folder of its authors' cluster", kind="str", group="data")
    dataset: str = setting("imagefolder", "imagefolder: any tree of one folder per class; digits: scikit-learn's handwritten digits, no download", kind="str", group="data", choices=DATASETS)
    download: bool = setting(False, "fetch Imagenette or Imagewoof into data_path when it is not there", kind="bool", group="data")
    train_split: str = setting("train", "folder of the training images below data_path (imagefolder)", kind="str", group="data")
    val_split: str = setting("val", "folder of the validation images below data_path (imagefolder)", kind="str", group="data")
    cache_dataset: bool = setting(False, "keep the list of an imagefolder's files for the next start; listed anew when a class folder changed", kind="bool", group="data")
    decode_cache: str = setting("auto", "keep images decoded, once for all epochs and runs: auto (where there is room), off, or the folder to keep them in", kind="str", group="data")
    augment_on: str = setting("auto", "augment image by image in workers, or in batches on the device; auto: device if that is CUDA and the policy has a batch form (ra or none)", kind="str", group="data", choices=("auto", "worker", "device"))
    decode_on: str = setting("worker", "decode each time in workers, or JPEGs in batches on a CUDA GPU (nvJPEG; needs decode_cache off, augment_on device)", kind="str", group="data", choices=("worker", "device"))
    workers: int = setting(16, "processes that load images, per process that trains; 0 loads in the training process", kind="int", group="data", interval="[0, 1024]", flags=["-j"])

    # The model
    model: str = setting("resnet18", "any torchvision classification model, or efficientnet_v2_b0, _b1, _b2, _b3, _xl", kind="str", group="model")
    weights: str | None = setting(None, "start from these: a torchvision weights name (EfficientNet_V2_S_Weights.IMAGENET1K_V1, or DEFAULT) or a file; a head of another class count is replaced", kind="str", group="model", optional=True)
    dropout: tuple[float, ...] | None = setting(None, "probability of zeroing, in the model's Dropout layers; unset: the model's own", kind="floats", group="model", interval="[0, 1)", optional=True, scheduled=True)
    stochastic_depth_prob: tuple[float, ...] | None = setting(None, "probability of dropping the last residual block, growing linearly with depth; unset: the model's own", kind="floats", group="model", interval="[0, 1)", optional=True, scheduled=True)
    bn_momentum: float | None = setting(None, "weight of the newest batch in batch norm's running statistics; unset: the model's own (0.1)", kind="float", group="model", interval="(0, 1]", optional=True)
    sync_bn: bool = setting(False, "batch norm over all processes together", kind="bool", group="model")

    # Stages
    stages: int = setting(1, "stages of progressive learning; 1 trains as the reference does", kind="int", group="stages", interval="[1, 1000]")
    stage_rule: str = setting("paper", "image size of stage i of M, from S0 to Se: paper S0+(Se-S0)*i/(M-1), released code S0+(Se-S0)*(i+1)/M", kind="str", group="stages", choices=("paper", "released"))
    stage_epochs: tuple[int, ...] | None = setting(None, "epochs of each stage; unset: stage i is epochs i*N//M up to (i+1)*N//M", kind="ints", group="stages", interval="[1, 1000000000]", optional=True)
    train_crop_size: tuple[float, ...] = setting((224.0,), "side of the training crop, pixels; rounded down", kind="floats", group="stages", interval="[1, 8192]", scheduled=True)
    image_size_multiple: int = setting(1, "round training sizes down to a multiple of this", kind="int", group="stages", interval="[1, 512]")

    # Training
    epochs: int = setting(90, "passes over the training images, all stages together", kind="int", group="training", interval="[1, 1000000000]")
    start_epoch: int = setting(0, "first epoch to train, counted from 0; a resumed run knows its own", kind="int", group="training", interval="[0, 1000000000]")
    batch_size: tuple[float, ...] = setting((32.0,), "images per step and process", kind="floats", group="training", interval="[1, 1000000000]", scheduled=True, flags=["-b"])
    opt: str = setting("sgd", "optimizer", kind="str", group="training", choices=("sgd", "sgd_nesterov", "rmsprop", "adamw"))
    lr: float = setting(0.1, "learning rate after warm-up", kind="float", group="training", interval="(0, inf)")
    momentum: float = setting(0.9, "of sgd and rmsprop", kind="float", group="training", interval="[0, 1)")
    weight_decay: float = setting(1e-4, "for all parameters without a weight decay of their own below", kind="float", group="training", interval="[0, inf)", flags=["--wd"])
    norm_weight_decay: float | None = setting(None, "weight decay of normalisation layers", kind="float", group="training", interval="[0, inf)", optional=True)
    bias_weight_decay: float | None = setting(None, "weight decay of biases", kind="float", group="training", interval="[0, inf)", optional=True)
    transformer_embedding_decay: float | None = setting(None, "weight decay of class tokens and position embeddings", kind="float", group="training", interval="[0, inf)", optional=True)
    label_smoothing: float = setting(0.0, "share of the target spread over all classes, in the loss", kind="float", group="training", interval="[0, 1]")
    clip_grad_norm: float | None = setting(None, "scale gradients down to at most this norm", kind="float", group="training", interval="(0, inf)", optional=True)
    lr_scheduler: str = setting("steplr", "how the learning rate falls after warm-up", kind="str", group="training", choices=("steplr", "cosineannealinglr", "exponentiallr"))
    lr_update: str = setting("epoch", "follow the schedule once per epoch, as the reference, or at every step", kind="str", group="training", choices=("epoch", "step"))
    lr_warmup_epochs: int = setting(0, "epochs of warm-up", kind="int", group="training", interval="[0, 1000000000]")
    lr_warmup_method: str = setting("constant", "warm-up", kind="str", group="training", choices=("linear", "constant"))
    lr_warmup_decay: float = setting(0.01, "warm-up starts at this share of lr", kind="float", group="training", interval="[0, 1]")
    lr_step_size: int = setting(30, "epochs from one fall to the next (steplr)", kind="int", group="training", interval="[1, 1000000000]")
    lr_gamma: float = setting(0.1, "factor of each fall: per lr_step_size epochs (steplr), per epoch (exponentiallr)", kind="float", group="training", interval="(0, 1]")
    lr_min: float = setting(0.0, "where the cosine ends (cosineannealinglr)", kind="float", group="training", interval="[0, inf)")
    model_ema: bool = setting(False, "keep and evaluate an exponential moving average of the weights", kind="bool", group="training")
    model_ema_steps: int = setting(32, "steps from one update of the average to the next", kind="int", group="training", interval="[1, 1000000000]")
    model_ema_decay: float = setting(0.99998, "decay as the reference means it: 1 - decay is scaled by images per update over epochs", kind="float", group="training", interval="[0, 1)")

    # Augmentation
    auto_augment: str | None = setting(None, "policy: ra (RandAugment), ta_wide, augmix, or AutoAugment's imagenet, cifar10, svhn", kind="str", group="augmentation", choices=POLICIES, optional=True)
    ra_magnitude: tuple[float, ...] = setting((9.0,), "strength of RandAugment, in the units of ra_scale", kind="floats", group="augmentation", interval="[0, inf)", scheduled=True)
    ra_scale: str = setting("torchvision", "torchvision: bins of 30, as the reference's recipes; paper: tenths of the range, may exceed 10 (15 rotates by 45 degrees)", kind="str", group="augmentation", choices=tuple(RA_SCALE_END))
    augmix_severity: int = setting(3, "strength of augmix", kind="int", group="augmentation", interval="[1, 10]")
    random_erase: tuple[float, ...] = setting((0.0,), "probability of erasing a random rectangle", kind="floats", group="augmentation", interval="[0, 1]", scheduled=True)
    mixup_alpha: tuple[float, ...] = setting((0.0,), "mixup's Beta(alpha, alpha); 0 is off", kind="floats", group="augmentation", interval="[0, inf)", scheduled=True)
    cutmix_alpha: tuple[float, ...] = setting((0.0,), "cutmix's Beta(alpha, alpha); 0 is off; with mixup on, each batch gets one of the two", kind="floats", group="augmentation", interval="[0, inf)", scheduled=True)
    train_crop_scale: tuple[float, float] = setting((0.08, 1.0), "smallest and largest area of the random crop, as shares of the image", kind="floats", group="augmentation", interval="(0, 1]")
    hflip_prob: float = setting(0.5, "probability of a horizontal flip", kind="float", group="augmentation", interval="[0, 1]")
    ra_sampler: bool = setting(False, "repeated augmentation: each image ra_reps times in a step, as many images per epoch as without", kind="bool", group="augmentation")
    ra_reps: int = setting(3, "repeats of ra_sampler", kind="int", group="augmentation", interval="[1, 100]")
    interpolation: str = setting("bilinear", "of every resize and warp", kind="str", group="augmentation", choices=("nearest", "bilinear", "bicubic"))
    backend: str = setting("pil", "what transforms work on", kind="str", group="augmentation", choices=("pil", "tensor"))
    use_v2: bool = setting(False, "take torchvision's own transforms from torchvision.transforms.v2 instead of torchvision.transforms", kind="bool", group="augmentation")

    # Evaluation
    val_resize_size: int = setting(256, "short side before the centre crop, pixels", kind="int", group="evaluation", interval="[1, 8192]")
    val_crop_size: int = setting(224, "side of the centre crop, pixels: the test size", kind="int", group="evaluation", interval="[1, 8192]")
    eval_every: int = setting(1, "epochs from one evaluation to the next; the last epoch is always evaluated", kind="int", group="evaluation", interval="[1, 1000000000]")
    test_only: bool = setting(False, "evaluate --weights or --resume and stop; writes nothing", kind="bool", group="evaluation")

    # The machine
    device: str = setting("auto", "auto: cuda, then mps, then cpu; or a device by name", kind="str", group="machine")
    amp: bool = setting(False, "mixed precision", kind="bool", group="machine")
    amp_dtype: str = setting("auto", "auto: bfloat16 where supported, else float16; float16 trains with a gradient scaler", kind="str", group="machine", choices=("auto", "bfloat16", "float16"))
    channels_last: bool = setting(False, "keep images and weights channels last in memory; faster convolutions", kind="bool", group="machine")
    compile: bool = setting(False, "torch.compile; compiles once per stage, outside the clock", kind="bool", group="machine")
    seed: int = setting(0, "every random choice follows from it", kind="int", group="machine", interval="[0, 4294967295]")
    use_deterministic_algorithms: bool = setting(False, "the same bits on a GPU too, slower", kind="bool", group="machine")
    world_size: int = setting(1, "processes; torchrun says it, only a launch by srun needs it here", kind="int", group="machine", interval="[1, 1000000000]")
    dist_url: str = setting("env://", "where processes meet, for a launch by srun: tcp://HOST:PORT", kind="str", group="machine")

    # The run
    config: str | None = setting(None, "YAML file of settings", kind="str", group="run", optional=True)
    output_dir: str = setting(".", "the run's folder", kind="str", group="run")
    resume: str = setting("", "auto: continue the run in output_dir, if there is one; or a checkpoint file", kind="str", group="run")
    overwrite: bool = setting(False, "start again in a folder that holds a run", kind="bool", group="run")
    time_budget: str | None = setting(None, "stop after this long (90s, 25m, 1.5h), saved; exit status 3", kind="str", group="run", optional=True)
    print_freq: int = setting(10, "steps between lines of progress", kind="int", group="run", interval="[1, 1000000000]")
    clearml: str = setting("auto", "report to ClearML; auto: online if a server is configured and answers, else offline, for `python -m tracking upload OUTPUT_DIR`", kind="str", group="run", choices=("auto", "online", "offline", "off"))
    clearml_project: str = setting("progressive-learning", "ClearML project", kind="str", group="run")
    clearml_task: str | None = setting(None, "name of the ClearML task; unset: the name of output_dir", kind="str", group="run", optional=True)
    clearml_tags: tuple[str, ...] | None = setting(None, "tags of the ClearML task", kind="strs", group="run", optional=True)
    plan: str | None = setting(None, "print the stages and their cost, train nothing; `json` for machines", kind="str", group="run", choices=("table", "json"), optional=True)
    # fmt: on

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML, checkpoints and dashboards: one number stays one number, the
        values of a schedule become a list."""
        return {name: plain(value) for name, value in asdict(self).items()}


SETTINGS = {f.name: f.metadata for f in fields(Config)}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Config)}
SCHEDULED = tuple(name for name, row in SETTINGS.items() if row["scheduled"])

# How a run is started, not what it computes: left out of its config.yaml, free to differ on resume.
LAUNCH = ("config", "download", "overwrite", "plan", "resume", "test_only", "time_budget")
CLEARML = ("clearml", "clearml_project", "clearml_task", "clearml_tags")
# Where and how it runs: written down, and free to differ on resume.
PLACE = (
    *CLEARML, "cache_dataset", "data_path", "decode_cache", "device", "dist_url", "output_dir", "print_freq", "workers",
    "world_size",
)  # fmt: skip

# A setting (left) that does nothing unless another one (middle) has one of these values (right).
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ra_magnitude": ("auto_augment", ("ra",)),
    "ra_scale": ("auto_augment", ("ra",)),
    "augmix_severity": ("auto_augment", ("augmix",)),
    "ra_reps": ("ra_sampler", (True,)),
    "amp_dtype": ("amp", (True,)),
    "model_ema_steps": ("model_ema", (True,)),
    "model_ema_decay": ("model_ema", (True,)),
    "momentum": ("opt", ("sgd", "sgd_nesterov", "rmsprop")),
    "lr_step_size": ("lr_scheduler", ("steplr",)),
    "lr_gamma": ("lr_scheduler", ("steplr", "exponentiallr")),
    "lr_min": ("lr_scheduler", ("cosineannealinglr",)),
    "train_split": ("dataset", ("imagefolder",)),
    "val_split": ("dataset", ("imagefolder",)),
    "cache_dataset": ("dataset", ("imagefolder",)),
    "backend": ("augment_on", ("auto", "worker")),
    "use_v2": ("augment_on", ("auto", "worker")),
    "decode_on": ("decode_cache", ("off",)),
    "clearml_project": ("clearml", ("auto", "online", "offline")),
    "clearml_task": ("clearml", ("auto", "online", "offline")),
    "clearml_tags": ("clearml", ("auto", "online", "offline")),
    "download": ("dataset", tuple(name for name in DATASETS if name.startswith("image") and name != "imagefolder")),
}


def resolve(
    argv: Sequence[str], overrides: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
) -> Config:
    """The settings of a run, merged and checked.

    argv: the command line without the program's name
    overrides: values changed in a dashboard, the last word
    base: what those values were changed from; stands in place of the file and the command line

    Raises:
        ConfigError: unknown name, wrong type, value out of range, impossible combination.
    """
    command_line = read_command_line(argv)
    path = command_line.get("config")
    own = os.path.join(command_line.get("output_dir", DEFAULTS["output_dir"]), "config.yaml")
    if path is None and command_line.get("resume") == "auto" and os.path.isfile(own):
        path = own  # a run is continued with the settings it has, no need to repeat them
    given_here = (read_yaml(path) if path is not None else {}, command_line) if base is None else ()
    sources = [*given_here, convert_all(base or {}, "")]
    sources.append(convert_all(overrides or {}, ""))
    values, level = dict(DEFAULTS), dict.fromkeys(DEFAULTS, -1)
    for i, given in enumerate(sources):
        values.update(given)
        level.update(dict.fromkeys(given, i))
    if values["stage_epochs"] and level["epochs"] < level["stage_epochs"]:
        values["epochs"] = sum(values["stage_epochs"])
    if not values["test_only"]:
        drop_or_reject_idle(values, level)
    config = Config(**values)
    check(config)
    return config


def drop_or_reject_idle(values: dict[str, Any], level: dict[str, int]) -> None:
    """A setting that cannot take effect is an error, unless what it depends on was switched off
    by a later source (`--auto-augment ta_wide` over a file with `ra_magnitude`): then it goes back
    to its default, so that the run's record does not claim it."""
    needs = dict(NEEDS)
    if values["lr_warmup_epochs"] == 0:
        for name in ("lr_warmup_method", "lr_warmup_decay"):
            needs[name] = ("lr_warmup_epochs", ("1 or more",))
    if values["stages"] == 1:
        for name in ("stage_rule", "stage_epochs"):
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
    """What no single value shows: combinations, names that other files know, paths."""
    from learning import models

    models.check_name(config.model)
    if config.weights is not None and not os.path.isfile(config.weights):
        models.find_weights(config.model, config.weights)
    for name in SCHEDULED:
        values = getattr(config, name)
        if (
            values is not None
            and len(values) not in {1, config.stages}
            and not (len(values) == 2 and config.stages > 1)
        ):
            accepted = "one value (stages is 1)"
            if config.stages > 1:
                accepted = f"one value, first and last, or one per stage ({config.stages})"
            raise ConfigError(f"{name} takes {accepted}; got {len(values)} values")
    if config.stages > config.epochs:
        raise ConfigError(f"{config.stages} stages need at least {config.stages} epochs, epochs is {config.epochs}")
    if config.stage_epochs is not None:
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
    if config.start_epoch >= config.epochs:
        raise ConfigError(f"start_epoch {config.start_epoch} is not below epochs {config.epochs}")
    if config.lr_scheduler == "cosineannealinglr" and config.lr_min > config.lr:
        raise ConfigError(f"lr_min {config.lr_min} is above lr {config.lr}")
    if config.opt == "sgd_nesterov" and config.momentum == 0:
        raise ConfigError("opt sgd_nesterov needs a momentum above 0")
    end = RA_SCALE_END[config.ra_scale]
    if max(config.ra_magnitude) > end:
        raise ConfigError(
            f"ra_magnitude {max(config.ra_magnitude):g} is above the end of ra_scale {config.ra_scale} ({end:g})"
        )
    if min(config.train_crop_size) < config.image_size_multiple:
        raise ConfigError(
            f"train_crop_size {min(config.train_crop_size):g} rounds down to 0 with image_size_multiple {config.image_size_multiple}"
        )
    if len(config.train_crop_scale) != 2 or config.train_crop_scale[0] > config.train_crop_scale[1]:
        raise ConfigError(f"train_crop_scale takes smallest and largest share, got {show(config.train_crop_scale)}")
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
    if not config.decode_cache:
        raise ConfigError("decode_cache must be auto, off or a folder, got ''")
    if config.resume and config.overwrite:
        raise ConfigError("resume continues a run, overwrite starts again; give one of them")
    if config.resume not in ("", "auto") and not os.path.isfile(config.resume):
        raise ConfigError(f"resume: no file {config.resume}; give a checkpoint, or auto")
    if config.test_only and not (config.weights or config.resume):
        raise ConfigError("test_only needs something to evaluate: --weights or --resume")
    if config.time_budget is not None:
        seconds(config.time_budget)


def seconds(duration: str) -> float:
    """`90s`, `25m`, `1.5h` or plain seconds, in seconds.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", duration.strip())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"time_budget must be a time such as 90s, 25m or 1.5h, got {duration!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


# ---- one value ----

LISTS = ("ints", "floats", "strs")


def convert(name: str, value: Any, where: str = "") -> Any:
    """`value`, as YAML or the command line gave it, in the type of setting `name`.

    Raises:
        ConfigError: it has another type, or is not one of the accepted values.
    """
    row = SETTINGS[name]
    if value is None or (row["optional"] and value == "none"):
        if not row["optional"]:
            raise ConfigError(f"{where}{name} must be {describe(row)}, got nothing")
        return None
    kind = row["kind"]
    if kind in LISTS:
        items = value if isinstance(value, list | tuple) else [value]
        if not items:
            raise ConfigError(f"{where}{name} needs at least one value, got an empty list")
        return tuple(convert_one(name, item, kind[:-1], where) for item in items)
    return convert_one(name, value, kind, where)


def convert_one(name: str, value: Any, kind: str, where: str) -> Any:
    row = SETTINGS[name]
    wrong = ConfigError(f"{where}{name} must be {describe(row)}, got {value!r}")
    if kind == "bool":
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind == "str":
        if name == "time_budget" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # seconds, which YAML reads as a number
        if not isinstance(value, str):
            raise wrong
        if row["choices"] is None:
            return value
        if value.lower() not in row["choices"]:
            near = nearest(value.lower(), row["choices"])
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(f"{where}{name} must be one of {', '.join(row['choices'])}, got {value!r}{hint}")
        return value.lower()
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text, a trap worth its own words
        if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            proper = re.sub(r"[eE]\+?", "e+", value, count=1).replace("e+-", "e-")
            proper = proper if "." in proper else proper.replace("e", ".0e")
            raise ConfigError(
                f"{where}{name} must be {describe(row)}, got {value!r} (YAML reads that as text; write {proper})"
            )
        raise wrong
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    if abs(value) > 1e300 or value != value or (kind == "int" and value != int(value)):  # no inf, no nan
        raise (
            ConfigError(f"{where}{name} must be {describe(row)} of usual size, got {str(value)[:20]}")
            if abs(value) > 1e300
            else wrong
        )
    if not within(value, row["interval"]):
        raise ConfigError(f"{where}{name} must be in {row['interval']}, got {value:g}")
    return int(value) if kind == "int" else float(value)


def within(value: float, interval: str) -> bool:
    """Whether `value` lies in an interval written as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (value >= low if interval[0] == "[" else value > low) and (
        value <= high if interval[-1] == "]" else value < high
    )


def describe(row: Mapping[str, Any]) -> str:
    noun = {
        "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false",
        "ints": "whole numbers", "floats": "a number or a list of numbers", "strs": "words",
    }[row["kind"]]  # fmt: skip
    return f"one of {', '.join(row['choices'])}" if row["choices"] else noun


def plain(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    items = [int(item) if isinstance(item, float) and item == int(item) else item for item in value]
    return items[0] if len(items) == 1 else items


def show(value: Any) -> str:
    """`value` as one would type it."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(plain(value))


def as_text(value: Any) -> str:
    """A plain value as a dashboard shows it in a field; nothing for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def from_text(name: str, text: str) -> Any:
    """What was written into the field of setting `name`; `convert` says what is wrong with it."""
    row, text = SETTINGS[name], text.strip()
    if not text:
        return "" if DEFAULTS[name] == "" else None
    if row["kind"] == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if row["kind"] in LISTS:
        return [parse_text(name, item.strip("'\"")) for item in re.split(r"[\s,]+", text.strip("[]() ")) if item]
    return parse_text(name, text)


# ---- YAML ----


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe types alone, and no key twice: the second would silently win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """The settings in file `path`, converted; keys that no setting has are refused.

    Raises:
        ConfigError: no such file, not YAML, not plain settings (Python objects included).
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, UniqueKeys)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not a text file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"config: {path} is not plain YAML{line}: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} must hold lines of `setting: value`, it holds a {type(content).__name__}")
    return convert_all(content, f"{path}: ")


def convert_all(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    reject_unknown(given, SETTINGS, where)
    for name in ("config", "plan"):
        if name in given:
            raise ConfigError(f"{where}{name} belongs on the command line")
    return {name: convert(name, value, where) for name, value in given.items()}


def nearest(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that `name` is short for or misspells, if any."""
    longer = [word for word in known if name and word.startswith(name)]
    return next(iter(longer or difflib.get_close_matches(name, known, n=1)), None)


def reject_unknown(names: Collection[Any], known: Collection[str], where: str, dashes: str = "") -> None:
    """Raise ConfigError for the first of `names` that is not `known`, with the nearest that is."""
    for name in names:
        if name not in known:
            near = nearest(str(name), known)
            hint = f"did you mean {dashes}{near}?" if near else "python train.py --help lists all"
            raise ConfigError(f"{where}unknown setting {dashes}{name}; {hint}")


# ---- the command line ----


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line: every setting as --name-with-dashes, its value as text."""
    parser = Parser(
        prog="train.py",
        description="Train an image classifier through the stages of EfficientNetV2's progressive learning.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    names = dict.fromkeys(row["group"] for row in SETTINGS.values())  # in the table's order
    groups = {name: parser.add_argument_group(name) for name in names}
    for name, row in SETTINGS.items():
        default = "" if DEFAULTS[name] in (None, "") else f" (default: {show(DEFAULTS[name])})"
        text = (row["help"] + default).replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "help": text}
        if row["kind"] == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif name == "plan":
            options.update(nargs="?", const="table", metavar="json")
        else:
            options["metavar"] = (
                "|".join(row["choices"]) if row["choices"] else {"s": "TEXT", "i": "N", "f": "X"}[row["kind"][0]]
            )
            if row["kind"] in LISTS:
                options["nargs"] = "+"
        groups[row["group"]].add_argument("--" + name.replace("_", "-"), *row["flags"], **options)
    return parser


def read_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """The settings given on the command line, converted.

    Raises:
        ConfigError: unknown flag (abbreviations are unknown), missing or wrong value.
    """
    parser = build_parser()
    given, rest = parser.parse_known_args(list(argv))
    unknown = [word for word in rest if word.startswith("-")] or rest
    flags = [word.split("=")[0].lstrip("-") for word in unknown if word.startswith("--")]
    reject_unknown(flags, [name.replace("_", "-") for name in SETTINGS], "", dashes="--")
    if unknown:
        raise ConfigError(f"cannot make sense of {unknown[0]!r} on the command line; flags begin with --, see --help")
    return {name: convert(name, parse_text(name, value)) for name, value in vars(given).items()}


def parse_text(name: str, value: Any) -> Any:
    """Command-line text as the number it stands for; text that is none goes on to `convert`, which
    knows what to say about it."""
    if isinstance(value, list):
        return [parse_text(name, item) for item in value]
    if isinstance(value, str) and SETTINGS[name]["kind"] not in ("str", "strs", "bool"):
        for number in (int, float):
            try:
                return number(value)
            except ValueError:
                pass
    return value
