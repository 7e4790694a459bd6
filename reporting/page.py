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
        title=f"{settings['model']} on {os.path.basename(os.path.abspath(place))}",
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
        classes=class_table(summary) if summary else None,
        verdict=verdict(summary) if summary else "",
        curves=curves(summary, folder.assessment()) if summary else [],
        calibration=calibration(summary) if summary else "",
        mistakes=mistakes(folder),
        inference=inference_table(summary) if summary else None,
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
    return {
        "Progress": [figures.draw_curves(panel, records, plan.stages) for panel in outcome],
        "What grows": [figures.draw_curves(panel, records, plan.stages) for panel in grown],
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
    kind = "jpeg" if path.endswith(".jpg") else "png"
    with open(path, "rb") as file:
        return f"data:image/{kind};base64,{base64.b64encode(file.read()).decode()}"


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


def class_table(summary: Mapping[str, Any]) -> Table | None:
    """Tabulate precision, recall and F1 of each class, the worst first; None for a run of an older version.

    Classes without images come last: nothing is known of them.
    """
    rows = sorted(summary.get("per_class") or (), key=lambda row: (not row["support"], row["f1"], -row["support"]))
    if not rows:
        return None
    weighted = "weight" in rows[0]
    heads = ["class", "precision %", "recall %", "F1 %", "images", *(["weight in the loss"] if weighted else [])]
    return heads, [
        [
            row["class"],
            *(f"{row[name]:.2f}" if row["support"] else "" for name in ("precision", "recall", "f1")),
            row["support"],
        ]
        + ([f"{row['weight']:.3g}"] if weighted else [])
        for row in rows
    ]


def verdict(summary: Mapping[str, Any]) -> str:
    """Say the figures that take classes of few images as seriously as those of many; "" for an older run."""
    best, final = summary["best"], summary["final"]
    if "macro_f1" not in best:
        return ""
    names = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "sensitivity": "sensitivity", "specificity": "specificity"}  # fmt: skip
    told = [f"{text} {best[name]:.2f} %" for name, text in names.items() if best.get(name) is not None]
    told += [f"area under the ROC curve {best['auc']:.4f}"] if best.get("auc") is not None else []
    last = ", ".join(f"{names[name]} {final[name]:.2f} %" for name in ("balanced_accuracy", "macro_f1"))
    same = best["epoch"] + 1 == summary["epochs"] and best["weights"] == "model"
    told[0] = told[0].capitalize()
    return ", ".join(told) + ("." if same else f". The last weights: {last}.")


def curves(summary: Mapping[str, Any], shown: Mapping[str, Any]) -> list[str]:
    """Draw the ROC curve and the reliability of the best weights, as far as there are any."""
    found: list[str] = []
    reliability, roc = shown.get("reliability"), shown.get("roc")
    if reliability or roc:
        from reporting import figures
    if roc:
        best = summary["best"]
        chosen = (1 - best["specificity"] / 100, best["sensitivity"] / 100)
        found.append(figures.draw_roc(roc, best["auc"], chosen, summary["per_class"][1]["class"]))
    if reliability:
        titles = curve_titles(summary["calibration"])
        found += [figures.draw_reliability(title, reliability[name]) for name, title in titles.items()]
    return found


def curve_titles(fit: Mapping[str, Any]) -> dict[str, str]:
    """Title the curves of reliability: that of the logits, and if a temperature was fitted, that with it."""
    titles = {"before": f"as trained: ECE {100 * fit['ece_before']:.2f} %"}
    if fit["fitted_on"]:
        titles["after"] = f"temperature {fit['temperature']:.4g}: ECE {100 * fit['ece_after']:.2f} %"
    return titles


def calibration(summary: Mapping[str, Any]) -> str:
    """Say what the temperature was fitted on; "" where there is none."""
    fit = summary.get("calibration")
    if not fit:
        return ""
    if not fit["fitted_on"]:
        return (
            f"Measured on {fit['measured_on']} images; too few others, or none of them wrong, to fit a temperature on."
        )
    return f"Temperature fitted on {fit['fitted_on']} validation images, both sides measured on the other {fit['measured_on']}."


def mistakes(folder: RunFolder) -> list[tuple[str, str, str]]:
    """List the most confident mistakes: the picture, what was predicted, and the file or number of the image."""
    found = []
    for place, mistake in enumerate(folder.assessment().get("mistakes") or ()):
        picture = as_data(folder.mistake(place))
        if picture is not None:
            said = f"{mistake['predicted']} ({100 * mistake['probability']:.1f} %), it is {mistake['true']}"
            found.append((picture, said, mistake["path"] or f"validation image {mistake['index']}"))
    return found


def inference_table(summary: Mapping[str, Any]) -> Table | None:
    """Tabulate how fast the model answers, a row for each batch size; None for a run of an older version."""
    rows = [[row["batch_size"], rounded(row["images_per_second"]), rounded(row["milliseconds"])] for row in summary.get("inference") or ()]  # fmt: skip
    return (["batch", "images/s", "milliseconds a batch"], rows) if rows else None


def number(value: float | None, digits: int = 4) -> str:
    """Format a number to so many significant digits; None as a dash."""
    return "–" if value is None else f"{value:.{digits}g}"


def rounded(value: float) -> str:
    """Format a speed or a time to three digits at least, without powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format seconds as minutes and seconds, from an hour on as hours and minutes."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
