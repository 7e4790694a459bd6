"""How a run of a study is carried out: as a process of this machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import psutil

from reporting.folder import RunFolder
from studies.study import Run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "train.py")
LOG, PROCESS = "train.log", "process.json"  # in a run's folder: what it printed, and who trains it
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

    def start(self, run: Run) -> Attempt: ...

    def machine(self) -> dict[str, Any]:
        """Describe how a run has the machine, for its row."""


class Local:
    """Starts runs as processes of this machine; on a CPU each gets its share of the cores as threads."""

    def __init__(self, at_once: int):
        self.at_once = at_once
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = max(1, cores // at_once)

    def start(self, run: Run) -> Attempt:
        """Start the process of a run, or find the one that an earlier sweep has left training."""
        left = left_training(run.folder)
        if left is not None:
            return LeftProcess(run, left)
        return OwnProcess(run, self.threads)

    def machine(self) -> dict[str, Any]:
        return {"threads": self.threads, "at_once": self.at_once}


class OwnProcess:
    """A run that this sweep has started: the training, and where asked for the evaluation on held-out images."""

    def __init__(self, run: Run, threads: int):
        self.run, self.asked = run, False
        self.environment = dict(os.environ)
        if run.config.device in ("auto", "cpu"):
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        os.makedirs(run.folder, exist_ok=True)
        self.after = [] if run.held_out is None else [["-m", "studies.held_out", run.folder, run.held_out]]
        self.process = self.begin([PROGRAM, *run.flags, "--resume", "auto"])
        note_process(run.folder, self.process.pid)

    def begin(self, command: Sequence[str]) -> subprocess.Popen:
        """Start a process that writes to the run's log."""
        environment = {**self.environment, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
        with open(os.path.join(self.run.folder, LOG), "ab") as log:
            # A session of its own: Ctrl-C reaches the sweep alone, which tells each run once.
            return subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
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
        """Find the line that says why: the signal that killed it, its last error, else its last line."""
        status = self.process.returncode
        if status < 0:
            return f"killed by signal {signal.Signals(-status).name}"
        with open(os.path.join(self.run.folder, LOG), encoding="utf-8", errors="replace") as file:
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


def note_process(folder: str, pid: int) -> None:
    """Write down which process trains in a folder; its start time tells it from a later one of the same number."""
    with suppress(psutil.Error):  # ended already
        started = psutil.Process(pid).create_time()
        RunFolder(folder).write(PROCESS, json.dumps({"pid": pid, "started": started}))


def left_training(folder: str) -> psutil.Process | None:
    """Find the process that still trains in a folder, because the sweep that started it was killed."""
    noted = RunFolder(folder).read_json(PROCESS)
    with suppress(psutil.Error, TypeError, KeyError):
        process = psutil.Process(noted["pid"])
        if abs(process.create_time() - noted["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
