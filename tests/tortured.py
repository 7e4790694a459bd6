"""The runs that torture.py tortures: in which forms, what they end with when left alone, what is wrong with others."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from programs import FORKS, SMALL, Forked, Started, end_all, environment
from runs import STAGED, STRONG, assert_same_bits, checkpoint, make_tree, metrics

from reporting.folder import RunFolder
from settings.errors import RunError

SMALL_SHM = "/dev/shm is too small"
LIMIT = 120.0  # seconds in which a small run ends, on a busy machine, too

# Forms of runs: flags, processes.
PLAIN = "--stages 2 --epochs 4 --train-crop-size 32 48 --decode-cache off".split()
FORMS = {
    "one process": ([*PLAIN, "--workers", "0"], 1),
    "EMA, RandAugment, mixup, RMSprop, two workers": ([*STAGED, *STRONG, "--workers", "2", "--decode-cache", "off"], 1),
    "a store being built, saved every third epoch": (
        [*"--stages 3 --epochs 6 --train-crop-size 32 48 --workers 1 --checkpoint-every 3".split(), "--decode-cache"], 1,
    ),
    "two processes": ([*PLAIN, *"--batch-size 4 --workers 1".split()], 2),
}  # fmt: skip


class Count:
    """One row: what was done, how often, and what of it was spoilt."""

    def __init__(self, what: str, expected: str):
        self.what, self.expected, self.times, self.spoilt, self.notes = what, expected, 0, 0, {}
        self.begun = time.monotonic()

    def note(self, outcome: str) -> None:
        self.times += 1
        self.notes[outcome] = self.notes.get(outcome, 0) + 1

    def spoil(self, reason: str) -> None:
        self.spoilt += 1
        if self.spoilt <= 3:
            print(f"SPOILT: {self.what}: {reason}", file=sys.stderr, flush=True)

    def row(self) -> dict:
        return {
            "what": self.what, "expected": self.expected, "times": self.times, "spoilt": self.spoilt,
            "outcomes": self.notes, "seconds": round(time.monotonic() - self.begun),
        }  # fmt: skip


class Form:
    """A form of run, the bits it ends with when left alone, and how long it takes."""

    def __init__(self, name: str, folder: Path):
        self.flags, self.processes = FORMS[name]
        self.name, self.folder, self.tree = name, folder, make_tree(folder / "images")
        begun = time.monotonic()
        codes, printed = self.finish(self.start("whole"))
        assert codes == self.processes * [0], printed
        self.seconds = time.monotonic() - begun

    def start(self, out: str, *more: str) -> list:
        """Start the processes of a run."""
        flags = [*SMALL, *self.flags, *([str(self.folder / "kept")] if self.flags[-1] == "--decode-cache" else [])]
        flags += ["--data-path", str(self.tree), "--output-dir", str(self.folder / out), *more]
        if self.flags[-1] == "--decode-cache" and not random.randrange(2):
            shutil.rmtree(self.folder / "kept", ignore_errors=True)  # built anew
        own = {"IMPATIENCE": "5"} | ({"SMALL_SHM": "yes"} if self.name == SMALL_SHM and not more else {})
        if self.processes > 1:
            flags += ["--dist-url", f"file://{tempfile.mkdtemp(dir=self.folder)}/meeting"]
        kind = Forked if FORKS else Started
        return [
            kind(
                "tests/impatient.py", flags,
                environment(own | ({"RANK": str(rank), "WORLD_SIZE": str(self.processes)} if self.processes > 1 else {})),
                own_session=True,
            )
            for rank in range(self.processes)
        ]  # fmt: skip

    def finish(self, processes: list, limit: float = LIMIT) -> tuple[list[int], str]:
        """Wait for processes; return their statuses and what they printed on stderr."""
        end = time.monotonic() + limit
        codes = []
        for process in processes:
            try:
                code = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                kill([process], signal.SIGKILL)
                process.wait()
                code = 999  # it would not end
            codes.append(code)
        return codes, "".join(process.printed()[1] for process in processes)

    def resumed(self, out: str) -> str:
        """Let a run go on to its end; return what is wrong with it, "" if nothing."""
        codes, printed = self.finish(self.start(out, "--resume", "auto"))
        if codes != self.processes * [0]:
            return f"resumed with {codes}: {printed[-400:]}"
        return self.differs(out)

    def differs(self, out: str) -> str:
        """Say where a finished run differs from the one left alone."""
        ours, theirs = (checkpoint(self.folder / name) for name in (out, "whole"))
        try:
            for part in ("model", "model_ema", "optimizer"):
                assert_same_bits(ours.get(part), theirs.get(part))
            best, other = (RunFolder(str(self.folder / name)).best_weights() for name in (out, "whole"))
            assert_same_bits(dict(best), dict(other))
            for mine, other in zip(metrics(self.folder / out), metrics(self.folder / "whole"), strict=True):
                assert [mine[key] for key in ("epoch", "lr", "loss", "top1")] == [other[key] for key in ("epoch", "lr", "loss", "top1")]  # fmt: skip
        except (AssertionError, RunError, ValueError) as error:
            return f"{type(error).__name__} {error}"[:300] or "other bits"
        left = [str(path) for path in self.folder.rglob("*.tmp")]
        left += [str(path) for path in (self.folder / "kept").glob("*.images.*")]
        return f"left: {left}" if left else ""


def kill(processes: list, number: int, group: bool = True) -> None:
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process.pid, number)


@contextmanager
def form(name: str) -> Iterator[Form]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            yield Form(name, Path(folder))
        finally:
            end_all()
