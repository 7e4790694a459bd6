"""The table of settings: one row each, the fields of `Config`.

Help, command line, checks, plans, reports and dashboards follow from it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A setting that may change from stage to stage: how it is called and shown.

    field: its name in a `Stage`
    heading: of its column in plans, reports and the README
    absent: what stands in that column for None; "off" also stands for 0
    axis: label of the graph it is drawn in; those with the same one share a graph. None: in no graph
    whole: rounded down to whole numbers
    least: the smallest value but 0; one between that and 0 is refused where it is given, and 0 where stages come to it
    """

    field: str
    heading: str
    absent: str = ""
    axis: str | None = None
    whole: bool = False
    least: float = 0.0

    def show(self, value: float | None) -> str:
        """Format the value of a stage as a cell of a table."""
        return self.absent if value is None or (self.absent == "off" and value == 0) else f"{value:.4g}"


MISSING = object()


def setting(
    default: Any,
    help: str,
    *,
    kind: str,
    group: str,
    choices: Sequence[str] | None = None,
    interval: str | None = None,
    optional: bool = False,
    scheduled: Schedule | None = None,
    needs: tuple[str, Sequence[Any]] | None = None,
    flags: Sequence[str] = (),
    before: Any = MISSING,
) -> Any:
    """Make one row of the table.

    kind: "int", "float", "str", "bool", or a list of them: "ints", "floats", "strs"
    choices: the only texts accepted; of a list of numbers, the words that may stand in its place
    interval: accepted numbers, as in "[0, 1)"
    optional: may be None
    scheduled: how it is shown, if it takes one value, first and last, or one per stage; else None
    needs: name of another setting, and the values of that one with which this one takes effect
    flags: short forms besides --name-with-dashes
    before: what runs did before there was this setting, where that is not its default. A run of that time is resumed
        with it, so this is given when a default changes, or differs from the start
    """
    metadata: dict[str, Any] = dict(help=help, kind=kind, group=group, choices=choices, interval=interval)
    metadata.update(optional=optional, scheduled=scheduled, needs=needs, flags=tuple(flags))
    metadata["before"] = default if before is MISSING else before
    return field(default=default, metadata=metadata)


