"""The run's log. Training says what happened; from here it goes into the run's folder and to a dashboard."""

import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from torch import Tensor

from images.datasets import Data
from learning.checkpoint import UNFINISHED, Checkpoint, previous_checkpoint, put_in_place, to_cpu
from learning.fit import Forecast, since_start
from learning.learner import Learner
from learning.resume import began_with
from learning.scores import Score
from learning.state import RunState
from learning.throughput import inference_speed
from reporting.assessment import assess, thumbnail
from reporting.folder import METRICS, REPORT, RunFolder
from reporting.page import report_page
from reporting.records import epoch_record, is_whole, summarise
from settings.errors import first_line
from settings.resolve import FORECAST
from settings.table import LAUNCH, Config
from settings.values import every
from stages import Plan, Stage

REPORT_EVERY = 60.0  # seconds; drawing the page takes one or two


class Dashboard:
    """Where a run is shown besides its folder. This one shows nothing; `tracking` has those of ClearML and TensorBoard.

    ask_to_stop: called with a reason when someone wants the run to end early, saved
    """

    ask_to_stop: Callable[[str], None]

    def start(self, config: Config) -> None:
        """Begin to show a run, with what its folder holds already."""

    def begin_stage(self, stage: Stage) -> None:
        """Show a stage that begins, of which the run's folder holds a picture."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Show an epoch: its line of metrics.jsonl."""

    def best(self, epoch: int, confusion: Tensor) -> None:
        """Show an epoch whose weights evaluate better than all before.

        confusion: (K, K) counts, rows true
        """

    def finish(self) -> None:
        """Note that the run's folder is complete."""

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """End what is shown when the program ends, for whatever reason."""


