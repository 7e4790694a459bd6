"""The runs of a study, one after another or several at once, each resumed where it was cut."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from learning.checkpoint import previous_checkpoint
from learning.faults import one_line
from reporting.folder import RunFolder
from settings.errors import ConfigError, RunError, first_line, outside_training
from studies.launch import STOPPED, Attempt, Launcher, is_trained
from studies.rows import Results, Row, epoch_rows, finished_row
from studies.statistics import number_form
from studies.study import Run, Study

POLL_SECONDS = 0.5


@dataclass
class Progress:
    """How far a run is.

    state: "waiting", "training", "done", "failed" or "stopped"
    epoch: epochs trained
    seconds, work: of them, and their multiply-adds, in billions of a forward pass
    note: the accuracy of a finished run, why a failed one failed
    """

    state: str = "waiting"
    epoch: int = 0
    seconds: float = 0.0
    work: float = 0.0
    note: str = ""

    @property
    def open(self) -> bool:
        return self.state in ("waiting", "training", "stopped")


class Runner:
    """Carries out the runs of a study.

    images: training images of each condition
    deadline: on the clock of `time.monotonic`; what is under way then is stopped, saved
    show: called when something may have changed
    keep: keep checkpoints of finished runs
    """

    def __init__(
        self,
        study: Study,
        results: Results,
        launcher: Launcher,
        images: Mapping[str, int],
        deadline: float | None = None,
        show: Callable[["Runner"], None] = lambda runner: None,
        keep: bool = False,
    ):
        self.study, self.results, self.launcher, self.images = study, results, launcher, images
        self.deadline, self.show, self.keep = deadline, show, keep
        self.progress = {run: Progress() for run in study.runs}
        self.attempts: dict[Run, Attempt] = {}
        self.stopping, self.told = False, set[Run]()
        needed: set[Run] = set()  # for their weights, even if they have a row: that may be of another machine
        for run in reversed(study.runs):  # whose weights others start from comes before them
            row = results.row(run)
            if row is not None and (run not in needed or is_trained(run)):
                self.progress[run] = Progress("done", run.plan.num_epochs, note=self.outcome(run, row))
            elif run.source is not None:
                needed.add(run.source)

    def run(self) -> int:
        """Carry out all runs; return the exit status: 0 all done, 1 some failed, 3 stopped before the end."""
        with asking(self.stop):
            self.attempts = dict(self.launcher.find([run for run, progress in self.progress.items() if progress.open]))
            for run in self.attempts:
                self.progress[run].state = "training"
            while True:
                self.look()
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    self.stop()
                if self.stopping:
                    self.tell()
                else:
                    self.fill()
                self.show(self)
                if not self.attempts:
                    break
                time.sleep(POLL_SECONDS)
        states = [progress.state for progress in self.progress.values()]
        if self.stopping and any(progress.open for progress in self.progress.values()):
            return STOPPED
        return 0 if all(state == "done" for state in states) else 1

    def stop(self) -> None:
        """Start nothing more, and have what is under way save and end.

        A signal calls this, perhaps in the midst of a run's start: so it is the loop that tells the runs.
        """
        self.stopping = True

    def tell(self) -> None:
        """Ask each run under way, once, to save and end."""
        for run in self.attempts.keys() - self.told:
            self.attempts[run].stop()
        self.told.update(self.attempts)

    def fill(self) -> None:
        """Start runs until as many are under way as may be."""
        for run in self.study.runs:
            if self.stopping or len(self.attempts) >= self.launcher.at_once:
                return
            if self.progress[run].state in ("waiting", "stopped") and self.ready(run):
                self.progress[run].state = "training"
                with self.failing(run):
                    self.attempts[run] = self.launcher.start(run)

    @contextmanager
    def failing(self, run: Run) -> Iterator[None]:
        """Have an error of the machine or a server within the block fail this run alone."""
        try:
            yield
        except (ConfigError, RunError, OSError) as error:
            self.progress[run].state, self.progress[run].note = "failed", fault(error)

    def ready(self, run: Run) -> bool:
        """Check whether the run whose weights another starts from is done; if it failed, so has this one."""
        if run.source is None:
            return True
        source = self.progress[run.source]
        if source.state == "failed":
            self.progress[run] = Progress("failed", note=f"needs the weights of {run.source.name}")
        return source.state == "done"

    def look(self) -> None:
        """Note how far the runs are, and conclude those that have ended."""
        for run, attempt in list(self.attempts.items()):
            status = attempt.poll()
            self.measure(run)
            if status is not None:
                del self.attempts[run]
                self.conclude(run, status, attempt)

    def measure(self, run: Run) -> None:
        """Read the epochs that a run has trained, what they took and what they cost."""
        progress, costs = self.progress[run], run.plan.gflops_per_image
        records = RunFolder(run.folder).metrics()
        progress.epoch = len(records)
        progress.seconds = sum(record["epoch_seconds"] for record in records)
        # A run that was begun as another one, which train.py refuses to go on with, may have had more stages
        known = [costs[record["stage"]] for record in records if record["stage"] < len(costs)]
        progress.work = self.images[run.condition] * sum(known)

    def conclude(self, run: Run, status: int, attempt: Attempt) -> None:
        """Note how a run ended, and keep its rows if it is finished."""
        progress = self.progress[run]
        if status == 0:
            with self.failing(run):
                row = self.results.row(run)
                if row is None:
                    row = finished_row(run, self.study, self.launcher.machine(run))
                    self.results.add(run, row, epoch_rows(run))
                if not self.keep:
                    discard_checkpoints(run.folder)
                progress.state, progress.note = "done", self.outcome(run, row)
        elif status == STOPPED:
            progress.state = "stopped"
        else:
            progress.state, progress.note = "failed", attempt.reason()

    def outcome(self, run: Run, row: Row) -> str:
        metric = self.study.metrics[run.condition]
        return "" if row.get(metric) is None else f"{metric} {row[metric]:{number_form(metric)}}"

    def seconds_left(self) -> float | None:
        """Predict the seconds of training that are left, from those of the epochs so far; None before the first."""
        work = sum(progress.work for progress in self.progress.values())
        if not work:
            return None
        spent = sum(progress.seconds for progress in self.progress.values())
        left = sum(
            run.gflops * self.images[run.condition] - progress.work
            for run, progress in self.progress.items()
            if progress.open
        )
        return left * spent / work / self.launcher.at_once


def fault(error: Exception) -> str:
    """Describe in one line an error that is not of training: the thing, where it is, what helps."""
    if isinstance(error, ConfigError):
        return str(error)
    return outside_training(RunError(one_line(error) or f"{type(error).__name__}: {first_line(error)}"))


@contextmanager
def asking(stop: Callable[[], None]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM call `stop` instead of ending the program."""

    def handler(number: int, frame: Any) -> None:
        stop()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def discard_checkpoints(folder: str) -> None:
    """Remove the checkpoints of a finished run; its best weights and figures stay."""
    path = RunFolder(folder).checkpoint
    for file in (path, previous_checkpoint(path)):
        with suppress(FileNotFoundError):
            os.remove(file)
