"""A run's folder: the name of every file in it, and what they hold."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from settings.errors import ConfigError
from settings.table import Config


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
    except FileNotFoundError:
        pass
    return records


def read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def stage_speed(records: Sequence[dict[str, Any]], index: int) -> tuple[float, float]:
    """Seconds of training in a stage, and images per second over them."""
    seconds = images = 0.0
    for record in records:
        if record["stage"] == index:
            seconds += record["epoch_seconds"]
            images += record["epoch_seconds"] * record["images_per_second"]
    return seconds, images / seconds if seconds else 0.0


def worst_confusions(matrix: np.ndarray, classes: Sequence[str], most: int = 20) -> list[tuple[str, str, int]]:
    """True class, predicted class and images of the commonest mistakes, from a matrix (K, K), rows true."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(wrong, axis=None)[::-1][:most]
    return [(classes[i // len(classes)], classes[i % len(classes)], int(wrong.flat[i])) for i in order if wrong.flat[i]]


RUN_FILES = (
    "config.yaml", "metrics.jsonl", "summary.json", "checkpoint.pth", "checkpoint_previous.pth", "model_best.pth", "report.html",
    "report/confusion_best.json", "report/confusion_last.json", "clearml/task.json",
)  # fmt: skip


def check_folder(config: Config) -> None:
    """Raise ConfigError if output_dir holds a run that the settings would neither continue nor replace."""
    folder = config.output_dir
    place = os.path.abspath(folder)
    while not os.path.exists(place):  # the nearest that is there; the rest is made when training begins
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"output_dir {folder}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"output_dir {folder}: {place} cannot be written to; give another folder")
    held = [name for name in RUN_FILES if os.path.exists(os.path.join(folder, name))]
    if held and not config.overwrite and config.resume != "auto":
        raise ConfigError(
            f"output_dir {folder} already holds a run ({held[0]}); --resume auto continues it, --overwrite starts again, "
            "another --output-dir leaves it alone"
        )
