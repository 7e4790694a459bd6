"""Charts of what training took and what came of it: accuracy over time and over epochs, throughput."""

import statistics as plain
from collections.abc import Sequence
from typing import Any

import altair as alt

from Graphs.charts import COARSE, ESTIMATE, colour, conditions_of, data, layered, means, measure, number
from Graphs.figure import COLOURS, GREY, HEIGHT
from Graphs.rows import MEASURE, spent_by_processor, time_spent
from studies.rows import Row


def accuracy_over_time(rows: Sequence[Row]) -> alt.LayerChart:
    """Draw accuracy against what training took: a dot for each seed, mean and interval of each condition."""
    names = conditions_of(rows)
    unit, spent = time_spent(rows)
    points = [
        {"condition": row["condition"], "seed": row["seed"], "x": spent(row), "top1": measure(row)} for row in rows
    ]
    averages = means(rows, lambda some: plain.fmean(map(spent, some)))
    times = [point["x"] for point in points]
    # From 0, that times can be compared; those that were meant to be equal are seen from near.
    shortest = 0.0 if min(times) < 0.8 * max(times) else 0.95 * min(times)
    scale = alt.Scale(domain=[shortest, 1.05 * max(times)], nice=False)
    x = alt.X("x:Q", title=f"training, {unit}", scale=scale, axis=COARSE)
    y = alt.Y("top1:Q", title=MEASURE, scale=alt.Scale(zero=False))
    dots = alt.Chart(data(points)).mark_circle(size=45, opacity=0.5).encode(
        x, y, colour(names), tooltip=["condition:N", "seed:Q", number("x", unit, ".1f"), number("top1", MEASURE)]
    )  # fmt: skip
    bars = alt.Chart(data([entry for entry in averages if entry["low"] is not None])).mark_rule(strokeWidth=2).encode(
        alt.X("x:Q"), alt.Y("low:Q"), alt.Y2("high:Q"), colour(names)
    )  # fmt: skip
    middles = alt.Chart(data(averages)).mark_point(filled=True, size=150, shape="diamond", opacity=1).encode(
        alt.X("x:Q"), alt.Y("mean:Q"), colour(names), tooltip=ESTIMATE
    )  # fmt: skip
    return layered(dots, bars, middles)


def accuracy_over_epochs(rows: Sequence[Row], epochs: Sequence[Row]) -> alt.LayerChart:
    """Draw accuracy at test size over epochs: dots of the seeds, lines of their means, the first condition's stages shaded."""
    names = conditions_of(rows)
    spans: dict[int, dict[str, Any]] = {}
    for row in epochs:
        if row["condition"] == names[0]:
            span = spans.setdefault(
                row["stage"], {"stage": row["stage"], "from": row["epoch"], "px": row["image_size"]}
            )
            span["to"] = row["epoch"] + 1
            span["middle"] = (span["from"] + span["to"]) / 2
    shade = alt.Chart(data([span | {"px": f"{span['px']} px"} for span in spans.values()]))
    bands = shade.mark_rect(color=GREY).encode(
        alt.X("from:Q", title="epoch"), alt.X2("to:Q"), alt.Y(value=0), alt.Y2(value="height"),
        opacity=alt.Opacity("stage:Q", scale=alt.Scale(range=[0.04, 0.2]), legend=None),
    )  # fmt: skip
    sizes = shade.mark_text(baseline="bottom", dy=-5, fontSize=12).encode(
        alt.X("middle:Q"), alt.Y(value="height"), text="px:N"
    )
    points = [
        {"condition": row["condition"], "seed": row["seed"], "epoch": row["epoch"] + 1, "top1": row["top1"]}
        for row in epochs
        if row["top1"] is not None
    ]
    chart = alt.Chart(data(points))
    last = max(row["epoch"] for row in epochs) + 1
    x = alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(domain=[0, last], nice=False))
    y = alt.Y("top1:Q", title=MEASURE, scale=alt.Scale(zero=False))
    tip = ["condition:N", "epoch:Q"]
    dots = chart.mark_circle(size=22, opacity=0.4).encode(
        x, y, colour(names), tooltip=[*tip, "seed:Q", number("top1", MEASURE)]
    )
    average = alt.Y("mean(top1):Q", title=MEASURE)
    lines = chart.mark_line().encode(x, average, colour(names))
    ends = chart.mark_point(filled=True, opacity=1, size=40).encode(
        x, average, colour(names), tooltip=[*tip, number("mean(top1)", "mean")]
    )
    return layered(bands, sizes, dots, lines, ends)


def throughput(rows: Sequence[Row], epochs: Sequence[Row]) -> alt.LayerChart:
    """Draw images per second at each image size that stages have: epochs as points, their median as a bar.

    On a CPU they are those of a processor's second: its cores may have had other work, or a run may have been halted.
    """
    on_cpu = spent_by_processor(rows)
    title = "images per processor second" if on_cpu else "images per second"

    def speed(row: Row) -> float:
        return row["images_per_second"] * (row["epoch_seconds"] / row["cpu_seconds"] if on_cpu else 1)

    speeds: dict[int, list[float]] = {}
    for row in epochs:
        speeds.setdefault(row["image_size"], []).append(speed(row))
    medians = [
        {"px": size, "median": plain.median(some), "n": len(some), "highest": max(some)}
        for size, some in sorted(speeds.items())
    ]
    points = [{"px": row["image_size"], "speed": speed(row)} for row in epochs]
    x = alt.X("px:O", title="image size of the stage, px", axis=alt.Axis(labelAngle=0))
    y = alt.Y("median:Q", title=title)
    bars = alt.Chart(data(medians)).mark_bar(color=COLOURS[2], opacity=0.6, width={"band": 0.6}).encode(
        x, y, tooltip=[alt.Tooltip("px:O"), number("median", "images/s, median", ".1f"), alt.Tooltip("n:Q", title="epochs")]
    )  # fmt: skip
    dots = (
        alt.Chart(data(points))
        .mark_tick(color=GREY, opacity=0.25, thickness=1, width={"band": 0.5})
        .encode(x, alt.Y("speed:Q", title=title))
    )
    above = alt.Y("highest:Q", title=title)
    labels = alt.Chart(data(medians)).mark_text(baseline="bottom", dy=-4, fontSize=13).encode(
        x, above, text=alt.Text("median:Q", format=".3~r")
    )  # fmt: skip
    return layered(bars, dots, labels, height=HEIGHT * 0.75)
