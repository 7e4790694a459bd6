"""The exponential moving average of the weights."""

import copy

import torch
from torch import Tensor, nn

from settings.table import Config


class EMA:
    """Exponential moving average of a model's weights and floating-point buffers, on its device.

    steps: updates are this many steps apart

    Source: torchvision's reference (ExponentialMovingAverage over torch's AveragedModel): the first update
    copies, and so does every update during warm-up. Not AveragedModel itself, which keeps its count on the
    device and waits for it at each update.
    """

    def __init__(self, model: nn.Module, config: Config):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.steps = config.model_ema_steps
        self.given_decay = config.model_ema_decay
        self.num_updates = 0
        self.decay = self.given_decay
        self.restart = False
        # Ours and the model's tensors, in the same order: floating-point ones, and counters of batches.
        self.averaged: tuple[list[Tensor], list[Tensor]] = [], []
        self.copied: tuple[list[Tensor], list[Tensor]] = [], []

    def begin_epoch(self, images_per_step: int, num_epochs: int, warming_up: bool) -> None:
        """Set the decay for the steps of an epoch.

        num_epochs: that the run trains
        warming_up: every update copies the weights, so that the average forgets those of the warm-up
        """
        self.decay = ema_decay(self.given_decay, images_per_step, self.steps, num_epochs)
        self.restart = warming_up

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average to decay * average + (1 - decay) * model.

        The first update copies the model, and so does every update during warm-up.
        """
        if not self.averaged[0]:  # once: loading and training change these tensors in place
            ours, theirs = self.module.state_dict(), model.state_dict()
            floating = [name for name, value in ours.items() if value.is_floating_point()]
            rest = [name for name in ours if name not in floating]  # counters of batches
            self.averaged = [ours[name] for name in floating], [theirs[name] for name in floating]
            self.copied = [ours[name] for name in rest], [theirs[name] for name in rest]
        share = 1.0 if self.restart or self.num_updates == 0 else 1.0 - self.decay
        torch._foreach_lerp_(*self.averaged, share)
        if self.copied[0]:
            torch._foreach_copy_(*self.copied)
        self.num_updates = 0 if self.restart else self.num_updates + 1


def ema_decay(model_ema_decay: float, images_per_step: int, steps: int, epochs: int) -> float:
    """Compute the decay per update from the reference's per-image setting.

    1 - decay grows with the images between two updates and shrinks with the length of the run. It is computed anew for
    each stage's batch size, so that the average reaches back over the same number of images in all stages.

    Source: torchvision references/classification, train.py (its comment derives the rule).
    """
    return 1.0 - min(1.0, (1.0 - model_ema_decay) * images_per_step * steps / epochs)
