"""The figures of the studies, each from its rows in `results/`; a study without rows has none yet."""

import csv
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import altair as alt

from Graphs.charts import (
    COARSE,
    ESTIMATE,
    Accuracy,
    Values,
    colour,
    conditions_of,
    data,
    layered,
    means,
    measure,
    number,
)
from Graphs.figure import COLOURS, GREY, Figure, Specification, styled
from Graphs.over_time import accuracy_over_epochs, accuracy_over_time, throughput
from Graphs.rows import MEASURE, comparison, data_set, first_and_last, is_complete, study_file, time_spent, varying
from settings.table import SCHEDULES
from studies.rows import Row, read_rows


@dataclass(frozen=True)
class Kind:
    """A figure that a study has.

    end: of its name
    title: what it shows
    draw: draws it from the rows of runs, and of epochs if `epochs`
    of: chooses the rows that it shows, and what it needs to know of each
    room: pixels that its axis takes
    key: what its marks are, `{first}` for the first condition
    """

    end: str
    title: str
    draw: Callable[..., alt.LayerChart]
    epochs: bool = False
    of: Callable[[Sequence[Row]], list[Row]] = list
    room: int = 42
    key: str = ""


@dataclass(frozen=True)
class StudyFigure(Figure):
    """A figure of a study.

    study: its name
    subtitle: of what: model, data, length
    sources: files of rows, the runs' first
    kind: what draws it from the rows of each source
    """

    study: str
    subtitle: str
    sources: tuple[str, ...]
    kind: Kind

    def content(self) -> bytes:
        content = b""
        for source in self.sources:
            with open(source, "rb") as file:
                content += file.read()
        return content

    def specification(self) -> Specification:
        runs, *epochs = (read_rows(source) for source in self.sources)
        shown = self.kind.of(runs)
        note = note_lines(self.sources[0], shown)
        if self.kind.key:
            note.insert(0, self.kind.key.format(first=conditions_of(shown)[0]))
        averaged = {name for name in conditions_of(runs) if comparison(self.study, runs, name)[0] == "top1_ema"}
        if averaged:  # by which the study is judged, in its table too
            note.append("accuracy of the weights' average")
            shown, *epochs = ([averages_of(row, averaged) for row in rows] for rows in (shown, *epochs))
        chart = self.kind.draw(shown, *epochs)
        return styled(chart, self.title, self.subtitle, note, self.kind.room).to_dict()


def averages_of(row: Row, conditions: Collection[str]) -> Row:
    """Put the accuracy of the weights' average in the place of theirs, in a row of one of `conditions`."""
    return row | {"top1": row["top1_ema"]} if row["condition"] in conditions else row


def note_lines(source: str, rows: Sequence[Row]) -> list[str]:
    """Say in lines which rows a figure is drawn from, how many, and what they were measured on."""
    machines = sorted({f"{row['device']} ({row['system']}), torch {row['torch']}" for row in rows})
    conditions, seeds = ({row[name] for row in rows} for name in ("condition", "seed"))
    counts = f"{len(rows)} runs: {len(conditions)} conditions, seeds {', '.join(map(str, sorted(seeds)))}"
    return [f"results/{os.path.basename(source)}", counts, *machines]


# ---- charts ----


def every_seed(
    rows: Sequence[Row], group: Callable[[Row], str] | None = None, of: Accuracy = measure, title: str = MEASURE
) -> alt.LayerChart:
    """Draw accuracy by condition: every seed a point, mean and 95 % interval.

    group: names what the conditions are coloured by
    of, title: what finds the accuracy of a run, and how it is called
    """
    names = conditions_of(rows)
    groups = {row["condition"]: group(row) if group else "" for row in rows}
    points = [{"condition": row["condition"], "seed": row["seed"], "top1": of(row)} for row in rows]
    averages = means(rows, of=of)
    # Student's interval of few runs may reach beyond what an accuracy can be; the axis ends there
    scale = alt.Scale(zero=False, padding=8)
    if any((entry["high"] or 0) > 100 for entry in averages):
        scale = alt.Scale(zero=False, domainMax=100, nice=False)
    x = alt.X("top1:Q", title=title, scale=scale, axis=COARSE)
    lines = max(name.count(", ") + 1 for name in names)  # of a label
    labels = alt.Axis(labelLimit=240, labelExpr="split(datum.label, ', ')", labelOffset=5 - 5 * lines, ticks=False, grid=True)  # fmt: skip
    y = alt.Y("condition:N", sort=names, title=None, axis=labels)
    shade = colour(list(dict.fromkeys(groups.values())), "group") if group else alt.value(COLOURS[0])

    def grouped(values: Values) -> alt.Chart:
        return alt.Chart(data([entry | {"group": groups[entry["condition"]]} for entry in values]))

    dots = grouped(points).mark_circle(size=45, opacity=0.5).encode(
        x, y, color=shade, tooltip=["condition:N", "seed:Q", number("top1", title)]
    )  # fmt: skip
    bars = grouped([entry for entry in averages if entry["low"] is not None]).mark_rule(strokeWidth=2, clip=True).encode(
        alt.X("low:Q"), alt.X2("high:Q"), y, color=shade
    )  # fmt: skip
    middles = grouped(averages).mark_point(filled=True, size=130, shape="diamond", opacity=1).encode(
        alt.X("mean:Q"), y, color=shade, tooltip=ESTIMATE
    )  # fmt: skip
    return layered(dots, bars, middles, height=max(36, 14 * lines + 6) * len(names))


