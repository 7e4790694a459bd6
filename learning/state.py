"""How far a run is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learning.scores import Score


@dataclass
class RunState:
    """How far a run is; with the learner's weights, all that a resume needs.

    epoch, step: the next step to take
    first_epoch: that this run has trained; those before are another's, whose checkpoint it began with
    loss_sum, num_images: of the part of `epoch` that is done, all processes
    train_seconds, wait_seconds, cpu_seconds: of that part; the last of this process and its workers
    seconds: that the run has taken until the last checkpoint, all of its parts from the start of their processes
    best_top1, best_epoch, best_weights: percent, epoch and copy ("model" or "ema") of the best evaluation
    better: copy that the latest evaluation found the better one; "" before there is one, and in older files
    """

    epoch: int = 0
    step: int = 0
    first_epoch: int = 0
    loss_sum: float = 0.0
    num_images: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = -1
    best_weights: str = "model"
    better: str = ""

    def note_best(self, scores: "Mapping[str, Score]") -> bool:
        """Note the best of the copies just evaluated; return whether it is better than all before."""
        before = self.best_top1
        self.better = max(scores, key=lambda name: scores[name].top1, default=self.better)  # of equals the model
        for name, score in scores.items():
            if score.top1 > self.best_top1:
                self.best_top1, self.best_epoch, self.best_weights = score.top1, self.epoch, name
        return self.best_top1 > before

    def next_epoch(self) -> None:
        """Go to the start of the next epoch: reset its step, sums and times."""
        self.epoch += 1
        self.step = self.num_images = 0
        self.loss_sum = self.train_seconds = self.wait_seconds = self.cpu_seconds = 0.0
