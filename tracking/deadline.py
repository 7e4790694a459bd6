"""Work in threads, with a limit: training never waits for a server that is gone."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

PATIENCE = 3.0  # seconds of waiting before the server is asked whether it is still there


def watched(work: Callable[[], None], limit: float, trouble: Callable[[], Any]) -> bool:
    """Do `work` in a thread for at most `limit` seconds, and return whether it was finished.

    trouble: asked every few seconds whether something is wrong; two times in a row end the waiting, too
    """
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline, silent = time.monotonic() + limit, 0
    while time.monotonic() < deadline and silent < 2:
        thread.join(PATIENCE)
        if not thread.is_alive():
            return True
        silent = silent + 1 if trouble() else 0
    return not thread.is_alive()


@contextmanager
def never_fatal(consequence: str, where: str = "ClearML") -> Iterator[None]:
    """Print any error within the block in one line and go on: it is no failure of the run.

    consequence: what the error leads to, in words
    """
    try:
        yield
    except Exception as error:  # of the SDK, the network, the server: anything
        print(f"{where}: {consequence}: {brief(error)}", flush=True)


def brief(error: BaseException) -> str:
    """Tell an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


abandoned = False  # a thread that waits for a server


def abandon(line: str | None = None) -> None:
    """Note that a thread still waits for a server: `exit_now` will not wait for it; print `line` if there is one."""
    global abandoned
    abandoned = True
    if line is not None:
        print(line, flush=True)


def exit_now(code: int) -> NoReturn:
    """End the program with status `code`, as sys.exit does unless a thread was abandoned.

    In that case the process ends at once: Python's own end would wait for threads, and so for a server that is gone.
    Ctrl-C and SIGTERM have nothing more to stop, and are not heard: the one would print where in Python's own end it came,
    the other change the status.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if abandoned:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)
