"""Worker processes: they leave signals to the process that trains, and end when their loader does."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def close_loader(loader: DataLoader) -> None:
    """End the worker processes of a loader now.

    Left to garbage collection they linger into the next stage (pytorch/pytorch#22133); torch has no public call for
    it.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    loader._iterator = None


@contextmanager
def closing_loader(loader: DataLoader) -> Iterator[DataLoader]:
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


def loader_on_all_cores(dataset: Any) -> DataLoader:
    """Build a loader of every item of `dataset` in order, in lists of up to 32, made by as many processes as cores.

    A few items are made here: they would be done before a process has started.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(dataset) // 100)
    return DataLoader(
        dataset,
        max(1, min(32, len(dataset))),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=as_it_is,
        worker_init_fn=ignore_signals,
    )


def as_it_is(batch: Any) -> Any:
    """Return a batch unchanged: the collate function for data sets that load whole batches."""
    return batch
