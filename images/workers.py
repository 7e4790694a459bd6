"""Worker processes: they leave signals to the process that trains, and end when their loader does."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from settings.errors import RunError
from utils import Runtime


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker process.

    Ctrl-C and a scheduler's SIGTERM reach the whole group of processes. The training process decides what to do, and
    still needs its workers for the step it is in.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


PATIENCE = 300.0  # seconds without a batch, after which workers count as hanging
LOOK_EVERY = 5.0  # seconds; workers that are gone are noticed then


class Loader(DataLoader):
    """A DataLoader that ends with a RunError, which says why, when no batch comes any more.

    torch's own either raises wherever the program happens to be, perhaps in the midst of a step, or waits for ever.
    Here the loader is asked every few seconds, and only while a batch is waited for.
    """

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
        handler = signal.getsignal(signal.SIGCHLD) if main else None
        iterator = super().__iter__()
        if main:
            signal.signal(signal.SIGCHLD, handler)  # torch's raises anywhere
        return self.watched(iterator)

    def watched(self, iterator: Any) -> Iterator[Any]:
        """Yield what `iterator` does."""
        while True:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    batch = next(iterator)
                    break
                except StopIteration:
                    return
                except RuntimeError as error:
                    late = str(error).startswith("DataLoader timed out")
                    if not late or time.monotonic() >= deadline:
                        raise why_none(error, iterator, self.dataset) or error from error
            yield batch


def why_none(error: RuntimeError, iterator: Any, dataset: Any) -> RunError | None:
    """Say why workers bring no batch; None if `error` is one of the program."""
    text = str(error)
    workers = getattr(iterator, "_workers", [])
    shared = "/dev/shm is too small: enlarge it (docker run --shm-size=8g), or lower --workers"
    if text.startswith("DataLoader timed out"):
        stopped = [str(worker.pid) for worker in workers if is_stopped(worker.pid)]
        reason = (
            f"process {', '.join(stopped)} is stopped: kill -CONT lets it go on" if stopped else "see to their disk"
        )
        return RunError(f"the workers have brought no images for {PATIENCE:.0f} s; {reason}")
    if "shared memory" in text or "unable to write to file" in text or "/torch_" in text:
        return RunError(f"a worker has no room for its images: {shared}")
    if not text.startswith("DataLoader worker"):
        return None
    for worker in workers:
        worker.join(1)  # or its status may not be known yet
    dead = next((worker for worker in workers if worker.exitcode), None)
    if dead is None:
        return RunError(f"a worker has ended: {text}")
    who = f"worker {dead.pid}"
    if dead.exitcode == -signal.SIGBUS:
        fault = getattr(getattr(dataset, "images", None), "fault", lambda: None)()
        return RunError(f"{who} was ended by the system: {fault or shared}")
    if dead.exitcode == -signal.SIGKILL:
        return RunError(f"{who} was killed; where no one did that, memory has run out: lower --workers")
    return RunError(f"{who} has ended with status {dead.exitcode}")


def is_stopped(pid: int) -> bool:
    """Check whether a process was halted by a signal (SIGSTOP, Ctrl-Z)."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def close_loader(loader: Any) -> None:
    """End the worker processes of a loader now; do nothing to one that has none.

    Left to garbage collection they linger into the next stage (pytorch/pytorch#22133); torch has no public call for
    it, and would wait for ever for one that is stopped.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        for worker in getattr(iterator, "_workers", ()):
            if is_stopped(worker.pid):
                worker.kill()
        iterator._shutdown_workers()
    if isinstance(loader, DataLoader):
        loader._iterator = None


AnyLoader = TypeVar("AnyLoader")


@contextmanager
def closing_loader(loader: AnyLoader) -> Iterator[AnyLoader]:
    """End the workers of `loader` after the block, also if something was raised in it."""
    try:
        yield loader
    finally:
        close_loader(loader)


def make_loader(dataset: Dataset, runtime: Runtime, workers: int, **kwargs: Any) -> DataLoader:
    """Build a DataLoader whose workers, pinned memory and generator are set as this project needs them."""
    return Loader(
        dataset,
        num_workers=workers,
        timeout=LOOK_EVERY if workers else 0,
        persistent_workers=workers > 0,  # started once per stage; the sampler's keys say all that changes
        pin_memory=runtime.device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own, or every epoch would draw from the global one
        **kwargs,
    )


def as_it_is(batch: Any) -> Any:
    """Return a batch unchanged: the collate function for data sets that load whole batches.

    A worker moves its tensors to shared memory here: the queue's thread, which would do it, loses a batch that finds no
    room there, and the run would wait for it.
    """
    if get_worker_info() is not None:
        for part in batch:
            for tensor in part if isinstance(part, list) else [part]:
                if isinstance(tensor, Tensor):
                    tensor.share_memory_()
    return batch
