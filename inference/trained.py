"""A trained model as its run left it: weights, names of classes, and how images are made ready for it."""

import os
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torchvision.transforms import Compose

from learning.learner import build_model_of
from learning.models import as_trained, check_name
from learning.resume import find_whole
from learning.weights import read_weights
from presets import test_preset
from reporting.folder import BEST, CHECKPOINT, PLAN, RunFolder
from settings.errors import ConfigError, first_line
from settings.resolve import RUN_SETTINGS, resolve
from settings.table import CLEARML, LAUNCH, Config
from utils import Runtime, start_runtime

# What a run began with need not be there any more, and where and how fast it ran says nothing about here.
NOT_OF_THE_MODEL = {
    *LAUNCH, *CLEARML, "weights", "decode_cache", "decode_on", "augment_on",
    "device", "amp", "amp_dtype", "compile", "cuda_graphs", "world_size", "dist_url",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A model of a run, on the device and set to evaluate.

    config: the run's settings, but for those of where and how fast it ran
    classes: names, in the order of the model's outputs
    image_size: side of the images that it takes, pixels; the run's test size unless asked otherwise
    weights: which they are, for people: `best weights of epoch 7`
    top1: percent, as the run has measured it of these weights, at its test size; None: it has not
    finished: the run was; else `weights` are those so far
    temperature: what logits are divided by before softmax, for probabilities that mean what they say; 1 of last weights
    """

    folder: RunFolder
    config: Config
    classes: list[str]
    model: nn.Module
    runtime: Runtime
    image_size: int
    weights: str
    top1: float | None
    finished: bool
    temperature: float

    @property
    def resize_size(self) -> int:
        """The short side that images are resized to before their centre is cropped, pixels."""
        return round(self.image_size * self.config.val_resize_size / self.config.val_crop_size)

    @property
    def transform(self) -> Compose:
        """The run's transform of validation images: an RGB PIL image to float32 (3, image_size, image_size)."""
        return test_preset(self.config, self.image_size)

    def __str__(self) -> str:
        unfinished = "" if self.finished else ", of a run that is not finished"
        return (
            f"{self.folder.path}: {self.config.model}, {self.weights}{unfinished}; {len(self.classes)} classes, "
            f"{self.image_size} px"
        )


def open_run(
    path: str, *, weights: str = "best", image_size: int | None = None, device: str = "auto", amp: bool = False
) -> Trained:
    """Open what a run has trained.

    path: its folder
    weights: "best", or "last": of a checkpoint, its moving average if the run keeps one
    image_size: pixels; None: the run's test size
    amp: mixed precision, of the run's type if it had one; else full precision, as what is shipped

    Raises:
        ConfigError: no run, one without weights, weights that are damaged or of another model; no such device.
    """
    folder = RunFolder(path)
    if not folder.has(RUN_SETTINGS):
        raise ConfigError(f"{path} holds no run: it has no {RUN_SETTINGS}; give the output_dir of a training")
    try:
        values, classes, summary = dict(folder.settings()), folder.classes(), folder.summary()
    except Exception as error:  # hand-made, or cut off: what is wrong with it varies
        raise ConfigError(f"{path}: its settings, classes or summary cannot be read ({first_line(error)})") from error
    config = resolve([], {name: values[name] for name in values if name not in NOT_OF_THE_MODEL} | {"device": device})
    check_name(config.model)
    if amp:
        # auto is bfloat16 but on a GPU that is too old for it
        config = replace(config, amp=True, amp_dtype="float16" if values.get("amp_dtype") == "float16" else "auto")
    fit = (summary or {}).get("calibration") or {}  # none in older runs, and where outputs were not kept
    runtime = start_runtime(config)
    state, which, top1 = weights_of(folder, config, weights)
    model, _ = build_model_of(config, len(classes), state, runtime)
    for name, value in model.state_dict().items():
        if state[name].shape != value.shape:  # which training takes for a head to be made anew
            raise ConfigError(
                f"{path}: its weights have {len(state[name])} outputs ({name}), its {PLAN} names {len(classes)} classes"
            )
    return Trained(
        folder=folder,
        config=config,
        classes=classes,
        model=as_trained(model, published=values.get("weights") is not None).eval(),
        runtime=runtime,
        image_size=image_size or config.val_crop_size,
        weights=which,
        top1=top1,
        finished=summary is not None,
        # Fitted for the best weights; the last ones may be surer of themselves, or less
        temperature=float(fit.get("temperature", 1.0)) if which.startswith("best") else 1.0,
    )


def weights_of(folder: RunFolder, config: Config, which: str) -> tuple[dict[str, Tensor], str, float | None]:
    """Read the weights of a run.

    Returns: them, which they are, and their top-1 as far as it was measured, percent

    Raises:
        ConfigError: there are none, or they are damaged.
    """
    if which == "best" and folder.has(BEST):
        confusion = folder.confusion("best")
        epoch = "" if confusion is None else f" of epoch {confusion[0] + 1}"
        top1 = None if confusion is None else float(100 * confusion[1].trace() / confusion[1].sum())
        return read_weights(config.model, folder.at(BEST)), f"best weights{epoch}", top1
    checkpoint, troubles = find_whole(folder.checkpoint)
    if checkpoint is None and folder.has(CHECKPOINT):
        raise ConfigError("; ".join(troubles))
    if checkpoint is None:
        there = f"it has {BEST} alone" if folder.has(BEST) else "nothing was saved yet"
        raise ConfigError(f"{os.path.join(folder.path, CHECKPOINT)} is not there: {there}")
    average, state = checkpoint.model_ema, checkpoint.state
    place = os.path.basename(checkpoint.read_from)
    told = f"last weights{'' if place == CHECKPOINT else f' of {place}'}{' (EMA)' if average else ''}, after "
    if state.step:  # it was stopped, or crashed, inside an epoch, and has not evaluated these
        return average or checkpoint.model, told + f"{state.step} steps of epoch {state.epoch + 1}", None
    records = {record["epoch"]: record for record in folder.metrics()}
    top1 = records.get(state.epoch - 1, {}).get("top1_ema" if average else "top1")
    return average or checkpoint.model, told + f"epoch {state.epoch}", top1
