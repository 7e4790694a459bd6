"""The rows of gpu.py: kept as they come, read with what they are compared with."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROWS = "rows.jsonl"
DONE, FAILED, CUT = "done", "failed", "cut"  # how a measurement ended; a row that says so has no measures


class Rows:
    """The rows in a folder, a JSON object a line, each on the disk before the next is measured."""

    def __init__(self, folder: str):
        self.path = Path(folder, ROWS)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; what was left of one that a crash cut short gets a line of its own."""
        data = json.dumps(row).encode() + b"\n"
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                data = data if file.read() == b"\n" else b"\n" + data
            file.write(data)

    def read(self) -> list[Row]:
        """Read all rows; leave out those that a crash cut short."""
        return read_rows(self.path)

    def ended(self, card: str) -> dict[tuple[str, str], str]:
        """Find how each measurement on a card ended last, by its part and item."""
        return {
            (row["part"], row["item"]): row["status"] for row in self.read() if "status" in row and card_of(row) == card
        }


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows; none if it is not there."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def card_of(row: Mapping[str, Any]) -> str:
    """Name what a row was measured on: the GPU, or the processor where there was none."""
    return row["machine"]["gpu"] or row["machine"]["cpu"]


def by_card(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Sort rows by what they were measured on: figures of different cards are not compared."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(card_of(row), []).append(row)
    return found


def measures(rows: Sequence[Row]) -> list[Row]:
    """Choose the newest of a card's rows that measure the same, and add what they are compared with.

    share_of_product, share_of_memory: of a step, against the device's own ceilings
    times_reference: of whole training, over the reference's way of loading
    share_of_best: of a batch size, against the best one at its image size
    times_bare, share_of_ceiling: there already, measured in the same item
    time_ratio, times_relative_cost: of staged training, over training at the last size

    Returns: new rows, in the order in which they first came.
    """
    kept: dict[tuple, Row] = {}
    for row in rows:
        if "status" not in row:
            kept[tuple(row.get(key) for key in ("part", "way", "image_size", "batch_size", "rank"))] = dict(row)
    found = list(kept.values())
    product, memory = (one(found, way=way) for way in ("bfloat16 product", "memory, read and written"))
    for row in found:
        if row["part"] == "step":
            row["share_of_product"] = over(row, product, "tflops")
            row["share_of_memory"] = over(row, memory, "gb_per_second")
        if row["part"] == "whole":
            other = one(found, part="reference", image_size=row["image_size"])
            row["times_reference"] = over(row, other, "images_per_second")
        if row["part"] == "batch":
            speeds = [
                other["images_per_second"]
                for other in found
                if other["part"] == "batch" and other["image_size"] == row["image_size"]
            ]
            row["share_of_best"] = row["images_per_second"] / max(speeds)
        if row["part"] == "progressive" and row["way"] == "staged":
            row["time_ratio"] = over(row, one(found, part="progressive", way="fixed"), "train_seconds")
            row["times_relative_cost"] = row["time_ratio"] and row["time_ratio"] / row["relative_cost"]
    return found


def one(rows: Sequence[Row], **wanted: Any) -> Row:
    """Find the row that has all that is wanted; {} if there is none."""
    return next((row for row in rows if wanted.items() <= row.items()), {})


def over(row: Row, other: Row, key: str) -> float | None:
    """Divide a measure of one row by that of another; None where one of them is missing."""
    return row[key] / other[key] if row.get(key) is not None and other.get(key) else None


def unfinished(rows: Sequence[Row]) -> list[Row]:
    """List how measurements ended that were cut or failed, and have not been finished since."""
    last = {(row["part"], row["item"]): row for row in rows if "status" in row}
    return [row for row in last.values() if row["status"] != DONE]
