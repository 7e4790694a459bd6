"""A run's report.html: one page that needs nothing else, from what the run's folder holds so far."""

import base64
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2

from reporting.folder import RunFolder
from reporting.records import stage_speed, worst_confusions
from stages import COLUMNS, Plan

MAX_CLASSES_IN_MATRIX = 30  # more cannot be read; then the page lists the worst confusions
PLACES = {
    "stage_size": "its stage's size",
    "last_training_size": "last training size",
    "test_size": "test size",
}  # where the closing evaluations were made

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # headings, rows


def report_page(folder: RunFolder) -> str:
    """Render the report of a run, finished or not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True,  # class names, paths and settings are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    settings, plan, records, summary = folder.settings(), folder.plan(), folder.metrics(), folder.summary()
    place = settings["data_path"] if settings["dataset"] in ("imagefolder", "hub") else settings["dataset"]
    return environment.get_template("page.html.j2").render(
        title=f"{settings['model']} on {os.path.basename(os.path.normpath(place))}",
        run=os.path.basename(os.path.abspath(folder.path)),
        num_epochs=len(records),
        plan=plan,
        last=plan.last,
        total_epochs=plan.stages[-1].epochs.stop,
        stages=stage_table(plan, records),
        figures=draw(settings, plan, records) if records else {},
        pictures=[(stage, picture) for stage in plan.stages if (picture := as_data(folder.picture(stage.index)))],
        summary=summary,
        training=duration(summary["train_seconds"]) if summary else "",
        accuracy=accuracy_table(summary) if summary else None,
        confusions=confusions(folder) if summary else {},
        settings=(["setting", "value"], list(settings.items())),
    )


def draw(settings: Mapping[str, Any], plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Draw the figures of a run that has trained, by the heading they stand under."""
    from reporting import figures  # matplotlib takes most of a second, which a plan or a mistake need not wait for

    colours = figures.COLOURS
    outcome: list[figures.Panel] = [
        ("accuracy, %", {"top1": (colours["model"], "top-1"), "top1_ema": (colours["ema"], "top-1 EMA")}),
        ("loss", {"loss": (colours["train"], "training"), "val_loss": (colours["model"], "validation")}),
    ]
    used = {name for name in COLUMNS if any(record.get(name) for record in records)}  # not off throughout
    grown = [(axis, settings_on(axis, used, settings, figures.LINES)) for axis in axes()]
    grown = [(axis, lines) for axis, lines in grown if lines]
    grown.append(("learning rate", {"lr": (colours["train"], "lr")}))
    seen = {record["stage"] for record in records}
    speeds = [(stage, stage_speed(records, stage.index)[1]) for stage in plan.stages if stage.index in seen]
    pairs = [grown[i : i + 2] for i in range(0, len(grown), 2)]
    return {
        "Progress": [figures.draw_curves(outcome, records, plan.stages)],
        "What grows": [figures.draw_curves(pair, records, plan.stages) for pair in pairs],
        "Speed": [figures.draw_speed(speeds)],
    }


def axes() -> list[str]:
    """List the graphs that scheduled settings are drawn in, in the order of a stage's fields."""
    return list(dict.fromkeys(schedule.axis for schedule in COLUMNS.values() if schedule.axis))


def settings_on(
    axis: str, used: Collection[str], settings: Mapping[str, Any], colours: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Choose colour and label of each `used` scheduled setting on a graph, by its key in the records."""
    there = {name: schedule for name, schedule in COLUMNS.items() if schedule.axis == axis and name in used}
    scale = f", {settings['ra_scale']} scale" if "ra_magnitude" in there else ""
    return {
        name: (colours[i % len(colours)], schedule.heading + scale) for i, (name, schedule) in enumerate(there.items())
    }


def as_data(path: str) -> str | None:
    """Read a picture as a data URL, an address that holds the whole picture; None if it is not there."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return f"data:image/png;base64,{base64.b64encode(file.read()).decode()}"


def stage_table(plan: Plan, records: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of the plan, with what each stage took and reached."""
    heads, rows = plan.table()
    for stage, row in zip(plan.stages, rows):
        seconds, speed = stage_speed(records, stage.index)
        evaluated = [record for record in records if record["stage"] == stage.index and record["top1"] is not None]
        last = evaluated[-1] if evaluated else {}
        row += [f"{seconds:.0f}", f"{speed:.0f}", number(last.get("top1")), number(last.get("top1_ema"))]
    return [*heads, "seconds", "images/s", "top-1", "top-1 EMA"], rows


def accuracy_table(summary: Mapping[str, Any]) -> Table:
    """Tabulate the closing evaluations, a row for each size."""
    rows = []
    for moment in ("final", "best"):
        scores = summary[moment]
        for size in dict.fromkeys(scores[place]["image_size"] for place in PLACES):
            places = [place for place in PLACES if scores[place]["image_size"] == size]
            figures = (number(scores[places[0]].get(name)) for name in ("top1", "top5", "top1_ema"))
            rows.append([moment, f"{size} px: {', '.join(PLACES[place] for place in places)}", *figures])
    return ["weights", "evaluated at", "top-1 %", "top-5 %", "top-1 EMA %"], rows


def confusions(folder: RunFolder) -> dict[str, Any]:
    """Build what shows the confusions of the best weights: a figure, or of many classes a table."""
    found, classes = folder.confusion("best"), folder.classes()
    if found is None:
        return {}
    if len(classes) > MAX_CLASSES_IN_MATRIX:
        return {"table": (["true", "predicted", "images"], worst_confusions(found[1], classes))}
    from reporting import figures

    return {"figure": figures.draw_confusion(found[1], classes)}


def number(value: float | None, digits: int = 4) -> str:
    """Format a number to so many significant digits; None as a dash."""
    return "–" if value is None else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Format seconds as minutes and seconds, from an hour on as hours and minutes."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
