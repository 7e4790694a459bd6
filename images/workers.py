"""Worker processes: they leave signals to the process that trains, and end when their loader does."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from utils import Runtime


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker process.

    Ctrl-C and a scheduler's SIGTERM reach the whole group of processes. The training process decides what to do, and
    still needs its workers for the step it is in.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def close_loader(loader: Any) -> None:
    """End the worker processes of a loader now; do nothing to one that has none.

    Left to garbage collection they linger into the next stage (pytorch/pytorch#22133); torch has no public call for
    it.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    if isinstance(loader, DataLoader):
        loader._iterator = None


Loader = TypeVar("Loader")


@contextmanager
def closing_loader(loader: Loader) -> Iterator[Loader]:
    """End the workers of `loader` after the block, also if something was raised in it."""
    try:
        yield loader
    finally:
        close_loader(loader)


def make_loader(dataset: Dataset, runtime: Runtime, workers: int, **kwargs: Any) -> DataLoader:
    """Build a DataLoader whose workers, pinned memory and generator are set as this project needs them."""
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,  # started once per stage; the sampler's keys say all that changes
        pin_memory=runtime.device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own, or every epoch would draw from the global one
        **kwargs,
    )


def as_it_is(batch: Any) -> Any:
    """Return a batch unchanged: the collate function for data sets that load whole batches."""
    return batch
