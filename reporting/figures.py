"""The figures of a run's report, as SVG."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")  # before pyplot: no window is wanted
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from stages import Stage

STAGE_COLOURS = ("#eef3fb", "#dde8f7")
COLOURS = {"train": "#777777", "model": "#1f5fbf", "ema": "#c8502d", "size": "#2a7f62"}
LONGEST = 24  # characters of a name in a figure
LINES = ("#c8502d", "#1f5fbf", "#2a7f62", "#7a4fa3", "#777777", "#b08900")  # of settings that share a graph

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

# Label of the y axis; key of the records: colour and label of its line.
Panel = tuple[str, Mapping[str, tuple[str, str]]]


def as_svg(figure: plt.Figure) -> str:
    """Write a figure as an <svg> element, and close the figure."""
    text = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own fonts have them: text stays text
        figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def draw_curves(panel: Panel, records: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> str:
    """Draw a panel over epochs, stages shaded.

    One a drawing, which a page sets side by side or, on a telephone, one below the other, where two in one are illegible.
    """
    label, lines = panel
    epochs = [record["epoch"] + 1 for record in records]
    figure, axis = plt.subplots(figsize=(4.6, 2.8))
    for stage in stages:
        colour = STAGE_COLOURS[stage.index % 2]
        axis.axvspan(stage.epochs.start + 0.5, stage.epochs.stop + 0.5, color=colour, lw=0)
    for key, (colour, name) in lines.items():
        points = [(epoch, record[key]) for epoch, record in zip(epochs, records) if record.get(key) is not None]
        if points:
            marker = "o" if len(points) < 40 else None
            axis.plot(*zip(*points), color=colour, label=name, lw=1.6, marker=marker, ms=3)
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    axis.set_xlim(0.5, stages[-1].epochs.stop + 0.5)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def draw_speed(rows: Sequence[tuple[Stage, float]]) -> str:
    """Draw images per second of each stage, its image size below the bar."""
    figure, axis = plt.subplots(figsize=(4.6, 2.6))
    names = [f"stage {stage.index}\n{stage.image_size} px" for stage, _ in rows]
    bars = axis.bar(names, [speed for _, speed in rows], color=COLOURS["size"], width=0.6)
    axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.set_ylabel("images per second")
    return as_svg(figure)


def shortened(name: str) -> str:
    """Leave out the middle of a long name, which a figure would cut off at its edge."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[1 - LONGEST // 2 :]}"


def draw_confusion(matrix: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Draw counts (K, K), rows true, shaded by their share of the row."""
    return as_svg(confusion_figure(matrix, classes))


def confusion_figure(matrix: NDArray[np.int64], classes: Sequence[str]) -> plt.Figure:
    """Build the figure that `draw_confusion` draws."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [shortened(name) for name in classes]
    side = 1.5 + 0.42 * len(classes) + 0.075 * max(10, *map(len, names))  # inches; the last is for the names
    figure, axis = plt.subplots(figsize=(side, side))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(classes)), names, rotation=60, ha="right")
    axis.set_yticks(range(len(classes)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    for row, column in zip(*np.nonzero(matrix)):
        colour = "white" if share[row, column] > 0.5 else "black"
        axis.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=colour)
    return figure


def draw_reliability(title: str, curve: Mapping[str, Sequence[float]]) -> str:
    """Draw how often images were right by how probable their class was said to be; below, how many images there are.

    curve: counts, confidence and accuracy of bins of equal width; a dot is as large as its bin is full
    """
    figure, (upper, lower) = plt.subplots(2, figsize=(4.0, 4.2), sharex=True, height_ratios=(3, 1))
    counts, confidence, accuracy = (np.array(curve[name]) for name in ("counts", "confidence", "accuracy"))
    edges, width = np.arange(len(counts)) / len(counts), 1 / len(counts)
    upper.bar(edges, accuracy, width, align="edge", color=STAGE_COLOURS[1], edgecolor="white", lw=0.8)
    upper.plot([0, 1], [0, 1], color=COLOURS["train"], lw=1, ls="--")
    some, sizes = counts > 0, 8 + 120 * counts / max(counts.max(), 1)
    upper.scatter(confidence[some], accuracy[some], sizes[some], color=COLOURS["ema"], clip_on=False, zorder=3, lw=0)
    upper.set(title=title, ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    lower.bar(edges, counts, width, align="edge", color=COLOURS["model"], edgecolor="white", lw=0.8)
    lower.set(xlabel="probability of the class named", ylabel="images")
    return as_svg(figure)


def draw_roc(curve: Mapping[str, Sequence[float]], area: float, chosen: tuple[float, float], positive: str) -> str:
    """Draw the ROC curve of two classes.

    chosen: false and true positive rate where the more probable class is named
    positive: the class that is looked for
    """
    figure, axis = plt.subplots(figsize=(4.0, 3.8))
    axis.plot([0, 1], [0, 1], color=COLOURS["train"], lw=1, ls="--")
    false, true = curve["false_positive_rate"], curve["true_positive_rate"]
    axis.plot(false, true, color=COLOURS["model"], lw=1.6, label=f"area {area:.4f}")
    axis.plot(*chosen, color=COLOURS["ema"], marker="o", ls="none", label="the more probable class")
    positive = shortened(positive)
    axis.set(xlabel=f"others called {positive}", ylabel=f"{positive} called so", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return as_svg(figure)


def lines_figure(lines: Sequence[Mapping[str, Any]], x: str, y: str) -> plt.Figure:
    """Build a figure of lines over [0, 1].

    lines: x and y of the points, name ("" for none)
    """
    figure, axis = plt.subplots(figsize=(4.0, 3.8))
    for line, colour in zip(lines, (*LINES, *LINES)):
        axis.plot(line["x"], line["y"], color=colour, lw=1.6, label=line["name"] or "_")
    axis.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
