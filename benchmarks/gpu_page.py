"""The page of gpu.py: what a card gives, against what it could.

    python benchmarks/gpu_page.py runs/gpu

writes report.html of a folder of gpu.py anew, from its rows.
"""

import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import jinja2
import matplotlib.pyplot as plt
from gpu_rows import ROWS, Row, Rows, by_card, measures, unfinished

from reporting.figures import LINES, as_svg

PAGE = "report.html"
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headings, rows

# The ways of the first figure, in the order of their bars: part and way of the rows, and a name.
WAYS = {
    ("step", "bare"): "step: a loop by hand",
    ("step", "ours-eager"): "step: ours, launch by launch",
    ("step", "ours"): "step: ours",
    ("whole", "whole-eager"): "training, launch by launch",
    ("whole", "whole"): "training",
    ("reference", "reference-loading"): "training, loaded the reference's way",
}

# Heading of a table: part, and columns: key of a row to heading. Shares and ratios are shown as they are.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "The card's own ceilings": ("ceilings", {
        "way": "of", "tflops": "TFLOP/s", "gb_per_second": "GB/s", "microseconds": "µs",
    }),
    "Whole training": ("whole", {
        "way": "way", "image_size": "px", "images_per_second": "images/s", "resident": "the step's images/s", "share_of_ceiling": "of the step",
        "times_reference": "x reference", "data_wait_fraction": "waiting", "gpu_utilisation": "GPU %", "gpu_memory_gib": "GPU GiB",
    }),
    "The step, on images that are on the device": ("step", {
        "way": "way", "image_size": "px", "images_per_second": "images/s", "ms_per_step": "ms", "times_bare": "x the time of bare",
        "tflops": "TFLOP/s", "share_of_product": "of the product's", "gb_per_second": "GB/s at least", "share_of_memory": "of the memory's",
    }),
    "Batch size": ("batch", {
        "image_size": "px", "batch_size": "batch", "images_per_second": "images/s", "share_of_best": "of the best", "gpu_memory_gib": "GPU GiB",
    }),
    "The reference's way of loading": ("reference", {
        "image_size": "px", "images_per_second": "images/s", "data_wait_fraction": "waiting",
    }),
    "Stages against the last size throughout": ("progressive", {
        "way": "way", "train_seconds": "seconds", "relative_cost": "relative cost", "time_ratio": "time ratio", "times_relative_cost": "x relative cost",
    }),
    "First steps": ("smoke", {
        "image_size": "px", "first_step_seconds": "the first, s", "stage_seconds": "to enter the stage, s", "ms_per_step": "the next, ms", "gpu_memory_gib": "GPU GiB",
    }),
    "Tests that need a GPU": ("tests", {
        "tests": "tests", "failures": "failed", "errors": "broken", "skipped": "skipped", "broken": "which",
    }),
}  # fmt: skip
PROFILE = {"steps": "steps", "ms_per_step": "ms/step, profiled", "kernels_per_step": "kernels/step", "idle_share": "GPU idle"}  # fmt: skip
KERNEL = {"kernel": "kernel", "ms_per_step": "ms/step", "calls_per_step": "calls/step", "share": "share"}


