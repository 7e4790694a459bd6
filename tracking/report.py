"""Reports of a run to a ClearML task."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from reporting.folder import BEST, CHECKPOINT, METRICS, REPORT, SUMMARY, RunFolder
from reporting.records import worst_confusions
from stages import COLUMNS
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


class TaskReport:
    """The reports of a run to a ClearML task, from what its folder holds. Repeating them changes nothing.

    folder: the run's
    no_files: why the server takes no files now, None if it does
    """

    def __init__(self, task: Any, folder: RunFolder, no_files: str | None):
        self.task = task
        self.folder = folder
        self.no_files = no_files
        self.logger = task.get_logger()
        self.plan = folder.plan()
        self.classes = folder.classes()

    def so_far(self) -> None:
        """Report the stages, pictures of what augmentation does in them, and the epochs there are."""
        heads, rows = self.plan.table()
        self.logger.report_table("plan", "stages", iteration=0, table_plot=[heads, *rows])
        for stage in self.plan.stages:
            picture = self.folder.picture(stage.index)
            if os.path.exists(picture) and self.no_files is None:  # the SDK would hold up all else
                series = f"stage {stage.index}, {stage.image_size} px"
                self.logger.report_image("training images", series, stage.epochs.start, local_path=picture)
        for record in self.folder.metrics():
            self.epoch(record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Report a line of metrics.jsonl; the epoch, counted from 0, is the iteration."""
        for name, (title, series) in SCALARS.items():
            value = record.get(name)
            if value is not None and math.isfinite(value):  # the SDK would send 0 for what is not finite
                self.logger.report_scalar(title, series, value, record["epoch"])
        for name in record.get("non_finite", ()):
            self.logger.report_scalar("non_finite", name, 1, record["epoch"])

    def confusion(self, series: str, epoch: int, matrix: np.ndarray) -> None:
        """Report accuracy per class and the confusion matrix, of many classes those least often right.

        matrix: (K, K) images, rows true, columns predicted
        """
        right, all_of = matrix.diagonal(), matrix.sum(axis=1)
        accuracy = 100 * right / np.maximum(all_of, 1)
        rows = [[name, int(n), f"{share:.2f}"] for name, n, share in zip(self.classes, all_of, accuracy)]
        table = [["class", "images", "top1"], *rows]
        self.logger.report_table("accuracy per class", series, iteration=epoch, table_plot=table)
        shown = np.arange(len(self.classes))
        if len(shown) > MAX_CLASSES:
            shown = np.sort(np.argsort(accuracy, kind="stable")[:MAX_CLASSES])
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
            figures = summary | {"train_hours": summary["train_seconds"] / 3600}
            for name in SINGLE_VALUES:
                if figures[name] is not None:
                    self.logger.report_single_value(name, figures[name])

    def artifacts(self) -> None:
        """Upload summary, metrics and report, as far as they are there; waits for it."""
        for name in ARTIFACTS:
            if self.folder.has(name):
                self.task.upload_artifact(name, artifact_object=self.folder.at(name), wait_on_upload=True)

    def models(self) -> None:
        """Upload the best and the last weights, and register them; waits for it, and needs a server."""
        records = self.folder.metrics()
        best = self.folder.confusion("best")
        if best is not None:
            self.model("best", BEST, best[0], "weights under torchvision's names")
        if records:
            self.model("last", CHECKPOINT, records[-1]["epoch"], "everything that --resume continues from")

    def model(self, name: str, file: str, epoch: int, comment: str) -> None:
        """Upload one file of weights and register it, under the same model as before if there is one."""
        if not self.folder.has(file):
            return
        title = f"{self.task.name} {name}"
        known = {model.name: model.id for model in self.task.models["output"]}
        labels = {label: number for number, label in enumerate(self.classes)}
        model = load_sdk().OutputModel(
            task=self.task, name=title, framework="PyTorch", label_enumeration=labels, base_model_id=known.get(title),
            comment=f"epoch {epoch}: {comment}",
        )  # fmt: skip
        model.update_weights(
            weights_filename=self.folder.at(file), iteration=epoch, auto_delete_file=False, async_enable=False
        )
