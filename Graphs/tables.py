"""What README and docs show of settings, plans and results, by the name in their marks (see marks.py)."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from Graphs.marks import markdown
from Graphs.rows import ROOT, STUDIES, comparison, data_set, study_file, time_spent
from reporting.folder import RunFolder
from settings.resolve import resolve
from settings.table import DEFAULTS, SCHEDULES, SETTINGS, show
from stages import make_plan
from studies.rows import Row, read_rows
from studies.statistics import Estimate, difference, estimate_text, mean_of, number_form

OUTPUT = "output.txt"  # what a run in results/ printed
STUDY_NAMES = ("reproduce", "staged_192px", "strengths", "schedules", "epochs", "dropout", "image_size", "ra_magnitude", "transfer", "class_weights")  # fmt: skip
LABELS = {
    "top1": "top-1 %", "top1_ema": "top-1 % of the average", "best_top1": "best top-1 %",
    "balanced_accuracy": "balanced accuracy %", "macro_f1": "macro-F1 %", "held_out_top1": "test images: top-1 %",
    "held_out_balanced_accuracy": "test images: balanced accuracy %", "auc": "AUC", "sensitivity": "sensitivity", "specificity": "specificity",
}  # fmt: skip
HELD_OUT = ("held_out_top1", "held_out_balanced_accuracy", "auc", "sensitivity", "specificity")


class Tables:
    """Builds what stands between the marks of a page.

    results: folder of the rows
    up: from the page to the root, as its links go: "" or "../"
    """

    def __init__(self, results: str, up: str = ""):
        self.results, self.up = results, up

    def table(self, name: str) -> str:
        """Build the block of a name.

        Raises:
            ValueError: there is none of this name.
        """
        fixed: dict[str, Callable[[], str]] = {
            "stages": stages_table, "scheduled": scheduled_table, "results": self.runs_table,
            "verdicts": self.verdicts,
        }  # fmt: skip
        kind, _, rest = name.partition(" ")
        if name in fixed:
            return fixed[name]()
        if kind == "settings":
            return settings_table(rest)
        if kind == "output":
            return self.output(rest)
        if kind == "study":
            return self.study_table(rest)
        if kind == "figure":
            return self.picture(rest)
        raise ValueError(f"no table {name!r}")

    # ---- runs ----

    def runs_table(self) -> str:
        """Build the table of the runs whose folders are kept, one row each, from their own files."""
        rows = []
        for name in sorted(os.listdir(self.results)):
            folder = os.path.join(self.results, name)
            summary = RunFolder(folder).summary() if os.path.isdir(folder) else None
            if summary is None:
                continue
            versions = summary["versions"]
            rows.append([
                f"[{name}]({self.up}results/{name}/config.yaml)",
                ", ".join(str(stage["image_size"]) for stage in summary["stages"]),
                summary["epochs"],
                f"{summary['top1']:.2f}",
                f"1 (seed {summary['seed']})",
                f"{summary['train_seconds'] / 60:.1f}",
                f"{summary['relative_cost']:.2f}",
                f"{summary['device']}, {versions['system']}, torch {versions['torch']}",
                (summary["commit"] or "before the first")[:16],
            ])  # fmt: skip
        heads = ["run", "image sizes", "epochs", "top-1 %", "seeds", "training, minutes", "relative cost", "machine", "commit"]  # fmt: skip
        return markdown(heads, rows)

    def output(self, run: str) -> str:
        """Show what a run printed."""
        with open(os.path.join(self.results, run, OUTPUT), encoding="utf-8") as file:
            return f"```text\n{file.read().strip()}\n```"

    # ---- studies ----

    def rows(self, study: str) -> list[Row]:
        return read_rows(os.path.join(self.results, f"{study}.csv"))

    def run_as(self, study: str) -> str | None:
        """Find which of a study's sizes has rows: the full one, else the small one, else None."""
        return next((name for name in (study, f"{study}_small") if self.rows(name)), None)

    def study_table(self, name: str) -> str:
        """Build what came of a study: a row for each condition, or how to run it.

        name: of the full-size study; after a bar, of the data set whose conditions are meant
        """
        study, _, data = (part.strip() for part in name.partition("|"))
        chosen = self.run_as(study)
        command = f"`python sweep.py {STUDIES}/{study}.yaml`"
        if chosen is None:
            smaller = (
                "" if study.endswith("_small") else f"; `{study}_small.yaml` beside it is the size for two CPU cores"
            )
            return f"Not run yet. {command} runs it{smaller}."
        rows = [row for row in self.rows(chosen) if not data or data_set(row["condition"]) == data]
        if not rows:
            raise ValueError(f"results/{chosen}.csv has no condition of {data}")
        first = "" if chosen == study else f"Not run at full size yet ({command}). At small scale:\n\n"
        content = study_file(chosen)
        return f"{first}{content.get('title', chosen)}.\n\n{self.conditions_table(chosen, rows)}"

    def conditions_table(self, study: str, rows: Sequence[Row]) -> str:
        """Build the table of a study's conditions, each with its config and its rows."""
        unit, spent = time_spent(rows)
        conditions = list(dict.fromkeys(row["condition"] for row in rows))
        compared = {name: comparison(study, rows, name) for name in conditions}
        metrics = list(dict.fromkeys(metric for metric, _ in compared.values()))
        beside = [name for name in HELD_OUT if name not in metrics and any(row.get(name) is not None for row in rows)]
        places: dict[str, list[int]] = {}
        for line, row in enumerate(self.rows(study), 2):  # in the file, below the heads
            places.setdefault(row["condition"], []).append(line)
        lines = []
        for name in conditions:
            place = f"{self.up}results/{study}.csv#L{places[name][0]}-L{places[name][-1]}"
            metric, control = compared[name]
            found = None if control == name else difference(rows, name, control, metric)
            taken = sum(spent(row) for row in rows if row["condition"] == name) / len(places[name])
            lines.append([
                f"[{name}]({self.up}{STUDIES}/{study}.yaml)", f"[{len(places[name])}]({place})",
                *(estimate_text(mean_of(rows, name, column), number_form(column)) if column == metric else "" for column in metrics),
                verdict(found, metric, control), f"{taken:.1f}",
                *(estimate_text(mean_of(rows, name, column), number_form(column)) for column in beside),
            ])  # fmt: skip
        heads = ["condition", "runs", *(f"{LABELS[metric]}, 95 % interval" for metric in metrics), "difference, paired by seed", f"{unit} of training", *(LABELS[column] for column in beside)]  # fmt: skip
        return markdown(heads, lines)

    def verdicts(self) -> str:
        """List what each study separates from its control, and what it leaves undecided."""
        lines = []
        for study in STUDY_NAMES:
            chosen = self.run_as(study)
            if chosen is None:
                continue
            rows = self.rows(chosen)
            apart, undecided = [], []
            for name in dict.fromkeys(row["condition"] for row in rows):
                metric, control = comparison(chosen, rows, name)
                found = None if name == control else difference(rows, name, control, metric)
                if found is not None and not found.undecided:
                    apart.append(f"*{name}* {verdict(found, metric, control)}")
                elif found is not None:
                    undecided.append(f"*{name}*")
            said = "; ".join(apart) or "nothing separates from its control"
            lines.append(f"- `{chosen}`: {said}." + (f" Undecided: {'; '.join(undecided)}." if undecided else ""))
        return "\n".join(lines) or "No study has been run yet."

    def picture(self, name: str) -> str:
        """Show a figure: of the full-size study if it has rows, else of the small one, else none.

        name: "schedule", or a full-size study and the kind of its figure; after a bar, what to show where it has none
        """
        from Graphs.figures import all_figures  # what draws is not needed for tables

        figures = {figure.place: figure for figure in all_figures(self.results)}
        for wanted in map(str.strip, name.split("|")):
            study, _, end = wanted.partition(" ")
            for place in (wanted, f"{study}_small {end}".strip()):
                if place in figures:
                    path = f"{self.up}Graphs/{figures[place].name}"
                    return f"[![{figures[place].title}]({path}.svg)]({path}.html)"
        return ""

    # ---- figures inside sentences ----

    def value(self, name: str) -> str:
        """Format one figure: RUN | key of its summary | format, or STUDY | CONDITION [minus CONDITION] | column | format.

        Raises:
            ValueError: there is no row for it.
        """
        parts = [part.strip() for part in name.split("|")]
        if len(parts) == 3:
            run, key, form = parts
            summary = RunFolder(os.path.join(self.results, run)).summary()
            if summary is None or key not in summary:
                raise ValueError(f"value {name}: results/{run} has no {key}")
            return format(summary[key], form)
        if len(parts) != 4:
            raise ValueError(f"value {name}: give three parts for a run, four for a study")
        study, condition, column, form = parts
        one, _, other = condition.partition(" minus ")
        rows = self.rows(study)
        known = {row["condition"] for row in rows}
        if not {one, other or one} <= known or column not in rows[0]:
            raise ValueError(f"value {name}: results/{study}.csv has no {column} of {condition}")
        found = difference(rows, one, other, column) if other else mean_of(rows, one, column)
        if found is None:
            raise ValueError(f"value {name}: no seed has both")
        return estimate_text(found, form)


