"""Write the tables of README and docs from what they show: settings, plans, `results/`.

    python -m Graphs.draw               every table of PAGES
    python -m Graphs.draw RUN_FOLDER    the report.html of a run again

A table stands between the marks `<!-- table NAME -->` and `<!-- end of table -->`.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from reporting.folder import PLAN, REPORT, RunFolder
from reporting.page import report_page
from settings.resolve import resolve
from settings.table import DEFAULTS, SCHEDULES, SETTINGS, show
from stages import make_plan

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def stages_table() -> str:
    """Build the table of what changes from stage to stage in the paper's schedule on Imagenette."""
    heads, rows = make_plan(resolve(["--config", os.path.join(ROOT, "configs", "imagenette_s.yaml")])).table()
    changing = [i for i in range(len(heads)) if len({row[i] for row in rows}) > 1]
    return markdown([heads[i] for i in changing], [[row[i] for i in changing] for row in rows])


def scheduled_table() -> str:
    """Build the table of the settings that may change from stage to stage."""
    rows = []
    for name, schedule in SCHEDULES.items():
        row = SETTINGS[name]
        default = "the model's own" if DEFAULTS[name] is None else show(DEFAULTS[name])
        rows.append([f"`{name}`", schedule.heading, row["help"], row["interval"], default])
    return markdown(["setting", "in plans", "what it is", "accepted", "default"], rows)


def results_table() -> str:
    """Build the table of the finished runs in `results/`, one folder each, from their own files."""
    rows = []
    folder = os.path.join(ROOT, "results")
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):  # beside the rows of studies
        summary = RunFolder(os.path.join(folder, name)).summary()
        if summary is None:
            continue
        versions = summary["versions"]
        rows.append([
            f"[{name}](../results/{name}/config.yaml)",
            ", ".join(str(stage["image_size"]) for stage in summary["stages"]),
            summary["epochs"],
            f"{summary['top1']:.2f}",
            f"1 (seed {summary['seed']})",
            f"{summary['train_seconds'] / 60:.1f}",
            f"{summary['relative_cost']:.2f}",
            f"{summary['device']}, {versions['system']}, torch {versions['torch']}",
            (summary["commit"] or "before the first")[:16],
        ])  # fmt: skip
    heads = ["run", "image sizes", "epochs", "top-1 %", "seeds", "training, minutes", "relative cost", "machine", "commit"]  # fmt: skip
    return markdown(heads, rows)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"stages": stages_table, "scheduled": scheduled_table},
    os.path.join("docs", "results.md"): {"results": results_table},
}


def with_table(text: str, name: str, content: str) -> str:
    """Put a table between its marks in the text of a page, and return the text.

    Raises:
        ValueError: the page has no such marks.
    """
    marks = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.S)
    text, count = marks.subn(lambda found: f"{found[1]}{content}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"{count} places for the table {name}, not one")
    return text


def write_tables(page: str, tables: dict[str, Callable[[], str]]) -> None:
    """Write tables, given by name, between their marks in the file `page`."""
    with open(page, encoding="utf-8") as file:
        text = file.read()
    for name, table in tables.items():
        text = with_table(text, name, table())
    with open(page, "w", encoding="utf-8") as file:
        file.write(text)


def main(arguments: Sequence[str]) -> None:
    """Write all tables, or, given the folder of a run, its report."""
    if not arguments:
        for page, tables in PAGES.items():
            write_tables(os.path.join(ROOT, page), tables)
        return
    run = RunFolder(arguments[0])
    if len(arguments) > 1 or not run.has(PLAN):
        sys.exit("error: give nothing, to write the tables of README and docs, or one folder of a run")
    run.write(REPORT, report_page(run))


if __name__ == "__main__":
    main(sys.argv[1:])
