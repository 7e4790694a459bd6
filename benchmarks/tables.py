"""Write the tables of docs/performance.md from the rows in benchmarks/results/.

    python benchmarks/tables.py

Those of a GPU come from gpu.jsonl there, which is rows.jsonl of a folder of gpu.py, copied; several after one another.

Each table stands between the marks `<!-- table NAME -->` and `<!-- end of table -->`, NAME as in TABLES. The rows of a
benchmark's newest run with the same settings count.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_rows import by_card, measures, read_rows  # noqa: E402

from Graphs.marks import markdown, write_tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

# Table: the file of rows, the ways shown (none named: all), and columns: heading, key of a row or of its settings (after a
# dot), format.
TABLES: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, str, str], ...]]] = {
    "loader": ("loader", ("reference", "worker", "store-worker", "store-device"), (
        ("images", ".data", "{}"), ("crop, px", ".image_size", "{}"), ("policy", ".policy", "{}"), ("way", "way", "{}"),
        ("images/s per core", "images_per_cpu_second", "{:,.0f}"), ("times the reference", "times_reference", "{:.2f}"),
    )),
    "half": ("loader", ("first-stage-reference", "first-stage-whole", "first-stage"), (
        ("images", ".data", "{}"), ("crop, px", ".image_size", "{}"), ("of a run up to, px", ".last_size", "{}"), ("policy", ".policy", "{}"), ("way", "way", "{}"),
        ("images/s per core", "images_per_cpu_second", "{:,.0f}"), ("times the reference", "times_reference", "{:.2f}"), ("times whole images", "times_whole", "{:.2f}"),
    )),
    "build": ("loader", ("decode-once", "build-store"), (
        ("images", ".data", "{}"), ("crop, px", ".image_size", "{}"), ("up to, px", ".last_size", "{}"), ("way", "way", "{}"), ("seconds", "seconds", "{:.1f}"),
        ("images/s", "images_per_second", "{:,.0f}"), ("memory, GiB", "peak_rss_gib", "{:.2f}"), ("times decoding once", "times_decode_once", "{:.2f}"),
    )),
    "step": ("step", ("bare", "ours", "ours-ema", "ours-eager", "reference"), (
        ("model", ".model", "{}"), ("size, px", ".image_size", "{}"), ("batch", ".batch_size", "{}"), ("way", "way", "{}"),
        ("images/s", "images_per_second", "{:,.1f}"), ("times the bare loop's time", "times_bare", "{:.3f}"),
    )),
    "memory": ("step", ("fresh", "stage-to-stage"), (
        ("model", ".model", "{}"), ("batch", ".batch_size", "{}"), ("size, px", "image_size", "{}"), ("process", "way", "{}"),
        ("most memory, GiB", "peak_memory_gib", "{:.2f}"), ("times a fresh one", "times_fresh", "{:.2f}"),
    )),
    "end_to_end": ("end_to_end", ("train", "ceiling", "reference"), (
        ("images", ".data", "{}"), ("size, px", "image_size", "{}"), ("way", "way", "{}"), ("images/s", "images_per_second", "{:,.0f}"),
        ("waiting", "data_wait_fraction", "{:.1%}"), ("share of the ceiling", "share_of_ceiling", "{:.2f}"), ("times the reference", "times_reference", "{:.2f}"),
    )),
    "overhead": ("overhead", ("ours", "bare"), (
        ("model", ".model", "{}"), ("images", ".images", "{:,}"), ("way", "way", "{}"), ("an epoch, CPU s", "cpu_seconds_per_epoch", "{:.1f}"),
        ("fixed, CPU s", "fixed_cpu_seconds", "{:.1f}"), ("times the bare loop's", "times_bare", "{:.2f}"),
    )),
    "progressive": ("progressive", ("staged", "fixed"), (
        ("images", ".data", "{}"), ("sizes, px", ".image_size", "{}"), ("epochs", ".epochs", "{}"), ("way", "way", "{}"), ("training, s", "train_seconds", "{:.0f}"),
        ("relative cost", "relative_cost", "{:.3f}"), ("time ratio", "time_ratio", "{:.3f}"), ("over relative cost", "times_relative_cost", "{:.3f}"),
    )),
    "prediction": ("prediction", ("evaluate", "predict"), (
        ("images", ".data", "{}"), ("model", "model", "{}"), ("size, px", "image_size", "{}"), ("way", "way", "{}"),
        ("images/s", "images_per_second", "{:,.1f}"), ("times evaluation", "times_evaluate", "{:.2f}"),
    )),
    "prediction_memory": ("prediction", ("memory", "memory-tenfold"), (
        ("model", "model", "{}"), ("size, px", "image_size", "{}"), ("images", "images", "{:,}"), ("damaged", "damaged", "{:,}"),
        ("every one a row", "every_one_a_row", "{}"), ("most memory, GiB", "peak_rss_gib", "{:.2f}"), ("times that for a tenth", "times_fewer", "{:.2f}"),
    )),
    "fit_time": ("fit_time", (), (
        ("run", "way", "{}"), ("image sizes, px", "image_sizes", "{}"), ("epochs", "epochs", "{}"), ("asked, s", "asked_seconds", "{:,.0f}"), ("took, s", "seconds", "{:,.1f}"),
        ("used", "share_used", "{:.1%}"), ("within", "within", "{}"), ("longer than forecast", "forecast_error", "{:+.1%}"),
    )),
    "gpu_ceilings": ("gpu", ("bfloat16 product", "memory, read and written", "upload from pinned memory", "launch of a kernel", "a kernel in a CUDA graph"), (
        ("of", "way", "{}"), ("TFLOP/s", "tflops", "{:,.0f}"), ("GB/s", "gb_per_second", "{:,.0f}"), ("µs", "microseconds", "{:.2f}"),
    )),
    "gpu_whole": ("gpu", ("whole", "whole-eager"), (
        ("images", ".data", "{}"), ("model", ".model", "{}"), ("size, px", "image_size", "{}"), ("way", "way", "{}"), ("images/s", "images_per_second", "{:,.0f}"),
        ("of the step alone", "share_of_ceiling", "{:.2f}"), ("waiting", "data_wait_fraction", "{:.1%}"), ("times the reference's loading", "times_reference", "{:.2f}"),
    )),
    "gpu_step": ("gpu", ("bare", "ours", "ours-eager", "reference"), (
        ("model", ".model", "{}"), ("batch", ".batch_size", "{}"), ("size, px", "image_size", "{}"), ("way", "way", "{}"), ("images/s", "images_per_second", "{:,.0f}"),
        ("times the bare loop's time", "times_bare", "{:.2f}"), ("of bfloat16 products", "share_of_product", "{:.1%}"), ("of memory, at least", "share_of_memory", "{:.1%}"),
    )),
    "gpu_batch": ("gpu", ("batch",), (
        ("model", ".model", "{}"), ("size, px", "image_size", "{}"), ("batch", "batch_size", "{}"), ("images/s", "images_per_second", "{:,.0f}"), ("of the best", "share_of_best", "{:.2f}"), ("memory, GiB", "gpu_memory_gib", "{:.1f}"),
    )),
    "gpu_profile": ("gpu", ("profile", "profile-eager"), (
        ("model", ".model", "{}"), ("size, px", "image_size", "{}"), ("way", "way", "{}"), ("ms/step, profiled", "ms_per_step", "{:.1f}"),
        ("kernels/step", "kernels_per_step", "{:,.0f}"), ("GPU idle", "idle_share", "{:.1%}"),
    )),
    "gpu_progressive": ("gpu", ("staged", "fixed"), (
        ("sizes, px", ".sizes", "{}"), ("epochs", ".staged_epochs", "{}"), ("way", "way", "{}"), ("training, s", "train_seconds", "{:.1f}"),
        ("relative cost", "relative_cost", "{:.3f}"), ("time ratio", "time_ratio", "{:.3f}"), ("over relative cost", "times_relative_cost", "{:.3f}"),
    )),
}  # fmt: skip


def rows_of(file: str) -> list[dict[str, Any]]:
    """Read the rows of a benchmark; none if it has not run."""
    path = RESULTS / f"{file}.json"
    if file == "gpu":
        rows = read_rows(RESULTS / "gpu.jsonl")
        return [row for of_card in by_card(rows).values() for row in measures(of_card)]
    return json.loads(path.read_text()) if path.exists() else []


def newest(rows: list[dict[str, Any]], ways: tuple[str, ...]) -> list[dict[str, Any]]:
    """Choose the latest row of each (settings, machine, way, size, batch).

    They come in the order in which the settings first came.
    """
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not ways or row["way"] in ways:
            settings = dict(row["settings"])
            settings.pop("runs", None)  # which of several were asked for
            key = json.dumps(
                [settings, row["machine"], row["way"], row.get("image_size"), row.get("batch_size")], sort_keys=True
            )
            kept[key] = row
    return list(kept.values())


def table(name: str) -> str:
    """Format one of TABLES in Markdown, with the machine and the versions its rows come from."""
    file, ways, columns = TABLES[name]
    rows = newest(rows_of(file), ways)
    if not rows:
        return f"Not measured yet: `python benchmarks/{file}.py --help`."
    shown = [column for column in columns if any(look_up(row, column[1]) is not None for row in rows)]
    cells = []
    for row in rows:
        values = [(look_up(row, key), form) for _, key, form in shown]
        cells.append(["" if value is None else form.format(value) for value, form in values])
    sources = sorted({source(row) for row in rows})
    return f"{markdown([heading for heading, _, _ in shown], cells)}\n\n*`benchmarks/{file}.py`: {'; '.join(sources)}*"


def look_up(row: dict[str, Any], key: str) -> Any:
    """Find a value in a row, or, for a key after a dot, in the row's settings; join a list by commas."""
    value = row["settings"].get(key[1:]) if key.startswith(".") else row.get(key)
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def source(row: dict[str, Any]) -> str:
    """Describe where a row comes from: device, torch, commit, date."""
    machine, versions = row["machine"], row["versions"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}, torch {versions['torch']}, commit {(row['commit'] or 'none')[:12]}, {row['date'][:10]}"


def write(page: Path = PAGE) -> None:
    """Write all of TABLES into a page."""
    write_tables(str(page), {name: partial(table, name) for name in TABLES})


if __name__ == "__main__":
    write()
