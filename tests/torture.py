"""Torture runs, and count what comes of it: kills, flipped bits, signals, disks and workers that fail.

    python tests/torture.py                     all of it, each form at least once: about ten minutes on two cores
    python tests/torture.py --minutes 600       as often as that time allows
    python tests/torture.py kills flips         some of it
    python tests/torture.py --save, --write     keep the counts; write them, and fuzz.py's, into docs/reliability.md

Each run is of the tests' size. It counts as spoilt if it does not end with the bits of a run left alone, prints a
traceback, waits too long, or leaves files behind; the first few are described on stderr, and the status is then 1.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import tiny  # noqa: E402, F401
import torch  # noqa: E402
from programs import SMALL, Forked, end_all, environment, wait_until  # noqa: E402
from runs import assert_same_bits, make_tree, metrics  # noqa: E402
from tortured import FORMS, SMALL_SHM, Count, Form, form, kill  # noqa: E402

from Graphs.marks import markdown, write_tables  # noqa: E402
from learning.checkpoint import Checkpoint, Damaged, read_safely  # noqa: E402
from learning.weights import read_weights  # noqa: E402
from reporting.records import commit  # noqa: E402
from settings.errors import ConfigError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
FUZZED = ROOT / "results" / "reliability_data.json"  # of fuzz.py
PAGE = ROOT / "docs" / "reliability.md"

# ---- kills and signals at any moment ----


def struck(name: str, seconds: float, number: int, row: Count, most: int) -> None:
    """Send a signal at random moments of a run, up to `most` times before it is left to finish; so for `seconds`."""
    wanted = {0, -number} | (set() if number == signal.SIGKILL else {1, 3})  # killed: Python was not up yet
    with form(name) as runs:
        end, run = time.monotonic() + seconds, 0
        while not run or time.monotonic() < end:
            out, done, run = f"run{run}", False, run + 1
            for _ in range(random.randint(1, most)):
                processes = runs.start(out, "--resume", "auto")
                time.sleep(random.uniform(0, 1.2 * runs.seconds))
                before = [process.poll() for process in processes]
                at = time.monotonic()
                kill(processes, number, group=bool(random.randrange(2)))
                codes, printed = runs.finish(processes)
                if None not in before:  # it was over
                    done = True
                    break
                row.note({-number: "killed", 999: "would not end"}.get(codes[0], f"status {codes[0]}"))
                begun = "in become" not in printed  # else in the fork server, where a program has its own first lines
                if not set(codes) <= wanted or ("Traceback" in printed and begun):
                    row.spoil(f"{name}: statuses {codes}: {printed[-400:]}")
                elif number != signal.SIGKILL and time.monotonic() - at > 10 + runs.seconds:
                    row.spoil(f"{name}: ended after {time.monotonic() - at:.0f} s")
                if codes[0] == 0:
                    done = True
                    break
            wrong = runs.differs(out) if done and (runs.folder / out / "summary.json").exists() else runs.resumed(out)
            if wrong:
                row.spoil(f"{name}: {wrong}")
            shutil.rmtree(runs.folder / out, ignore_errors=True)


def kills(seconds: float) -> Iterator[Count]:
    """SIGKILL at any moment, of the program alone or with its workers; in each form."""
    for name in FORMS:
        row = Count(f"SIGKILL at any moment: {name}", "resumed to the same bits")
        struck(name, seconds / len(FORMS), signal.SIGKILL, row, most=12)
        yield row


def signals(seconds: float) -> Iterator[Count]:
    """SIGTERM and SIGINT at any moment."""
    for number in (signal.SIGTERM, signal.SIGINT):
        for name in FORMS:
            row = Count(f"{number.name} at any moment: {name}", "a line, status 3, 1 or 0, resumed to the same bits")
            struck(name, seconds / len(FORMS) / 2, number, row, most=4)
            yield row


# ---- files that rot ----


def flips(seconds: float) -> Iterator[Count]:
    """Single bits of checkpoint, --weights and best weights; and files cut or overwritten."""
    readers: dict[str, tuple[str, Callable]] = {
        "checkpoint.pth": ("checkpoint.pth", lambda path: Checkpoint.load(path).to_dict()),
        "--weights": ("checkpoint.pth", lambda path: read_weights("efficientnet_v2_tiny", path)),
        "model_best.pth": ("model_best.pth", read_safely),
    }
    with form("one process") as runs:
        for name, (file, read) in readers.items():
            path = runs.folder / "damaged.pth"
            whole = (runs.folder / "whole" / file).read_bytes()
            path.write_bytes(whole)
            sound = read(str(path))
            for what, damage in DAMAGES.items():
                row = Count(f"{what}: {name}", "refused, or nothing of it is lost")
                end = time.monotonic() + seconds / 2 / len(readers) / len(DAMAGES)
                while not row.times or time.monotonic() < end:
                    path.write_bytes(damage(bytearray(whole)))
                    try:
                        found = read(str(path))
                        assert_same_bits(found, sound)
                        row.note("the same tensors")
                    except (ConfigError, Damaged):
                        row.note("refused")
                    except AssertionError:
                        row.note("other tensors")
                        row.spoil("read, with other tensors")
                yield row
        row = Count("a bit of checkpoint.pth flipped, then --resume auto", "the one before it taken, the same bits")
        end = time.monotonic() + seconds / 2
        while not row.times or time.monotonic() < end:
            out = runs.folder / f"rot{row.times}"
            processes = runs.start(out.name)
            wait_until(lambda out=out: (out / "checkpoint_previous.pth").exists(), "two checkpoints")
            kill(processes, signal.SIGKILL)
            runs.finish(processes)
            file = out / "checkpoint.pth"
            file.write_bytes(DAMAGES["a bit flipped"](bytearray(file.read_bytes())))
            row.note("resumed")
            wrong = runs.resumed(out.name)
            if wrong:
                row.spoil(wrong)
        yield row


def flipped(content: bytearray) -> bytes:
    at = random.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    return bytes(content)


def overwritten(content: bytearray) -> bytes:
    at = random.randrange(len(content) - 512)
    content[at : at + 512] = random.randbytes(512)
    return bytes(content)


DAMAGES: dict[str, Callable[[bytearray], bytes]] = {
    "a bit flipped": flipped,
    "512 bytes overwritten": overwritten,
    "cut short": lambda content: bytes(content[: random.randrange(len(content))]),
}


# ---- machines that fail ----


def vanish(runs: Form, out: Path, processes: list) -> Callable[[], None]:
    shutil.move(out, out.with_suffix(".away"))

    def back() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(out.with_suffix(".away"), out)

    return back


def limit_files(runs: Form, out: Path, processes: list) -> Callable[[], None]:
    psutil.Process(processes[0].pid).rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))
    return lambda: None


def to_worker(number: int) -> Callable:
    def send(runs: Form, out: Path, processes: list) -> Callable[[], None]:
        children = wait_until(lambda: psutil.Process(processes[0].pid).children(), "a worker")
        children[0].send_signal(number)
        return lambda: None

    return send


def to_rank(number: int) -> Callable:
    def send(runs: Form, out: Path, processes: list) -> Callable[[], None]:
        os.kill(processes[1].pid, number)
        return lambda: kill(processes, signal.SIGKILL)

    return send


def of_store(change: Callable) -> Callable:
    def spoil(runs: Form, out: Path, processes: list) -> Callable[[], None]:
        for path in (runs.folder / "kept").glob("*.images"):
            change(path)
        return lambda: None

    return spoil


def fill(runs: Form, out: Path, processes: list) -> Callable[[], None]:
    with suppress(OSError), open(out / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return (out / "filler").unlink


@contextmanager
def disk_of_its_own(folder: Path, wanted: bool) -> Iterator[None]:
    """Mount a disk of 4 MiB, in memory, at `folder`."""
    if not wanted:
        yield
        return
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FULL = "its disk is full"  # this and SMALL_SHM only root can have
LONG = "--stages 2 --epochs 400 --train-crop-size 32 48".split()
FAULTS: dict[str, tuple[list[str], int, Callable, set[int]]] = {
    "the folder vanishes": ([*LONG, "--decode-cache", "off", "--workers", "0"], 1, vanish, {1}),
    "files may not grow any more (EFBIG)": ([*LONG, "--decode-cache", "off", "--workers", "0"], 1, limit_files, {1}),
    FULL: ([*LONG, "--decode-cache", "off", "--workers", "0"], 1, fill, {1}),
    SMALL_SHM: ([*LONG, "--decode-cache", "off", "--workers", "2"], 1, lambda *_: lambda: None, {1}),
    "a worker is killed": ([*LONG, "--decode-cache", "off", "--workers", "2"], 1, to_worker(signal.SIGKILL), {1}),
    "a worker is halted": ([*LONG, "--decode-cache", "off", "--workers", "2"], 1, to_worker(signal.SIGSTOP), {1}),
    "a process of two is killed": ([*LONG, "--decode-cache", "off", "--workers", "0"], 2, to_rank(signal.SIGKILL), {1}),
    "a process of two is halted": ([*LONG, "--decode-cache", "off", "--workers", "0"], 2, to_rank(signal.SIGSTOP), {1}),
    "SIGTERM to one process of two": ([*LONG, "--decode-cache", "off", "--workers", "0"], 2, to_rank(signal.SIGTERM), {3}),
    "the store is cut short": ([*LONG, "--workers", "1", "--decode-cache"], 1, of_store(lambda p: os.truncate(p, 4096)), {1}),
    "the store is deleted": ([*LONG, "--workers", "1", "--decode-cache"], 1, of_store(os.remove), {0, 1}),
}  # fmt: skip


def faults(seconds: float) -> Iterator[Count]:
    """Faults of the machine in mid-run: one line, status 1 in time, and resumable."""
    for name, (flags, processes, fault, wanted) in FAULTS.items():
        if name in (FULL, SMALL_SHM) and (sys.platform != "linux" or os.geteuid() != 0):
            continue
        row = Count(name, f"one line a process, status {min(wanted)}, resumable")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as disk:
            runs = Form.__new__(Form)
            runs.flags, runs.processes, runs.name, runs.folder = flags, processes, name, Path(folder)
            runs.tree, runs.seconds = make_tree(Path(folder) / "images"), 1.0
            end = time.monotonic() + seconds / len(FAULTS)
            while not row.times or time.monotonic() < end:
                out = Path(folder) / f"run{row.times}"
                disk.enter_context(disk_of_its_own(out, name == FULL))
                started = runs.start(out.name)
                if name != SMALL_SHM:
                    started[0].wait_for_epochs(out, 2)
                mend = fault(runs, out, started)
                codes, printed = runs.finish(started[:1], 90)
                row.note(f"status {codes[0]}")
                lines = [line for line in printed.splitlines() if line.startswith(("error: ", "stopped: "))]
                mend()
                runs.finish(started[1:], 30)
                if not {codes[0]} <= wanted or "Traceback" in printed or (codes[0] == 1 and len(lines) != 1):
                    row.spoil(f"status {codes[0]}: {printed[-500:]}")
                elif lines and row.times == 1:
                    row.notes[lines[0].replace(str(out.parent), "DIR")] = 1
                if codes[0] != 0:
                    reached = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
                    again = runs.start(out.name, "--resume", "auto")
                    wait_until(
                        lambda a=again, o=out, n=reached: a[0].poll() is not None or len(metrics(o)) > n + 1, "a resume"
                    )
                    kill(again, signal.SIGKILL)
                    codes, printed = runs.finish(again)
                    if not {codes[0]} <= {0, -signal.SIGKILL}:
                        row.spoil(f"resumed with {codes}: {printed[-500:]}")
                shutil.rmtree(out, ignore_errors=True)
        end_all()
        yield row


# ---- what grows ----


def stages(seconds: float) -> Iterator[Count]:
    """Change the stage again and again, with a worker in each; memory, handles and processes must not grow."""
    number = min(1000, max(50, round(2 * seconds)))
    row = Count(
        "changes of the stage in one run, its report drawn at the end",
        "memory, handles and processes as after the first tenth",
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree, out = make_tree(Path(folder) / "images", (("train", 2), ("val", 1))), Path(folder) / "run"
        flags = [
            *SMALL,
            "--data-path",
            str(tree),
            "--output-dir",
            str(out),
            "--stages",
            str(number),
            "--epochs",
            str(number),
        ]
        flags += "--train-crop-size 32 40 --dropout 0 0.3 --workers 1 --batch-size 4 --decode-cache off --checkpoint-every 1000".split()
        process = Forked("tests/unreported.py", flags, environment())
        seen, own = {}, psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error, OSError):
                epochs = (out / "metrics.jsonl").read_text().count("\n")
                seen[epochs] = (own.memory_info().rss, own.num_fds(), len(own.children()), own.num_threads())
            time.sleep(0.05)
        if process.returncode != 0:
            row.spoil(f"status {process.returncode}: {process.printed()[1][-400:]}")
        early = [value for epochs, value in seen.items() if number // 10 <= epochs < number // 5]
        late = [value for epochs, value in seen.items() if epochs >= number - number // 10]
        row.times = number - 1
        names = ("memory, MiB", "handles", "processes", "threads")
        for at, name in enumerate(names):
            unit = 2**20 if at == 0 else 1
            first, last = (max(value[at] for value in part) // unit for part in (early, late))
            row.notes[f"{name}: {first}, at the end {last}"] = 1
            if last > first + (40 if at == 0 else 3):
                row.spoil(f"{name} grew from {first} to {last}")
    yield row


# ---- counts ----


KINDS: dict[str, Callable[[float], Iterator[Count]]] = {
    "kills": kills, "signals": signals, "flips": flips, "faults": faults, "stages": stages,
}  # fmt: skip


def table() -> str:
    """Format what was counted last in Markdown."""
    rows = []
    for part in json.loads(RESULTS.read_text()).values():
        for row in part["rows"]:
            outcomes = "; ".join(name if count == 1 and ":" in name else f"{count} {name}" for name, count in row["outcomes"].items())  # fmt: skip
            rows.append(
                [row["what"], f"{row['times']:,}", row["spoilt"], outcomes.replace("|", "/"), f"`{part['command']}`"]
            )
    return markdown(["what was done", "times", "spoilt", "what came of it", "command"], rows)


def fuzzed() -> str:
    """Format what fuzz.py counted last in Markdown."""
    counts = ("examples", "taken", "refused in one line", "tracebacks", "taken and wrong")
    rows = [
        [row["what"].removeprefix("fuzzed "), *(f"{row[count]:,}" for count in counts)]
        for row in json.loads(FUZZED.read_text())
    ]
    return markdown(["what was drawn", *counts], rows)


def save(kind: str, command: str, rows: list[dict]) -> None:
    """Keep the counts of a kind; those of others stay."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} core(s), torch {torch.__version__}"
    kept[kind] = {"command": command, "machine": machine, "commit": commit(), "rows": rows}
    RESULTS.write_text(json.dumps({name: kept[name] for name in KINDS if name in kept}, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--minutes", type=float, default=0.0, help="to spend, shared among the kinds")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and bits; unset: others each time")
    parser.add_argument("--save", action="store_true", help="keep the counts, for --write")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/reliability.md")
    given = parser.parse_args(arguments)
    unknown = set(given.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kind {min(unknown)}; there are {', '.join(KINDS)}")
    random.seed(given.seed)
    spoilt = 0
    kinds = given.kinds or list(KINDS)
    for kind in () if given.write else kinds:
        rows = []
        for row in KINDS[kind](60 * given.minutes / len(kinds)):
            rows.append(row.row())
            spoilt += row.spoilt
            print(f"{row.what}: {row.times:,}, spoilt {row.spoilt} {row.notes}", flush=True)
            if given.save:
                save(kind, f"python tests/torture.py {kind} --minutes {given.minutes / len(kinds):g}", rows)
    if given.write:
        write_tables(str(PAGE), {"fuzzed": fuzzed, "counts": table})
    return min(spoilt, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
