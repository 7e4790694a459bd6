"""Progressive learning: the plan of a run's stages, and the switch from one to the next.

The plan is arithmetic on settings (EfficientNetV2, arXiv:2104.00298, Algorithm 1). The
`StageScheduler` puts a stage into effect: new loaders at its size and strengths, new drop rates
on the model that trains; optimizer, schedule, EMA and the count of epochs are not touched.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from images.loaders import TrainLoader
from learning.cost import gflops_per_image
from learning.models import build_on_meta, set_dropout, set_stochastic_depth
from settings.table import Config


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage of progressive learning trains with.

    index: stage number, from 0
    epochs: global epoch numbers, half open
    image_size: side of the square training crop, pixels
    ra_magnitude: in the units of `ra_scale`; None = no RandAugment
    mixup_alpha, cutmix_alpha: parameter of Beta(alpha, alpha); 0 = off
    dropout: probability of zeroing, [0, 1); None = the model's own
    stochastic_depth_prob: probability of dropping the last block, [0, 1); None = the model's own
    random_erase: probability of erasing a rectangle, [0, 1]
    batch_size: images per step and process
    """

    index: int
    epochs: range
    image_size: int
    ra_magnitude: float | None
    mixup_alpha: float
    cutmix_alpha: float
    dropout: float | None
    stochastic_depth_prob: float | None
    random_erase: float
    batch_size: int

    def settings(self) -> dict[str, Any]:
        """What goes from stage to stage, by name: for logs and tables."""
        return {name: value for name, value in vars(self).items() if name not in ("index", "epochs")}


def stage_value(first: float, last: float, index: int, num_stages: int) -> float:
    """A setting in stage `index`: `first` in stage 0, `last` in the last stage.

    stage_value(128, 300, 1, 4) == 185.33..., left unrounded for the caller.

    Raises:
        ValueError: fewer than two stages, or an index outside them.
    Source: arXiv:2104.00298, Algorithm 1. Section 5.1 gives the first stage the minimum of
        Table 6. The released TF code does so for all settings but the image size, see
        `released_image_size`.
    """
    if num_stages < 2:
        raise ValueError(f"going from {first} to {last} takes at least 2 stages, got {num_stages}")
    if not 0 <= index < num_stages:
        raise ValueError(f"stage index must be in [0, {num_stages}), got {index}")
    return first + (last - first) * index / (num_stages - 1)


def released_image_size(first: float, last: float, index: int, num_stages: int) -> float:
    """Image size of stage `index` as the paper's released code has it: a step ahead of the paper,
    never `first` itself (128 to 300 in four stages: 171, 214, 257, 300).

    Source: google/automl, efficientnetv2/main_tf2.py.
    """
    return first + (last - first) * (index + 1) / num_stages


def spread(values: Sequence[float], num_stages: int) -> list[float]:
    """A scheduled setting in every stage, from one value, first and last, or one per stage."""
    if len(values) == num_stages:
        return list(values)
    if len(values) == 1:
        return [values[0]] * num_stages
    first, last = values
    return [stage_value(first, last, i, num_stages) for i in range(num_stages)]


