"""The order of samples, which follows from (seed, epoch).

Any process can compute any step of it, so that a run may resume at any step.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from settings.errors import ConfigError
from utils import ORDER, key_to_seed

Draw = tuple[int, int, int]  # epoch, index of the image, repeat: the key of one augmented sample


class DrawSampler(Sampler[list[Draw]]):
    """The batches of one process: a permutation per epoch, cut into steps, each step dealt out to processes.

    Counter-based: step s of an epoch is known without the steps before it, at any number of workers.
    Each epoch has every image once. The last step has what is left, as many for each process, at least two
    (batch norm needs them, and two repeats are one image); fewer than that are left out of this epoch.

    exhausted: the current iteration has handed out its last step
    repeats: each image so many times in a row, dealt to different processes first; the epoch stays as long
        and so has fewer images (repeated augmentation, arXiv:1901.09335)
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, repeats: int = 1
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.start(0)
        rest = num_images % (batch_size * world_size) // world_size  # images per process in a last, shorter step
        first = num_images // (batch_size * world_size) * batch_size * world_size
        own = (range(first + of, first + rest * world_size, world_size) for of in range(world_size))
        distinct = min(len({place // repeats for place in places}) for places in own)
        self.last_batch = rest if distinct >= 2 or batch_size == 1 else 0
        self.num_steps = num_images // (batch_size * world_size) + (self.last_batch > 0)
        if self.num_steps == 0:
            raise ConfigError(
                f"{num_images} training image(s) are too few for {world_size} process(es); each needs at least 2"
                + (f", not repeats of one (ra_reps {repeats})" if repeats > 1 else "")
            )

    @property
    def batch_sizes(self) -> set[int]:
        """Sizes of this process's batches: that of most steps, and that of the last."""
        full = {self.batch_size} if self.num_images >= self.batch_size * self.world_size else set()
        return full | ({self.last_batch} if self.last_batch else set())

    def start(self, epoch: int, first_step: int = 0, stop_epoch: int | None = None) -> None:
        """Set what the next iteration yields: the steps of `epoch` from `first_step` on, and later epochs.

        stop_epoch: the first epoch that is not yielded; by default the one after `epoch`
        """
        self.epoch, self.first_step = epoch, first_step
        self.stop_epoch = epoch + 1 if stop_epoch is None else stop_epoch
        self.exhausted = False

    def __len__(self) -> int:
        """Count the batches that the next iteration yields."""
        return (self.stop_epoch - self.epoch) * self.num_steps - self.first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of this process, each a list of the keys of its samples."""
        first_step = self.first_step
        for epoch in range(self.epoch, self.stop_epoch):
            # Not seed + epoch: torch's CPU generator takes 32 bits, and neighbouring runs would share orders.
            generator = torch.Generator().manual_seed(key_to_seed(self.seed, epoch, ORDER))
            order = torch.randperm(self.num_images, generator=generator)
            per_step = self.batch_size * self.world_size
            for step in range(first_step, self.num_steps):
                start = step * per_step
                count = min(per_step, (self.num_images - start) // self.world_size * self.world_size)
                own = range(start + self.rank, start + count, self.world_size)
                # Repeats of an image apart: mixup and cutmix mix neighbours.
                places = sorted(own, key=lambda place: place % self.repeats)
                indices = order[torch.tensor(places) // self.repeats].tolist()
                self.exhausted = epoch + 1 == self.stop_epoch and step + 1 == self.num_steps
                yield [(epoch, index, place % self.repeats) for index, place in zip(indices, places)]
            first_step = 0
