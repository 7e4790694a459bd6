"""What the charts of studies are made of: values, colours, estimates, layers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import altair as alt

from Graphs.figure import COLOURS, HEIGHT, WIDTH
from studies.rows import Row
from studies.statistics import mean_of

Values = list[dict[str, Any]]
Accuracy = Callable[[Row], float | None]  # finds that of a run


def data(values: Values) -> alt.Data:
    return alt.Data(values=[{name: rounded(value) for name, value in entry.items()} for entry in values])


def rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def number(field: str, title: str, form: str = ".2f") -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title, format=form)


def conditions_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["condition"] for row in rows))


def colour(names: Sequence[str], field: str = "condition") -> alt.Color:
    """Give each name a colour, the same in every figure of a study."""
    scale = alt.Scale(domain=list(names), range=[COLOURS[i % len(COLOURS)] for i in range(len(names))])
    return alt.Color(f"{field}:N", scale=scale, title=None)


def measure(row: Row) -> float | None:
    """Find the accuracy of a run: on images that chose nothing if it was measured on such, else that of its last epoch."""
    return row.get("held_out_top1") if row.get("held_out_top1") is not None else row["top1"]


def means(rows: Sequence[Row], x: Callable[[Sequence[Row]], float] | None = None, of: Accuracy = measure) -> Values:
    """Estimate the mean accuracy of each condition, with its 95 % interval, as values of a chart.

    x: what the condition's rows come to on the other axis
    of: finds the accuracy of a run
    """
    found = []
    known = [row | {"measure": of(row)} for row in rows]
    for name in conditions_of(rows):
        estimate = mean_of(known, name, "measure")
        if estimate is not None:
            entry = {"condition": name, "mean": estimate.mean, "low": estimate.low, "high": estimate.high}
            entry |= {"n": estimate.n} | ({} if x is None else {"x": x([r for r in rows if r["condition"] == name])})
            found.append(entry)
    return found


COARSE = alt.Axis(tickCount=8)
ESTIMATE = [
    alt.Tooltip("condition:N"), number("mean", "mean"), number("low", "95 % from"), number("high", "to"), alt.Tooltip("n:Q", title="runs"),
]  # fmt: skip


def layered(*charts: alt.Chart, height: float = HEIGHT) -> alt.LayerChart:  # the axes of one without data would warn
    return alt.LayerChart(layer=[chart for chart in charts if chart.data["values"]], width=WIDTH, height=height)
