"""The error a user can mend, and how it is told."""

import os
import sys


class ConfigError(ValueError):
    """What a user wrote cannot be done. The message is one line: what was given, what is
    accepted, what to do. `main` prints it and ends with exit status 2."""

    def __init__(self, message: str):
        super().__init__(own_line(type(self), message))


def own_line(kind: type[Exception], message: str) -> str:
    """`message`, or what is left of it when torch's loader has raised a worker's error anew: a new error of the same
    type, whose message is the worker's traceback, which ends in the type's full name and the first message."""
    if not message.startswith(f"Caught {kind.__name__} in "):
        return message
    return message.strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def tell(error: Exception) -> None:
    """Print an error as one line on stderr; with several processes, which of them it was."""
    rank = os.environ.get("RANK", "0")
    print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {error}", file=sys.stderr)
