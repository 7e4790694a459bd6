"""The figures of the studies, each from its rows in `results/`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import altair as alt

from Graphs.figure import COLOURS, GREY, HEIGHT, WIDTH, Figure
from studies.rows import Row
from studies.statistics import mean_of

LABEL = {"top1": "top-1, %", "top1_ema": "top-1 of the average, %", "best_top1": "best top-1, %"}


def conditions_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["condition"] for row in rows))


def colour(rows: Sequence[Row]) -> alt.Color:
    """Give each condition a colour, the same in every figure of a study."""
    names = conditions_of(rows)
    return alt.Color("condition:N", scale=alt.Scale(domain=names, range=COLOURS[: len(names)]), title=None)


def on_cpu(rows: Sequence[Row]) -> bool:
    return all(row["device"] == "cpu" for row in rows)


def means(rows: Sequence[Row], column: str = "top1", **more: str) -> list[dict[str, Any]]:
    """Estimate the mean of each condition as data of a chart.

    more: columns whose mean is wanted as well, by the name they get
    """
    found = []
    for name in conditions_of(rows):
        estimate = mean_of(rows, name, column)
        if estimate is None:
            continue
        entry = {"condition": name, "mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n}
        for key, other in more.items():
            value = mean_of(rows, name, other)
            entry[key] = value and value.mean
        found.append(entry)
    return found


def accuracy_over_time(rows: Sequence[Row]) -> alt.TopLevelMixin:
    """Accuracy of the last epoch against what training took: a dot for each seed, mean and interval of each condition."""
    seconds = "cpu_seconds" if on_cpu(rows) else "train_seconds"
    unit = "training, processor minutes" if on_cpu(rows) else "training, minutes"
    points = [
        {"condition": row["condition"], "seed": row["seed"], "minutes": row[seconds] / 60, "top1": row["top1"]}
        for row in rows
    ]
    averages = [{**entry, "minutes": entry["seconds"] / 60} for entry in means(rows, seconds=seconds)]
    x = alt.X("minutes:Q", title=unit, scale=alt.Scale(zero=True))
    y = alt.Y("top1:Q", title=LABEL["top1"], scale=alt.Scale(zero=False))
    dots = alt.Chart(alt.Data(values=points)).mark_circle(size=45, opacity=0.45).encode(
        x, y, colour(rows), tooltip=["condition:N", "seed:Q", "minutes:Q", "top1:Q"]
    )  # fmt: skip
    whole = alt.Chart(alt.Data(values=averages))
    bars = whole.mark_rule(strokeWidth=2).encode(alt.X("minutes:Q"), alt.Y("low:Q"), alt.Y2("high:Q"), colour(rows))
    middles = whole.mark_point(filled=True, size=130, shape="diamond").encode(
        alt.X("minutes:Q"), alt.Y("mean:Q"), colour(rows), tooltip=["condition:N", "n:Q", "mean:Q", "low:Q", "high:Q"]
    )
    return (dots + bars + middles).properties(width=WIDTH, height=HEIGHT)


def accuracy_over_epochs(rows: Sequence[Row], epochs: Sequence[Row]) -> alt.TopLevelMixin:
    """Accuracy at test size after each evaluated epoch, mean over the seeds; stages of the first condition shaded."""
    first = conditions_of(rows)[0]
    spans: dict[int, dict[str, Any]] = {}
    for row in epochs:
        if row["condition"] == first:
            span = spans.setdefault(
                row["stage"], {"stage": row["stage"], "from": row["epoch"], "px": f"{row['image_size']} px"}
            )
            span["to"] = row["epoch"] + 1
            span["middle"] = (span["from"] + span["to"]) / 2
    shade = alt.Chart(alt.Data(values=list(spans.values())))
    bands = shade.mark_rect(color=GREY).encode(
        alt.X("from:Q"),
        alt.X2("to:Q"),
        opacity=alt.Opacity("stage:O", scale=alt.Scale(range=[0.04, 0.16]), legend=None),
    )
    sizes = shade.mark_text(baseline="top", dy=2).encode(alt.X("middle:Q"), alt.value(0), text="px:N")
    points = [
        {"condition": row["condition"], "seed": row["seed"], "epoch": row["epoch"] + 1, "top1": row["top1"]}
        for row in epochs
        if row["top1"] is not None
    ]
    chart = alt.Chart(alt.Data(values=points))
    x = alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1))
    dots = chart.mark_circle(size=22, opacity=0.35).encode(x, alt.Y("top1:Q", title=LABEL["top1"]), colour(rows))
    lines = chart.mark_line(point=True).encode(
        x, alt.Y("mean(top1):Q", title=LABEL["top1"]), colour(rows), tooltip=["condition:N", "epoch:Q", "mean(top1):Q"]
    )
    return (bands + sizes + dots + lines).properties(width=WIDTH, height=HEIGHT)


def every_seed(rows: Sequence[Row]) -> alt.TopLevelMixin:
    """Accuracy of the last epoch for each condition: every seed a point, mean and 95 % interval."""
    names = conditions_of(rows)
    points = [{"condition": row["condition"], "seed": row["seed"], "top1": row["top1"]} for row in rows]
    y = alt.Y("condition:N", sort=names, title=None, axis=alt.Axis(labelLimit=220))
    x = alt.X("top1:Q", title=LABEL["top1"], scale=alt.Scale(zero=False))
    dots = alt.Chart(alt.Data(values=points)).mark_circle(size=45, opacity=0.5, color=COLOURS[0]).encode(
        x, y, tooltip=["condition:N", "seed:Q", "top1:Q"]
    )  # fmt: skip
    whole = alt.Chart(alt.Data(values=means(rows)))
    bars = whole.mark_rule(strokeWidth=2, color=COLOURS[1]).encode(alt.X("low:Q"), alt.X2("high:Q"), y)
    middles = whole.mark_point(filled=True, size=110, shape="diamond", color=COLOURS[1], opacity=1).encode(
        alt.X("mean:Q"), y, tooltip=["condition:N", "n:Q", "mean:Q", "low:Q", "high:Q"]
    )
    return (dots + bars + middles).properties(width=WIDTH - 120, height=34 * len(names))


def throughput(rows: Sequence[Row], epochs: Sequence[Row]) -> alt.TopLevelMixin:
    """Images per second at each image size: an epoch is a point, the bar their median."""
    points = [{"px": row["image_size"], "speed": row["images_per_second"]} for row in epochs]
    x, y = (
        alt.X("px:O", title="image size, px", axis=alt.Axis(labelAngle=0)),
        alt.Y("speed:Q", title="images per second"),
    )
    chart = alt.Chart(alt.Data(values=points))
    bars = chart.mark_bar(color=COLOURS[2], opacity=0.7).encode(x, alt.Y("median(speed):Q", title="images per second"))
    dots = chart.mark_circle(size=14, color=GREY, opacity=0.4).encode(x, y)
    labels = chart.mark_text(dy=-10).encode(x, alt.Y("median(speed):Q"), text=alt.Text("median(speed):Q", format=".0f"))
    return (bars + dots + labels).properties(width=WIDTH, height=HEIGHT * 0.75)


def of_study(name: str, title: str, figures: Sequence[tuple[str, Any, bool]]) -> list[Figure]:
    """List the figures of one study: name of the file, function, and whether it also takes the rows of epochs."""
    return [
        Figure(file, title, (f"{name}.csv", f"{name}_epochs.csv") if with_epochs else (f"{name}.csv",), partial(draw))
        for file, draw, with_epochs in figures
    ]
