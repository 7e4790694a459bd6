"""What the benchmarks share: the machine's row, rounds in turn and their medians, processor time, tables, JSON."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import PIL
import psutil
import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts run in place; the program's modules lie one folder up

from reporting import records  # noqa: E402
from settings.errors import ConfigError  # noqa: E402
from settings.machine import cores  # noqa: E402
from utils import find_device  # noqa: E402

Measures = dict[str, Any]

EAGER = ["--cuda-graphs", "off"]  # have train.py launch a step's kernels one by one, on a GPU too

# ---- command line ----


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Build the command line that all benchmarks have.

    description: what is measured and how long it takes
    """
    parser = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto: cuda, then mps, then cpu (default: auto)")
    parser.add_argument("--json", metavar="FILE", default=str(ROOT / "benchmarks" / "results" / f"{name}.json"), help=f"a list of rows, which is added to (default: benchmarks/results/{name}.json)")  # fmt: skip
    parser.set_defaults(benchmark=name)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options for a folder of images."""
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder of images: with train/ in it, with class folders, or flat")  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N", default=10_000, help="use at most N images, evenly spread over the folder (default: 10000)")  # fmt: skip
    parser.add_argument("--scratch", metavar="DIR", help="where the store and the runs lie meanwhile; about 0.3 MB an image (default: the system's folder for temporary files)")  # fmt: skip


def positive(text: str) -> int:
    """Convert text of the command line to a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options; `flags` is what follows `--`, for train.py."""
    own, flags = list(argv), []
    if "--" in own:
        cut = own.index("--")
        own, flags = own[:cut], own[cut + 1 :]
    args = parser.parse_args(own)
    args.flags = flags
    return args


def machine_flags(device: str) -> list[str]:
    """List what train.py is told on this device, before the flags that follow `--`."""
    # An epoch of seconds would have its checkpoint, 330 MB of EfficientNetV2-S, written while the next one is timed.
    flags = ["--device", device, "--channels-last", "--checkpoint-every", "1h"]
    return flags + ["--amp"] if find_device(device, 0).type == "cuda" else flags


def run(main: Callable[[argparse.Namespace], list[Measures]], args: argparse.Namespace) -> int:
    """Measure with `main` and save its rows; return the exit status.

    What a user can mend is printed as one line, with exit status 2.
    """
    try:
        read_rows(args.json)  # a file that cannot be added to shows now, not after the measurement
        save(args, main(args))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ---- rows ----


def read_rows(path: str) -> list[Measures]:
    """Read the rows that a file of --json has so far.

    Raises:
        ConfigError: it is not JSON, or no list.
    """
    if not os.path.exists(path):
        return []
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--json {path} cannot be read as JSON ({error}); give another file") from error
    if not isinstance(rows, list):
        raise ConfigError(f"--json {path} holds no list of rows; give another file")
    return rows


def save(args: argparse.Namespace, rows: Sequence[Measures]) -> None:
    """Add `rows` to the file of --json, each with the machine, the versions and the settings it came from.

    No host or user name and no absolute path goes along: of a path its last part is kept.
    """
    left_out = ("json", "scratch", "device", "benchmark")
    settings = {name: portable(value) for name, value in vars(args).items() if name not in left_out}
    source = origin(args.benchmark, settings, args.device)
    lines = [json.dumps(row) for row in [*read_rows(args.json), *({**row, **source} for row in rows)]]
    os.makedirs(os.path.dirname(os.path.abspath(args.json)), exist_ok=True)
    with open(f"{args.json}.tmp", "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n")  # a row a line: a diff shows what was added
    os.replace(f"{args.json}.tmp", args.json)
    print(f"{len(rows)} rows added to {args.json}")


def origin(benchmark: str, settings: Mapping[str, Any], device: str) -> Measures:
    """Collect what every row says of where it comes from."""
    return {
        "benchmark": benchmark,
        "settings": settings,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def portable(value: Any) -> Any:
    """Shorten paths to their last part, in lists too; leave other values as they are."""
    if isinstance(value, list):
        return [portable(item) for item in value]
    return os.path.basename(os.path.normpath(value)) if isinstance(value, str) and os.sep in value else value


def machine(device: str) -> dict[str, Any]:
    """Describe the machine: processor, memory, GPU."""
    found = find_device(device, 0)
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": found.type,
        "gpu": torch.cuda.get_device_name(found) if found.type == "cuda" else None,
    }


def cpu_model() -> str:
    """Find the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """Find the commit of the code, as `records.commit` does, but ignore changes in benchmarks/results.

    Rows that earlier benchmarks have added do not make the code another one.
    """
    name = records.commit()
    if name is None or not name.endswith("-dirty"):
        return name
    command = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
    same = subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    return name.removesuffix("-dirty") if same else name