def verdict(found: Estimate | None, metric: str, control: str) -> str:
    """Format a difference, and say where its interval does not separate it from none."""
    if found is None:
        return ""
    text = estimate_text(found, f"+{number_form(metric)}")
    return f"{text} against {control}" + (", undecided" if found.undecided else "")


# ---- settings and plans ----


def stages_table() -> str:
    """Build the table of what changes from stage to stage in the paper's schedule on Imagenette."""
    heads, rows = make_plan(resolve(["--config", os.path.join(ROOT, "configs", "imagenette_s.yaml")])).table()
    changing = [i for i in range(len(heads)) if len({row[i] for row in rows}) > 1]
    return markdown([heads[i] for i in changing], [[row[i] for i in changing] for row in rows])


def scheduled_table() -> str:
    """Build the table of the settings that may change from stage to stage."""
    rows = []
    for name, schedule in SCHEDULES.items():
        row = SETTINGS[name]
        default = "the model's own" if DEFAULTS[name] is None else show(DEFAULTS[name])
        rows.append([f"`{name}`", schedule.heading, prose(row["help"]), bounds(row["interval"]), default])
    return markdown(["setting", "in plans", "what it is", "accepted", "default"], rows)


def settings_table(group: str) -> str:
    """Build the table of a group of settings.

    Raises:
        ValueError: no setting is of this group.
    """
    rows = [[f"`{name}`", prose(row["help"]), accepted(row), f"`{shown(name)}`"] for name, row in SETTINGS.items() if row["group"] == group]  # fmt: skip
    if not rows:
        raise ValueError(f"no settings of the group {group!r}")
    return markdown(["setting", "what it is", "accepted", "default"], rows)


