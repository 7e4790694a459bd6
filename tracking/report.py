"""Reports of a run: to a ClearML task, and to whatever else has the face of its logger."""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from learning.checkpoint import Checkpoint, previous_checkpoint
from reporting.folder import BEST, CHECKPOINT, METRICS, REPORT, SUMMARY, RunFolder
from reporting.page import class_table, curve_titles, inference_table
from reporting.records import worst_confusions
from settings.errors import ConfigError
from stages import COLUMNS
from tracking.events import SAMPLES, Points, points_of
from tracking.server import load_sdk

ARTIFACTS = (SUMMARY, METRICS, REPORT)

MAX_CLASSES = 50  # of a whole confusion matrix; one of 1,000 classes is an event of 6 MB

# A key of metrics.jsonl: the graph and the line it is drawn in. One graph shows what stages set.
SCALARS = {
    "loss": ("loss", "train"),
    "val_loss": ("loss", "val"),
    "top1": ("top1", "val"),
    "top1_ema": ("top1", "val_ema"),
    "top5": ("top5", "val"),
    "lr": ("lr", "lr"),
    "images_per_second": ("images_per_second", "train"),
    "epoch_seconds": ("epoch_seconds", "train"),
    "data_wait_fraction": ("data_wait_fraction", "train"),
    "gpu_memory_gib": ("gpu_memory_gib", "peak"),
    **{name: ("stage", name) for name in COLUMNS},
}
SINGLE_VALUES = (
    "best_top1", "best_epoch", "top1", "top1_ema", "train_hours", "images_per_second", "speedup_over_fixed_size",
    "relative_cost", "parameters",
)  # fmt: skip
OF_BEST = ("balanced_accuracy", "macro_f1", "auc", "sensitivity", "specificity")  # single values of the best weights
OF_CALIBRATION = ("temperature", "ece_before", "ece_after")