def print_table(rows: Sequence[Measures], columns: Mapping[str, str]) -> None:
    """Print `rows` for a terminal.

    columns: key to heading; a key that a row lacks leaves its place empty
    """
    cells = [list(columns.values())]
    for row in rows:
        cells.append([show(row.get(key)) for key in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def show(value: Any) -> str:
    """Format a measure for `print_table`; None as nothing."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
    return "" if value is None else str(value)


# ---- rounds ----


def interleave(ways: Mapping[str, Callable[[], Any]], repeats: int, discard: int = 1) -> dict[str, list[Any]]:
    """Measure each way once, then each once more, and so on, for `repeats` rounds.

    What slows the machine down for a while thus meets all ways. The first `discard` rounds, before those, warm caches
    and are not returned.
    """
    rounds: dict[str, list[Any]] = {way: [] for way in ways}
    for number in range(-discard, repeats):
        for way, measure in ways.items():
            print(f"  {'warm-up' if number < 0 else f'round {number + 1}/{repeats}'}: {way}", file=sys.stderr)
            measures = measure()
            if number >= 0:
                rounds[way].append(measures)
    return rounds


def median(values: Sequence[float | None]) -> float | None:
    """Compute the median of the numbers among `values`; None if there are none."""
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None


def medians(rounds: Sequence[Measures]) -> Measures:
    """Compute the median of each measure over a way's rounds; add the rounds, which show the spread."""
    return {key: median([measures[key] for measures in rounds]) for key in rounds[0]} | {"rounds": list(rounds)}


def ratio(rounds: Sequence[Measures], base: Sequence[Measures], key: str) -> float | None:
    """Compute the median of the ratios within each round.

    Not the ratio of the medians: within a round both sides met the same machine.
    """
    pairs = [(one[key], other[key]) for one, other in zip(rounds, base)]
    return median([one / other if one is not None and other else None for one, other in pairs])


# ---- processor time and memory ----


def workers_cpu_seconds() -> float:
    """Add up the user and system time so far of all processes below this one, live and ended."""
    seconds = os.times().children_user + os.times().children_system
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            seconds += sum(process.cpu_times()[:4])  # its own and of those it has seen the end of
    return seconds


def cpu_seconds(workers: int) -> float | None:
    """Add up the user and system time so far of this process and all below it.

    Returns: None where the system does not tell.
    """
    if workers == 0:
        return time.process_time()
    return time.process_time() + workers_cpu_seconds() if os.name == "posix" else None


def settle(seconds: float = 10.0) -> None:
    """Wait until the processes below this one have nothing left to do, at most `seconds`.

    Loaders read ahead; without this, one way's reading would run into the next way's turn.
    """
    deadline, before = time.monotonic() + seconds, workers_cpu_seconds()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = workers_cpu_seconds()
        if now - before < 0.02:
            return
        before = now


def resident_bytes(pid: int) -> int:
    """Measure the memory that `pid` and all below it hold, pages they share counted once.

    Returns: bytes; 0 where the system does not tell.
    """
    total = 0
    with suppress(psutil.NoSuchProcess):
        whole = psutil.Process(pid)
        for process in [whole, *whole.children(recursive=True)]:
            with suppress(psutil.Error, AttributeError):  # ended meanwhile; a system that does not count shared pages
                total += process.memory_full_info().pss
    return total


def fresh_process(function: Callable[..., Any], *args: Any, watch: bool = False) -> tuple[Any, float | None]:
    """Call `function(*args)` in a new process, which inherits no memory.

    watch: measure the most memory that it and the processes below it held; that takes a good part of a core

    Returns: what the function returned; that memory, GiB, None if it was not measured.

    Raises:
        ConfigError: raised there, or the process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, args))
    process.start()
    sender.close()
    peak = 0
    while not receiver.poll(0.05 if watch else None):
        if watch:
            peak = max(peak, resident_bytes(process.pid or 0))
    try:
        result = receiver.recv()
    except EOFError as error:
        process.join()
        raise ConfigError(f"a process of the benchmark ended with status {process.exitcode}; see above") from error
    process.join()
    if isinstance(result, ConfigError):
        raise result
    return result, peak / 2**30 if peak else None


def answer(sender: Any, function: Callable[..., Any], args: tuple) -> None:
    """Call `function` in the process that `fresh_process` started; send back its result or ConfigError."""
    # A spawned process would spawn its own, each importing torch anew; here they start as a program's do.
    multiprocessing.set_start_method(None, force=True)
    try:
        sender.send(function(*args))
    except ConfigError as error:
        sender.send(error)
