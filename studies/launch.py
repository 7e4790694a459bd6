"""How a run of a study is carried out: as a process of this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import psutil

from learning.checkpoint import previous_checkpoint
from reporting.folder import RunFolder
from studies.study import Run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "train.py")
LOG = "train.log"  # in a run's folder: what it printed
STOPPED = 3  # exit status of a run that was stopped and saved


class Attempt(Protocol):
    """A run under way."""

    def poll(self) -> int | None:
        """Return train.py's exit status, STOPPED for a run that was cut; None as long as it goes on."""

    def stop(self) -> None:
        """Ask the run to save and end."""

    def reason(self) -> str:
        """Say in a line why the run failed."""


class Launcher(Protocol):
    """Starts runs.

    at_once: how many may be under way
    """

    at_once: int

    def find(self, runs: Sequence[Run]) -> dict[Run, Attempt]:
        """Find those of `runs` that a sweep which was killed has left under way."""

    def start(self, run: Run) -> Attempt: ...

    def machine(self) -> dict[str, Any]:
        """Describe how a run has the machine, for its row."""


class Local:
    """Starts runs as processes of this machine; each gets its share of the cores, for its threads or its workers.

    On a GPU they share that as well: its time goes round, its memory must hold all of them.
    """

    def __init__(self, at_once: int):
        self.at_once = at_once
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.share = max(1, cores // at_once)
        own = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        self.threads = int(own) if own.isdigit() and int(own) else self.share

    def find(self, runs: Sequence[Run]) -> dict[Run, Attempt]:
        left = processes_left(runs)
        return {run: LeftProcess(run, process) for run, process in left.items()}

    def start(self, run: Run) -> Attempt:
        flags = list(run.flags)
        if run.config.workers > self.share and self.at_once > 1 and not {"--workers", "-j"} & {*flags}:
            flags += ["--workers", str(self.share)]
        return OwnProcess(run, flags, self.threads)

    def machine(self) -> dict[str, Any]:
        return {"threads": self.threads, "at_once": self.at_once}


class OwnProcess:
    """A run that this sweep has started: the training, and where asked for the evaluation on held-out images."""

    def __init__(self, run: Run, flags: Sequence[str], threads: int):
        self.run, self.asked = run, False
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),
        }
        os.makedirs(run.folder, exist_ok=True)
        folder = RunFolder(run.folder)
        if not any(map(os.path.exists, (folder.checkpoint, previous_checkpoint(folder.checkpoint)))):
            folder.clear()  # nothing to go on from: what lies there is of a run whose row was removed
        self.log = folder.at(LOG)
        self.log_start = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        self.after = [] if run.held_out is None else [["-m", "studies.held_out", run.folder, run.held_out]]
        self.process = self.begin([PROGRAM, *flags, "--resume", "auto"])

    def begin(self, command: Sequence[str]) -> subprocess.Popen:
        """Start a process that writes to the run's log."""
        with open(self.log, "ab") as log:
            # A session of its own: Ctrl-C reaches the sweep alone, which tells each run once.
            return subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def poll(self) -> int | None:
        status = self.process.poll()
        if status == 0 and self.after:
            if self.asked:
                return STOPPED
            self.process = self.begin(self.after.pop(0))
            return None
        # Told to stop before it could listen, or while it closed
        return STOPPED if self.asked and status in (-signal.SIGTERM, 128 + signal.SIGTERM) else status

    def stop(self) -> None:
        self.asked = True
        self.process.terminate()

    def reason(self) -> str:
        """Find what says why: the signal that killed it, its last error, else its last line."""
        status = self.process.returncode
        if status < 0:
            name = signal.Signals(-status).name
            return f"killed by signal {name}{', as when memory runs out' if name == 'SIGKILL' else ''}"
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(self.log_start)
            lines = [line.strip() for line in file if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")


class LeftProcess:
    """A run that a killed sweep has left training: not our child, so how it ended shows in its folder."""

    def __init__(self, run: Run, process: psutil.Process):
        self.run, self.process = run, process

    def poll(self) -> int | None:
        with suppress(psutil.Error):
            if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
                return None
        finished = RunFolder(self.run.folder).summary() is not None and self.run.held_out is None
        return 0 if finished else STOPPED  # started again, which finds what there is

    def stop(self) -> None:
        with suppress(psutil.Error):
            self.process.terminate()

    def reason(self) -> str:
        return "ended without a word"  # never asked: it finished, or goes on in a new process


def processes_left(runs: Sequence[Run]) -> dict[Run, psutil.Process]:
    """Find the processes that train these runs already, because the sweep that started them was killed.

    They are known by their command line: a note of their number in a file might not have been written in time.
    """
    places = {os.path.realpath(run.folder): run for run in runs}
    found: dict[Run, dict[int, psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # ended meanwhile, or not ours to ask
            words = process.cmdline()
            if PROGRAM in words and "--output-dir" in words:
                folder = words[words.index("--output-dir") + 1]
            elif "studies.held_out" in words:
                folder = words[words.index("studies.held_out") + 1]
            else:
                continue
            run = places.get(os.path.realpath(os.path.join(process.cwd(), folder)))
            if run is not None and process.status() != psutil.STATUS_ZOMBIE:
                found.setdefault(run, {})[process.pid] = process
    left = {}
    for run, processes in found.items():  # forked workers have the command line of their parent
        with suppress(psutil.Error, StopIteration):
            left[run] = next(process for process in processes.values() if process.ppid() not in processes)
    return left
