"""Progressive learning: the plan of a run's stages, and the switch from one to the next.

The plan is arithmetic on settings (EfficientNetV2, arXiv:2104.00298, Algorithm 1). The
`StageScheduler` puts a stage into effect: new loaders at its size and strengths, new drop rates
on the model that trains; optimizer, schedule, EMA and the count of epochs are not touched.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate, pairwise, zip_longest
from typing import TYPE_CHECKING, Any

from torch import nn

from learning.cost import gflops_per_image
from learning.models import build_on_meta, set_dropout, set_stochastic_depth, tuned_layers
from learning.rules import equal_compute, released_image_size, spread
from settings.errors import ConfigError
from settings.table import SCHEDULES, Config

if TYPE_CHECKING:
    from images.loaders import TrainLoader


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
    finetune: trains the classifier alone, see `finetune_stage`
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
    finetune: bool = False

    def settings(self) -> dict[str, Any]:
        """Collect what may change from stage to stage, by name: for logs and tables."""
        return {name: getattr(self, name) for name in COLUMNS}


# What a stage sets, in the order of its fields: the columns of every table.
COLUMNS = {
    schedule.field: schedule
    for field in fields(Stage)
    for schedule in SCHEDULES.values()
    if schedule.field == field.name
}


def stage_epochs(config: Config, sizes: Sequence[int]) -> list[range]:
    """Divide the epochs among the stages.

    By `stage_epochs` if set, or by `equal_compute`; else N // M each, the remainder spread evenly (350 epochs in 4 stages:
    87, 88, 87, 88).

    sizes: of the stages, pixels
    """
    num_stages, num_epochs = config.stages, config.epochs
    if config.stage_epochs is not None:
        bounds = [0, *accumulate(config.stage_epochs)]
    elif config.stage_rule == "compute":
        bounds = [0, *accumulate(equal_compute(num_epochs, sizes))]
    else:
        bounds = [i * num_epochs // num_stages for i in range(num_stages + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def plan_stages(config: Config) -> list[Stage]:
    """Compute the stages of a run.

    Sizes round down to whole pixels, or to a multiple of `image_size_multiple`; batch sizes to
    whole images; strengths, probabilities and alphas stay as they come, but for alphas so near 0
    that torch cannot draw with them.

    Source: arXiv:2104.00298, Algorithm 1.
    """
    columns = {schedule.field: values_of(config, name) for name, schedule in SCHEDULES.items()}
    if config.stage_rule == "released" and config.stages > 1:
        first, last = config.train_crop_size
        columns["image_size"] = [int(released_image_size(first, last, i, config.stages)) for i in range(config.stages)]
    multiple = config.image_size_multiple
    columns["image_size"] = [size // multiple * multiple for size in columns["image_size"]]
    stages = [
        Stage(index=i, epochs=epochs, **{name: column[i] for name, column in columns.items()})
        for i, epochs in enumerate(stage_epochs(config, columns["image_size"]))
    ]
    return [*stages, finetune_stage(config, stages[-1])] if config.finetune_epochs else stages


def finetune_stage(config: Config, last: Stage) -> Stage:
    """Build the stage after the `last` one, which trains the classifier alone, on images as evaluation sees them.

    Nothing is dropped, mixed or augmented in it but by flips (`presets.finetune_preset`).

    Source: arXiv:1906.06423 (FixRes), section 4.
    """
    return replace(
        last,
        index=last.index + 1,
        epochs=range(last.epochs.stop, last.epochs.stop + config.finetune_epochs),
        image_size=config.finetune_size or config.val_crop_size,
        ra_magnitude=None,
        mixup_alpha=0.0,
        cutmix_alpha=0.0,
        dropout=0.0,
        stochastic_depth_prob=0.0,
        random_erase=0.0,
        finetune=True,
    )


def values_of(config: Config, name: str) -> list[Any]:
    """Compute the values of scheduled setting `name` in the stages.

    They are None in all stages where the setting is unset or does nothing.
    """
    given = getattr(config, name)
    if given is None or config.idle(name):
        return [None] * config.stages
    values, schedule = spread(given, config.stages), SCHEDULES[name]
    if schedule.whole:
        return [int(value) for value in values]
    return [value if value >= schedule.least else 0.0 for value in values]


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and what they cost.

    gflops_per_image: billions of multiply-adds of one image's forward pass, in each stage
    full_epochs: epochs at the last size whose compute the stages share, by stage_rule compute; else None
    """

    stages: Sequence[Stage]
    gflops_per_image: Sequence[float]
    full_epochs: int | None = None

    @property
    def num_epochs(self) -> int:
        """Epochs that the run trains, fine-tuning included; by stage_rule compute they are more than its setting `epochs`."""
        return self.stages[-1].epochs.stop

    @property
    def compared_with(self) -> int:
        """Epochs at the last size that costs are told against: `full_epochs`, else as many as the stages have."""
        return self.full_epochs or self.last.epochs.stop

    @property
    def relative_cost(self) -> float:
        """Arithmetic of the run over that of `compared_with` epochs at the last stage's size, fine-tuning left out of both."""
        trained = [(len(stage.epochs), gflops) for stage, gflops in zip(self.stages, self.gflops_per_image) if not stage.finetune]  # fmt: skip
        spent = sum(epochs * gflops for epochs, gflops in trained)
        return spent / (self.compared_with * trained[-1][1])

    @property
    def last(self) -> Stage:
        """The last stage that trains all of the model."""
        return [stage for stage in self.stages if not stage.finetune][-1]

    def evaluates(self, epoch: int, eval_every: int) -> bool:
        """Check whether an epoch ends with an evaluation: every `eval_every`-th, the last, and the last before fine-tuning."""
        return (epoch + 1) % eval_every == 0 or epoch + 1 in (self.last.epochs.stop, self.num_epochs)

    def full_passes(self, costs: Sequence[float]) -> list[float]:
        """Compute what each stage but fine-tuning comes to in passes at the last size.

        costs: of an image in each stage, in any unit
        """
        trained = self.stages[: self.last.index + 1]
        return [len(stage.epochs) * cost / costs[self.last.index] for stage, cost in zip(trained, costs)]

    @property
    def areas(self) -> list[float]:
        """The pixels of an image in each stage, which stages of equal compute are cut by."""
        return [float(stage.image_size**2) for stage in self.stages]

    def stage_of(self, epoch: int) -> Stage:
        """Find the stage that an epoch belongs to."""
        return next(stage for stage in self.stages if epoch in stage.epochs)

    def ahead(self, epoch: int) -> list[Stage]:
        """List the stages that still have epochs to train, from number `epoch` on."""
        return [stage for stage in self.stages if stage.epochs.stop > epoch]

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values, for `--plan json` and files; `last_epoch` is exclusive."""
        rows = [
            {"index": stage.index, "first_epoch": stage.epochs.start, "last_epoch": stage.epochs.stop}
            | stage.settings()
            | {"gflops_per_image": gflops, "finetune": stage.finetune}
            for stage, gflops in zip(self.stages, self.gflops_per_image)
        ]
        compared = {} if self.full_epochs is None else {"full_epochs": self.full_epochs}
        return {"stages": rows, "relative_cost": self.relative_cost, **compared}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Plan":
        """Read what `as_dict` returned, of an older version too: settings it did not know are None."""
        stages = [
            Stage(
                index=row["index"],
                epochs=range(row["first_epoch"], row["last_epoch"]),
                finetune=row.get("finetune", False),
                **{schedule.field: row.get(schedule.field) for schedule in SCHEDULES.values()},
            )
            for row in content["stages"]
        ]
        return cls(stages, [row["gflops_per_image"] for row in content["stages"]], content.get("full_epochs"))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Format headings and rows as text; epochs are counted from 1.

        Of stages of equal compute two columns more tell it, in passes at the last size: by area, and by multiply-adds.
        """
        rows = []
        for stage, gflops in zip(self.stages, self.gflops_per_image):
            shown = [schedule.show(getattr(stage, name)) for name, schedule in COLUMNS.items()]
            epochs = f"{stage.epochs.start + 1}-{stage.epochs.stop}"
            rows.append([f"{stage.index}{' finetune' * stage.finetune}", epochs, *shown, f"{gflops:.4g}"])
        heads = ["stage", "epochs", *(schedule.heading for schedule in COLUMNS.values()), "GFLOPs/image"]
        if self.full_epochs is not None:
            for head, costs in (("full passes", self.areas), ("by GFLOPs", self.gflops_per_image)):
                heads.append(head)
                cells = [f"{passes:.4g}" for passes in self.full_passes(costs)]
                rows = [[*row, cell] for row, cell in zip_longest(rows, cells, fillvalue="")]
        return heads, rows

    def __str__(self) -> str:
        """Format the plan as a table for a terminal."""
        heads, rows = self.table()
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [heads, *rows]]
        last = self.last
        cost = f"cost: {self.relative_cost:.3f} of {self.compared_with} epochs at {last.image_size} px throughout"
        lines.append(f"{cost}, in multiply-adds")
        if self.full_epochs is not None:
            lines[-1] += f" ({sum(self.full_passes(self.areas)) / self.full_epochs:.3f} by area)"
        if last != self.stages[-1]:
            lines[-1] += (
                f"; without {len(self.stages[-1].epochs)} epochs of fine-tuning, which take the forward pass alone"
            )
        return "\n".join(lines)


