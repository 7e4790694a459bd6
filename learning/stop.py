"""The wish to stop: signals, a time budget, workers that fail, and what is made of them."""

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from settings.errors import RunError
from settings.values import seconds
from utils import Runtime

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """A signal ends the program now; the message says which.

    resumable: whether the run has saved something to go on from
    """

    def __init__(self, reason: str, resumable: bool):
        super().__init__(reason)
        self.resumable = resumable


def signal_main(number: int) -> None:
    """Send a signal to the main thread, which ends what it waits for."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows
        _thread.interrupt_main(signal.Signals(number))


class Stop:
    """The decision whether training should end early: on a signal, after a time budget, or when asked to.

    The signals are SIGINT and SIGTERM; the time budget counts from when this is made. Used as a context; calling it
    with the number of a step returns the answer. All processes get the same one, at the same step: with several of
    them it is agreed upon every few steps.

    patient: a signal is heard at the next step. Else, before and after training, it raises Interrupted at once, and
        where the main thread is inside a library that takes its time, ends the program after GRACE seconds
    resumable: whether the run has saved something to go on from
    failure: why no more images come; the run is to be saved, and then to end with it
    """

    AGREE_EVERY = 8  # steps; an exchange between hosts takes about a tenth of a millisecond
    GRACE = 8.0

    # What processes agree on is the largest of their numbers: one of these, or 64 * (rank + 1) + the signal
    NOTHING, BUDGET, WISH = range(3)

    def __init__(self, runtime: Runtime, time_budget: str | None = None, patient: bool = True):
        self.runtime, self.patient = runtime, patient
        self.deadline = None if time_budget is None else time.monotonic() + seconds(time_budget)
        self.wish, self.signal, self.interrupts = "", 0, 0
        self.agreed = self.NOTHING
        self.resumable = False
        self.failure: RunError | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self.ended = threading.Event()
        self.heard, bell = socket.socketpair()
        bell.setblocking(False)
        self.bell, self.bell_before = bell, signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()
        self.hook_before, sys.unraisablehook = sys.unraisablehook, self.on_unraisable
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.unraisablehook = self.hook_before
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.bell_before)
        self.ended.set()
        self.bell.shutdown(socket.SHUT_RDWR)  # ends the thread, though workers have the socket, too
        self.bell.close()

    def watch(self) -> None:
        """End the program a while after a signal, where the main thread does not hear of it."""
        with self.heard:
            while number := self.heard.recv(1):
                self.interrupts += number[0] == signal.SIGINT
                # A second Ctrl-C counts in training, too: a process that waits for another one runs no handler
                again = number[0] == signal.SIGINT and self.interrupts > 1
                if number[0] not in self.previous or (self.patient and not again):
                    continue
                if not self.ended.wait(self.GRACE) and (again or not self.patient):
                    self.say_so(f"ended: {signal.Signals(number[0]).name}, in the midst of what takes long")
                    os._exit(3 if self.resumable else 1)

    def say_so(self, line: str) -> None:
        """Write a line on rank 0: os.write, because printing is not safe inside a handler."""
        if self.runtime.is_main:
            os.write(2, f"\n{line}\n".encode())

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Have signals heard at steps within the block; one after its last step is heard at its end."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
        if self.signal and not self.asked:
            raise Interrupted(f"signal {signal.Signals(self.signal).name}", self.resumable)

    def on_signal(self, number: int, frame: Any) -> None:
        """Ask training to stop; a SIGINT after that ends the program at once, without saving."""
        name = f"signal {signal.Signals(number).name}"
        first, self.signal = not self.signal, number
        if (not self.patient and first) or (number == signal.SIGINT and not first):  # a second SIGTERM hinders no end
            raise Interrupted(name, self.resumable)
        self.say_so("stopping after this step, the run will be saved; Ctrl-C again ends it at once")

    def on_unraisable(self, fault: Any) -> None:
        """Have a signal heard again whose exception was raised where Python lets none out: in a weak reference's callback."""
        if not isinstance(fault.exc_value, Interrupted):
            self.hook_before(fault)
            return
        number, self.signal = self.signal, 0
        self.interrupts -= number == signal.SIGINT  # it will be heard again
        threading.Timer(0.01, signal_main, [number]).start()  # not at once: that would be in here

    def ask(self, reason: str) -> None:
        """Have training end, saved; may be called from any thread of rank 0."""
        self.wish = reason

    def __call__(self, step: int = 0, budget: bool = True) -> bool:
        """Return whether to stop; with several processes, all must call it for the same steps.

        budget: whether the time budget counts
        """
        if not self.agreed and (step % self.AGREE_EVERY == 0 or self.runtime.world_size == 1):
            late = budget and self.deadline is not None and time.monotonic() >= self.deadline
            own = self.WISH if self.wish else self.BUDGET if late else self.NOTHING
            if self.signal:
                own = 64 * (self.runtime.rank + 1) + self.signal
            self.agreed = self.runtime.largest(own)
        return bool(self.agreed)

    @property
    def asked(self) -> bool:
        """Whether someone wants the run to end now: it is not the time budget."""
        return self.agreed > self.BUDGET

    @property
    def reason(self) -> str:
        if self.agreed <= self.WISH:
            return "time budget spent" if self.agreed == self.BUDGET else self.wish or "asked to by another process"
        rank, number = divmod(self.agreed, 64)
        to_whom = f" to process {rank - 1}" if self.runtime.world_size > 1 else ""
        return f"signal {signal.Signals(number).name}{to_whom}"

    def while_they_come(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, or what comes of them until workers fail: then `failure` says why.

        With several processes the error is raised: the others are in the next step already.
        """
        try:
            yield from batches
        except RunError as error:
            if self.runtime.world_size > 1:
                raise
            self.failure = error


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise Interrupted within the block."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(f"signal {signal.Signals(number).name}", False)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
