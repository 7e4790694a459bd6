"""A figure: one definition, drawn as a picture (SVG), as an interactive page and, from that picture, in ClearML."""

import hashlib
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import altair as alt
import vl_convert

from studies.rows import Row, read_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER, LIBRARY = "Graphs", "vega.js"
GREY = "#7a7a7a"  # readable on white and on black
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#9467bd", "#b58900", "#c2388f", "#6b8e23", "#8c564b")
WIDTH, HEIGHT = 620, 320


@dataclass(frozen=True)
class Figure:
    """One figure of `Graphs/`.

    name: of its files
    title: what it shows, a sentence
    sources: files of rows it is drawn from, below `results/`; without them it is left out
    draw: builds the chart from the rows of each source
    """

    name: str
    title: str
    sources: tuple[str, ...]
    draw: Callable[..., alt.TopLevelMixin]

    def rows(self, results: str) -> list[list[Row]]:
        return [read_rows(os.path.join(results, source)) for source in self.sources]

    def ready(self, results: str) -> bool:
        """Check whether every source has rows."""
        return all(os.path.exists(os.path.join(results, source)) for source in self.sources)

    def digest(self, results: str) -> str:
        """Hash the rows, by which a figure older than them is found out."""
        content = hashlib.sha256()
        for source in self.sources:
            with open(os.path.join(results, source), "rb") as file:
                content.update(file.read())
        return content.hexdigest()[:16]

    def chart(self, results: str) -> alt.TopLevelMixin:
        """Build the chart, with what it is drawn from below it."""
        rows = self.rows(results)
        chart = self.draw(*rows).properties(
            title=alt.TitleParams(
                text=self.title, subtitle=source_line(self.sources, rows[0] if rows else []), anchor="start", color=GREY,
                subtitleColor=GREY, fontSize=14, subtitleFontSize=11, offset=14,
            )
        )  # fmt: skip
        return chart.configure(
            background="transparent",
            font="system-ui, sans-serif",
            axis=alt.AxisConfig(labelColor=GREY, titleColor=GREY, gridColor="#8884", domainColor=GREY, tickColor=GREY),
            legend=alt.LegendConfig(labelColor=GREY, titleColor=GREY, labelLimit=260),
            header=alt.HeaderConfig(labelColor=GREY, titleColor=GREY),
            text=alt.MarkConfig(color=GREY),
            view=alt.ViewConfig(stroke=None),
        )

    def write(self, results: str, folder: str) -> None:
        """Write NAME.svg and NAME.html; the digest of the rows stands in both."""
        specification = self.chart(results).to_dict()
        mark = f"<!-- rows {self.digest(results)} -->"
        svg = vl_convert.vegalite_to_svg(specification, vl_version=vl_version())
        write_text(os.path.join(folder, f"{self.name}.svg"), re.sub(r"(<svg[^>]*>)", rf"\1{mark}", svg, count=1) + "\n")
        page = PAGE.format(
            title=html.escape(self.title), mark=mark, name=self.name, specification=as_script(specification)
        )
        write_text(os.path.join(folder, f"{self.name}.html"), page)


# The page needs nothing from the network: the library lies beside it, once for all figures.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>body{{margin:1em;font:14px system-ui,sans-serif}}.chart{{max-width:100%;overflow-x:auto}}</style>
</head>
<body>{mark}
<div class="chart" id="{name}"></div>
<script src="vega.js"></script>
<script>vegaEmbed("#{name}", {specification}, {{actions: {{export: true, source: false, compiled: false, editor: false}}}});</script>
</body>
</html>
"""


def as_script(specification: dict) -> str:
    """Write a specification as JSON that may stand in a script element."""
    return json.dumps(specification).replace("</", "<\\/")


def vl_version() -> str:
    """Name the version of Vega-Lite that altair writes, as vl-convert calls it: `6.1`."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def write_library(folder: str) -> None:
    """Write the library that the interactive pages share: Vega, Vega-Lite and their embedding, about a megabyte."""
    snippet = 'import vegaEmbed from "vega-embed";\nwindow.vegaEmbed = vegaEmbed;\n'
    write_text(os.path.join(folder, LIBRARY), vl_convert.javascript_bundle(snippet, vl_version()))


def write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def source_line(sources: Sequence[str], rows: Iterable[Row]) -> str:
    """Say which rows a figure is drawn from, how many, and what they were measured on."""
    rows = list(rows)
    machines = sorted({f"{row['device']}, {row['system']}, torch {row['torch']}" for row in rows if "device" in row})
    seeds = {row["seed"] for row in rows}
    return f"results/{', '.join(sources)}: {len(rows)} runs, {len(seeds)} seeds; {'; '.join(machines)}"