def stage_epochs(config: Config) -> list[range]:
    """Which epochs belong to which stage: `stage_epochs` if set, else N // M each, the remainder
    spread evenly (350 epochs in 4 stages: 87, 88, 87, 88)."""
    num_stages, num_epochs = config.stages, config.epochs
    if config.stage_epochs is None:
        bounds = [i * num_epochs // num_stages for i in range(num_stages + 1)]
    else:
        bounds = [sum(config.stage_epochs[:i]) for i in range(num_stages + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def plan_stages(config: Config) -> list[Stage]:
    """The stages of a run.

    Sizes round down to whole pixels, or to a multiple of `image_size_multiple`; batch sizes to
    whole images; strengths, probabilities and alphas stay as they come.

    Source: arXiv:2104.00298, Algorithm 1.
    """
    num_stages = config.stages
    sizes = spread(config.train_crop_size, num_stages)
    if config.stage_rule == "released" and num_stages > 1:
        first, last = config.train_crop_size
        sizes = [released_image_size(first, last, i, num_stages) for i in range(num_stages)]
    multiple = config.image_size_multiple
    unset: list[float | None] = [None] * num_stages
    columns: dict[str, list[Any]] = {
        "image_size": [int(size) // multiple * multiple for size in sizes],
        "ra_magnitude": spread(config.ra_magnitude, num_stages) if config.auto_augment == "ra" else unset,
        "mixup_alpha": spread(config.mixup_alpha, num_stages),
        "cutmix_alpha": spread(config.cutmix_alpha, num_stages),
        "dropout": spread(config.dropout, num_stages) if config.dropout else unset,
        "stochastic_depth_prob": spread(config.stochastic_depth_prob, num_stages)
        if config.stochastic_depth_prob
        else unset,
        "random_erase": spread(config.random_erase, num_stages),
        "batch_size": [int(size) for size in spread(config.batch_size, num_stages)],
    }
    return [
        Stage(index=i, epochs=epochs, **{name: column[i] for name, column in columns.items()})
        for i, epochs in enumerate(stage_epochs(config))
    ]


def relative_cost(stages: Sequence[Stage], gflops: Sequence[float]) -> float:
    """Arithmetic of the run over that of as many epochs at the last stage's size.

    gflops: per image, one per stage
    """
    spent = sum(len(stage.epochs) * cost for stage, cost in zip(stages, gflops))
    return spent / (sum(len(stage.epochs) for stage in stages) * gflops[-1])


def describe_plan(config: Config, stages: Sequence[Stage]) -> dict[str, Any]:
    """The plan with its cost, as plain values for `--plan json`.

    Raises:
        ConfigError: the model cannot take an image size, or has nothing that a drop rate could act on.
    """
    model = build_on_meta(config.model)
    for stage in stages:
        set_drop_rates(model, stage)
    gflops = gflops_per_image(model, [stage.image_size for stage in stages])
    rows = [
        {"index": stage.index, "first_epoch": stage.epochs.start, "last_epoch": stage.epochs.stop}
        | stage.settings()
        | {"gflops_per_image": cost}
        for stage, cost in zip(stages, gflops)
    ]
    return {"stages": rows, "relative_cost": relative_cost(stages, gflops)}


PLAN_COLUMNS = {  # heading: what stands in it when the value is None, or 0 where that means off
    "image_size": ("image size", ""),
    "ra_magnitude": ("RandAugment", "off"),
    "mixup_alpha": ("mixup", "off"),
    "cutmix_alpha": ("cutmix", "off"),
    "random_erase": ("erase", "off"),
    "dropout": ("dropout", "model's"),
    "stochastic_depth_prob": ("stoch. depth", "model's"),
    "batch_size": ("batch", ""),
    "gflops_per_image": ("GFLOPs/image", ""),
}


def plan_table(plan: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a plan, as text; epochs counted from 1."""
    rows = []
    for stage in plan["stages"]:
        row = [str(stage["index"]), f"{stage['first_epoch'] + 1}-{stage['last_epoch']}"]
        for name, (_, absent) in PLAN_COLUMNS.items():
            value = stage[name]
            row.append(absent if value is None or (absent == "off" and value == 0) else f"{value:.4g}")
        rows.append(row)
    return ["stage", "epochs", *(heading for heading, _ in PLAN_COLUMNS.values())], rows


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a table for a terminal."""
    heads, rows = plan_table(plan)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [heads, *rows]]
    last = plan["stages"][-1]
    lines.append(
        f"cost: {plan['relative_cost']:.3f} of {last['last_epoch']} epochs at {last['image_size']} px throughout, in multiply-adds"
    )
    return "\n".join(lines)


def set_drop_rates(model: nn.Module, stage: Stage) -> None:
    if stage.dropout is not None:
        set_dropout(model, stage.dropout)
    if stage.stochastic_depth_prob is not None:
        set_stochastic_depth(model, stage.stochastic_depth_prob)


class StageScheduler:
    """Puts one stage after another into effect.

    make_loader: builds the training loader of a stage
    models: every copy whose drop rates follow the stages: the model that trains, its EMA
    stages: that will be entered, in order; the workers of the next one start as soon as those of the current
        one have got their last batches
    """

    def __init__(
        self, make_loader: Callable[[Stage], TrainLoader], models: Iterable[nn.Module], stages: Sequence[Stage] = ()
    ):
        self.make_loader = make_loader
        self.models = list(models)
        self.stages = list(stages)
        self.loader: TrainLoader | None = None
        self.following: TrainLoader | None = None

    def enter(self, stage: Stage) -> TrainLoader:
        """The loader of `stage`, its drop rates set; the loader of the stage before is closed."""
        following, self.following = self.following, None
        self.close()
        for model in self.models:
            set_drop_rates(model, stage)
        self.loader = following or self.make_loader(stage)
        rest = self.stages[self.stages.index(stage) + 1 :] if stage in self.stages else []
        if rest:
            self.loader.when_drained = partial(self.warm, rest[0])
        return self.loader

    def warm(self, stage: Stage) -> None:
        """Let the workers of the next stage start."""
        self.following = self.make_loader(stage)
        self.following.start(stage.epochs.start)

    def __enter__(self) -> "StageScheduler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers of the current stage and of the next, if there are any."""
        for loader in (self.loader, self.following):
            if loader is not None:
                loader.close()
        self.loader = self.following = None
