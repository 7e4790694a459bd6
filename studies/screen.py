"""A sweep on the terminal: its plan, a live table with a line per run, its means and differences."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from studies.rows import Row
from studies.runner import Progress, Runner
from studies.statistics import difference, estimate_text, mean_of, number_form
from studies.study import Study

COLOURS = {"done": "green", "failed": "red", "training": "cyan", "stopped": "yellow", "waiting": "dim"}


def duration(seconds: float | None) -> str:
    """Format seconds as `3:25:07` or `25:07`."""
    if seconds is None:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[Any]] = ()) -> Table:
    """Build a table: the first column to the left, the others to the right."""
    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    return table


class Screen:
    """Shows how a sweep goes: as one table that changes, or, where the output is no terminal, a line for each change."""

    def __init__(self, study: Study):
        self.study = study
        self.console = Console(width=None if Console().is_terminal else 160, highlight=False, markup=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.runner: Runner | None = None
        self.told: dict[str, str] = {}
        self.started = time.monotonic()

    def __enter__(self) -> "Screen":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            if self.runner is not None:
                self.live.update(self.table(self.runner))
            self.live.stop()

    def plan(self, images: Mapping[str, int] | None, rows: Sequence[Row], unknown: str = "") -> None:
        """Print what will be run: for each condition its epochs, images and arithmetic against the control's.

        images: training images of each condition's data; None, if they could not be counted
        rows: of finished runs, whose times tell how long the others will take
        unknown: why images are None
        """
        study = self.study
        each = images or dict.fromkeys(study.conditions, 1)
        work = {(run.condition, run.seed): run.gflops * each[run.condition] for run in study.runs}
        basis = next(work[run.condition, run.seed] for run in study.runs if run.condition == study.control)
        lines = []
        for condition in study.conditions:
            several = [run for run in study.runs if run.condition == condition]
            run = several[0]
            each_stage = [str(stage.image_size) for stage in run.plan.stages]
            sizes = "-".join(each_stage if len({*each_stage}) > 1 else each_stage[:1])
            seen = f"{run.plan.num_epochs * each[condition]:,}" if images else ""
            cost = work[condition, run.seed] / basis
            lines.append([condition, len(several), sizes, run.plan.num_epochs, seen, f"{cost:.3f}"])
        heads = ["condition", "runs", "sizes, px", "epochs", "images", f"cost / {study.control}"]
        self.console.print(study.title)
        self.console.print(plain_table(heads, lines))
        done = {(row["condition"], row["seed"]): row["train_seconds"] for row in rows}
        finished = [key for key in work if key in done]
        text = f"{len(work)} runs, {len(finished)} of them finished; "
        text += f"cost {sum(work.values()) / basis:.2f} of one {study.control} run"
        if 0 < len(finished) < len(work):
            trained = sum(work[key] for key in finished)
            left = (sum(work.values()) - trained) * sum(done[key] for key in finished) / trained
            text += f"; as fast as those, the others train {duration(left)}, one after another"
        self.console.print(text)
        if images is None:
            self.console.print(f"images not counted, costs are as if all conditions had as many: {unknown}")

    def update(self, runner: Runner) -> None:
        """Show how far the runs are."""
        if self.live is not None:
            self.runner = runner
            self.live.update(self.table(runner, self.console.height), refresh=True)
            return
        for run, progress in runner.progress.items():
            line = f"{run.name}: {state_text(progress, run.plan.num_epochs)}"
            if self.told.get(run.name) != line and (progress.state != "waiting" or run.name in self.told):
                self.told[run.name] = line
                left = runner.seconds_left()
                self.console.print(line + (f" ({duration(left)} of training left in all)" if left else ""))

    def table(self, runner: Runner, height: int | None = None) -> Table:
        """Build the live table.

        height: lines there are for it; where they are too few, those of runs that wait or are done become one each
        """
        left = runner.seconds_left()
        counts = [progress.state for progress in runner.progress.values()]
        head = f"{counts.count('done')} of {len(counts)} done, {duration(time.monotonic() - self.started)} so far"
        if left is not None:
            head += f", {duration(left)} of training left"
        table = plain_table(["run", "state", "epochs", "training", head])
        folded = ("done", "waiting") if height is not None and len(counts) + 1 > height else ()
        if "done" in folded and "done" in counts:
            table.add_row(f"{counts.count('done')} runs", "done", style=COLOURS["done"])
        for run, progress in runner.progress.items():
            if progress.state not in folded:
                epochs = f"{progress.epoch}/{run.plan.num_epochs}"
                seconds = duration(progress.seconds) if progress.seconds else ""
                table.add_row(run.name, progress.state, epochs, seconds, progress.note, style=COLOURS[progress.state])
        if "waiting" in folded and "waiting" in counts:
            table.add_row(f"{counts.count('waiting')} runs", "waiting", style=COLOURS["waiting"])
        return table

    def outcome(self, rows: Sequence[Row]) -> None:
        """Print mean and interval of each condition, and its difference from its control, paired by seed."""
        study, lines = self.study, []
        for condition in study.conditions:
            metric, control = study.metrics[condition], study.controls[condition]
            found = mean_of(rows, condition, metric)
            if found is None:
                continue
            against = difference(rows, condition, control, metric) if condition != control else None
            verdict = "" if against is None else "undecided" if against.undecided else "differs"
            form = number_form(metric)
            above = "" if against is None else f"{estimate_text(against, f'+{form}')} than {control}"
            lines.append([condition, found.n, f"{metric} {estimate_text(found, form)}", above, verdict])
        if lines:
            heads = ["condition", "n", "mean, 95 % interval", "higher by, paired by seed", ""]
            self.console.print(plain_table(heads, lines))


def state_text(progress: Progress, epochs: int) -> str:
    """Describe how far a run is in a line of its own."""
    if progress.state == "training":
        return f"training, {progress.epoch} of {epochs} epochs"
    return f"{progress.state}{', ' if progress.note else ''}{progress.note}"
