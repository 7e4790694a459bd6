"""What figures and tables read out of a study's rows and its file."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from studies.rows import Row
from studies.study import read_conditions, read_mapping

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STUDIES = os.path.join("configs", "studies")
MEASURE = "top-1 accuracy, %"


def study_file(study: str) -> dict[str, Any]:
    """Read the file of a study; of one that is kept elsewhere nothing is known but its rows."""
    path = os.path.join(ROOT, STUDIES, f"{study}.yaml")
    return read_mapping(path) if os.path.exists(path) else {}


def is_complete(heads: Sequence[str]) -> bool:
    """Check whether a file with these column heads has a row per run."""
    return {"condition", "seed", "top1", "settings"} <= set(heads)


def varying(rows: Sequence[Row]) -> list[str]:
    """List the settings that rows have a column for: those that are not the same in all runs."""
    names = list(rows[0])
    return [name for name in names[names.index("seed") + 1 : names.index("relative_cost")] if name != "epochs"]


def spent_by_processor(rows: Sequence[Row]) -> bool:
    """Check whether what training took is told in processor seconds: on a CPU, whose cores runs share."""
    return all(row["device"] == "cpu" for row in rows)


def time_spent(rows: Sequence[Row]) -> tuple[str, Callable[[Row], float]]:
    """Choose how to tell what training took: by the processor, whose cores runs share, or else by the clock.

    Returns: the unit, minutes or, where all runs are short, seconds; and what finds a row's
    """
    on_cpu = spent_by_processor(rows)
    column = "cpu_seconds" if on_cpu else "train_seconds"
    unit, seconds = ("minutes", 60) if max(row[column] for row in rows) >= 180 else ("seconds", 1)
    return f"processor {unit}" if on_cpu else unit, lambda row: row[column] / seconds


def first_and_last(value: Any) -> tuple[float, float] | None:
    """Read the value of a scheduled setting, one number or a list of them; None for anything else."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(item, str | None) for item in values):
        return None
    return float(values[0]), float(values[-1])


def comparison(study: str, rows: Sequence[Row], condition: str) -> tuple[str, str]:
    """Find the column that counts for a condition, and the condition it is compared with, as the study's file says."""
    content = study_file(study)
    conditions = read_conditions(content, study) if content else {}
    own = conditions.get(condition, {})
    control = own.get("control", content.get("control", next(iter(conditions), rows[0]["condition"])))
    return str(own.get("metric", content.get("metric", "top1"))), str(control)


def data_set(condition: str) -> str:
    """Find which data a condition of a study of several is about: its name up to a colon or comma."""
    return condition.replace(":", ",").split(",")[0]