def write_page(folder: str) -> None:
    """Write report.html from what the folder holds so far."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("gpu_page.html.j2").render(
        cards={card: of_card(rows) for card, rows in by_card(Rows(folder).read()).items()},
        studies=studies(Path(folder, "results")),
    )
    Path(folder, PAGE).write_text(page, encoding="utf-8")


def of_card(rows: Sequence[Row]) -> dict[str, Any]:
    """Collect what the page shows of a card."""
    found = measures(rows)
    tables = {}
    for heading, (part, columns) in TABLES.items():
        chosen = [row for row in found if row["part"] == part]
        if chosen:
            tables[heading] = tabulate(chosen, columns)
    return {
        "newest": rows[-1],
        "figures": draw(found),
        "tables": tables,
        "profiles": profiles(found),
        "unfinished": [(row["part"], row["item"], row["status"], row.get("reason", "")) for row in unfinished(rows)],
    }


def tabulate(rows: Sequence[Row], columns: Mapping[str, str]) -> Table:
    """Build a table of the columns that any row has."""
    there = [key for key in columns if any(row.get(key) is not None for row in rows)]
    return [columns[key] for key in there], [[common.show(row.get(key)) for key in there] for row in rows]


def profiles(rows: Sequence[Row]) -> dict[str, tuple[Table, Table]]:
    """Build for each profile its summary and the kernels that take longest."""
    found: dict[str, tuple[Table, Table]] = {}
    for row in rows:
        if row["part"] == "profile" and "rank" not in row:
            kernels = [
                other for other in rows if other["part"] == "profile" and other["way"] == f"{row['way']}, kernels"
            ]
            found[f"{row['image_size']} px, {row['way']}"] = tabulate([row], PROFILE), tabulate(kernels, KERNEL)
    return found


def studies(folder: Path) -> dict[str, Table]:
    """Build a table of the means of each study that has rows, by the study's name.

    Seconds of training are left out where some runs shared the machine.
    """
    found: dict[str, Table] = {}
    for path in sorted(folder.glob("*_means.csv")):
        shared = any(int(row["at_once"] or 1) > 1 for row in read_csv(path.with_name(path.name.replace("_means", ""))))
        columns = ("top1", "top1_ema", *([] if shared else ["train_seconds"]))
        rows = [row for row in read_csv(path) if row["column"] in columns]
        cells = [[row["condition"], row["column"], row["n"], *(decimal(row[key]) for key in ("mean", "sd", "low", "high"))] for row in rows]  # fmt: skip
        heads = ["condition", "measure", "runs", "mean", "standard deviation", "95 % from", "to"]
        found[path.stem.removesuffix("_means")] = (heads, cells)
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def decimal(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


# ---- figures ----


def draw(rows: Sequence[Row]) -> dict[str, str]:
    """Draw what there are rows for, as SVG by heading."""
    figures = {}
    if any((row["part"], row["way"]) in WAYS for row in rows):
        figures["Images per second"] = draw_speeds(rows)
    if any(row.get("share_of_memory") or row.get("share_of_ceiling") for row in rows):
        figures["Shares of the ceilings"] = draw_shares(rows)
    if any(row["part"] == "batch" for row in rows):
        figures["Images per second by batch size"] = draw_batches(rows)
    return figures


def sizes_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["image_size"] for row in rows if (row["part"], row["way"]) in WAYS})


def draw_speeds(rows: Sequence[Row]) -> str:
    """Draw a bar for each way at each size, and what the memory would allow the step at most."""
    sizes = sizes_of(rows)
    ways = [way for way in WAYS if any((row["part"], row["way"]) == way for row in rows)]
    figure, axis = plt.subplots(figsize=(10.5, 3.6))
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        speeds = {row["image_size"]: row["images_per_second"] for row in rows if (row["part"], row["way"]) == way}
        places = [sizes.index(size) + width * (i - (len(ways) - 1) / 2) for size in speeds]
        bars = axis.bar(places, list(speeds.values()), width, color=LINES[i % len(LINES)], label=WAYS[way])
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=6, rotation=90, padding=2)
    limits = {row["image_size"]: row["images_per_second"] / row["share_of_memory"] for row in rows if row.get("share_of_memory")}  # fmt: skip
    for i, (size, limit) in enumerate(limits.items()):
        place = sizes.index(size)
        axis.hlines(limit, place - 0.42, place + 0.42, color="black", lw=1, ls=":", label="" if i else "memory's ceiling, nothing fused")  # fmt: skip
    axis.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axis.set_ylabel("images per second")
    axis.margins(y=0.12)
    axis.legend(frameon=False, fontsize=7)
    return as_svg(figure)


def draw_shares(rows: Sequence[Row]) -> str:
    """Draw how near the step comes to products and memory, and whole training to the step, in percent."""
    shares = {
        "step, of bfloat16 products": ("ours", "share_of_product"),
        "step, of memory": ("ours", "share_of_memory"),
        "training, of the step": ("whole", "share_of_ceiling"),
    }
    sizes = sizes_of(rows)
    figure, axis = plt.subplots(figsize=(10.5, 2.6))
    width = 0.8 / len(shares)
    for i, (name, (way, key)) in enumerate(shares.items()):
        values = {row["image_size"]: 100 * row[key] for row in rows if row["way"] == way and row.get(key)}
        places = [sizes.index(size) + width * (i - 1) for size in values]
        bars = axis.bar(places, list(values.values()), width, color=LINES[i], label=name)
        axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    axis.axhline(100, color="black", lw=1, ls=":")
    axis.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axis.set_ylabel("% of the ceiling")
    axis.margins(y=0.12)
    axis.legend(frameon=False, fontsize=7, ncols=len(shares), loc="lower center", bbox_to_anchor=(0.5, 1))
    return as_svg(figure)


def draw_batches(rows: Sequence[Row]) -> str:
    """Draw images per second over the batch size, a line for each image size."""
    figure, axis = plt.subplots(figsize=(5.0, 2.8))
    tried = [row for row in rows if row["part"] == "batch"]
    for i, size in enumerate(sorted({row["image_size"] for row in tried})):
        points = [(row["batch_size"], row["images_per_second"]) for row in tried if row["image_size"] == size]
        axis.plot(*zip(*points), color=LINES[i], marker="o", ms=3, label=f"{size} px")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({row["batch_size"] for row in tried}), sorted({row["batch_size"] for row in tried}))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch size")
    axis.set_ylabel("images per second")
    axis.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def main(argv: Sequence[str]) -> int:
    """Write the page of the folder named; return the exit status."""
    if len(argv) != 1 or not os.path.isfile(os.path.join(argv[0], ROWS)):
        print(f"error: give one folder of gpu.py, with {ROWS} in it; got {' '.join(argv) or 'none'}", file=sys.stderr)
        return 2
    write_page(argv[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
