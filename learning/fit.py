"""A run that fits a time: its steps and an evaluation are timed before the first epoch, and the epochs chosen accordingly.

The lengths that stages would have had keep their proportions. What is chosen is written down as settings, and stands:
a resumed run, or one that is started from its config.yaml, trains the same epochs, on a slower machine, too.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil

from images.datasets import Data
from images.loaders import eval_loader
from images.store_place import building_seconds
from images.workers import closing_loader
from learning.checkpoint import TIMED, UNFINISHED, write_beside
from learning.learner import Learner
from learning.optim import LearningRate
from learning.state import RunState
from learning.stop import Stop
from learning.throughput import SHARE
from settings.errors import ConfigError
from settings.table import DEFAULTS, Config
from settings.values import every, seconds
from utils import Runtime

if TYPE_CHECKING:
    from stages import Stage, StageScheduler

RESERVE = 0.05  # of the time from the measuring on: by so much a run may be slower than its first steps
MEASURING = 0.04  # of the time left may go into measuring
PAGES = 0.025  # of training on a CPU: report.html is drawn once a minute, which takes one or two seconds
ASSESSING = 1.5  # seconds before that: calibration, mistakes; the speed of inference takes SHARE of training
ENDING, ENDING_CLEARML = 4.0, 8.0  # seconds after summary.json is written: the last report.html; what ClearML is sent
BLOCKS = 5  # that measured steps are divided into; the median counts


def since_start() -> float:
    """Compute the seconds since this process was started, its imports included."""
    return time.time() - psutil.Process().create_time()


# ---- how many epochs a time affords ----


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take.

    epochs: an epoch of each stage, with what is done at its end besides an evaluation
    entries: the beginning of each stage: workers, compilation
    evaluation: of all copies of the weights at test size
    closing: what comes after the stages: fine-tuning, further evaluations
    """

    epochs: list[float]
    entries: list[float]
    evaluation: float
    closing: float

    def training(self, lengths: Sequence[int]) -> float:
        """Add up the seconds of stages with so many epochs."""
        return sum(self.entries) + sum(count * cost for count, cost in zip(lengths, self.epochs))

    def evaluations(self, lengths: Sequence[int], eval_every: int) -> float:
        """Add up the seconds of all evaluations: one every `eval_every` epochs, after the last epoch, and the closing ones."""
        return math.ceil(sum(lengths) / eval_every) * self.evaluation + self.closing

    def total(self, lengths: Sequence[int], eval_every: int) -> float:
        return self.training(lengths) + self.evaluations(lengths, eval_every)


def affordable(costs: Costs, shape: Sequence[float], eval_every: int, limit: float) -> list[int] | None:
    """Choose the epochs of the stages that take at most `limit` seconds; None if one epoch of each takes more.

    They are in proportion to `shape`, rounded down; what is left goes to stages whose epochs still fit, first to the one
    that has least of its part.
    """

    def fits(lengths: Sequence[int]) -> bool:
        return costs.total(lengths, eval_every) <= limit

    def scaled(factor: float) -> list[int]:
        return [max(1, int(factor * part)) for part in shape]

    if not fits([1] * len(shape)):
        return None
    low, high = 0.0, (limit / min(costs.epochs) + 1) / min(shape)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    lengths = scaled(low)
    while True:
        longer = [[*lengths[:i], lengths[i] + 1, *lengths[i + 1 :]] for i in range(len(lengths))]
        open_to = [i for i, one in enumerate(longer) if fits(one)]
        if not open_to:
            return lengths
        lengths = longer[min(open_to, key=lambda i: lengths[i] / shape[i])]