# Multiply-adds by model and size: the plans of a study ask for the same ones.
COUNTED: dict[str, dict[int, float]] = {}


def make_plan(config: Config) -> Plan:
    """Plan the stages of a run, and compute what they cost.

    Raises:
        ConfigError: the model cannot take an image size, has nothing that a drop rate could act on, or no classifier
            that could be trained alone; start_epoch is beyond the last stage.
    """
    stages = plan_stages(config)
    model = build_on_meta(config.model)
    if stages[-1].finetune:
        tuned_layers(model)
    set_drop_rates(model, stages[0])  # all stages set the same ones
    counted = COUNTED.setdefault(config.model, {})
    sizes = [stage.image_size for stage in stages]
    # Also the test size, which a model that takes one size only may refuse: after an epoch that would be lost.
    *gflops, _ = gflops_per_image(model, [*sizes, config.val_crop_size], counted)
    plan = plan_of(config, stages, gflops)
    if config.start_epoch >= plan.last.epochs.stop:
        raise ConfigError(
            f"start_epoch {config.start_epoch} is not below the {plan.last.epochs.stop} epochs of the stages"
        )
    return plan


def plan_of(config: Config, stages: Sequence[Stage], gflops: Sequence[float]) -> Plan:
    """Make the plan of stages whose costs are known, billions of multiply-adds per image."""
    return Plan(stages, gflops, config.epochs if config.stage_rule == "compute" else None)


def set_drop_rates(model: nn.Module, stage: Stage) -> None:
    """Set the drop rates of `model` to those of `stage`; None leaves the model's own.

    In fine-tuning there is nothing to set: what could drop is in evaluation mode.
    """
    if stage.finetune:
        return
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
        self, make_loader: "Callable[[Stage], TrainLoader]", models: Iterable[nn.Module], stages: Sequence[Stage] = ()
    ):
        self.make_loader = make_loader
        self.models = list(models)
        self.stages = list(stages)
        self.loader: TrainLoader | None = None
        self.following: TrainLoader | None = None

    def enter(self, stage: Stage) -> "TrainLoader":
        """Put `stage` into effect: close the loader before, set the drop rates, return the new loader."""
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
        """Start the workers of the next stage."""
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