def by_data_set(rows: Sequence[Row]) -> alt.LayerChart:
    """Draw `every_seed` with a colour for each data set: what a condition's name begins with, up to a colon or comma."""
    tested = dict.fromkeys(data_set(row["condition"]) for row in rows if row.get("held_out_top1") is not None)
    title = f"{MEASURE}; of {', '.join(tested)} on test images" if tested else MEASURE
    return every_seed(rows, lambda row: data_set(row["condition"]), title=title)


def by_balanced_accuracy(rows: Sequence[Row]) -> alt.LayerChart:
    """Draw `every_seed` by the accuracy on validation images in which all classes count alike."""
    return every_seed(rows, of=lambda row: row["balanced_accuracy"], title="balanced accuracy, validation images, %")


def parallel(rows: Sequence[Row]) -> alt.LayerChart:
    """Draw each run as a line through what varies and what it came to; each axis goes from its least to its largest value."""
    unit, spent = time_spent(rows)
    columns: dict[str, list[float | None]] = {}
    for name in varying(rows):
        heading = SCHEDULES[name].heading if name in SCHEDULES else name.replace("_", " ")
        pairs = [first_and_last(row[name]) for row in rows]
        both = any(pair and pair[0] != pair[1] for pair in pairs)
        for i, which in enumerate(("first", "last") if both else ("",)):
            columns[f"{heading} {which}".strip()] = [pair and pair[i] for pair in pairs]
    columns["epochs"] = [row["epochs"] for row in rows]
    columns[unit] = [spent(row) for row in rows]
    columns[MEASURE] = [measure(row) for row in rows]
    kept: dict[str, list[float]] = {}
    for name, values in columns.items():
        known = [float(value) for value in values if value is not None]
        if len(known) == len(rows) and len(set(known)) > 1 and known not in kept.values():  # not twice the same axis
            kept[name] = known
    places = {axis: [(value - min(some)) / (max(some) - min(some)) for value in some] for axis, some in kept.items()}
    lines = [
        {"run": i, "condition": row["condition"], "seed": row["seed"], "axis": axis, "at": places[axis][i], "value": kept[axis][i]}
        for i, row in enumerate(rows)
        for axis in kept
    ]  # fmt: skip
    ticks = []
    for axis, some in kept.items():
        shown = dict(zip(some, places[axis]))
        least, most = min(shown), max(shown)
        for value, place in sorted(shown.items()):
            if len(shown) <= 6 or value in (least, most):
                ticks.append({"axis": axis, "at": place, "text": f"{value:.4g}"})
    words = alt.Axis(labelAngle=0, labelExpr="split(datum.label, ' ')", grid=True, gridColor=GREY, domain=False)
    x = alt.X("axis:N", sort=list(kept), title=None, axis=words, scale=alt.Scale(type="point", padding=0.3))
    y = alt.Y("at:Q", axis=None)
    strokes = alt.Chart(data(lines)).mark_line(opacity=0.6, strokeWidth=1.5).encode(
        x, y, colour(conditions_of(rows)), detail="run:N"
    )  # fmt: skip
    dots = alt.Chart(data(lines)).mark_circle(size=30, opacity=0.7).encode(
        x, y, colour(conditions_of(rows)),
        tooltip=["condition:N", "seed:Q", "axis:N", number("value", "value", ".4~g")],
    )  # fmt: skip
    labels = alt.Chart(data(ticks)).mark_text(align="left", dx=6, dy=-8, fontSize=11).encode(x, y, text="text:N")
    return layered(strokes, dots, labels)


def of_one_magnitude(rows: Sequence[Row]) -> list[Row]:
    """Choose the runs whose magnitude of RandAugment does not grow; `x` is that, `group` image size and scale."""
    kept = []
    for row in rows:
        if "auto_augment" in row and row["auto_augment"] != "ra":
            continue  # a magnitude that does nothing
        sizes, magnitudes = first_and_last(row.get("train_crop_size")), first_and_last(row.get("ra_magnitude"))
        if magnitudes is not None and magnitudes[0] == magnitudes[1]:
            size = f"{sizes[-1]:.0f} px" if sizes else "one size"
            scale = row.get("ra_scale")
            kept.append(row | {"group": f"{size}, {scale} scale" if scale else size, "x": magnitudes[0]})
    return kept


