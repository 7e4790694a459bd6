"""Rows of a study: what is kept of each finished run, in `results/`.

NAME.csv                a row per run
NAME_epochs.csv         a row per epoch of each run
NAME_means.csv          per condition: mean, standard deviation, n, 95 % interval
NAME_differences.csv    the same of the differences between conditions, paired by seed
"""

import csv
import io
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from reporting.folder import HELD_OUT, RunFolder
from settings.errors import ConfigError
from settings.values import as_text
from studies.statistics import Estimate, difference, mean_of
from studies.study import Run, Study

Row = dict[str, Any]
TEXT = (
    "condition",
    "one",
    "other",
    "column",
    "device",
    "system",
    "python",
    "torch",
    "torchvision",
    "commit",
    "date",
    "settings",
    "held_out",
)
WHOLE = (
    "seed",
    "epochs",
    "best_epoch",
    "epoch",
    "stage",
    "image_size",
    "images",
    "n",
    "threads",
    "at_once",
    "processes",
    "held_out_images",
)
MEASURES = (
    "top1",
    "top1_ema",
    "best_top1",
    "balanced_accuracy",
    "macro_f1",
    "held_out_top1",
    "held_out_balanced_accuracy",
    "auc",
    "sensitivity",
    "specificity",
    "train_seconds",
    "cpu_seconds",
)
EPOCH = (
    "epoch",
    "stage",
    "image_size",
    "loss",
    "top1",
    "top1_ema",
    "images_per_second",
    "epoch_seconds",
    "cpu_seconds",
)


class Results:
    """The rows of a study in a folder.

    Raises:
        ConfigError: its rows are of another study, or of other settings.
    """

    def __init__(self, study: Study, folder: str):
        self.study, self.folder = study, folder
        self.read()

    def read(self) -> None:
        """Read the rows there are; again, once no other sweep writes them.

        Raises:
            ConfigError: as `Results`.
        """
        self.rows = read_rows(self.path(), ("condition", "seed", "settings"))
        self.epochs = read_rows(self.path("epochs"), ("condition", "seed", "epoch"))
        # Of every seed, also of those that the study names no more: means and differences are over all of a condition
        expected = {run.condition: run.settings_digest for run in self.study.runs}
        for row in self.rows:
            now = expected.get(row["condition"], row["settings"])
            if row["settings"] != now:
                raise ConfigError(
                    f"{self.path()} has {row['condition']}, seed {row['seed']} with other settings (their digest "
                    f"{row['settings']}, now {now}); give another folder as --results, or remove the row and the run's folder"
                )

    def path(self, part: str = "") -> str:
        return os.path.join(self.folder, f"{self.study.name}{'_' if part else ''}{part}.csv")

    def row(self, run: Run) -> Row | None:
        """Find the row of a run; None if it is not finished, or not evaluated on the held-out images that it has now."""
        key = (run.condition, run.seed)
        found = next((row for row in self.rows if (row["condition"], row["seed"]) == key), None)
        if found is None or run.held_out is None:
            return found
        other = (found.get("held_out") or run.held_out) != run.held_out  # a row of older versions does not name them
        return None if other or found.get("held_out_top1") is None else found

    def finished(self) -> list[Row]:
        """List the rows of the runs that the study has now."""
        return [row for row in map(self.row, self.study.runs) if row is not None]

    def add(self, run: Run, row: Row, epochs: Sequence[Row]) -> None:
        """Add a finished run, in the place of the row it may have, and write all files anew by way of temporary ones.

        The row comes last, so that a run which has one has everything.
        """
        key = {"condition": run.condition, "seed": run.seed}
        rows, other_epochs = (
            [old for old in kept if {"condition": old["condition"], "seed": old["seed"]} != key]
            for kept in (self.rows, self.epochs)
        )
        self.epochs = self.ordered([*other_epochs, *(key | epoch for epoch in epochs)])
        self.rows = self.ordered([*rows, key | row])
        os.makedirs(self.folder, exist_ok=True)
        write_rows(self.path("epochs"), self.epochs)
        write_rows(self.path(), self.rows)
        self.write_statistics()

    def ordered(self, rows: Iterable[Row]) -> list[Row]:
        """Sort rows as the study names their conditions, then by seed and epoch; those it does not know come last."""
        places = {condition: i for i, condition in enumerate(self.study.conditions)}
        return sorted(
            rows, key=lambda row: (places.get(row["condition"], len(places)), row["seed"], row.get("epoch", 0))
        )

    def write_statistics(self) -> None:
        """Write means and paired differences of all measures there are."""
        conditions = [name for name in self.study.conditions if any(row["condition"] == name for row in self.rows)]
        columns = [name for name in MEASURES if any(row.get(name) is not None for row in self.rows)]
        means: list[Row] = []
        differences: list[Row] = []
        for column in columns:
            for name in conditions:
                found = mean_of(self.rows, name, column)
                if found is not None:
                    means.append({"column": column, "condition": name} | as_row(found))
            for other, one in itertools.combinations(conditions, 2):
                found = difference(self.rows, one, other, column)
                if found is not None:
                    differences.append({"column": column, "one": one, "other": other} | as_row(found))
        write_rows(self.path("means"), means)
        write_rows(self.path("differences"), differences)


