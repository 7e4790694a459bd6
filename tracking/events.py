"""Events, as the SDK calls points of graphs: which of them a task has, and the files of an offline session."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SCALAR = "training_stats_scalar"  # the type of a point
SINGLE = -(2**31)  # the iteration of a single value
SAMPLES = 6000  # points of a series that a server tells as they are; of more it tells means
SESSION_METRICS, SESSION_LOG = "metrics.jsonl", "log.jsonl"  # of an offline session: lists of events, one a line


class Points:
    """The points that a task has: told again, a point loses its time, and counts twice in the mean of its series."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], dict[int, float]] = {}  # by title and series, then by iteration

    def has(self, title: str, series: str, value: float, iteration: int) -> bool:
        """Check whether a point is there with this value, in the single precision in which a server keeps it."""
        held = self.values.get((title, series), {}).get(iteration)
        return held is not None and np.float32(held) == np.float32(value)

    def have(self, others: "Points") -> bool:
        """Check whether all of `others` are there; of a series that a server tells in means, whether any is."""
        return all(
            self.has(*series, value, iteration) if len(values) < SAMPLES else series in self.values
            for series, values in others.values.items()
            for iteration, value in values.items()
            if iteration != SINGLE  # which a server tells elsewhere
        )


def points_of(task: Any) -> Points:
    """Find the points that a task has; none where the server does not say, few of a series of over SAMPLES."""
    if task.is_offline():
        return session_points(task.get_offline_mode_folder())
    points = Points()
    for title, lines in task.get_reported_scalars().items():
        for series, found in lines.items():
            points.values[title, series] = dict(zip(found["x"], found["y"]))
    return points


def session_points(folder: str) -> Points:
    """Find the points that an offline session in `folder` has."""
    points = Points()
    for events in read_events(os.path.join(folder, SESSION_METRICS)):
        for event in events:
            if event.get("type") == SCALAR:
                points.values.setdefault((event["metric"], event["variant"]), {})[event["iter"]] = event["value"]
    return points


def read_events(path: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of a session's file, without those cut short, as a process that was killed may leave the last."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def rewrite_events(path: str, keep: Callable[[dict[str, Any]], bool] = lambda event: True) -> None:
    """Write a session's file anew with whole lines alone, because the SDK cannot read others, and the events to `keep`."""
    if not os.path.exists(path):
        return
    kept = [[event for event in events if keep(event)] for events in read_events(path)]
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(events) + "\n" for events in kept if events)
    os.replace(path + ".tmp", path)
