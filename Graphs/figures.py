"""Every figure there is."""

from Graphs.figure import Figure
from Graphs.schedule import ScheduleFigure
from Graphs.studies import study_figures

SCHEDULE = ScheduleFigure("schedule", "Progressive learning: images and strengths grow together", "schedule", "configs/imagenette_s.yaml")  # fmt: skip


def all_figures(results: str) -> list[Figure]:
    """List the schedule's picture and the figures of the studies that have rows in the folder `results`."""
    return [SCHEDULE, *study_figures(results)]
