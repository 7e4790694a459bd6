"""A run's report.html, from what its folder holds."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")  # before pyplot: no window is wanted
import matplotlib.pyplot as plt
import numpy as np
import yaml

from reporting.folder import read_json, read_metrics, stage_speed, worst_confusions

MAX_CLASSES_IN_MATRIX = 30  # more cannot be read; then the page lists the worst confusions
STAGE_COLOURS = ("#eef3fb", "#dde8f7")
PALETTE = {"train": "#777777", "model": "#1f5fbf", "ema": "#c8502d", "size": "#2a7f62", "other": "#7a4fa3"}

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "same names in every drawing",
        "figure.autolayout": True,
    }
)


def as_svg(figure: plt.Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def draw_curves(
    panels: Sequence[tuple[str, Mapping[str, tuple[str, str]]]],
    records: Sequence[dict[str, Any]],
    stages: Sequence[dict[str, Any]],
) -> str:
    """One panel per (label of the y axis, {key of the records: (colour, label)}), over epochs, stages shaded."""
    epochs = [record["epoch"] + 1 for record in records]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.0 * len(panels), 2.9), squeeze=False)
    for axis, (label, lines) in zip(axes[0], panels):
        for stage in stages:
            axis.axvspan(
                stage["first_epoch"] + 0.5, stage["last_epoch"] + 0.5, color=STAGE_COLOURS[stage["index"] % 2], lw=0
            )
        for key, (colour, name) in lines.items():
            points = [(epoch, record[key]) for epoch, record in zip(epochs, records) if record.get(key) is not None]
            if points:
                axis.plot(
                    *zip(*points), color=colour, label=name, lw=1.6, marker="o" if len(points) < 40 else None, ms=3
                )
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.set_xlim(0.5, stages[-1]["last_epoch"] + 0.5)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def draw_speed(rows: Sequence[tuple[dict[str, Any], float]]) -> str:
    """Images per second of each stage, its image size below the bar."""
    figure, axis = plt.subplots(figsize=(5.0, 2.6))
    bars = axis.bar(
        [f"stage {stage['index']}\n{stage['image_size']} px" for stage, _ in rows],
        [speed for _, speed in rows],
        color=PALETTE["size"],
        width=0.6,
    )
    axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.set_ylabel("images per second")
    return as_svg(figure)


def draw_confusion(matrix: np.ndarray, classes: Sequence[str]) -> str:
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.42 * len(classes)
    figure, axis = plt.subplots(figsize=(side, side))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    for row, column in zip(*np.nonzero(matrix)):
        axis.text(
            column,
            row,
            int(matrix[row, column]),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if share[row, column] > 0.5 else "black",
        )
    return as_svg(figure)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

    return f"<div class=wide><table>{cells('th', heads)}{''.join(cells('td', row) for row in rows)}</table></div>"


def number(value: Any, digits: int = 4) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def stage_table(plan: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> str:
    heads = [
        "stage",
        "epochs",
        "image size",
        "RandAugment",
        "mixup",
        "cutmix",
        "dropout",
        "stoch. depth",
        "erase",
        "batch",
        "GFLOPs/image",
        "seconds",
        "images/s",
        "top-1",
        "top-1 EMA",
    ]
    rows = []
    for stage in plan["stages"]:
        seconds, speed = stage_speed(records, stage["index"])
        last: dict[str, Any] = next(
            (r for r in reversed(records) if r["stage"] == stage["index"] and r["top1"] is not None), {}
        )
        keys = (
            "image_size",
            "ra_magnitude",
            "mixup_alpha",
            "cutmix_alpha",
            "dropout",
            "stochastic_depth_prob",
            "random_erase",
            "batch_size",
        )
        rows.append(
            [stage["index"], f"{stage['first_epoch'] + 1}–{stage['last_epoch']}", *(number(stage[key]) for key in keys)]
            + [
                number(stage["gflops_per_image"], 3),
                f"{seconds:.0f}",
                f"{speed:.0f}",
                number(last.get("top1")),
                number(last.get("top1_ema")),
            ]
        )
    return table(heads, rows)


def accuracy_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for moment in ("final", "best"):
        for place, title in (
            ("stage_size", "its stage's size"),
            ("last_training_size", "last training size"),
            ("test_size", "test size"),
        ):
            score = summary[moment][place]
            rows.append(
                [
                    moment,
                    f"{title}: {score['image_size']} px",
                    number(score.get("top1")),
                    number(score.get("top5")),
                    number(score.get("top1_ema")),
                ]
            )
    return table(["weights", "evaluated at", "top-1 %", "top-5 %", "top-1 EMA %"], rows)


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1240px;margin:2em auto;padding:0 1.2em}
h1{font-size:1.6em;margin-bottom:.1em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:13px}td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}svg,img{max-width:100%;height:auto}
.samples{display:grid;grid-template-columns:1fr 1fr;gap:1.2em}.samples img{width:100%}figure{margin:0}figcaption,.note{color:#666;font-size:13px}
.figures{display:flex;gap:2.5em;flex-wrap:wrap;margin:.8em 0}.figures b{display:block;font-size:1.5em}
"""


