"""Carry out a study: every run of its conditions and seeds, and the rows that come of them.

    python sweep.py configs/studies/dropout.yaml --plan
    python sweep.py configs/studies/dropout.yaml
    python sweep.py configs/studies/dropout_small.yaml --parallel 2 -- --data-path data --workers 0
    python sweep.py configs/studies/dropout.yaml --on clearml --queue default

What follows `--` goes to every run. All runs are checked before the first starts. Finished runs have a row in
`results/` and are not run again; a run that was cut goes on where it stopped. A run that fails does not end the rest.

Exit status: 0 all runs finished; 1 some failed, or a disk or server did; 2 wrong input; 3 stopped before the end, the same command continues.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from filelock import FileLock, Timeout

from images.datasets import load_data
from settings.errors import ConfigError, RunError, tell
from settings.values import seconds
from studies.held_out import load_held_out
from studies.launch import STOPPED, Local
from studies.rows import Results
from studies.runner import Runner, fault
from studies.screen import Screen
from studies.study import Study, read_study
from tracking.queue import Queue
from utils import Runtime

# What data are, and which of them: runs with the same have the same images
DATA = (
    "dataset", "data_path", "train_split", "val_split", "hub_config", "image_column", "label_column", "train_list", "val_list",
    "on_bad_image",
)  # fmt: skip


def main(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Carry out the study; return the exit status."""
    name = os.path.splitext(os.path.basename(options.study))[0]
    folder = os.path.join(options.output_dir, name)
    deadline = None if options.time_budget is None else time.monotonic() + seconds(options.time_budget)
    study = read_study(options.study, folder, flags)
    results = Results(study, options.results)  # wrong ones are told before data are looked for
    with Screen(study) as screen:
        if options.plan:
            try:
                screen.plan(count_images(study, fetch=False), results.finished())
            except ConfigError as error:
                screen.plan(None, results.finished(), str(error))
            return 0
        images = count_images(study)
        lock = os.path.join(options.results, f".{name}.lock")
        with (
            alone(os.path.join(folder, ".lock"), f"works in {folder}; wait for it, or give another --output-dir"),
            alone(lock, f"writes {results.path()}; wait for it, or give another --results"),
        ):
            results.read()  # again: a sweep that has just ended may have written some
            screen.plan(images, results.finished())
            launcher = Queue(options.queue, study.runs) if options.on == "clearml" else Local(options.parallel)
            status = Runner(study, results, launcher, images, deadline, screen.update, options.keep_checkpoints).run()
        screen.outcome(results.rows)
    return status


def count_images(study: Study, fetch: bool = True) -> dict[str, int]:
    """Count the training images of each condition; all data are found and looked through on the way.

    fetch: download what the settings say may be downloaded, here and once

    Raises:
        ConfigError: naming the condition whose data are not there.
    """
    counts: dict[tuple, int] = {}
    found, runtime = {}, Runtime(device=torch.device("cpu"))
    for run in study.runs:
        config = run.config if fetch else replace(run.config, download=False)
        key = (run.held_out, *(getattr(config, name) for name in DATA))
        if key not in counts:
            try:
                held_out = run.held_out
                data = load_data(config, runtime) if held_out is None else load_held_out(config, held_out, runtime)
            except ConfigError as error:
                raise ConfigError(f"condition {run.condition}: {error}") from error
            counts[key] = len(data.train)
        found[run.condition] = counts[key]
    return found


@contextmanager
def alone(lock: str, does: str) -> Iterator[None]:
    """Let no other sweep hold the file `lock` within the block; the lock of a dead one does not count.

    does: what the other one does, and what helps

    Raises:
        ConfigError: another holds it.
    """
    os.makedirs(os.path.dirname(lock) or ".", exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another sweep {does}") from error
    except NotImplementedError:
        pass  # a disk that knows no locks
    try:
        yield
    finally:
        held.release()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise argparse's message as a ConfigError."""
        raise ConfigError(message)


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: the sweep's own options, and what follows `--` for the runs."""
    own, flags = list(argv), []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    parser = Parser(
        "sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", help="a file such as those in configs/studies/")
    parser.add_argument("--plan", action="store_true", help="print the runs and what they cost, train nothing")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once; on a CPU each gets its share of the cores (default: 1)")  # fmt: skip
    parser.add_argument("--on", choices=("here", "clearml"), default="here", help="where runs are carried out; clearml: by the agents of --queue (default: here)")  # fmt: skip
    parser.add_argument("--queue", metavar="NAME", help="of ClearML")
    parser.add_argument("--time-budget", metavar="TIME", help="stop after this long (90s, 25m, 1.5h), saved; exit status 3")  # fmt: skip
    parser.add_argument("--output-dir", default="runs/studies", metavar="DIR", help="below it each study and run has a folder (default: runs/studies)")  # fmt: skip
    parser.add_argument(
        "--results", default="results", metavar="DIR", help="where the rows are kept (default: results)"
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep those of finished runs, not only their best weights")  # fmt: skip
    options = parser.parse_args(own)
    if options.parallel < 1:
        raise ConfigError(f"--parallel must be 1 or more, got {options.parallel}")
    if (options.on == "clearml") != (options.queue is not None):
        raise ConfigError("--on clearml and --queue NAME belong together; give both or neither")
    return options, flags


def run(argv: Sequence[str]) -> int:
    """Run the program; return the exit status. What goes wrong outside of a run is told in one line."""
    try:
        return main(*read_options(argv))
    except ConfigError as error:
        tell(error)
        return 2
    except (RunError, OSError) as error:
        tell(f"error: {fault(error)}")
        return 1
    except KeyboardInterrupt:
        tell("stopped; the same command goes on")
        return STOPPED


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
