"""How a run of a study is carried out: as a process of this machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import psutil

from learning.checkpoint import previous_checkpoint
from reporting.folder import BEST, SUMMARY, RunFolder
from settings.errors import ConfigError
from settings.machine import cores
from studies.study import Run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "train.py")
LOG = "train.log"  # in a run's folder: what it printed
NOTE = "study.json"  # there: the digest of the settings it is trained with, and how it has the machine
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
        """Find those of `runs`, which have no row, that a sweep which was killed has left under way.

        Raises:
            ConfigError: what a run's folder holds is of other settings.
        """

    def start(self, run: Run) -> Attempt: ...

    def machine(self, run: Run) -> dict[str, Any]:
        """Describe how a run has had the machine, for its row."""


class Local:
    """Starts runs as processes of this machine; each gets its share of the cores, for its threads or its workers.

    On a GPU they share that as well: its time goes round, its memory must hold all of them.
    """

    def __init__(self, at_once: int):
        self.at_once = at_once
        self.share = max(1, cores() // at_once)
        own = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        threads = int(own) if own.isdigit() and int(own) else self.share
        self.each = {"threads": threads, "at_once": at_once}

    def find(self, runs: Sequence[Run]) -> dict[Run, Attempt]:
        check_folders(runs)
        left = processes_left(runs)
        return {run: LeftProcess(process) for run, process in left.items()}

    def start(self, run: Run) -> Attempt:
        flags = list(run.flags)
        if run.config.workers > self.share and self.at_once > 1 and not {"--workers", "-j"} & {*flags}:
            flags += ["--workers", str(self.share)]
        return OwnProcess(run, flags, self.each)

    def machine(self, run: Run) -> dict[str, Any]:
        note = noted(run)
        return {name: note.get(name, value) for name, value in self.each.items()}


class OwnProcess:
    """A run that this sweep has started: the training, and where asked for the evaluation on held-out images.

    One that has trained to its end before, but has no row, is not trained again.

    machine: how it has the machine: "threads", and what else its row is to tell

    Raises:
        ConfigError: as `check_folders`.
    """

    def __init__(self, run: Run, flags: Sequence[str], machine: Mapping[str, int]):
        check_folders([run])
        self.run, self.asked = run, False
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(machine["threads"]),
            "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),
        }
        os.makedirs(run.folder, exist_ok=True)
        folder = RunFolder(run.folder)
        self.steps: list[list[str]] = []
        if not (is_trained(run) and noted(run).get("settings") == run.settings_digest):
            if not has_checkpoint(run):
                folder.clear()  # nothing to go on from: it failed or was cut before that, or its best weights are gone
            folder.write(NOTE, json.dumps({"settings": run.settings_digest, **machine}))
            self.steps.append([PROGRAM, *flags, "--resume", "auto"])
        if run.held_out is not None:
            self.steps.append(["-m", "studies.held_out", run.folder, run.held_out])
        self.log = folder.at(LOG)
        self.log_start = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        self.process = self.begin(self.steps.pop(0)) if self.steps else None

    def begin(self, command: Sequence[str]) -> subprocess.Popen:
        """Start a process that writes to the run's log."""
        with open(self.log, "ab") as log:
            # A session of its own: Ctrl-C reaches the sweep alone, which tells each run once.
            return subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def poll(self) -> int | None:
        status = 0 if self.process is None else self.process.poll()
        if status == 0 and self.steps:
            if self.asked:
                return STOPPED
            self.process = self.begin(self.steps.pop(0))
            return None
        # Told to stop before it could listen, before it had saved anything, or while it closed
        return STOPPED if self.asked and status in (1, -signal.SIGTERM, 128 + signal.SIGTERM) else status

    def stop(self) -> None:
        self.asked = True
        if self.process is not None:
            self.process.terminate()

    def reason(self) -> str:
        """Find what says why: the signal that killed it, its last error, else its last line."""
        status = 0 if self.process is None else self.process.returncode
        if status < 0:
            name = signal.Signals(-status).name
            return f"killed by signal {name}{', as when memory runs out' if name == 'SIGKILL' else ''}"
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(self.log_start)
            lines = [line.strip() for line in file if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")


class LeftProcess:
    """A run that a killed sweep has left training: not our child, so how it ended shows in its folder.

    It always ends as stopped, and is started again, which finds and checks what there is.
    """

    def __init__(self, process: psutil.Process):
        self.process = process

    def poll(self) -> int | None:
        with suppress(psutil.Error):
            if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
                return None
        return STOPPED

    def stop(self) -> None:
        with suppress(psutil.Error):
            self.process.terminate()

    def reason(self) -> str:
        return "ended without a word"  # never asked: it goes on in a new process


def has_checkpoint(run: Run) -> bool:
    path = RunFolder(run.folder).checkpoint
    return any(map(os.path.exists, (path, previous_checkpoint(path))))


def is_trained(run: Run) -> bool:
    """Check whether a run has trained to its end here; one that was cut has best weights as well."""
    folder = RunFolder(run.folder)
    return folder.has(BEST) and folder.has(SUMMARY)


def noted(run: Run) -> dict[str, Any]:
    """Read what a sweep has noted of the run in a folder; nothing where none has."""
    return RunFolder(run.folder).read_json(NOTE) or {}


def check_folders(runs: Iterable[Run]) -> None:
    """Check that what lies in the folders of runs, which have no row, is of the settings that they have now.

    What was cut would go on under its old settings, what has finished would be lost.

    Raises:
        ConfigError: naming the folders where it is not.
    """
    others = []
    for run in runs:
        now, goes_on = run.settings_digest, has_checkpoint(run)
        # Of one that goes on and that no sweep has noted, train.py finds it out
        then = noted(run).get("settings", now if goes_on else None)
        if then != now and (goes_on or is_trained(run)):
            others.append(run.folder)
    if others:
        raise ConfigError(
            f"runs that have no row, and are not of the settings now, lie in {', '.join(others)}; remove what need not be "
            "kept, or give another --output-dir"
        )


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