def report_page(folder: str) -> str:
    """A run's report, one self-contained page of HTML, from what its folder holds so far."""
    records = read_metrics(folder)
    plan = read_json(os.path.join(folder, "report", "plan.json"))
    summary = read_json(os.path.join(folder, "summary.json"))
    confusion = read_json(os.path.join(folder, "report", "confusion_best.json")) if summary else None
    with open(os.path.join(folder, "config.yaml"), encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    stages = plan["stages"]
    title = f"{settings['model']} on {settings['dataset']}"
    if settings["dataset"] == "imagefolder":
        title = f"{settings['model']} on {os.path.basename(os.path.normpath(settings['data_path']))}"
    done = f"{len(records)} of {stages[-1]['last_epoch']} epochs"
    parts = [
        f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(os.path.basename(os.path.abspath(folder)))} · {done}</p>"
    ]
    if summary:
        figures = {
            "best top-1": f"{summary['best_top1']:.2f} %",
            "final top-1": f"{summary['top1']:.2f} %",
            "training": duration(summary["train_seconds"]),
            "parameters": f"{summary['parameters'] / 1e6:.2f} M",
            "device": summary["device"],
        }
        parts.append(
            "<div class=figures>"
            + "".join(f"<div>{name}<b>{html.escape(value)}</b></div>" for name, value in figures.items())
            + "</div>"
        )
    parts.append("<h2>Stages</h2>" + stage_table(plan, records))
    parts.append(
        f"<p class=note>Arithmetic of the plan: {plan['relative_cost']:.3f} of training at {stages[-1]['image_size']} px throughout.</p>"
    )
    if records:
        accuracy = {"top1": (PALETTE["model"], "top-1"), "top1_ema": (PALETTE["ema"], "top-1 EMA")}
        losses = {"loss": (PALETTE["train"], "training"), "val_loss": (PALETTE["model"], "validation")}
        strengths = {
            "dropout": (PALETTE["ema"], "dropout"), "stochastic_depth_prob": (PALETTE["model"], "stochastic depth"),
            "mixup_alpha": (PALETTE["size"], "mixup alpha"), "cutmix_alpha": (PALETTE["other"], "cutmix alpha"), "random_erase": (PALETTE["train"], "random erase"),
        }  # fmt: skip
        parts.append("<h2>Progress</h2>" + draw_curves([("accuracy, %", accuracy), ("loss", losses)], records, stages))
        growth = [
            ("image size, px", {"image_size": (PALETTE["size"], "training crop")}),
            ("RandAugment magnitude", {"ra_magnitude": (PALETTE["other"], settings["ra_scale"] + " scale")}),
        ]
        parts.append("<h2>What grows</h2>" + draw_curves(growth, records, stages))
        parts.append(
            draw_curves(
                [("probability, alpha", strengths), ("learning rate", {"lr": (PALETTE["train"], "lr")})],
                records,
                stages,
            )
        )
        seen = [stage for stage in stages if any(record["stage"] == stage["index"] for record in records)]
        parts.append(
            "<h2>Speed</h2>" + draw_speed([(stage, stage_speed(records, stage["index"])[1]) for stage in seen])
        )
    pictures = []
    for stage in stages:
        path = os.path.join(folder, "report", f"stage_{stage['index']}.png")
        if os.path.exists(path):
            with open(path, "rb") as file:
                data = base64.b64encode(file.read()).decode()
            pictures.append(
                f"<figure><img alt='stage {stage['index']}' src='data:image/png;base64,{data}'><figcaption>stage {stage['index']}: {stage['image_size']} px</figcaption></figure>"
            )
    if pictures:
        parts.append(
            "<h2>Training images, as the model sees them</h2><div class=samples>" + "".join(pictures) + "</div>"
        )
    if summary:
        parts.append("<h2>Accuracy</h2>" + accuracy_table(summary))
    if confusion:
        matrix, classes = np.array(confusion["confusion"]), plan["classes"]
        parts.append(f"<h2>Confusions of the best weights ({summary['best']['weights']}) at test size</h2>")
        parts.append(
            draw_confusion(matrix, classes)
            if len(classes) <= MAX_CLASSES_IN_MATRIX
            else table(["true", "predicted", "images"], worst_confusions(matrix, classes))
        )
    parts.append("<h2>Settings</h2>" + table(["setting", "value"], [(name, value) for name, value in settings.items()]))
    if summary:
        parts.append(
            "<h2>Made with</h2>"
            + table(["", ""], [*summary["versions"].items(), ("commit", summary["commit"]), ("seed", summary["seed"])])
        )
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
