"""A figure: one definition, written as a picture (SVG) and as an interactive page; the site shows the same inside its text."""

import hashlib
import html
import json
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER, LIBRARY = "Graphs", "vega.js"
GREY = "#7a7a7a"  # text and axes; readable on white and on black
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#9467bd", "#b58900", "#c2388f", "#6b8e23", "#8c564b", "#3aa6b9", "#7a7a7a")
WIDTH, HEIGHT = 620, 320
LINE = 46  # letters of a subtitle that fit on a phone

Specification = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One figure of `Graphs/`.

    name: of its files
    title: what it shows
    place: what README and docs call it: "schedule", or study and kind: "reproduce_small time"
    """

    name: str
    title: str
    place: str

    def content(self) -> bytes:
        """Read what the figure is drawn from."""
        raise NotImplementedError

    def specification(self) -> Specification:
        """Build the chart, with what it is drawn from below it, as Vega-Lite."""
        raise NotImplementedError

    @property
    def mark(self) -> str:
        """The digest that both files carry, by which a figure older than its rows is found out."""
        return f"<!-- drawn from {hashlib.sha256(self.content()).hexdigest()[:16]} -->"

    def write(self, folder: str) -> None:
        """Write NAME.svg and NAME.html."""
        specification = self.specification()
        write_text(os.path.join(folder, f"{self.name}.svg"), picture(specification, self.mark))
        write_text(os.path.join(folder, f"{self.name}.html"), page(self.name, self.title, specification, self.mark))

    def is_current(self, folder: str) -> bool:
        """Check whether both files are there and drawn from what there is now."""
        paths = [os.path.join(folder, f"{self.name}.{kind}") for kind in ("svg", "html")]
        return all(os.path.exists(path) and self.mark in read_text(path) for path in paths)


def styled(chart: alt.LayerChart, title: str, subtitle: str, note: Sequence[str], room: int = 42) -> alt.LayerChart:
    """Give a chart its title, a note below it as its last layer, and colours for light and dark pages.

    room: pixels that the axis takes between the chart and the note
    """
    below = (
        alt.Chart(alt.Data(values=[{}]))
        .mark_text(align="left", baseline="top", dy=room, fontSize=11, lineHeight=15)
        .encode(x=alt.value(0), y=alt.value("height"), text=alt.value(list(note)))  # type: ignore[arg-type]
    )
    whole = alt.layer(chart, below, **dimensions(chart)).properties(
        title=alt.TitleParams(
            text=title, subtitle=textwrap.wrap(subtitle, LINE), anchor="start", frame="bounds", offset=12, fontSize=15, subtitleFontSize=12,
            color=GREY, subtitleColor=GREY,
        ),
        description=f"{title}. {subtitle}. {' '.join(note)}",
    )  # fmt: skip
    return whole.configure(
        background="transparent",
        padding={"left": 20, "right": 8, "top": 5, "bottom": 5},  # a reader's font may be a tenth wider than ours
        font="system-ui, sans-serif",
        axis=alt.AxisConfig(labelColor=GREY, titleColor=GREY, gridColor="#8883", domainColor=GREY, tickColor=GREY, labelFontSize=12, titleFontSize=12, titleFontWeight="normal"),
        legend=alt.LegendConfig(labelColor=GREY, titleColor=GREY, labelLimit=260, labelFontSize=12, orient="top", columns=3, columnPadding=24, symbolType="circle", symbolOpacity=1),
        text=alt.MarkConfig(color=GREY),
        view=alt.ViewConfig(stroke=None),
    )  # fmt: skip


def dimensions(chart: alt.LayerChart) -> dict[str, Any]:
    """Take width and height from a chart, for the one it becomes a layer of."""
    found = {name: chart[name] for name in ("width", "height")}
    for name in found:
        chart[name] = alt.Undefined
    return found


# ---- files ----


def picture(specification: Specification, mark: str) -> str:
    """Draw a chart as SVG."""
    svg = vl_convert.vegalite_to_svg(specification, vl_version=vl_version())
    numbers: dict[str, str] = {}  # of clips it counts on from figure to figure: here from 0 in each
    svg = re.sub(r"\bclip\d+\b", lambda found: numbers.setdefault(found[0], f"clip{len(numbers)}"), svg)
    return re.sub(r"(<svg[^>]*>)", rf"\1{mark}", svg, count=1) + "\n"


# The page needs nothing from the network: the library lies beside it, once for all figures.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>body{{margin:1em auto;max-width:760px;padding:0 1em;font:14px system-ui,sans-serif}}</style>
<link rel="stylesheet" href="figures.css">
</head>
<body>{mark}
{chart}
<script src="{library}"></script>
<script src="figures.js"></script>
</body>
</html>
"""


def page(name: str, title: str, specification: Specification, mark: str) -> str:
    """Build the interactive page of a figure."""
    return PAGE.format(title=html.escape(title), mark=mark, chart=as_element(name, specification), library=LIBRARY)


def as_element(name: str, specification: Specification) -> str:
    """Build the element that figures.js draws a chart in: as wide as there is room, if the chart can be."""
    content = json.dumps(specification, separators=(",", ":")).replace("</", "<\\/")  # which would end the element
    return f'<div class="chart" id="{name}"><script type="application/json">{content}</script></div>'


def vl_version() -> str:
    """Name the version of Vega-Lite that altair writes as vl-convert calls it: `6.4`."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def write_library(folder: str) -> None:
    """Write the library that the interactive pages share, if it is not there: Vega, Vega-Lite and their embedding."""
    path = os.path.join(folder, LIBRARY)
    notice = read_text(os.path.join(ROOT, FOLDER, "vega_notice.txt"))
    head = f"/* Vega-Lite {alt.SCHEMA_VERSION}\n\n{notice}*/\n"
    if not os.path.exists(path) or not read_text(path).startswith(head):
        bundle = vl_convert.javascript_bundle(vl_version=vl_version())  # type: ignore[call-arg] # its stub wants a snippet
        # In a function of its own: its names are short, and a page has others.
        write_text(path, f"{head}(() => {{\n{bundle}\n}})();\n")


def read_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