def with_lengths(config: Config, lengths: Sequence[int], before: LearningRate) -> Config:
    """Set the epochs of the stages, and with them what counts epochs in the learning rate's schedule, in proportion.

    before: the schedule of `config` as it was
    """
    share = sum(lengths) / before.span
    changes: dict[str, Any] = {"epochs": sum(lengths)}
    if len(lengths) > 1:
        changes["stage_epochs"] = tuple(lengths)
    if config.stage_rule == "compute":  # whose sizes are the paper's, and whose lengths these are
        changes["stage_rule"] = "paper"
    if config.lr_warmup_epochs:
        changes["lr_warmup_epochs"] = round(config.lr_warmup_epochs * share)
        if not changes["lr_warmup_epochs"]:  # a whole epoch of it would be most of so short a run, at a hundredth of lr
            changes |= {name: DEFAULTS[name] for name in ("lr_warmup_method", "lr_warmup_decay")}
    if config.lr_scheduler == "steplr":
        changes["lr_step_size"] = max(1, round(config.lr_step_size * share))
    if config.lr_scheduler == "exponentiallr":
        changes["lr_gamma"] = max(1e-6, config.lr_gamma ** (1 / share))
    return replace(config, fit_time=None, **changes)


@dataclass(frozen=True)
class Forecast:
    """What a run was expected to take, in seconds.

    asked: the time it was to fit
    before: from the start of the process to the first epoch
    training, evaluating: after that, until summary.json is written
    ending: kept for what comes after that
    lengths: epochs of the stages
    epochs: an epoch of each stage
    """

    asked: float
    before: float
    training: float
    evaluating: float
    ending: float
    lengths: list[int]
    epochs: list[float]

    @property
    def total(self) -> float:
        """Seconds from the start of the process until summary.json is written."""
        return self.before + self.training + self.evaluating

    def __str__(self) -> str:
        stages = " + ".join(f"{count} x {cost:.3g}" for count, cost in zip(self.lengths, self.epochs))
        return (
            f"fit_time: {self.total + self.ending:.0f} of {self.asked:.0f} s expected: {self.before:.0f} until now, "
            f"{self.training:.0f} training ({stages}), {self.evaluating:.0f} evaluating, {self.ending:.0f} for the end; the "
            "rest is kept for what takes longer"
        )

    def outcome(self, taken: float) -> dict[str, Any]:
        """Compare with what the run took until now, when its summary is written: for summary.json."""
        return asdict(self) | {"forecast": self.total, "taken": taken, "error": taken / self.total - 1}


# ---- what its parts take ----


class Few(Stop):
    """Ends training, or an evaluation, after a few steps, and notes the time after some of them.

    marks: numbers of steps, rising; it ends after the last
    times: when each mark was reached, the device waited for
    """

    def __init__(self, runtime: Runtime, marks: Sequence[int]):
        super().__init__(runtime)
        self.marks, self.count, self.times = list(marks), 0, list[float]()
        if self.marks[0] == 0:
            self.note()

    def note(self) -> None:
        self.runtime.synchronize()
        self.times.append(time.perf_counter())

    def __call__(self, step: int = 0, budget: bool = True) -> bool:
        self.count += 1
        if self.count in self.marks:
            self.note()
        return self.count >= self.marks[-1]

    def per_step(self, in_bursts: bool) -> float:
        """Compute the seconds of a step: the median of the blocks between marks.

        in_bursts: workers bring the images. They begin together, so that batches may come as many at once, with a wait
            after them, which the mean alone has in it.
        """
        steps = [stop - start for start, stop in pairwise(self.marks)]
        taken = [stop - start for start, stop in pairwise(self.times)]
        median = statistics.median(time / count for time, count in zip(taken, steps))
        return max(median, sum(taken) / sum(steps)) if in_bursts else median