class RunLog:
    """The log of a process that writes nothing: that of every rank but 0.

    saved: whether there is something to resume from, as far as this process knows
    """

    saved = True

    def begin_stage(self, stage: Stage) -> None:
        """Note that a stage begins."""

    def epoch(self, stage: Stage, state: RunState, learner: Learner, scores: Mapping[str, Score]) -> dict[str, Any]:
        """Build the line of metrics of an epoch, and log it."""
        return epoch_record(stage, state, learner, scores)

    def save_best(self, learner: Learner, state: RunState, score: Score) -> None:
        """Save the weights that `state` calls the best, and their confusion matrix."""

    def save_checkpoint(self, learner: Learner, state: RunState, data: Data, always: bool) -> None:
        """Save all that a resume needs, if the time for it has come; `always`: anyway."""

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            RunError: it could not be saved.
        """

    def best_weights(self) -> dict[str, Tensor] | None:
        """Read the weights that `save_best` has saved; None on a rank that saves none."""
        return None

    def finish(
        self, state: RunState, learner: Learner, sizes: Mapping[str, int], closing: Mapping[int, Mapping[str, Score]]
    ) -> None:
        """Write the outcome of the run.

        sizes: what the closing evaluations were made at, by name, pixels
        closing: their scores, by size and by copy of the weights ("model", "ema", "best"); at test size the best has the
            outputs of all images
        """

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """End what the log still does."""


class FolderLog(RunLog):
    """The log of rank 0: config.yaml, metrics.jsonl, summary.json, report.html, and what the report shows in `report/`.

    Checkpoints are written by a thread, while training goes on; the next one waits for it, and raises its error.

    samples: a picture of augmented images for each stage to come, uint8 (3, H, W)
    checkpoint: that the run continues from, if it does
    forecast: what the run should take, if it begins now and was fitted to a time
    records: the lines of metrics.jsonl, of earlier parts of a resumed run too
    best: weights and confusions that are not saved yet
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        plan: Plan,
        data: Data,
        samples: Mapping[int, Tensor],
        first_epoch: int,
        dashboard: Dashboard,
        checkpoint: Checkpoint | None = None,
        forecast: Forecast | None = None,
    ):
        self.folder, self.config, self.plan, self.dashboard = folder, config, plan, dashboard
        self.data = data
        self.records: list[dict[str, Any]] = []
        self.report_due = time.monotonic() + REPORT_EVERY
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Future[str | None] | None = None
        self.saved_epoch, self.saved_at = first_epoch, time.monotonic()
        self.saved = False
        self.best: tuple[dict[str, Tensor], Tensor] | None = None
        self.fingerprint = checkpoint.best if checkpoint else None
        source = checkpoint.read_from if checkpoint else ""
        self.keep = source != previous_checkpoint(folder.checkpoint)  # else that in its place is damaged
        if source == folder.checkpoint + UNFINISHED:
            put_in_place(folder.checkpoint)
        self.taken = checkpoint.state.seconds if checkpoint and config.resume == "auto" else 0.0  # by earlier parts
        if config.overwrite:
            folder.clear()
        if forecast is not None:
            folder.write(FORECAST, json.dumps(asdict(forecast)))
        if config.resume == "auto":
            # Epochs after the checkpoint are trained again, to the same numbers.
            self.records = [record for record in folder.metrics() if record["epoch"] < first_epoch and is_whole(record)]
            began = max(config.start_epoch, checkpoint.state.first_epoch if checkpoint else 0)
            missing = sorted(set(range(began, first_epoch)) - {record["epoch"] for record in self.records})
            if missing:
                print(f"{folder.at(METRICS)} has lost {len(missing)} epochs; times and speeds are those of the others")
        folder.write_metrics(self.records)
        settings = {name: value for name, value in config.as_dict().items() if name not in LAUNCH}
        # Where the run started from is part of it.
        begun = began_with(folder.path) if config.resume == "auto" else config.resume
        if begun:
            settings["resume"] = begun
        folder.write_settings(settings)
        folder.write_plan(plan, data.classes)
        for stage, grid in samples.items():
            folder.write_picture(stage, grid)
        dashboard.start(config)

    def begin_stage(self, stage: Stage) -> None:
        self.dashboard.begin_stage(stage)

    def epoch(self, stage: Stage, state: RunState, learner: Learner, scores: Mapping[str, Score]) -> dict[str, Any]:
        record = epoch_record(stage, state, learner, scores)
        # JSON has no infinity, so a number that is not finite would be a fault of the caller.
        assert all(not isinstance(value, float) or math.isfinite(value) for value in record.values()), record
        self.records.append(record)
        self.folder.add_metrics(record)
        self.dashboard.epoch(record)
        return record

    def save_best(self, learner: Learner, state: RunState, score: Score) -> None:
        self.best = to_cpu(learner.copies[state.best_weights].state_dict()), score.confusion
        self.dashboard.best(state.best_epoch, score.confusion)

    def save_checkpoint(self, learner: Learner, state: RunState, data: Data, always: bool) -> None:
        epochs, seconds = every(self.config.checkpoint_every)
        passed = time.monotonic() - self.saved_at
        if always or (epochs and state.epoch - self.saved_epoch >= epochs) or (seconds and passed >= seconds):
            self.wait()
            state.seconds = self.taken + since_start()
            checkpoint = learner.checkpoint(state, self.config, data)
            checkpoint.best = self.fingerprint
            self.saving = self.thread.submit(self.folder.save, checkpoint, self.best, self.keep)
            self.best, self.keep, self.saved = None, True, True
            self.saved_epoch, self.saved_at = state.epoch, time.monotonic()
        if time.monotonic() >= self.report_due:
            self.report()

    def wait(self) -> None:
        saving, self.saving = self.saving, None
        if saving is not None:
            self.fingerprint = saving.result()

    def best_weights(self) -> dict[str, Tensor]:
        self.wait()
        return self.folder.best_weights()

    def finish(
        self, state: RunState, learner: Learner, sizes: Mapping[str, int], closing: Mapping[int, Mapping[str, Score]]
    ) -> None:
        self.wait()
        scores = closing[sizes["test_size"]]
        self.folder.write_confusion("last", self.plan.num_epochs - 1, scores["model"].confusion)
        self.folder.write_confusion("best", state.best_epoch, scores["best"].confusion)
        found = assess(scores["best"], self.data.classes, self.data.val, self.config.seed)
        for place, mistake in enumerate(found.mistakes):
            self.folder.write_mistake(place, thumbnail(self.data.val, mistake["index"]))
        self.folder.write_assessment(found.shown())
        largest, seconds = int(max(self.config.batch_size)), sum(record["epoch_seconds"] for record in self.records)
        inference = inference_speed(learner, sizes["test_size"], largest, seconds)
        summary = summarise(
            self.config, self.plan, state, learner, sizes, closing, self.records, self.data.skipped, found, inference
        )
        forecast = self.folder.read_json(FORECAST)
        if forecast is not None:
            summary["fit_time"] = Forecast(**forecast).outcome(self.taken + since_start())
        self.folder.write_summary(summary)
        self.report()
        self.dashboard.finish()
        best = f"best {summary['best_top1']:.2f} in epoch {state.best_epoch + 1}"
        learner.runtime.say(f"top1 {summary['top1']:.2f}, {best}; see {self.folder.at(REPORT)}")

    def report(self) -> None:
        """Write report.html, and set the time when it is due again; what fails in it costs the run nothing."""
        try:
            self.folder.write(REPORT, report_page(self.folder))
        except Exception as error:  # other people's names, settings and pictures are in it
            self.folder.note_error()
            print(f"{self.folder.at(REPORT)} is not drawn: {type(error).__name__}: {first_line(error)}", flush=True)
        self.report_due = time.monotonic() + REPORT_EVERY

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.thread.shutdown()
        if kind is None:
            self.wait()
