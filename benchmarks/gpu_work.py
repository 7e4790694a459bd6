"""The processes that gpu.py measures in: one for all measurements, and a sweep for each study."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import psutil
import torch
from gpu_parts import Item, free_memory
from gpu_setup import Setup

from settings.errors import ConfigError, RunError, first_line
from studies.rows import read_rows
from studies.study import read_study
from utils import find_device

SAVING = 30.0  # seconds that a sweep gets to save its runs, after its time


class Ended(Exception):
    """A measurement did not finish; the message says why in a line.

    cut: for want of time, so that the same command may go on with it
    """

    def __init__(self, message: str, cut: bool = False):
        super().__init__(message)
        self.cut = cut


class Worker:
    """A process that measures, one measurement after another.

    It starts torch once for all of them. One that crashes it, or does not end, costs itself and a new start.

    log: file that takes what the process prints
    """

    def __init__(self, setup: Setup, log: str):
        self.setup, self.log = setup, log
        self.process: Any = None
        self.connection: Connection | None = None

    def start(self) -> Connection:
        """Start the process, unless it runs."""
        if self.process is not None and not self.process.is_alive():
            self.close()
        if self.connection is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, self.setup, self.log))
            self.process.start()
            theirs.close()
        return self.connection

    def measure(self, item: Item, limit: float) -> Iterator[common.Measures]:
        """Yield the rows of a measurement as they come, until `limit` on the clock of time.monotonic.

        Raises:
            Ended: it failed, the process died, or time was over.
        """
        connection, sent = self.start(), False
        while True:
            try:
                if not sent:
                    connection.send(item)
                    sent = True
                if not connection.poll(max(0.0, limit - time.monotonic())):
                    self.close()
                    raise Ended("time was over", cut=True)
                kind, content = connection.recv()
            except (EOFError, ConnectionError) as error:
                self.process.join()
                status = self.process.exitcode
                self.close()
                raise Ended(f"the process ended with status {status}; see {self.log}") from error
            if kind == "lost" or (item.last and kind != "row"):
                self.close()
            if kind == "end":
                return
            if kind in ("error", "lost"):
                raise Ended(content)
            yield content

    def close(self) -> None:
        """End the process and those that it started; the next measurement starts it anew."""
        if self.process is not None:
            end_tree(self.process.pid)
            self.process.join()
            assert self.connection is not None
            self.connection.close()
        self.process = self.connection = None


def serve(connection: Connection, setup: Setup, log: str) -> None:
    """Carry out the measurements that come through `connection`, in the process that `Worker` starts."""
    # A spawned process would spawn its own, each importing torch anew; here they start as a program's do.
    multiprocessing.set_start_method(None, force=True)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            item: Item = connection.recv()
            print(f"---- {item.part}: {item.name}", flush=True)
            try:
                assert item.function is not None
                for row in item.function(setup, *item.args):
                    connection.send(("row", row))
                connection.send(("end", None))
            except Exception as error:
                traceback.print_exc()
                # After a capture that broke torch has no way back either, though the GPU answers.
                ends = lost() or isinstance(error, RunError)
                connection.send(("lost" if ends else "error", f"{type(error).__name__}: {first_line(error)}"))
                if ends:
                    return
            free_memory()


def lost() -> bool:
    """Check whether the GPU answers no more, as after an illegal access, until another process takes it."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def end_tree(pid: int) -> None:
    """End a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        whole = psutil.Process(pid)
        for process in [*whole.children(recursive=True), whole]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def take_over(study: str, setup: Setup, data: str) -> int:
    """Copy the repository's rows of a study to where its sweep goes on, if this card made all of them, of these images.

    The sweep would ask for neither, and mix the times of two cards.

    Returns: how many runs need not be repeated.
    """
    name, target = Path(study).stem, Path(setup.out, "results")
    own = common.ROOT / "results"
    rows = read_rows(str(own / f"{name}.csv"))
    if not rows or not setup.on_gpu or (target / f"{name}.csv").exists():
        return 0
    runs = read_study(str(common.ROOT / study), "", []).runs
    digests = {run.settings_digest for run in runs}
    card = torch.cuda.get_device_name(find_device(setup.device, 0))
    if any(row["device"] != card or row["settings"] not in digests for row in rows):
        return 0
    if {Path(data).name} != {Path(run.config.data_path).name for run in runs}:
        return 0
    target.mkdir(parents=True, exist_ok=True)
    for part in (
        "_epochs",
        "_means",
        "_differences",
        "",
    ):  # the runs' own rows last: by them a sweep knows what is done
        with suppress(FileNotFoundError):
            shutil.copy(own / f"{name}{part}.csv", target)
    return len(rows)


def run_study(study: str, setup: Setup, data: str, parallel: int, limit: float, log: str) -> None:
    """Carry out a study with sweep.py until `limit`; its rows lie below `setup.out`, its runs below `setup.scratch`.

    Raises:
        Ended: some of its runs failed, or time was over; the same call goes on then.
    """
    with suppress(ConfigError):  # which the sweep tells
        taken = take_over(study, setup, data)
        if taken:
            print(f"{study}: {taken} runs are in results/ already", flush=True)
    seconds = limit - time.monotonic()
    command = [sys.executable, "sweep.py", study, "--parallel", str(parallel), "--time-budget", f"{max(1.0, seconds):.0f}s"]  # fmt: skip
    command += ["--results", os.path.abspath(os.path.join(setup.out, "results")), "--output-dir", os.path.abspath(os.path.join(setup.scratch, "trainings"))]  # fmt: skip
    command += [
        "--",
        *common.machine_flags(setup.device),
        "--clearml",
        "off",
        "--workers",
        str(setup.workers // parallel),
    ]
    command += [
        "--dataset",
        "imagefolder",
        "--data-path",
        os.path.abspath(data),
        "--decode-cache",
        os.path.abspath(setup.store),
    ]
    with open(log, "ab") as file:
        before = file.tell()
        process = subprocess.Popen(command, cwd=common.ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        status = process.wait(seconds + SAVING)
    except subprocess.TimeoutExpired:
        raise Ended("time was over", cut=True) from None
    finally:
        end_tree(process.pid)
    if status == 3:
        raise Ended("time was over", cut=True)
    if status:
        with open(log, "rb") as file:
            file.seek(before)
            lines = file.read().decode(errors="replace").strip().splitlines()
        raise Ended(lines[-1].removeprefix("error: ") if status == 2 and lines else f"some runs failed; see {log}")