def marks_of(count: int, skipped: int) -> list[int]:
    """Divide `count` steps into blocks, after leaving out the first ones.

    skipped: steps whose images workers have loaded meanwhile; at most half of all are left out
    """
    start = min(skipped, count // 2)
    block = max(1, (count - start) // BLOCKS)
    return list(range(start, count + 1, block))[: BLOCKS + 1]


class Measuring:
    """Times the parts of a run, with the very functions that it trains and evaluates with.

    train: of train.py, `train_one_epoch`; evaluate: of train.py
    limit: seconds that each of the measurements may take, besides its first two steps
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        learner: Learner,
        stages: "Sequence[Stage]",
        scheduler: "StageScheduler",
        train: Callable[..., bool],
        evaluate: Callable[..., Mapping[str, Any]],
        limit: float,
    ):
        self.config, self.data, self.learner, self.stages, self.scheduler = config, data, learner, stages, scheduler
        self.train, self.evaluate, self.limit = train, evaluate, limit
        self.runtime = learner.runtime

    def affordable(self, step: float, most: int) -> int:
        """Choose how many steps of so many seconds are measured, the same on all processes."""
        return self.runtime.from_main(max(1, min(most, int(self.limit / max(step, 1e-6)))))

    def stage(self, stage: "Stage") -> tuple[float, float]:
        """Measure the seconds of an epoch of a stage, and of the stage's beginning; the caller undoes the steps."""
        started = time.perf_counter()
        loader = self.scheduler.enter(stage)
        self.learner.enter_stage(stage.image_size, loader.batch_sizes, loader.soft_classes, stage.finetune)
        state = RunState(epoch=stage.epochs.start)
        config = replace(self.config, lr=0.0, lr_min=0.0, finetune_lr=None)  # weights stay what they are
        still = LearningRate(config, self.stages)
        unseen = SimpleNamespace(title="measuring", step=lambda step, losses: None)

        def steps(marks: Sequence[int]) -> Few:
            few = Few(self.runtime, marks)
            self.train(self.learner, loader, state, still, unseen, few)
            if few.failure is not None:
                raise few.failure
            return few

        first = steps([1, 2])
        step = first.times[-1] - (first.times[0] if len(first.times) > 1 else started)
        entry = max(0.0, first.times[0] - started - step)
        rest = len(loader) - 2
        if rest > 0:
            step = steps(marks_of(self.affordable(step, rest), 2 * self.config.workers)).per_step(
                self.config.workers > 0
            )
        return step * len(loader), entry

    def evaluation(self) -> float:
        """Measure the seconds of an evaluation of all copies, at test size."""
        size, copies, criterion = self.config.val_crop_size, self.learner.copies, self.learner.criterion
        marks = [1, 2, 3]
        while True:
            with closing_loader(eval_loader(self.config, self.data, self.runtime, size)) as loader:
                few, started = Few(self.runtime, marks), time.perf_counter()
                self.evaluate(copies, loader, criterion, self.runtime, few)
                self.runtime.synchronize()
                whole = time.perf_counter() - started
                if few.failure is not None:
                    raise few.failure
                if few.count < marks[-1]:
                    return whole
                if marks[-1] > 3:
                    return few.per_step(self.config.workers > 0) * len(loader)
                count = self.affordable(few.times[2] - few.times[1], len(loader) + 1)
                marks = [mark + 1 for mark in marks_of(max(3, count), 2 * self.config.workers)]

    def save(self) -> tuple[float, float]:
        """Measure the seconds of copying a checkpoint and of writing it, by writing one and removing it."""
        started = time.perf_counter()
        checkpoint = self.learner.checkpoint(RunState(), self.config, self.data)
        copied = written = time.perf_counter()
        if self.runtime.is_main:
            # Not by the name of a checkpoint, which a run killed here would be resumed from; the next one writes over it.
            path = os.path.join(self.config.output_dir, TIMED)
            write_beside(path, checkpoint.to_dict())
            written = time.perf_counter()
            os.remove(path + UNFINISHED)
        return copied - started, written - copied


def measure(measuring: Measuring) -> Costs:
    """Measure what the parts of a run take; the learner is afterwards as it was.

    Fine-tuning, whose epochs are given, counts as a part of what comes after the stages.
    """
    config, learner, runtime, stages = measuring.config, measuring.learner, measuring.runtime, measuring.stages
    known: dict[tuple, tuple[float, float]] = {}
    found = []
    with learner.undoing(), measuring.scheduler:
        for stage in stages:
            key = (stage.image_size, stage.batch_size, stage.mixup_alpha > 0 or stage.cutmix_alpha > 0, stage.finetune)
            known[key] = known.get(key) or measuring.stage(stage)
            found.append(known[key])
        copy, write = measuring.save()
        learner.finetune(False)
        evaluation = measuring.evaluation()
    if learner.ema is not None:  # it is what the weights are before the first step
        learner.ema.module.load_state_dict(learner.model.state_dict())
        learner.ema.num_updates = 0
    runtime.release_memory()
    epochs_between, _ = every(config.checkpoint_every)
    on_cpu = runtime.device.type == "cpu"
    times, saves = [], 1 / epochs_between if epochs_between else 0.0
    for seconds_of_epoch, _ in found:
        # Written while training goes on, but on a CPU at its cost; the best weights are another part of it.
        waiting = 1.4 * write if on_cpu else max(0.0, write - seconds_of_epoch)
        times.append(seconds_of_epoch * (1 + SHARE + (PAGES if on_cpu else 0.0)) + saves * (copy + waiting))
    closing = ASSESSING
    if stages[-1].image_size != config.val_crop_size:
        area = (stages[-1].image_size / config.val_crop_size) ** 2
        closing += evaluation * max(area, 0.25 + 0.75 * area) * (len(learner.copies) + 1) / len(learner.copies)
    entries = [entry for _, entry in found]
    if stages[-1].finetune:
        count = len(stages[-1].epochs)
        closing += count * times.pop() + entries.pop() + (math.ceil(count / config.eval_every) + 1) * evaluation
    return runtime.from_main(Costs(times, entries, evaluation, closing))


# ---- the whole ----


def check_decoding(config: Config, data: Data, runtime: Runtime) -> None:
    """Raise ConfigError if decoding the images once would take all of `fit_time`, as a few of them tell."""
    assert config.fit_time is not None
    asked, gone = seconds(config.fit_time, "fit_time"), since_start()
    needed = runtime.share(lambda: building_seconds(config, data))
    if runtime.from_main(needed > 0 and gone + needed > asked):
        raise ConfigError(
            f"fit_time {config.fit_time} is too short: decoding the images, once for all runs, takes about {needed:.0f} s "
            "alone; give more, or --decode-cache off"
        )


def fit(
    config: Config,
    data: Data,
    learner: Learner,
    stages: "Sequence[Stage]",
    scheduler: "StageScheduler",
    train: Callable[..., bool],
    evaluate: Callable[..., Mapping[str, Any]],
) -> tuple[Config, Forecast]:
    """Choose the epochs that `fit_time` affords; return the settings with them, and what the run should take.

    stages: as the settings have them without it: their lengths give the proportions
    train, evaluate: `train_one_epoch` and `evaluate` of train.py

    Raises:
        ConfigError: it does not afford one epoch of each stage; the message says what does.
    """
    assert config.fit_time is not None
    asked, runtime = seconds(config.fit_time, "fit_time"), learner.runtime
    limit = MEASURING * max(1.0, asked - since_start()) / (len({stage.image_size for stage in stages}) + 1)
    costs = measure(Measuring(config, data, learner, stages, scheduler, train, evaluate, limit))
    stages = stages[: len(costs.epochs)]  # fine-tuning keeps its epochs
    before = runtime.from_main(since_start())
    ending = ENDING + (ENDING_CLEARML if config.clearml != "off" else 0.0)
    left = asked - before
    lengths = affordable(
        costs, [len(stage.epochs) for stage in stages], config.eval_every, left * (1 - RESERVE) - ending
    )
    if lengths is None:
        least = (costs.total([1] * len(stages), config.eval_every) + ending) / (1 - RESERVE)
        raise ConfigError(
            f"fit_time {config.fit_time} is too short: an epoch of every stage, evaluation and the end take {least:.0f} s "
            f"after the {before:.0f} s until now; give {math.ceil(before + least)}s or more"
        )
    schedule = LearningRate(config, stages)
    evaluating = costs.evaluations(lengths, config.eval_every)
    forecast = Forecast(asked, before, costs.training(lengths), evaluating, ending, lengths, costs.epochs)
    return with_lengths(config, lengths, schedule), forecast
