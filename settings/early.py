"""What the command line alone can answer, before torch is imported, which takes seconds."""

import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from settings.errors import ConfigError, tell
from settings.resolve import resolve
from settings.sources import read_command_line


def read_settings(argv: Sequence[str]) -> None:
    """Read the settings of a training; raise ConfigError where they are wrong in themselves."""
    read_command_line(argv)
    if not os.environ.get("CLEARML_TASK_ID"):  # whose settings come from a server
        resolve(argv)


def answer(argv: Sequence[str], read: Callable[[Sequence[str]], Any] = read_settings) -> None:
    """End the program for `--help` and for a command line that is wrong in itself; else return.

    Neither torch nor the data are looked at. A signal ends the program in one line from here on. Python looks for no
    garbage until `imported` is called: among what is imported next there is none, and it would take half a second.

    read: reads the command line, and raises ConfigError where it is wrong
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, nor is every terminal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        read(argv)
    except ConfigError as error:
        tell(error)
        sys.exit(2)
    gc.disable()


def imported() -> None:
    """Have Python look for garbage again, but not among what has been imported."""
    gc.freeze()
    gc.enable()


def leave(number: int, frame: Any) -> None:
    """End the program, which has begun nothing yet."""
    os.write(2, f"stopped: signal {signal.Signals(number).name}; nothing was saved\n".encode())
    os._exit(1)