def prose(text: str) -> str:
    """Have Markdown show a text as it is: code stays code, other signs lose their meaning."""
    return re.sub(r"`[^`]*`|[*_<|]", lambda found: found[0] if found[0].startswith("`") else "\\" + found[0], text)


def bounds(interval: str) -> str:
    return interval.replace("1000000000", "10⁹")


def shown(name: str) -> str:
    return show(DEFAULTS[name]) or "''"


def accepted(row: Mapping[str, Any]) -> str:
    """Describe which values a setting takes, and what it needs to take effect."""
    words = {"int": "whole number", "float": "number", "str": "text", "bool": "switch"}
    kind = row["kind"]
    one = words[kind.removesuffix("s")] if kind != "bool" else words[kind]
    text = ", ".join(f"`{choice}`" for choice in row["choices"] or ())
    if kind.endswith("s") or not text:
        text = f"{text}, or {one}" if text else one
    if row["interval"]:
        text += f" in {bounds(row['interval'])}"
    if kind.endswith("s") and not row["scheduled"]:
        text += ", several"
    if row["scheduled"]:
        text += "; may change from stage to stage"
    if row["needs"]:
        other, values = row["needs"]
        text += f"; with `{other}` {' or '.join(f'`{show(value)}`' for value in values)}"
    return text