class RunReport:
    """The report of a run, from what its folder holds.

    logger: takes it, with the methods and arguments of ClearML's
    no_files: why it takes no files now, None if it does
    known: the points that were told before this report began
    shown: the stages whose pictures are sent
    """

    def __init__(self, folder: RunFolder, logger: Any, no_files: str | None = None):
        self.folder = folder
        self.no_files = no_files
        self.logger = logger
        self.plan = folder.plan()
        self.classes = folder.classes()
        self.known = Points()
        self.shown: set[int] = set()
        self.told_mistakes = False
        self.best_due = 0.0

    def so_far(self) -> None:
        """Report the plan, and the epochs there are with pictures of their stages."""
        heads, rows = self.plan.table()
        self.logger.report_table("plan", "stages", iteration=0, table_plot=[heads, *rows])
        for record in self.folder.metrics():
            self.epoch(record)
        self.pictures()

    def pictures(self) -> None:
        """Report the pictures of the stages of which there are epochs, and of mistakes, as far as they are not sent."""
        records = self.folder.metrics()
        for stage in self.plan.stages:
            if records and stage.epochs.start <= records[-1]["epoch"]:
                self.picture(stage.index)
        self.mistakes()

    def picture(self, index: int) -> None:
        """Report the picture of what augmentation does in a stage, once that has begun.

        Not before: the page shows the greatest iteration of all reports as the task's.
        """
        stage, picture = self.plan.stages[index], self.folder.picture(index)
        if self.no_files is not None or index in self.shown or not os.path.exists(picture):
            return  # the SDK would hold up all else for a file that no one takes
        self.shown.add(index)
        series = f"stage {index}, {stage.image_size} px"
        self.logger.report_image("training images", series, stage.epochs.start, local_path=picture)

    def mistakes(self) -> None:
        """Report the pictures of the most confident mistakes of a finished run, each by what was said of it."""
        summary = self.folder.summary()
        if self.no_files is not None or summary is None or self.told_mistakes:
            return
        self.told_mistakes = True
        for place, mistake in enumerate(self.folder.assessment().get("mistakes") or ()):
            share = f"{100 * mistake['probability']:.1f} %"
            series = f"{place + 1}: {mistake['true']}, taken for {mistake['predicted']}, {share}"
            self.logger.report_image(
                "worst mistakes", series, summary["best_epoch"], local_path=self.folder.mistake(place)
            )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Report a line of metrics.jsonl, as far as it is not known; its epoch is the iteration."""
        for point in points(record):
            if not self.known.has(*point):
                self.logger.report_scalar(*point)

    def best(self, epoch: int, matrix: np.ndarray) -> None:
        """Report the confusions of the best weights so far, at most once a minute.

        Early on every epoch is the best; `outcome` reports those that stay.
        """
        if time.monotonic() >= self.best_due:
            self.best_due = time.monotonic() + 60
            self.confusion("best", epoch, matrix)

    def confusion(self, series: str, epoch: int, matrix: np.ndarray) -> None:
        """Report accuracy per class and the confusion matrix, of many classes those least often right.

        matrix: (K, K) images, rows true, columns predicted
        """
        right, all_of = matrix.diagonal(), matrix.sum(axis=1)
        accuracy = 100 * right / np.maximum(all_of, 1)
        rows = [[name, int(n), f"{share:.2f}" if n else ""] for name, n, share in zip(self.classes, all_of, accuracy)]
        table = [["class", "images", "top1"], *rows]
        self.logger.report_table("accuracy per class", series, iteration=epoch, table_plot=table)
        shown = np.arange(len(self.classes))
        if len(shown) > MAX_CLASSES:
            worst = np.where(all_of > 0, accuracy, np.inf)  # a class without images is no bad one
            shown = np.sort(np.argsort(worst, kind="stable")[:MAX_CLASSES])
            rows = [["true", "predicted", "images"], *map(list, worst_confusions(matrix, self.classes))]
            self.logger.report_table("commonest confusions", series, iteration=epoch, table_plot=rows)
        labels = [self.classes[i] for i in shown]
        self.logger.report_confusion_matrix(
            "confusion matrix", series, matrix[np.ix_(shown, shown)], epoch,
            xaxis="predicted", yaxis="true", xlabels=labels, ylabels=labels, yaxis_reversed=True,
        )  # fmt: skip

    def outcome(self) -> None:
        """Report what the best and the last weights confuse, and the figures of a finished run."""
        for series in ("best", "last"):
            found = self.folder.confusion(series)
            if found is not None:
                self.confusion(series, *found)
        summary = self.folder.summary()
        if summary is not None:
            fit = summary.get("calibration") or {}
            figures = summary | {"train_hours": summary["train_seconds"] / 3600}
            figures |= {name: summary["best"].get(name) for name in OF_BEST}
            figures |= {name: fit.get(name) for name in OF_CALIBRATION}
            for name in (*SINGLE_VALUES, *OF_BEST, *OF_CALIBRATION):
                if figures[name] is not None:
                    self.logger.report_single_value(name, figures[name])
            self.quality(summary)

    def quality(self, summary: Mapping[str, Any]) -> None:
        """Report what the best weights of a finished run are worth: tables, the ROC curve, how far probabilities hold."""
        epoch = summary["best_epoch"]
        for title, content in (("classes, worst first", class_table(summary)), ("inference", inference_table(summary))):
            if content is not None:
                table = [list(content[0]), *map(list, content[1])]
                self.logger.report_table(title, "best", iteration=epoch, table_plot=table)
        shown = self.folder.assessment()
        roc, reliability = shown.get("roc"), shown.get("reliability")
        if roc:
            line = {"x": roc["false_positive_rate"], "y": roc["true_positive_rate"], "name": "best weights"}
            axes = ("others called so, share", f"{self.classes[1]} found, share")
            self.logger.report_plotly("ROC", "best", iteration=epoch, figure=plotly([line], *axes))
        if reliability:
            lines = []
            for name, title in curve_titles(summary["calibration"]).items():
                curve = reliability[name]
                some = [i for i, count in enumerate(curve["counts"]) if count]
                points = {"x": [curve["confidence"][i] for i in some], "y": [curve["accuracy"][i] for i in some]}
                lines.append(points | {"name": title, "text": [f"{curve['counts'][i]} images" for i in some]})
            axes = ("probability of the class named", "share that is right")
            self.logger.report_plotly("reliability", "best", iteration=epoch, figure=plotly(lines, *axes))


class TaskReport(RunReport):
    """The report of a run to a ClearML task.

    Repeated, it leaves the page as it is: points that the task has are not told again, and the rest takes the place of
    what it was. Two things it cannot: pictures and models are filed anew once the task is renamed, and the console,
    which is the SDK's, is only appended to.
    """

    def __init__(self, task: Any, folder: RunFolder, no_files: str | None):
        super().__init__(folder, task.get_logger(), no_files)
        self.task = task

    def so_far(self) -> None:
        self.known = points_of(self.task)
        super().so_far()

    def missing(self) -> int:
        """Count the points of the run that the task has not; none where they are too many to ask for."""
        self.known, records = points_of(self.task), self.folder.metrics()
        if len(records) >= SAMPLES:
            return 0
        return sum(not self.known.has(*point) for record in records for point in points(record))

    def artifacts(self) -> None:
        """Upload summary, metrics and report, as far as they are there; waits for it.

        Raises:
            RuntimeError: the server has not taken them all; of that the SDK says nothing.
        """
        names = [name for name in ARTIFACTS if self.folder.has(name)]
        for name in names:
            self.task.upload_artifact(name, artifact_object=self.folder.at(name), wait_on_upload=True)
        if self.task.is_offline():
            return
        self.task.reload()
        held = {artifact.key: artifact.hash for artifact in self.task.data.execution.artifacts or ()}
        lost = [name for name in names if held.get(name) != digest(self.folder.at(name))]
        if lost:
            raise RuntimeError(f"the server has not taken {', '.join(lost)}")

    def models(self) -> None:
        """Upload the best and the last weights, and register them; waits for it, and needs a server."""
        best = self.folder.confusion("best")
        if best is not None:
            self.model("best", BEST, best[0], "weights under torchvision's names")
        # A kill between two renames leaves the one before alone.
        last = CHECKPOINT if self.folder.has(CHECKPOINT) else previous_checkpoint(CHECKPOINT)
        epoch = self.saved_epoch(last)
        if epoch is not None:
            self.model("last", last, epoch, "everything that --resume continues from")

    def saved_epoch(self, name: str) -> int | None:
        """Find the epoch that a checkpoint is the end of, or lies in; None if it is of none. Later ones may have a record."""
        if not self.folder.has(name):
            return None
        try:
            state = Checkpoint.load(self.folder.at(name)).state
        except ConfigError:  # damaged, or of another version
            return max((record["epoch"] for record in self.folder.metrics()), default=None)
        return state.epoch - (state.step == 0) if state.epoch or state.step else None

    def model(self, name: str, file: str, epoch: int, comment: str) -> None:
        """Upload one file of weights and register it, under the same model as before if there is one to be changed."""
        if not self.folder.has(file):
            return
        title = f"{self.task.name} {name}"
        known = {model.name: model.id for model in self.task.models["output"] if not model.published}
        labels = {label: number for number, label in enumerate(self.classes)}
        model = load_sdk().OutputModel(
            task=self.task, name=title, framework="PyTorch", label_enumeration=labels, base_model_id=known.get(title),
            comment=f"epoch {epoch}: {comment}",
        )  # fmt: skip
        model.update_weights(
            weights_filename=self.folder.at(file), iteration=epoch, auto_delete_file=False, async_enable=False
        )


def points(record: Mapping[str, Any]) -> Iterator[tuple[str, str, float, int]]:
    """Yield title, series, value and iteration of all points in a line of metrics.jsonl.

    What is not finite is left out, since the SDK would send 0 for it.
    """
    for name, (title, series) in SCALARS.items():
        value = record.get(name)
        if value is not None and math.isfinite(value):
            yield title, series, value, record["epoch"]
    for name in record.get("non_finite", ()):
        yield "non_finite", name, 1, record["epoch"]


def plotly(lines: Sequence[Mapping[str, Any]], x: str, y: str) -> dict[str, Any]:
    """Build a plot of lines over [0, 1], and the diagonal, in the form that the dashboard draws.

    x, y: titles of the axes
    """
    diagonal = {"x": [0, 1], "y": [0, 1], "name": "", "line": {"dash": "dash"}, "showlegend": False}
    data = [{"type": "scatter", "mode": "lines+markers", **line} for line in (*lines, diagonal | {"mode": "lines"})]
    return {"data": data, "layout": {"xaxis": {"title": x, "range": [0, 1]}, "yaxis": {"title": y, "range": [0, 1]}}}


def digest(path: str) -> str:
    """Compute the SHA-256 of a file, by which a server knows an artifact."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
