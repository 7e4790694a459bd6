"""What a task is told of a run."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from reporting.folder import read_json, read_metrics, worst_confusions
from stages import plan_table
from tracking.server import load_sdk

ARTIFACTS = ("summary.json", "metrics.jsonl", "report.html")

MAX_CLASSES = 50  # of a whole confusion matrix; one of 1,000 classes is an event of 6 MB

# A key of metrics.jsonl: the graph and the line it is drawn in.
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
}
STAGE_SCALARS = (
    "image_size", "ra_magnitude", "mixup_alpha", "cutmix_alpha", "dropout", "stochastic_depth_prob", "random_erase",
    "batch_size",
)  # fmt: skip
SINGLE_VALUES = (
    "best_top1", "best_epoch", "top1", "top1_ema", "train_hours", "images_per_second", "speedup_over_fixed_size",
    "relative_cost", "parameters",
)  # fmt: skip


class TaskReport:
    """A run, told to a ClearML task from what its folder holds. Telling it again changes nothing.

    folder: the run's
    no_files: why the server takes no files now, None if it does
    """

    def __init__(self, task: Any, folder: str, no_files: str | None):
        self.task = task
        self.folder = folder
        self.no_files = no_files
        self.logger = task.get_logger()
        self.plan = read_json(self.path("report/plan.json"))
        self.classes = self.plan["classes"]

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def so_far(self) -> None:
        """The stages, what augmentation does in them, and the epochs there are."""
        heads, rows = plan_table(self.plan)
        self.logger.report_table("plan", "stages", iteration=0, table_plot=[heads, *rows])
        for stage in self.plan["stages"]:
            picture = self.path(f"report/stage_{stage['index']}.png")
            if os.path.exists(picture) and self.no_files is None:  # the SDK would hold up all else
                series = f"stage {stage['index']}, {stage['image_size']} px"
                self.logger.report_image("training images", series, stage["first_epoch"], local_path=picture)
        for record in read_metrics(self.folder):
            self.epoch(record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; the epoch, counted from 0, is the iteration."""
        graph_of = SCALARS | {name: ("stage", name) for name in STAGE_SCALARS}
        for name, (title, series) in graph_of.items():
            value = record.get(name)
            if value is not None and math.isfinite(value):  # the SDK would send 0 for what is not finite
                self.logger.report_scalar(title, series, value, record["epoch"])
        for name in record.get("non_finite", ()):
            self.logger.report_scalar("non_finite", name, 1, record["epoch"])

    def confusion(self, series: str, epoch: int, matrix: np.ndarray) -> None:
        """matrix: (K, K) images, rows true, columns predicted. Of many classes those least often right."""
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
        """What the best and the last weights confuse, and a finished run's figures."""
        for series in ("best", "last"):
            found = read_json(self.path(f"report/confusion_{series}.json"))
            if found is not None:
                self.confusion(series, found["epoch"], np.array(found["confusion"]))
        summary = read_json(self.path("summary.json"))
        if summary is not None:
            figures = summary | {"train_hours": summary["train_seconds"] / 3600}
            for name in SINGLE_VALUES:
                if figures[name] is not None:
                    self.logger.report_single_value(name, figures[name])

    def artifacts(self) -> None:
        for name in ARTIFACTS:
            if os.path.exists(self.path(name)):
                self.task.upload_artifact(name, artifact_object=self.path(name), wait_on_upload=True)

    def models(self) -> None:
        """Upload the best and the last weights, and register them. Waits for it; a server is needed."""
        records = read_metrics(self.folder)
        best = read_json(self.path("report/confusion_best.json"))
        if best is not None:
            self.model("best", "model_best.pth", best["epoch"], "weights under torchvision's names")
        if records:
            self.model("last", "checkpoint.pth", records[-1]["epoch"], "everything that --resume continues from")

    def model(self, name: str, file: str, epoch: int, comment: str) -> None:
        if not os.path.exists(self.path(file)):
            return
        title = f"{self.task.name} {name}"
        known = {model.name: model.id for model in self.task.models["output"]}
        labels = {label: number for number, label in enumerate(self.classes)}
        model = load_sdk().OutputModel(
            task=self.task, name=title, framework="PyTorch", label_enumeration=labels, base_model_id=known.get(title),
            comment=f"epoch {epoch}: {comment}",
        )  # fmt: skip
        model.update_weights(
            weights_filename=self.path(file), iteration=epoch, auto_delete_file=False, async_enable=False
        )
