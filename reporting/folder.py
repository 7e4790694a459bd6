"""A run's folder: every file's name, and how it is written and read."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from learning.checkpoint import write_safely
from settings.errors import ConfigError
from settings.resolve import RUN_SETTINGS
from settings.table import Config
from stages import Plan

METRICS, SUMMARY, REPORT, CHECKPOINT, BEST = (
    "metrics.jsonl", "summary.json", "report.html", "checkpoint.pth", "model_best.pth",
)  # fmt: skip
PLAN, CLEARML, TASK = "report/plan.json", "clearml", "clearml/task.json"
HELD_OUT = "held_out.json"  # what the best weights come to on images that chose nothing


def confusion_file(weights: str) -> str:
    return f"report/confusion_{weights}.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Text files and weights are written beside the old file and then take its place, so that they are whole at any
    moment. Metrics, summary and confusions that are not there read as an empty list or None.
    """

    path: str

    def at(self, name: str) -> str:
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        return os.path.exists(self.at(name))

    @property
    def checkpoint(self) -> str:
        return self.at(CHECKPOINT)

    def held(self) -> list[str]:
        """List the files by which a folder holds a run; `clear` removes these."""
        return [
            name
            for name in (
                RUN_SETTINGS, METRICS, SUMMARY, CHECKPOINT, "checkpoint_previous.pth", BEST, REPORT,
                confusion_file("best"), confusion_file("last"), HELD_OUT, TASK,
            )
            if self.has(name)
        ]  # fmt: skip

    def clear(self) -> None:
        """Remove the files of an older run, no others."""
        for name in self.held():
            os.remove(self.at(name))

    def write(self, name: str, text: str) -> None:
        """Write a text file by way of a temporary one; make its folder if need be."""
        os.makedirs(os.path.dirname(self.at(name)), exist_ok=True)
        with open(self.at(name) + ".tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(self.at(name) + ".tmp", self.at(name))

    def read_json(self, name: str) -> Any:
        """Read a JSON file; None if it is not there."""
        try:
            with open(self.at(name), encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    # ---- settings, plan, pictures ----

    def settings(self) -> dict[str, Any]:
        with open(self.at(RUN_SETTINGS), encoding="utf-8") as file:
            return yaml.safe_load(file)

    def write_settings(self, values: Mapping[str, Any]) -> None:
        self.write(RUN_SETTINGS, yaml.safe_dump(dict(values), sort_keys=False))

    def plan(self) -> Plan:
        return Plan.from_dict(self.read_json(PLAN))

    def classes(self) -> list[str]:
        return self.read_json(PLAN)["classes"]

    def write_plan(self, plan: Plan, classes: Sequence[str]) -> None:
        self.write(PLAN, json.dumps(plan.as_dict() | {"classes": list(classes)}))

    def picture(self, stage: int) -> str:
        """Build the path of the picture that shows a stage's augmented images."""
        return self.at(f"report/stage_{stage}.png")

    def write_picture(self, stage: int, grid: Tensor) -> None:
        """Write the picture of a stage's augmented images, uint8 (3, H, W)."""
        os.makedirs(os.path.dirname(self.picture(stage)), exist_ok=True)
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(self.picture(stage))

    # ---- figures ----

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, a line for each epoch; leave out a last line that a crash cut short."""
        records = []
        if self.has(METRICS):
            with open(self.at(METRICS), encoding="utf-8") as file:
                for line in file:
                    try:
                        records.append(json.loads(line))
                    except ValueError:
                        break
        return records

    def write_metrics(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl anew."""
        self.write(METRICS, "".join(json.dumps(record) + "\n" for record in records))

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the line of an epoch to metrics.jsonl."""
        with open(self.at(METRICS), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def summary(self) -> dict[str, Any] | None:
        return self.read_json(SUMMARY)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write(SUMMARY, json.dumps(summary, indent=2) + "\n")

    def confusion(self, weights: str) -> tuple[int, NDArray[np.int64]] | None:
        """Read the confusion matrix of the "best" or the "last" weights, and the epoch they are from.

        Returns: epoch, counts (K, K), rows true; None if there are none.
        """
        content = self.read_json(confusion_file(weights))
        return content and (content["epoch"], np.array(content["confusion"]))

    def write_confusion(self, weights: str, epoch: int, counts: Tensor) -> None:
        self.write(confusion_file(weights), json.dumps({"epoch": epoch, "confusion": counts.tolist()}))

    # ---- weights ----

    def best_weights(self) -> dict[str, Tensor]:
        return torch.load(self.at(BEST), map_location="cpu", weights_only=True)

    def write_best_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights alone, under torchvision's names."""
        write_safely(self.at(BEST), dict(weights))


def check_folder(config: Config) -> RunFolder:
    """Check that the run may use its output_dir, and return it.

    Raises:
        ConfigError: it holds a run that the settings would neither continue nor replace, or cannot be written to.
    """
    folder = RunFolder(config.output_dir)
    if config.test_only:  # which writes nothing
        return folder
    place = os.path.abspath(folder.path)
    while not os.path.exists(place):  # the nearest that is there; the rest is made when training begins
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"output_dir {folder.path}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"output_dir {folder.path}: {place} cannot be written to; give another folder")
    held = folder.held()
    if held and not config.overwrite and config.resume != "auto":
        raise ConfigError(
            f"output_dir {folder.path} already holds a run ({held[0]}); --resume auto continues it, --overwrite starts "
            "again, another --output-dir leaves it alone"
        )
    return folder
