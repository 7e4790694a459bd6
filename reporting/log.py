"""The run's log. Training says what happened; here it goes into the folder and to a dashboard."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from learning.checkpoint import save_checkpoint, to_cpu, write_safely
from reporting.folder import RUN_FILES, read_metrics
from reporting.page import report_page
from settings.table import LAUNCH, Config

REPORT_EVERY = 60.0  # seconds; drawing the page takes one or two


class Dashboard:
    """Where a run is shown besides its folder; here, nowhere. `tracking.py` has the one for ClearML.

    ask_to_stop: called with a reason when someone wants the run to end early, saved
    """

    ask_to_stop: Callable[[str], None]

    def start(self, log: "RunLog", config: Config) -> None:
        """The run begins, or goes on: `log` holds what came before."""

    def epoch(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written."""

    def best(self, epoch: int, confusion: Tensor) -> None:
        """Weights that evaluate better than all before; (K, K) counts, rows true."""

    def finish(self, summary: Mapping[str, Any], confusion: Tensor) -> None:
        """The run is at its end; what the last weights confuse."""

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, *exception: object) -> None:
        """The program leaves, for whatever reason."""


class RunLog:
    """The run's folder, written by rank 0: config.yaml, metrics.jsonl, summary.json, report.html, and what
    the report shows in `report/`. Every file is whole at any moment.

    samples: a picture of augmented images for each stage to come, uint8 (3, H, W)
    records: the lines of metrics.jsonl, of earlier parts of a resumed run too
    dashboard: is told the same
    """

    def __init__(
        self,
        config: Config,
        classes: Sequence[str],
        plan: Mapping[str, Any],
        samples: Mapping[int, Tensor],
        first_epoch: int,
        dashboard: Dashboard,
    ):
        self.folder = config.output_dir
        self.dashboard = dashboard
        self.records: list[dict[str, Any]] = []
        self.report_due = time.monotonic() + REPORT_EVERY
        os.makedirs(os.path.join(self.folder, "report"), exist_ok=True)
        if config.overwrite:
            for name in RUN_FILES:
                if os.path.exists(self.path(name)):
                    os.remove(self.path(name))
        if config.resume == "auto":
            # Epochs after the checkpoint are trained again, to the same numbers.
            self.records = [record for record in read_metrics(self.folder) if record["epoch"] < first_epoch]
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        settings = {name: value for name, value in config.as_dict().items() if name not in LAUNCH}
        if config.resume not in ("", "auto"):
            settings["resume"] = config.resume  # where the run started from is part of it
        self.write("config.yaml", yaml.safe_dump(settings, sort_keys=False))
        self.write("report/plan.json", json.dumps(dict(plan, classes=list(classes))))
        for stage, grid in samples.items():
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(self.path(f"report/stage_{stage}.png"))
        dashboard.start(self, config)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def write(self, name: str, text: str) -> None:
        with open(self.path(name) + ".tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(self.path(name) + ".tmp", self.path(name))

    def epoch(self, record: dict[str, Any]) -> None:
        """A line of metrics. A number that is not finite is a fault of the caller: JSON has none."""
        assert all(not isinstance(value, float) or math.isfinite(value) for value in record.values()), record
        self.records.append(record)
        with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.dashboard.epoch(record)
        if time.monotonic() >= self.report_due:
            self.report()

    def save_checkpoint(self, content: dict[str, Any]) -> None:
        save_checkpoint(self.path("checkpoint.pth"), content)

    def save_best(self, model: nn.Module, epoch: int, confusion: Tensor) -> None:
        """Weights alone, under torchvision's names, and what they confuse: (K, K), rows true, columns predicted."""
        write_safely(self.path("model_best.pth"), to_cpu(model.state_dict()))
        self.write("report/confusion_best.json", json.dumps({"epoch": epoch, "confusion": confusion.tolist()}))
        self.dashboard.best(epoch, confusion)

    def load_best(self) -> dict[str, Tensor]:
        return torch.load(self.path("model_best.pth"), map_location="cpu", weights_only=True)

    def finish(self, summary: Mapping[str, Any], confusion: Tensor) -> None:
        """The run's figures, and what the last weights confuse."""
        last = {"epoch": summary["epochs"] - 1, "confusion": confusion.tolist()}
        self.write("report/confusion_last.json", json.dumps(last))
        self.write("summary.json", json.dumps(summary, indent=2) + "\n")
        self.report()
        self.dashboard.finish(summary, confusion)

    def report(self) -> None:
        self.write("report.html", report_page(self.folder))
        self.report_due = time.monotonic() + REPORT_EVERY