def by_magnitude(kept: Sequence[Row]) -> alt.LayerChart:
    """Draw accuracy against RandAugment's magnitude: a colour for each image size and scale, seeds, mean and interval.

    kept: rows of `of_one_magnitude`
    """
    groups = sorted({row["group"] for row in kept}, key=lambda name: (len(name.split(" px")[0]), name))
    points = [{"group": row["group"], "seed": row["seed"], "x": row["x"], "top1": measure(row)} for row in kept]
    averages = []
    for group in groups:
        for magnitude in sorted({row["x"] for row in kept if row["group"] == group}):
            chosen = [row for row in kept if (row["group"], row["x"]) == (group, magnitude)]
            averages += [entry | {"group": group, "x": magnitude} for entry in means(chosen)]
    ticks = alt.Axis(values=sorted({row["x"] for row in kept}))
    x = alt.X("x:Q", title="RandAugment magnitude", scale=alt.Scale(zero=False, padding=20, nice=False), axis=ticks)
    shade = colour(groups, "group")
    dots = alt.Chart(data(points)).mark_circle(size=35, opacity=0.45).encode(
        x, alt.Y("top1:Q", title=MEASURE, scale=alt.Scale(zero=False)), shade,
        tooltip=["group:N", number("x", "magnitude", "g"), "seed:Q", number("top1", MEASURE)],
    )  # fmt: skip
    chart = alt.Chart(data(averages))
    lines = chart.mark_line().encode(x, alt.Y("mean:Q"), shade)
    bars = alt.Chart(data([entry for entry in averages if entry["low"] is not None])).mark_rule(strokeWidth=2).encode(
        x, alt.Y("low:Q"), alt.Y2("high:Q"), shade
    )  # fmt: skip
    middles = chart.mark_point(filled=True, size=120, shape="diamond", opacity=1).encode(
        x, alt.Y("mean:Q"), shade, tooltip=["group:N", number("x", "magnitude", "g"), *ESTIMATE[1:]]
    )  # fmt: skip
    return layered(dots, lines, bars, middles)


# ---- which study has which ----

SEEDS = "dots: runs; diamonds: their means; lines: 95 % intervals"
EVERY_SEED = Kind("", "Every seed, mean and 95 % interval", every_seed, key=SEEDS)
PARALLEL = Kind("parallel", "Parallel coordinates of all runs", parallel, room=58)
OVER_TIME = Kind("time", "Accuracy against training time", accuracy_over_time, key=SEEDS)
SCHEDULES_COMPARED = (
    OVER_TIME,
    Kind(
        "epochs", "Accuracy over epochs", accuracy_over_epochs, epochs=True,
        key="dots: runs; lines: their means; shaded: stages of {first}",
    ),
    Kind("throughput", "Throughput by stage", throughput, epochs=True, key="bars: medians; ticks: epochs"),
)  # fmt: skip
KINDS: dict[str, tuple[Kind, ...]] = {
    "reproduce": SCHEDULES_COMPARED,
    "staged_192px": SCHEDULES_COMPARED,
    "schedules": (OVER_TIME, EVERY_SEED),
    "strengths": (EVERY_SEED,),
    "epochs": (EVERY_SEED, OVER_TIME, PARALLEL),
    "dropout": (EVERY_SEED, PARALLEL),
    "image_size": (EVERY_SEED, PARALLEL),
    "ra_magnitude": (
        Kind("", "RandAugment magnitude by image size", by_magnitude, of=of_one_magnitude, key=SEEDS),
        Kind("conditions", EVERY_SEED.title, every_seed, key=SEEDS),
    ),
    "class_weights": (Kind("", EVERY_SEED.title, by_balanced_accuracy, key=SEEDS),),
    "transfer": (Kind("", "From scratch or trained weights", by_data_set, key=SEEDS),),
}
NAMES = {("reproduce", "epochs"): "ImageNetTE-EfficientNetV2-S"}  # as the original study called it


def study_figures(results: str) -> list[StudyFigure]:
    """List the figures of all studies that have rows in the folder `results`; one that is not known has the usual two."""
    figures = []
    for study in studies_in(results):
        content = study_file(study)
        for kind in KINDS.get(study.removesuffix("_small"), (EVERY_SEED, PARALLEL)):
            name = NAMES.get((study, kind.end), "_".join(filter(None, (study, kind.end))))
            sources = [os.path.join(results, f"{study}.csv")]
            if kind.epochs:
                sources.append(os.path.join(results, f"{study}_epochs.csv"))
                if not os.path.exists(sources[-1]):
                    continue
            place, subtitle = f"{study} {kind.end}".strip(), str(content.get("title", study))
            figures.append(StudyFigure(name, kind.title, place, study, subtitle, tuple(sources), kind))
    return figures


def studies_in(results: str) -> list[str]:
    """List the studies that have rows, by the head of their file; rows of epochs, means and differences have another."""
    found = []
    for file in sorted(os.listdir(results)) if os.path.isdir(results) else []:
        name, kind = os.path.splitext(file)
        if kind == ".csv":
            with open(os.path.join(results, file), encoding="utf-8", newline="") as text:
                lines = csv.reader(text)
                if is_complete(next(lines, [])) and next(lines, None):
                    found.append(name)
    return found
