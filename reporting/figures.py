"""The figures of a run's report, as SVG."""

import io
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
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def draw_curves(panels: Sequence[Panel], records: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> str:
    """Draw panels side by side over epochs, stages shaded."""
    epochs = [record["epoch"] + 1 for record in records]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.0 * len(panels), 2.9), squeeze=False)
    for axis, (label, lines) in zip(axes[0], panels):
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
    figure, axis = plt.subplots(figsize=(5.0, 2.6))
    names = [f"stage {stage.index}\n{stage.image_size} px" for stage, _ in rows]
    bars = axis.bar(names, [speed for _, speed in rows], color=COLOURS["size"], width=0.6)
    axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.set_ylabel("images per second")
    return as_svg(figure)


def draw_confusion(matrix: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Draw counts (K, K), rows true, shaded by their share of the row."""
    return as_svg(confusion_figure(matrix, classes))


def confusion_figure(matrix: NDArray[np.int64], classes: Sequence[str]) -> plt.Figure:
    """Build the figure that `draw_confusion` draws."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.42 * len(classes)
    figure, axis = plt.subplots(figsize=(side, side))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    for row, column in zip(*np.nonzero(matrix)):
        colour = "white" if share[row, column] > 0.5 else "black"
        axis.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=colour)
    return figure
