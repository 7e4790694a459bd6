"""TensorBoard as a run's dashboard: what ClearML is told, as events in OUTPUT_DIR/tensorboard/.

At every start all that the run's folder holds is told anew, into a new file that takes the place of those before. So a
resumed run has no epoch twice, one that was killed has lost none, and TensorBoard may be taken up in the midst of a run.
"""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reporting.folder import TENSORBOARD, RunFolder
from reporting.log import Dashboard
from settings.errors import ConfigError, first_line, process_rank
from settings.table import Config
from settings.values import as_text
from stages import Stage
from tracking.deadline import never_fatal
from tracking.report import OF_BEST, OF_CALIBRATION, SINGLE_VALUES, RunReport

Told = tuple[str, int]  # tag and step


def find_tensorboard(config: Config) -> Dashboard:
    """Choose whether the run is shown in TensorBoard, by `tensorboard`.

    Raises:
        ConfigError: its package is not there, or cannot be used.
    """
    if not config.tensorboard or config.test_only:
        return Dashboard()
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard needs the package: pip install tensorboard, or --no-tensorboard")
    if process_rank(config.world_size):
        return Dashboard()
    try:
        return TensorBoard(config)
    except ImportError as error:
        raise ConfigError(
            f"tensorboard: the package cannot be used here ({first_line(error)}); mend it, or --no-tensorboard"
        ) from error


class TensorBoard(Dashboard):
    """The events of a run, written by a thread of the package's, and flushed after each epoch.

    Raises:
        ImportError: the package cannot be used.
    """

    def __init__(self, config: Config):
        import torch.utils.tensorboard  # noqa: F401, seen to work before data is read

        self.folder = RunFolder(config.output_dir)
        self.events: Events | None = None  # none before the start, and where that failed
        self.finished = False

    def start(self, config: Config) -> None:
        with never_fatal("this run is not shown", "TensorBoard"):
            earlier = [self.folder.at(name) for name in self.folder.events()]
            events = Events(self.folder.at(TENSORBOARD), times_in(earlier))
            self.report = RunReport(self.folder, events)
            events.settings(self.folder.settings())
            self.report.so_far()
            best = self.folder.confusion("best")
            if best is not None:
                self.report.confusion("best", *best)
            events.times.clear()  # epochs to come are trained now, also those that were trained before
            events.flush()
            for path in earlier:
                os.remove(path)
            self.events = events

    def begin_stage(self, stage: Stage) -> None:
        if self.events is not None:
            with never_fatal("a picture is not shown", "TensorBoard"):
                self.report.picture(stage.index)

    def epoch(self, record: dict[str, Any]) -> None:
        if self.events is not None:
            with never_fatal("an epoch is not shown", "TensorBoard"):
                self.report.epoch(record)
                self.events.flush()

    def best(self, epoch: int, confusion: Tensor) -> None:
        if self.events is not None:
            with never_fatal("confusions are not shown", "TensorBoard"):
                self.report.best(epoch, confusion.numpy())

    def finish(self) -> None:
        self.finished = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.events is not None:
            with never_fatal("what the run came to is not shown", "TensorBoard"):
                self.report.pictures()
                self.report.outcome()
                self.events.close(self.finished)


class Events:
    """A file of events; reports are made to it as to ClearML's logger.

    What was told of a tag at a step is not told again.

    times: of earlier points, which are told with them
    """

    def __init__(self, folder: str, times: Mapping[Told, float]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder, purge_step=0)  # an open page forgets what the files before have told
        self.times = dict(times)
        self.told: set[Told] = set()
        self.last_step = 0
        self.end: Any = None

    def settings(self, values: Mapping[str, Any]) -> None:
        """Write the settings as hyperparameters, by which the page compares runs in what they came to."""
        from torch.utils.tensorboard.summary import hparams

        flat = {name: value if type(value) in (int, float) else as_text(value) for name, value in values.items()}
        compared = map(single_tag, (*SINGLE_VALUES, *OF_BEST, *OF_CALIBRATION))
        *begin, self.end = hparams(flat, dict.fromkeys(compared))
        for summary in begin:
            self.writer.file_writer.add_summary(summary)
        self.report_table(
            "settings", "settings", 0, [["setting", "value"], *([n, as_text(v)] for n, v in values.items())]
        )

    def report_scalar(self, title: str, series: str, value: float, iteration: int) -> None:
        if told := self.new(title, series, iteration):
            self.writer.add_scalar(told[0], value, iteration, self.times.get(told))

    def report_single_value(self, name: str, value: float) -> None:
        """Write a figure of the whole run, at its last step."""
        self.writer.add_scalar(single_tag(name), value, self.last_step)

    def report_table(self, title: str, series: str, iteration: int, table_plot: Sequence[Sequence[Any]]) -> None:
        """Write a table, whose first row is its head, as Markdown."""
        if told := self.new(title, series, iteration):
            rows = [[str(cell).replace("|", "\\|") for cell in row] for row in table_plot]
            rows.insert(1, ["---"] * len(rows[0]))
            self.writer.add_text(told[0], "\n".join(f"| {' | '.join(row)} |" for row in rows), iteration)

    def report_image(self, title: str, series: str, iteration: int, local_path: str) -> None:
        if told := self.new(title, series, iteration):
            with Image.open(local_path) as picture:
                self.writer.add_image(told[0], np.asarray(picture), iteration, dataformats="HWC")

    def report_confusion_matrix(
        self, title: str, series: str, matrix: NDArray, iteration: int, *, xlabels: Sequence[str], **labels: Any
    ) -> None:
        """Write a picture of a confusion matrix, rows true; of `labels` the picture has its own."""
        from reporting.figures import confusion_figure  # matplotlib takes most of a second

        if told := self.new(title, series, iteration):
            self.writer.add_figure(told[0], confusion_figure(matrix, xlabels), iteration)

    def report_plotly(self, title: str, series: str, iteration: int, figure: Mapping[str, Any]) -> None:
        """Write a picture of the lines of a plot."""
        from reporting.figures import lines_figure

        if told := self.new(title, series, iteration):
            axes = (figure["layout"][axis]["title"] for axis in ("xaxis", "yaxis"))
            self.writer.add_figure(told[0], lines_figure(figure["data"], *axes), iteration)

    def new(self, title: str, series: str, iteration: int) -> Told | None:
        """Note that a series is told at an iteration; return its tag and step, None if that was told."""
        # Other characters would be replaced all the same, and that be said
        told = re.sub(r"[^-/\w.]+", "_", f"{title}/{series}").strip("_"), iteration
        if told in self.told:
            return None
        self.told.add(told)
        self.last_step = max(self.last_step, iteration)
        return told

    def flush(self) -> None:
        self.writer.flush()

    def close(self, finished: bool) -> None:
        """End the file; that of a finished run says so."""
        if finished:
            self.writer.file_writer.add_summary(self.end)
        self.writer.close()


def single_tag(name: str) -> str:
    """Name the tag of a figure of the whole run."""
    return f"final/{name}"


def times_in(paths: Sequence[str]) -> dict[Told, float]:
    """Read from files of events when each point was first told; of damaged ones what comes before the damage."""
    times: dict[Told, float] = {}
    if paths:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        with never_fatal("the times of earlier epochs are lost", "TensorBoard"):
            for path in paths:
                for event in LegacyEventFileLoader(path).Load():
                    for value in event.summary.value:
                        times.setdefault((value.tag, event.step), event.wall_time)
    return times