def as_row(found: Estimate) -> Row:
    return {"mean": found.mean, "sd": found.sd, "n": found.n, "low": found.low, "high": found.high}


def finished_row(run: Run, study: Study, machine: Mapping[str, Any]) -> Row:
    """Build the row of a finished run from the files in its folder.

    machine: what the sweep knows of how the run had the machine

    Raises:
        FileNotFoundError: the run has no summary.
    """
    folder = RunFolder(run.folder)
    summary = folder.summary()
    if summary is None:
        raise FileNotFoundError(folder.at("summary.json"))
    records, versions = folder.metrics(), summary["versions"]
    varying = {name: as_text(run.config.as_dict()[name]) for name in study.varying}
    if run.source is not None:
        varying["weights"] = f"of {run.source.condition}"
    elif "weights" in varying or any(other.source for other in study.runs):
        varying["weights"] = run.config.weights or ""
    return {
        **varying,
        "epochs": run.plan.num_epochs,
        "relative_cost": summary["relative_cost"],
        "images": round(sum(record["images_per_second"] * record["epoch_seconds"] for record in records)),
        "top1": summary["top1"],
        "top1_ema": summary["top1_ema"],
        "best_top1": summary["best_top1"],
        "best_epoch": summary["best_epoch"],
        **{name: summary["final"].get(name) for name in ("balanced_accuracy", "macro_f1")},
        **(folder.read_json(HELD_OUT) or {}),
        "train_seconds": summary["train_seconds"],
        "cpu_seconds": sum(record["cpu_seconds"] for record in records),
        "images_per_second": summary["images_per_second"],
        "device": summary["device"],
        "processes": summary["processes"],
        **machine,
        "python": versions["python"],
        "torch": versions["torch"],
        "torchvision": versions["torchvision"],
        "system": versions["system"],
        "commit": summary["commit"] or "",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "settings": run.settings_digest,
    }


def epoch_rows(run: Run) -> list[Row]:
    """Build a row per epoch of a finished run; `train_seconds` is the sum up to its end."""
    rows, spent = [], 0.0
    for record in RunFolder(run.folder).metrics():
        spent += record["epoch_seconds"]
        rows.append({name: record[name] for name in EPOCH} | {"train_seconds": spent})
    return rows


def read_rows(path: str, needed: Sequence[str] = ()) -> list[Row]:
    """Read a file of rows; a file that is not there has none. Numbers become numbers, empty cells None.

    needed: columns that there must be

    Raises:
        ConfigError: not a file of rows.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a spreadsheet puts a mark at the beginning
            rows = list(csv.DictReader(file, strict=True))
        for name in needed:
            if rows and name not in rows[0]:
                raise ValueError(f"no column {name}, commas between columns")
        return [{name: typed(name, text) for name, text in row.items()} for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as rows of a study: {error}; mend or remove it") from error


def typed(name: str, text: str) -> Any:
    """Convert a cell to the type that its column has."""
    if name in TEXT:
        return text
    if text == "":
        return None
    if name in WHOLE:
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text  # the value of a setting


def write_rows(path: str, rows: Sequence[Row]) -> None:
    """Write rows by way of a temporary file; columns in the order in which they first come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: shown(value) for name, value in row.items()} for row in rows)
    with open(path + ".tmp", "w", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def shown(value: Any) -> Any:
    """Round a number to what a reader needs: six digits."""
    return f"{value:.6g}" if isinstance(value, float) else value
