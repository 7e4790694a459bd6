"""What a command line alone answers, before torch is imported: that takes seconds."""

import os
import sys
from collections.abc import Sequence

from settings.errors import ConfigError, tell
from settings.resolve import resolve
from settings.sources import read_command_line


def answer(argv: Sequence[str]) -> None:
    """End the program for `--help`, and for settings that are wrong whatever torch and the data are; else return."""
    try:
        read_command_line(argv)
        if not os.environ.get("CLEARML_TASK_ID"):  # whose settings come from a server
            resolve(argv)
    except ConfigError as error:
        tell(error)
        sys.exit(2)
