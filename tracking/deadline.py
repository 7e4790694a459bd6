"""Work in threads, with a limit: training never waits for a server that is gone."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

PATIENCE = 3.0  # seconds of waiting before the server is asked whether it is still there


def watched(work: Callable[[], None], limit: float, trouble: Callable[[], Any]) -> bool:
    """Do `work` in a thread; False if it takes longer than `limit` seconds, or there is `trouble` twice in a row."""
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
def never_fatal(consequence: str) -> Iterator[None]:
    """A failure within is told in a line, and is no failure of the run."""
    try:
        yield
    except Exception as error:  # of the SDK, the network, the server: anything
        reason = " ".join(str(error).split())[:200]
        print(f"ClearML: {consequence}: {type(error).__name__}: {reason}", flush=True)


abandoned = False  # a thread that waits for a server


def abandon(line: str) -> None:
    global abandoned
    abandoned = True
    print(line, flush=True)


def exit_now(code: int) -> NoReturn:
    """sys.exit; but not even Python's own end of threads waits for a server that is gone."""
    if abandoned:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)
