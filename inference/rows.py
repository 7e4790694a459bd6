"""The rows of predictions: a table or an object a line, on standard output or in a file."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO
from uuid import uuid4

from inference.predictions import Prediction
from learning.checkpoint import naming_fault, sync_folder
from settings.errors import ConfigError, RunError, tell


class Csv:
    """Rows of a table: the image, its most probable classes each with its probability, and an error.

    Names of files stand there byte for byte, in UTF-8 or not.
    """

    def __init__(self, classes: Sequence[str], top: int):
        self.classes, self.top = classes, top

    def head(self) -> str:
        numbers = range(1, self.top + 1)
        return self.line(["image", *(f"{what}_{i}" for i in numbers for what in ("class", "probability")), "error"])

    def row(self, prediction: Prediction) -> str:
        cells = [
            cell
            for number, probability in zip(prediction.classes, prediction.probabilities)
            for cell in (self.classes[number], f"{probability:.6g}")
        ] or [""] * (2 * self.top)
        return self.line([prediction.path, *cells, prediction.fault])

    @staticmethod
    def line(cells: Sequence[str]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\r\n").writerow(cells)  # by which it knows that \r and \n need quotes
        return text.getvalue().removesuffix("\r\n") + "\n"


class JsonLines:
    """Rows as JSON objects. Bytes of names that are no UTF-8 become lone surrogates, as Python's os.fsdecode has them."""

    def __init__(self, classes: Sequence[str], top: int):
        self.classes = classes

    def head(self) -> str:
        return ""

    def row(self, prediction: Prediction) -> str:
        if prediction.fault:
            return json.dumps({"image": prediction.path, "error": prediction.fault}) + "\n"
        pairs = zip(prediction.classes, prediction.probabilities)
        found = [{"class": self.classes[number], "probability": float(f"{share:.6g}")} for number, share in pairs]
        return json.dumps({"image": prediction.path, "predictions": found}) + "\n"


FORMATS: dict[str, type[Csv] | type[JsonLines]] = {"csv": Csv, "jsonl": JsonLines}


class Output:
    """Where rows go.

    name: of the file, for people
    failed: something could not be written
    """

    def __init__(self, file: IO[bytes], name: str):
        self.file, self.name = file, name
        self.failed = False

    def write(self, text: str) -> None:
        """Write a row.

        On standard output that is one call of the system: whatever ends the program, a row is there whole or not at all
        (in a pipe, up to the 4,096 bytes that the system takes at once).

        Raises:
            BrokenPipeError: no one reads any more.
            RunError: it cannot be written.
        """
        row = text.encode("utf-8", "surrogateescape")
        try:
            while row:
                row = row[self.file.write(row) or 0 :]
        except BrokenPipeError:
            raise
        except OSError as error:
            self.failed = True
            raise RunError.of_disk(error, self.name) from error


@contextmanager
def opened(path: str | None, overwrite: bool = False, parts: str = "") -> Iterator[Output]:
    """Open standard output; or a file, which appears when the block has ended, and never if an error ends it.

    What is written lies beside it until then, by a name of its own: another run may be writing the same file.

    overwrite: replace a file that has come meanwhile; else it stays, and what was written stays beside it
    parts: what was written when something else ended the block, for people, if that is of use: it then stays beside it

    Raises:
        RunError: the file cannot be written, or has come meanwhile.
    """
    if path is None:
        if sys.stdout is None:
            raise ConfigError("standard output is closed, where the rows would go; open it, or give --output FILE")
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as stdout:
            yield Output(stdout, "standard output")
        return
    beside = f"{path}.{uuid4().hex[:8]}.tmp"
    output = None
    try:
        with naming_fault(path):
            file = open(beside, "xb", buffering=0)  # noqa: SIM115, closed below; a full disk shows in `Output.write`
        with file:
            output = Output(file, path)
            yield output
            with naming_fault(path):
                os.fsync(file.fileno())
    except BaseException as error:
        kept = False
        with suppress(OSError):  # hours may lie in it
            kept = bool(parts) and output is not None and not output.failed and os.path.getsize(beside) > 0
        if not kept:
            with suppress(OSError):
                os.remove(beside)
            raise
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{error}; {parts} lie in {beside}") from error
        tell(f"{parts} lie in {beside}")
        raise
    if not overwrite and os.path.lexists(path):
        raise RunError(f"{path} has come meanwhile, and stays; what was written lies in {beside}")
    with naming_fault(path):
        os.replace(beside, path)
        sync_folder(os.path.dirname(path))