DATASETS = (
    "imagefolder", "imagenette", "imagenette-320px", "imagenette-160px",
    "imagewoof", "imagewoof-320px", "imagewoof-160px", "hub", "digits",
)  # fmt: skip
ENCODED = DATASETS[:-1]
FOLDERS = ENCODED[:-1]
DOWNLOADS = FOLDERS[1:]
OWN_SPLITS = ("imagefolder", "hub")
POLICIES = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")
# The least Beta(alpha, alpha) that torch draws from: below, both of the gamma draws that it divides round to 0 more and
# more often, and the share is then one half, where it should be 0 or 1 (a quarter of the draws at 0.001, all at 1e-10).
LEAST_ALPHA = 0.01


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run. Made by `resolve`.

    A setting has one name in YAML (`lr_warmup_epochs`), on the command line (`--lr-warmup-epochs`), in code and in
    reports.
    """

    # fmt: off
    # The data
    data_path: str = setting("data", "folder of the data set, or its name on the Hub (owner/name); the reference's own default is a folder of its authors' cluster", kind="str", group="data")
    dataset: str = setting("imagefolder", "imagefolder: any tree of one folder per class; hub: a data set of the Hugging Face Hub, or a folder of Parquet (needs the package datasets); digits: scikit-learn's handwritten digits, no download", kind="str", group="data", choices=DATASETS)
    download: bool = setting(False, "fetch Imagenette or Imagewoof into data_path when it is not there", kind="bool", group="data", needs=("dataset", DOWNLOADS))
    train_split: str = setting("train", "folder of the training images below data_path (imagefolder), or their split (hub)", kind="str", group="data", needs=("dataset", OWN_SPLITS))
    val_split: str = setting("val", "folder of the validation images below data_path (imagefolder), or their split (hub: else validation, valid or test)", kind="str", group="data", needs=("dataset", OWN_SPLITS))
    hub_config: str | None = setting(None, "configuration of a data set of the Hub that has several, such as 320px", kind="str", group="data", optional=True, needs=("dataset", ("hub",)))
    image_column: str | None = setting(None, "column of the images; unset: the one of that type", kind="str", group="data", optional=True, needs=("dataset", ("hub",)))
    label_column: str | None = setting(None, "column of the classes; unset: the one of that type, or called label", kind="str", group="data", optional=True, needs=("dataset", ("hub",)))
    train_list: str | None = setting(None, "text file of the training images to use, one path below the split's folder a line; unset: all", kind="str", group="data", optional=True, needs=("dataset", FOLDERS))
    val_list: str | None = setting(None, "the same for validation", kind="str", group="data", optional=True, needs=("dataset", FOLDERS))
    cache_dataset: bool = setting(False, "keep the list of an imagefolder's files for the next start; listed anew when a class folder changed", kind="bool", group="data", needs=("dataset", ("imagefolder",)))
    on_bad_image: str = setting("error", "an image that cannot be read: error ends the run and names it; skip looks for all of them first, which takes as long as decoding all, leaves them out and lists them in summary.json", kind="str", group="data", choices=("error", "skip"), needs=("dataset", ENCODED))
    decode_cache: str = setting("auto", "keep images decoded, once for all epochs and runs: auto (where there is room), off, or the folder to keep them in", kind="str", group="data")
    augment_on: str = setting("auto", "augment image by image in workers, or in batches on the device; auto: device if that is CUDA and the policy has a batch form (ra or none)", kind="str", group="data", choices=("auto", "worker", "device"))
    decode_on: str = setting("worker", "decode each time in workers, or JPEGs in batches on a CUDA GPU (nvJPEG; needs decode_cache off, augment_on device)", kind="str", group="data", choices=("worker", "device"), needs=("decode_cache", ("off",)))
    workers: int = setting(16, "processes that load images, per process that trains; 0 loads in the training process", kind="int", group="data", interval="[0, 1024]", flags=["-j"])

    # The model
    model: str = setting("resnet18", "any torchvision classification model, or efficientnet_v2_b0, _b1, _b2, _b3, _xl", kind="str", group="model")
    weights: str | None = setting(None, "start from these: a torchvision weights name (EfficientNet_V2_S_Weights.IMAGENET1K_V1, or DEFAULT) or a file; a head of another class count is replaced", kind="str", group="model", optional=True)
    dropout: tuple[float, ...] | None = setting(None, "probability of zeroing, in the model's Dropout layers; unset: the model's own", kind="floats", group="model", interval="[0, 1)", optional=True, scheduled=Schedule(field="dropout", heading="dropout", absent="model's", axis="probability, alpha"))
    stochastic_depth_prob: tuple[float, ...] | None = setting(None, "probability of dropping the last residual block, growing linearly with depth; unset: the model's own", kind="floats", group="model", interval="[0, 1)", optional=True, scheduled=Schedule(field="stochastic_depth_prob", heading="stoch. depth", absent="model's", axis="probability, alpha"))
    bn_momentum: float | None = setting(None, "weight of the newest batch in batch norm's running statistics; unset: the model's own (0.1)", kind="float", group="model", interval="(0, 1]", optional=True)
    sync_bn: bool = setting(False, "batch norm over all processes together", kind="bool", group="model")

    # Stages
    stages: int = setting(1, "stages of progressive learning; 1: one image size and strength throughout", kind="int", group="stages", interval="[1, 1000]")
    stage_rule: str = setting("paper", "image size of stage i of M, from S0 to Se: paper S0+(Se-S0)*i/(M-1), released code S0+(Se-S0)*(i+1)/M; compute: the paper's sizes, and stages of equal compute, which see small images more often (EfficientTrain++)", kind="str", group="stages", choices=("paper", "released", "compute"))
    stage_epochs: tuple[int, ...] | None = setting(None, "epochs of each stage; unset: stage i is epochs i*N//M up to (i+1)*N//M, or by stage_rule compute", kind="ints", group="stages", interval="[1, 1000000000]", optional=True)
    train_crop_size: tuple[float, ...] = setting((224.0,), "side of the training crop, pixels; rounded down", kind="floats", group="stages", interval="[1, 8192]", scheduled=Schedule(field="image_size", heading="image size", axis="image size, px", whole=True))
    image_size_multiple: int = setting(1, "round training sizes down to a multiple of this", kind="int", group="stages", interval="[1, 512]")

    finetune_epochs: int = setting(0, "epochs after all stages that train the classifier alone to the test size, with the statistics of the last batch norm (FixRes)", kind="int", group="stages", interval="[0, 1000000000]")
    finetune_size: int | None = setting(None, "side of the images of that, pixels; unset: val_crop_size", kind="int", group="stages", interval="[1, 8192]", optional=True)
    finetune_lr: float | None = setting(None, "learning rate of that; unset: a twentieth of lr", kind="float", group="stages", interval="(0, inf)", optional=True)

    # Training
    epochs: int = setting(90, "passes over the training images, all stages together but for finetune_epochs; with stage_rule compute, as many at the last size as they are to cost", kind="int", group="training", interval="[1, 1000000000]")
    start_epoch: int = setting(0, "first epoch to train, counted from 0; a resumed run knows its own", kind="int", group="training", interval="[0, 1000000000]")
    batch_size: tuple[float, ...] = setting((32.0,), "images per step and process", kind="floats", group="training", interval="[1, 1000000000]", scheduled=Schedule(field="batch_size", heading="batch", whole=True), flags=["-b"])
    opt: str = setting("sgd", "optimizer", kind="str", group="training", choices=("sgd", "sgd_nesterov", "rmsprop", "adamw"))
    lr: float = setting(0.1, "learning rate after warm-up", kind="float", group="training", interval="(0, inf)")
    momentum: float = setting(0.9, "of sgd and rmsprop", kind="float", group="training", interval="[0, 1)", needs=("opt", ("sgd", "sgd_nesterov", "rmsprop")))
    weight_decay: float = setting(1e-4, "for all parameters without a weight decay of their own below", kind="float", group="training", interval="[0, inf)", flags=["--wd"])
    norm_weight_decay: float | None = setting(None, "weight decay of normalisation layers", kind="float", group="training", interval="[0, inf)", optional=True)
    bias_weight_decay: float | None = setting(None, "weight decay of biases", kind="float", group="training", interval="[0, inf)", optional=True)
    transformer_embedding_decay: float | None = setting(None, "weight decay of class tokens and position embeddings", kind="float", group="training", interval="[0, inf)", optional=True)
    label_smoothing: float = setting(0.0, "share of the target spread over all classes, in the loss", kind="float", group="training", interval="[0, 1]")
    class_weights: str | tuple[float, ...] | None = setting(None, "weights of the classes in the training loss: auto, larger for rarer ones (effective number of samples); or a number per class, in the order of their names; unset: all alike. Scaled to a mean of 1 over the training images", kind="floats", group="training", choices=("auto",), interval="(0, inf)", optional=True)
    clip_grad_norm: float | None = setting(None, "scale gradients down to at most this norm", kind="float", group="training", interval="(0, inf)", optional=True)
    lr_scheduler: str = setting("steplr", "how the learning rate falls after warm-up", kind="str", group="training", choices=("steplr", "cosineannealinglr", "exponentiallr"))
    lr_update: str = setting("epoch", "follow the schedule once per epoch, as the reference, or at every step", kind="str", group="training", choices=("epoch", "step"))
    lr_clock: str = setting("epochs", "what the learning rate follows: epochs, or the share of the run's compute that is spent, counted by area; all of it is `epochs`, so that with stage_rule compute warm-up and falls count passes at the last size", kind="str", group="training", choices=("epochs", "compute"))
    lr_warmup_epochs: int = setting(0, "epochs of warm-up", kind="int", group="training", interval="[0, 1000000000]")
    lr_warmup_method: str = setting("constant", "warm-up", kind="str", group="training", choices=("linear", "constant"))
    lr_warmup_decay: float = setting(0.01, "warm-up starts at this share of lr", kind="float", group="training", interval="[0, 1]")
    lr_step_size: int = setting(30, "epochs from one fall to the next (steplr)", kind="int", group="training", interval="[1, 1000000000]", needs=("lr_scheduler", ("steplr",)))
    lr_gamma: float = setting(0.1, "factor of each fall: per lr_step_size epochs (steplr), per epoch (exponentiallr)", kind="float", group="training", interval="(0, 1]", needs=("lr_scheduler", ("steplr", "exponentiallr")))
    lr_min: float = setting(0.0, "where the cosine ends (cosineannealinglr)", kind="float", group="training", interval="[0, inf)", needs=("lr_scheduler", ("cosineannealinglr",)))
    model_ema: bool = setting(False, "keep and evaluate an exponential moving average of the weights", kind="bool", group="training")
    model_ema_steps: int = setting(32, "steps from one update of the average to the next", kind="int", group="training", interval="[1, 1000000000]", needs=("model_ema", (True,)))
    model_ema_decay: float = setting(0.99998, "decay as the reference means it: 1 - decay is scaled by images per update over epochs", kind="float", group="training", interval="[0, 1)", needs=("model_ema", (True,)))

    # Augmentation
    auto_augment: str | None = setting(None, "policy: ra (RandAugment), ta_wide, augmix, or AutoAugment's imagenet, cifar10, svhn", kind="str", group="augmentation", choices=POLICIES, optional=True)
    ra_magnitude: tuple[float, ...] = setting((9.0,), "strength of RandAugment, in the units of ra_scale", kind="floats", group="augmentation", interval="[0, 30]", scheduled=Schedule(field="ra_magnitude", heading="RandAugment", absent="off", axis="RandAugment magnitude"), needs=("auto_augment", ("ra",)))
    ra_scale: str = setting("torchvision", "torchvision: bins of 30, as the reference's recipes; paper: tenths of the range, may exceed 10 (15 rotates by 45 degrees)", kind="str", group="augmentation", choices=("torchvision", "paper"), needs=("auto_augment", ("ra",)))
    augmix_severity: int = setting(3, "strength of augmix", kind="int", group="augmentation", interval="[1, 10]", needs=("auto_augment", ("augmix",)))
    random_erase: tuple[float, ...] = setting((0.0,), "probability of erasing a random rectangle", kind="floats", group="augmentation", interval="[0, 1]", scheduled=Schedule(field="random_erase", heading="erase", absent="off", axis="probability, alpha"))
    mixup_alpha: tuple[float, ...] = setting((0.0,), "mixup's Beta(alpha, alpha); 0 is off", kind="floats", group="augmentation", interval="[0, inf)", scheduled=Schedule(field="mixup_alpha", heading="mixup", absent="off", axis="probability, alpha", least=LEAST_ALPHA))
    cutmix_alpha: tuple[float, ...] = setting((0.0,), "cutmix's Beta(alpha, alpha); 0 is off; with mixup on, each batch gets one of the two", kind="floats", group="augmentation", interval="[0, inf)", scheduled=Schedule(field="cutmix_alpha", heading="cutmix", absent="off", axis="probability, alpha", least=LEAST_ALPHA))
    train_crop_scale: tuple[float, float] = setting((0.08, 1.0), "smallest and largest area of the random crop, as shares of the image", kind="floats", group="augmentation", interval="(0, 1]")
    augment_size: int | None = setting(None, "side of the image that is cropped and that the policy works on, pixels, then reduced to the stage's size with antialiasing; unset: the stage's size", kind="int", group="augmentation", interval="[1, 8192]", optional=True)
    hflip_prob: float = setting(0.5, "probability of a horizontal flip", kind="float", group="augmentation", interval="[0, 1]")
    ra_sampler: bool = setting(False, "repeated augmentation: each image ra_reps times in a step, as many images per epoch as without", kind="bool", group="augmentation")
    ra_reps: int = setting(3, "repeats of ra_sampler", kind="int", group="augmentation", interval="[1, 100]", needs=("ra_sampler", (True,)))
    interpolation: str = setting("bilinear", "of every resize and warp", kind="str", group="augmentation", choices=("nearest", "bilinear", "bicubic"))
    backend: str = setting("pil", "what transforms work on", kind="str", group="augmentation", choices=("pil", "tensor"), needs=("augment_on", ("auto", "worker")))
    use_v2: bool = setting(False, "take torchvision's own transforms from torchvision.transforms.v2 instead of torchvision.transforms", kind="bool", group="augmentation", needs=("augment_on", ("auto", "worker")))

    # Evaluation
    val_resize_size: int = setting(256, "short side before the centre crop, pixels", kind="int", group="evaluation", interval="[1, 8192]")
    val_crop_size: int = setting(224, "side of the centre crop, pixels: the test size", kind="int", group="evaluation", interval="[1, 8192]")
    eval_every: int = setting(1, "epochs from one evaluation to the next; the last epoch is always evaluated", kind="int", group="evaluation", interval="[1, 1000000000]")
    test_only: bool = setting(False, "evaluate --weights or --resume and stop; writes nothing", kind="bool", group="evaluation")

    # The machine
    device: str = setting("auto", "auto: cuda, then mps, then cpu; or a device by name", kind="str", group="machine")
    amp: bool = setting(False, "mixed precision", kind="bool", group="machine")
    amp_dtype: str = setting("auto", "auto: bfloat16 where supported, else float16; float16 trains with a gradient scaler", kind="str", group="machine", choices=("auto", "bfloat16", "float16"), needs=("amp", (True,)))
    channels_last: bool = setting(False, "keep images and weights channels last in memory; faster convolutions", kind="bool", group="machine")
    compile: bool = setting(False, "torch.compile; compiles once per stage, outside the clock", kind="bool", group="machine")
    cuda_graphs: str = setting("auto", "auto: on a CUDA GPU each stage's step is captured once and replayed, with one process and without compile; on: with compile too; off: every kernel is launched by itself", kind="str", group="machine", choices=("auto", "on", "off"))
    seed: int = setting(0, "every random choice follows from it", kind="int", group="machine", interval="[0, 4294967295]")
    use_deterministic_algorithms: bool = setting(False, "the same bits on a GPU too, slower", kind="bool", group="machine")
    world_size: int = setting(1, "processes; torchrun says it, only a launch by srun needs it here", kind="int", group="machine", interval="[1, 1000000000]")
    dist_url: str = setting("env://", "where processes meet, for a launch by srun: tcp://HOST:PORT", kind="str", group="machine")

    # The run
    config: str | None = setting(None, "YAML file of settings", kind="str", group="run", optional=True)
    output_dir: str = setting(".", "the run's folder", kind="str", group="run")
    resume: str = setting("", "auto: continue the run in output_dir, if there is one; or a checkpoint file", kind="str", group="run")
    overwrite: bool = setting(False, "start again in a folder that holds a run", kind="bool", group="run")
    fit_time: str | None = setting(None, "choose the epochs, and with them the learning rate's end, so that the whole run fits into this time (90s, 25m, 1.5h), counted from the start of the process; steps and an evaluation are timed first", kind="str", group="run", optional=True)
    time_budget: str | None = setting(None, "stop after this long (90s, 25m, 1.5h), saved; exit status 3", kind="str", group="run", optional=True)
    print_freq: int = setting(10, "steps between lines of progress", kind="int", group="run", interval="[1, 1000000000]")
    checkpoint_every: str = setting("1e", "save after so many epochs (5 or 5e), or at the end of the epoch in which so much time is up (90s, 25m, 1.5h); a stage's end, the last epoch and a stop are saved always", kind="str", group="run")
    debug: bool = setting(False, "show the traceback of an error of the program; without, it is written to OUTPUT_DIR/error.txt", kind="bool", group="run")
    clearml: str = setting("auto", "report to ClearML; auto: online if a server is configured and answers, else offline, for `python -m tracking upload OUTPUT_DIR`", kind="str", group="run", choices=("auto", "online", "offline", "off"))
    clearml_project: str = setting("progressive-learning", "ClearML project", kind="str", group="run", needs=("clearml", ("auto", "online", "offline")))
    clearml_task: str | None = setting(None, "name of the ClearML task; unset: the name of output_dir", kind="str", group="run", optional=True, needs=("clearml", ("auto", "online", "offline")))
    clearml_tags: tuple[str, ...] | None = setting(None, "tags of the ClearML task", kind="strs", group="run", optional=True, needs=("clearml", ("auto", "online", "offline")))
    tensorboard: bool = setting(False, "write what ClearML is told into OUTPUT_DIR/tensorboard, for TensorBoard (needs its package, tensorboard)", kind="bool", group="run")
    plan: str | None = setting(None, "print the stages and their cost, train nothing; `json` for machines", kind="str", group="run", choices=("table", "json"), optional=True)
    # fmt: on

    def idle(self, name: str) -> bool:
        """Check whether setting `name` has no effect, because the setting it needs has another value."""
        needs = SETTINGS[name]["needs"]
        return needs is not None and getattr(self, needs[0]) not in needs[1]

    def as_dict(self) -> dict[str, Any]:
        """Convert the settings to plain values, for YAML, checkpoints and dashboards.

        One number stays one number, the values of a schedule become a list.
        """
        return {name: plain(value) for name, value in asdict(self).items()}


SETTINGS = {f.name: f.metadata for f in fields(Config)}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Config)}
BEFORE: dict[str, Any] = {name: row["before"] for name, row in SETTINGS.items()}
SCHEDULES: dict[str, Schedule] = {name: row["scheduled"] for name, row in SETTINGS.items() if row["scheduled"]}

# How a run is started, not what it computes: left out of its config.yaml, free to differ on resume.
LAUNCH = ("config", "debug", "download", "fit_time", "overwrite", "plan", "resume", "test_only", "time_budget")
CLEARML = ("clearml", "clearml_project", "clearml_task", "clearml_tags")
# Where and how it runs: written down, and free to differ on resume.
PLACE = (
    *CLEARML, "cache_dataset", "checkpoint_every", "cuda_graphs", "data_path", "decode_cache", "device", "dist_url",
    "on_bad_image", "output_dir", "print_freq", "tensorboard", "workers", "world_size",
)  # fmt: skip


def plain(value: Any) -> Any:
    """Convert a tuple to a list, or to its only item; floats in it that are whole become ints."""
    if not isinstance(value, tuple):
        return value
    items = [int(item) if isinstance(item, float) and item == int(item) else item for item in value]
    return items[0] if len(items) == 1 else items


def show(value: Any) -> str:
    """Format `value` as one would type it; None as "unset"."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(plain(value))
