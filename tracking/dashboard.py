"""What a run is shown in besides its folder: ClearML, TensorBoard, both or neither."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from reporting.log import Dashboard
from settings.table import Config
from stages import Stage
from tracking.run import find_clearml
from tracking.tensorboard import find_tensorboard


def find_dashboard(config: Config) -> Dashboard:
    """Choose what the run is shown in, by `clearml` and `tensorboard`.

    Raises:
        ConfigError: what was asked for is not there.
    """
    tensorboard = find_tensorboard(config)  # first: it asks no server
    return Dashboards(find_clearml(config), tensorboard)


class Dashboards(Dashboard):
    """Several dashboards as one: each is told everything, in their order, and ended, whatever the end of another."""

    def __init__(self, *shown: Dashboard):
        self.shown = shown

    @property
    def ask_to_stop(self) -> Callable[[str], None]:  # type: ignore[override]
        return self.shown[0].ask_to_stop

    @ask_to_stop.setter
    def ask_to_stop(self, ask: Callable[[str], None]) -> None:
        for dashboard in self.shown:
            dashboard.ask_to_stop = ask

    def start(self, config: Config) -> None:
        for dashboard in self.shown:
            dashboard.start(config)

    def begin_stage(self, stage: Stage) -> None:
        for dashboard in self.shown:
            dashboard.begin_stage(stage)

    def epoch(self, record: dict[str, Any]) -> None:
        for dashboard in self.shown:
            dashboard.epoch(record)

    def best(self, epoch: int, confusion: Tensor) -> None:
        for dashboard in self.shown:
            dashboard.best(epoch, confusion)

    def finish(self) -> None:
        for dashboard in self.shown:
            dashboard.finish()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with ExitStack() as ends:
            for dashboard in self.shown:
                ends.callback(dashboard.__exit__, kind, error, trace)
