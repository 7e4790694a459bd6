"""Worker processes: they leave signals to the process that trains, and end when their loader does."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from settings.errors import RunError
from settings.machine import cores
from utils import Runtime


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker process.

    Ctrl-C and a scheduler's SIGTERM reach the whole group of processes. The training process decides what to do, and
    still needs its workers for the step it is in. Of a bus error torch would print its guess, which is one of two, and
    of a batch that is not fetched any more Python a traceback; what fails in a worker's own work goes another way.
    """
    sys.excepthook = lambda *_: None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGBUS"):
        signal.signal(signal.SIGBUS, signal.SIG_DFL)


@contextmanager
def signals_held() -> Iterator[None]:
    """Have SIGINT and SIGTERM wait until the end of the block, in which processes are started, or files take their places.

    What a handler raises in the midst of a fork is lost, and a worker would die of a signal before it ignores it. What it
    raises before the loader is whole leaves workers that no one ends. Blocking alone does not do: another thread receives
    the signal then, and Python has this one handle it.
    """
    numbers, held = (signal.SIGINT, signal.SIGTERM), list[int]()
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    handlers = {number: signal.signal(number, lambda number, _: held.append(number)) for number in numbers}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for received in held:
            signal.raise_signal(received)


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
        if getattr(handler, "__module__", "") == signal_handling.__name__:  # another DataLoader has set it
            handler = signal.SIG_DFL
        if self._iterator is None:
            with signals_held():
                iterator = super().__iter__()
        else:
            iterator = self.anew(self._iterator)
        if main:
            signal.signal(signal.SIGCHLD, handler)  # torch's raises anywhere
        return self.watched(iterator)

    def watched(self, iterator: Any) -> Iterator[Any]:
        """Yield what `iterator` does."""
        watch = Watch(getattr(iterator, "_workers", ()))
        try:
            while True:
                watch.begin()
                batch = self.patiently(lambda: next(iterator, None), watch)  # None after the last
                watch.asking = False
                if batch is None:
                    return
                yield batch
        finally:
            watch.over.set()

    def anew(self, iterator: Any) -> Any:
        """Have workers that are there already begin another pass; torch waits until each of them has answered."""
        watch, ask = Watch(iterator._workers), iterator._get_data
        watch.begin()
        iterator._get_data = lambda: self.patiently(ask, watch)
        try:
            return super().__iter__()
        finally:
            del iterator._get_data
            watch.over.set()

    def patiently(self, ask: Callable[[], Any], watch: "Watch") -> Any:
        """Return what `ask` does, which raises every few seconds while workers have not answered.

        Raises:
            RunError: they do not answer any more.
        """
        while True:
            try:
                return ask()
            except (RuntimeError, OSError, EOFError) as error:  # the last two of a batch whose worker is gone
                late = str(error).startswith("DataLoader timed out")
                if not late or watch.waited >= PATIENCE:
                    reason = why_none(error, watch, self.dataset) or error
                    if late:
                        end_at_once(watch.workers)
                    raise reason from error


class Watch(threading.Thread):
    """A thread that ends workers which were halted, after a while: the loader would wait for their answer for ever.

    asking: the loader waits
    waited: for so many seconds. They are counted here, not taken from a clock: a run that was suspended whole (Ctrl-Z, a
        scheduler) and goes on has not waited meanwhile.
    halted: process numbers of workers that it has ended
    """

    def __init__(self, workers: Sequence[Any]):
        super().__init__(daemon=True)
        self.workers = workers
        self.halted: list[int] = []
        self.asking, self.waited = False, 0.0
        self.over = threading.Event()
        self.start()

    def begin(self) -> None:
        """Count from now on."""
        self.waited = 0.0
        self.asking = True

    def run(self) -> None:
        while not self.over.wait(LOOK_EVERY):
            if not self.asking:
                continue
            self.waited += LOOK_EVERY
            if self.waited >= PATIENCE:
                for worker in self.workers:
                    if worker.pid not in self.halted and is_stopped(worker.pid):
                        self.halted.append(worker.pid)
                        worker.kill()


def why_none(error: Exception, watch: Watch, dataset: Any) -> RunError | None:
    """Say why workers bring no batch; None if `error` is one of the program."""
    text, workers = str(error), watch.workers
    shared = "/dev/shm is too small: enlarge it (docker run --shm-size=8g), or lower --workers"
    if text.startswith("DataLoader timed out") or watch.halted:
        halted = watch.halted or [worker.pid for worker in workers if is_stopped(worker.pid)]
        reason = f"process {', '.join(map(str, halted))} was halted" if halted else "see to the disk of the images"
        return RunError(f"the workers have brought no images for {PATIENCE:.0f} s; {reason}; --resume auto continues")
    if "shared memory" in text or "unable to write to file" in text or "/torch_" in text:
        return RunError(f"a worker has no room for its images: {shared}")
    fault = getattr(getattr(dataset, "images", None), "fault", lambda: None)()
    if text.startswith("Caught "):  # in a worker, which goes on
        return RunError(fault) if fault and isinstance(error, OSError) else None
    deadline = time.monotonic() + 2  # its status may not be known yet
    dead = None
    while dead is None and time.monotonic() < deadline:
        dead = next((worker for worker in workers if worker.exitcode), None)
        time.sleep(0.01)
    if dead is None:
        return RunError(f"a worker has ended: {text}") if text.startswith("DataLoader worker") else None
    who = f"worker {dead.pid}"
    if dead.exitcode == -signal.SIGBUS:
        return RunError(f"{who} was ended by the system: {fault or shared}")
    if dead.exitcode == -signal.SIGKILL:
        return RunError(f"{who} was killed; where no one did that, memory has run out: lower --workers")
    return RunError(f"{who} has ended with status {dead.exitcode}")


def is_stopped(pid: int) -> bool:
    """Check whether a process was halted by a signal (SIGSTOP, Ctrl-Z)."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def end_at_once(workers: Sequence[Any]) -> None:
    """Kill worker processes that are still there. They ignore SIGTERM, and at its own end Python would wait for them."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join(5)


def close_loader(loader: Any) -> None:
    """End the worker processes of a loader now; do nothing to one that has none.

    Left to garbage collection they linger into the next stage (pytorch/pytorch#22133); torch has no public call for
    it, would wait for ever for one that is stopped, and leaves one that hangs.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        workers = list(getattr(iterator, "_workers", ()))
        for worker in workers:
            if is_stopped(worker.pid):
                worker.kill()
        iterator._shutdown_workers()
        end_at_once(workers)
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


def processes_for(count: int) -> int:
    """Choose how many processes make `count` items on all cores; 0: this one does."""
    return min(cores(), count // 100)


def loader_on_all_cores(dataset: Any) -> DataLoader:
    """Build a loader of every item of `dataset` in order, in lists of up to 32, made by as many processes as cores.

    A few items are made here: they would be done before a process has started.
    """
    workers = processes_for(len(dataset))
    return Loader(
        dataset,
        max(1, min(32, len(dataset))),
        num_workers=workers,
        timeout=LOOK_EVERY if workers else 0,
        persistent_workers=workers > 0,
        collate_fn=as_it_is,
        worker_init_fn=ignore_signals,
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
