"""An epoch on the terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from learning.scores import TrainingLoss
from stages import Stage


class Progress:
    """An epoch on the terminal.

    It is a bar, or, where stderr is no terminal, a line every print_freq steps; and a line at its end.
    """

    def __init__(
        self, stage: Stage, epoch: int, num_epochs: int, print_freq: int, first_step: int, num_steps: int, show: bool
    ):
        self.title = f"stage {stage.index}, {stage.image_size} px, epoch {epoch + 1}/{num_epochs}"
        self.print_freq, self.num_steps, self.show = print_freq, num_steps, show
        watched = show and sys.stderr.isatty()
        self.bar = tqdm(
            desc=self.title, initial=first_step, total=num_steps, unit="step", leave=False, disable=not watched
        )

    def step(self, step: int, losses: TrainingLoss) -> None:
        """Show that a step is done, and every print_freq steps the loss, on a GPU as it was print_freq steps before."""
        self.bar.update()
        if (step + 1) % self.print_freq == 0:
            loss = losses.glance()  # on every process, so that all of them notice a loss that is not finite
            if loss is None:
                return
            if not self.bar.disable:
                self.bar.set_postfix_str(f"loss {loss:.4f}")
            elif self.show:
                print(f"{self.title} [{step + 1}/{self.num_steps}] loss {loss:.4f}", flush=True)

    def conclude(self, record: Mapping[str, Any]) -> None:
        """Close the bar, and print the line of the epoch."""
        self.bar.close()
        if self.show:
            parts = [f"{name} {record[name]:.2f}" for name in ("top1", "top1_ema") if record[name] is not None]
            speed = f"{record['images_per_second']:.0f} images/s, {record['epoch_seconds']:.1f} s"
            print(f"{self.title}: " + ", ".join([f"loss {record['loss']:.4f}", *parts, speed]), flush=True)
