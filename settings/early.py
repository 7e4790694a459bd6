"""What the command line alone can answer, before torch is imported, which takes seconds."""

import io
import os
import sys
from collections.abc import Sequence

from settings.errors import ConfigError, tell
from settings.resolve import resolve
from settings.sources import read_command_line


def answer(argv: Sequence[str]) -> None:
    """End the program for `--help` and for settings that are wrong in themselves; else return.

    Neither torch nor the data are looked at.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, nor is every terminal
    try:
        read_command_line(argv)
        if not os.environ.get("CLEARML_TASK_ID"):  # whose settings come from a server
            resolve(argv)
    except ConfigError as error:
        tell(error)
        sys.exit(2)
