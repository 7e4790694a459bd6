"""What gpu.py measures: its parts, each a list of measurements, and the functions that carry them out.

They run in one process that outlives them, so that torch starts and loads its kernels once. Each yields its rows as soon
as they are there.
"""

import gc
import gzip
import os
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import common
import end_to_end
import progressive
import step
import torch
from gpu_setup import Setup
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from images.datasets import load_data
from images.loaders import train_loader
from images.store_place import with_store
from learning.learner import build_learner
from learning.models import build_on_meta
from learning.optim import LearningRate
from learning.rehearse import is_out_of_memory
from learning.state import RunState
from learning.stop import Stop
from reporting.progress import Progress
from settings.resolve import resolve
from stages import make_plan, plan_stages
from train import train_one_epoch
from utils import Runtime, find_device, start_runtime

LAUNCHES = 1000  # small kernels in a row: the time of one is what the host takes to launch it
TOP_KERNELS = 20


@dataclass(frozen=True)
class Item:
    """One measurement: `function(setup, *args)` yields its rows. Without a function it is a study, by its file's name.

    last: of its process, which a profiler leaves slower than it was
    """

    part: str
    name: str
    function: Callable[..., Iterator[common.Measures]] | None = None
    args: tuple = ()
    last: bool = False


# ---- it runs ----


def smoke(setup: Setup, size: int) -> Iterator[common.Measures]:
    """Take a step on noise at a size, enter the stage, and take two more.

    The first one loads kernels; entering a stage captures the CUDA graph of its step.
    """
    config = resolve(setup.flags([size]))
    runtime = start_runtime(config)
    learner = build_learner(config, setup.classes, None, runtime)[0]

    def seconds(action: Callable[..., None], *args: Any) -> float:
        start = time.perf_counter()
        action(*args)
        runtime.synchronize()
        return time.perf_counter() - start

    first = seconds(learner.step_on_noise, size, setup.batch_size)
    entered = seconds(learner.enter_stage, size, {setup.batch_size})
    following = [seconds(learner.step_on_noise, size, setup.batch_size) for _ in range(2)]
    yield {
        "way": "steps on noise",
        "image_size": size,
        "first_step_seconds": first,
        "stage_seconds": entered,
        "ms_per_step": 1000 * min(following),
        "gpu_memory_gib": runtime.peak_memory_gib(),
    }


def tests(setup: Setup) -> Iterator[common.Measures]:
    """Run the tests that need a GPU; without one they are skipped.

    Raises:
        RuntimeError: pytest ended before it could run them.
    """
    if find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed; pip install pytest")
    report = os.path.join(setup.scratch, "tests.xml")
    with suppress(FileNotFoundError):
        os.remove(report)  # an earlier one's counts would stand for those of one that does not start
    # These files alone: others import what is for development, and are of no use here.
    files = [str(path) for path in sorted(common.ROOT.glob("tests/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", "--continue-on-collection-errors"]  # fmt: skip
    # The longest compile kernels on the CPU; several are of one file.
    if find_spec("xdist") is not None and setup.on_gpu:
        command += ["-n", "4", "--dist", "load"]
    done = subprocess.run([*command, f"--junitxml={os.path.abspath(report)}", *files], cwd=common.ROOT)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {done.returncode}")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    broken = [f"{case.get('classname')}.{case.get('name')}" for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None]  # fmt: skip
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    yield {"way": "pytest -m gpu", **counts, "exit_status": done.returncode, "broken": ", ".join(broken) or None}


# ---- ceilings ----


def timed(action: Callable[[], object], runtime: Runtime, times: int, groups: int = 5) -> float:
    """Measure the seconds of one call: the median over groups of `times` calls, after one that warms up."""
    seconds = []
    for group in range(groups + 1):
        start = time.perf_counter()
        for _ in range(times):
            action()
        runtime.synchronize()
        if group:
            seconds.append((time.perf_counter() - start) / times)
    return statistics.median(seconds)


def ceilings(setup: Setup) -> Iterator[common.Measures]:
    """Measure what the device can do at best: matrix products, memory, uploads, launches."""
    runtime = start_runtime(resolve(setup.flags([setup.sizes[0]])))
    device, side = runtime.device, setup.matrix
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))  # not zeros: slower
    product = timed(lambda: left @ right, runtime, 10)
    yield {"way": "bfloat16 product", "tflops": 2 * side**3 / product / 1e12}
    source = torch.empty(setup.copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), runtime, 10)
    yield {"way": "memory, read and written", "gb_per_second": 2 * setup.copied / copy / 1e9}
    one = torch.ones(1, device=device)
    launch = timed(lambda: one.mul_(1), runtime, LAUNCHES)
    yield {"way": "launch of a kernel", "microseconds": 1e6 * launch}
    if device.type == "cuda":
        pinned = torch.empty(setup.copied // 4, dtype=torch.uint8).random_().pin_memory()
        upload = timed(lambda: target[: len(pinned)].copy_(pinned, non_blocking=True), runtime, 4)
        yield {"way": "upload from pinned memory", "gb_per_second": len(pinned) / upload / 1e9}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LAUNCHES):
                one.mul_(1)
        yield {"way": "a kernel in a CUDA graph", "microseconds": 1e6 * timed(graph.replay, runtime, 1) / LAUNCHES}


def bytes_per_image(net: nn.Module, size: int) -> float:
    """Estimate the least memory traffic of one image's training step, in 16 bits.

    Each layer's input and output once in the forward pass and twice in the backward pass, no layers fused. Weights are
    left out: a batch shares them.

    net: on the meta device
    """
    moved = 0

    def count(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal moved
        moved += sum(tensor.numel() for tensor in (*inputs, output) if isinstance(tensor, Tensor))

    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    net.eval()  # batch norm in training mode wants more than one image
    with torch.no_grad():
        net(torch.empty(1, 3, size, size, device="meta"))
    return 3 * 2 * moved


# ---- speed ----


def steps(setup: Setup, size: int) -> Iterator[common.Measures]:
    """Measure the training step on images that are on the device, its ways in turn: see step.py."""
    options = ["--device", setup.device, "--model", setup.model, "--image-size", str(size), "--batch-size", str(setup.batch_size)]  # fmt: skip
    options += ["--steps", str(setup.steps), "--repeats", str(setup.repeats), "--classes", str(setup.classes)]
    ways = ["bare", "ours", *(step.ON_GPU if setup.on_gpu else ()), "reference"]
    rows = step.compare(step.read_options([*options, "--ways", *ways]))
    gflops = make_plan(resolve(setup.flags([size]))).gflops_per_image[0]  # multiply-adds of a forward pass
    traffic = bytes_per_image(build_on_meta(setup.model), size)
    for row in rows:
        speed = row["images_per_second"]
        row.update(image_size=size, tflops=speed * 6 * gflops / 1e3, gb_per_second=speed * traffic / 1e9)
    yield from rows


def whole(setup: Setup, sizes: Sequence[int], eager: bool) -> Iterator[common.Measures]:
    """Measure whole training by train.py at each size, and the same step on a batch that is there already."""
    flags = [*setup.flags(sizes, setup.epochs), *setup.data_flags(), *(common.EAGER if eager else [])]
    num_classes = len(os.listdir(os.path.join(setup.tree, "train")))
    best = end_to_end.ceiling(flags, num_classes, 2 * setup.steps)
    free_memory()
    device, uuid = find_device(setup.device, 0), None
    if setup.on_gpu:
        uuid = "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    for size, row, ceiling in zip(sizes, end_to_end.train(flags, setup.scratch, uuid), best):
        resident = ceiling["images_per_second"]
        share = row["images_per_second"] / resident
        way = "whole-eager" if eager else "whole"
        row["graphs"] = bool(row.pop("captured")) and ceiling["graphs"]
        yield {"way": way, "image_size": size, **row, "resident": resident, "share_of_ceiling": share}


def reference(setup: Setup, size: int) -> Iterator[common.Measures]:
    """Measure the same training with images loaded the reference's way."""
    flags = [*setup.flags([size], 2), *setup.data_flags()]
    (row,) = end_to_end.reference(flags, len(os.listdir(os.path.join(setup.tree, "train"))))
    yield {"way": "reference-loading", "image_size": size, **row}


def batches(setup: Setup, size: int) -> Iterator[common.Measures]:
    """Measure the step at growing batch sizes, up to the first that does not fit."""
    for batch_size in setup.batch_sizes:
        free_memory()
        try:
            (row,) = end_to_end.ceiling(setup.flags([size], 1, batch_size), setup.classes, setup.steps)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return
        peak = torch.cuda.max_memory_reserved() / 2**30 if setup.on_gpu else None
        yield {"way": "batch", "image_size": size, "batch_size": batch_size, **row, "gpu_memory_gib": peak}


def staged(setup: Setup, way: str) -> Iterator[common.Measures]:
    """Train in stages, or at the last size throughout, as progressive.py does; the seconds of training."""
    sizes = setup.sizes if way == "staged" else setup.sizes[-1:]
    flags = [*setup.flags(sizes), *setup.data_flags(), "--epochs", str(setup.staged_epochs)]
    yield {"way": way, "image_size": setup.sizes[-1], **progressive.measure(flags, setup.scratch)}


# ---- profile ----


class StopAt(Stop):
    """Stops an epoch at a step."""

    step = 0

    def __call__(self, step: int = 0, budget: bool = True) -> bool:
        return step >= self.step


def profiled(setup: Setup, eager: bool) -> Iterator[common.Measures]:
    """Profile steps of real training at the first size: the kernels that take longest, the device's idle time.

    Two lots of steps go before, in which workers start, kernels are found and memory is taken.
    """
    config = resolve([*setup.flags(setup.sizes[:1]), *setup.data_flags(), *(common.EAGER if eager else [])])
    runtime = start_runtime(config)
    data = with_store(config, load_data(config, runtime), runtime)
    learner = build_learner(config, len(data.classes), None, runtime)[0]
    (stage,) = plan_stages(config)
    loader = train_loader(config, data, runtime, stage)
    learner.enter_stage(stage.image_size, loader.batch_sizes)
    lot = max(1, min(setup.profiled_steps, len(loader) // 3))
    state, stop = RunState(), StopAt(runtime)
    progress = Progress(stage, 0, stage.epochs.stop, config.print_freq, 0, len(loader), show=False)

    def train_to(last: int) -> None:
        stop.step = last
        train_one_epoch(learner, loader, state, LearningRate(config, [stage]), progress, stop)
        runtime.synchronize()

    try:
        train_to(2 * lot)
        with profile(activities=[ProfilerActivity.CUDA if setup.on_gpu else ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()  # the profiler's own start and end take longer than the steps
            train_to(3 * lot)
            seconds = time.perf_counter() - start
    finally:
        loader.close()
    way = "profile-eager" if eager else "profile"
    save_trace(profiler, os.path.join(setup.out, f"{way}.json.gz"))
    events = [event for event in profiler.events() if event.device_type == (DeviceType.CUDA if setup.on_gpu else DeviceType.CPU)]  # fmt: skip
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    summary = {"way": way, "image_size": stage.image_size, "steps": lot, "ms_per_step": 1000 * seconds / lot}
    summary |= {"kernels_per_step": len(events) / lot, "idle_share": idle_share(spans) if setup.on_gpu else None}
    yield summary
    for rank, row in enumerate(longest(events, lot), 1):
        yield {"way": f"{way}, kernels", "rank": rank, **row}


def idle_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """Compute the share of the time from the first start to the last end in which no span runs; None without spans."""
    if not spans:
        return None
    ordered = sorted(spans)
    busy, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - ordered[0][0])


def longest(events: Sequence[Any], num_steps: int) -> list[common.Measures]:
    """List the kernels that take most time together: name, milliseconds and calls per step, share of all."""
    taken: dict[str, list[float]] = {}
    for event in events:
        taken.setdefault(event.name, []).append(event.time_range.elapsed_us())
    whole_time = sum(map(sum, taken.values())) or 1.0
    ranked = sorted(taken.items(), key=lambda item: -sum(item[1]))[:TOP_KERNELS]
    return [
        {
            "kernel": name,
            "ms_per_step": sum(times) / 1e3 / num_steps,
            "calls_per_step": len(times) / num_steps,
            "share": sum(times) / whole_time,
        }
        for name, times in ranked
    ]


def save_trace(profiler: profile, path: str) -> None:
    """Save the whole trace, for chrome://tracing or ui.perfetto.dev."""
    plain = path.removesuffix(".gz")
    profiler.export_chrome_trace(plain)
    with open(plain, "rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target)
    os.remove(plain)


def free_memory() -> None:
    """Give memory of the GPU back, so that what starts next finds it."""
    gc.collect()  # a learner and its graphs know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- the parts ----


def plan_items(setup: Setup) -> dict[str, list[Item]]:
    """List the measurements of each part, those of most worth first."""
    by_worth = [setup.sizes[0], setup.sizes[-1], *setup.sizes[1:-1], *setup.other_sizes]
    ends = [setup.sizes[0], setup.sizes[-1]]
    variants = [False, True] if setup.on_gpu else [False]  # a CPU has no graphs to do without

    def form(eager: bool) -> str:
        return ", eager" if eager else ""

    lists: dict[str, list[tuple[str, Callable[..., Iterator[common.Measures]], tuple]]] = {
        "smoke": [(f"{size} px", smoke, (size,)) for size in setup.sizes],
        "tests": [("pytest -m gpu", tests, ())],
        "ceilings": [("ceilings", ceilings, ())],
        "whole": [
            (f"{', '.join(map(str, sizes))} px{form(eager)}", whole, (sizes, eager))
            for eager in variants
            for sizes in (setup.sizes, setup.other_sizes)
        ],
        "step": [(f"{size} px", steps, (size,)) for size in by_worth],
        "profile": [(f"{setup.sizes[0]} px{form(eager)}", profiled, (eager,)) for eager in variants],
        "reference": [(f"{size} px", reference, (size,)) for size in by_worth[: len(setup.sizes)]],
        "batch": [(f"{size} px", batches, (size,)) for size in ends],
        "progressive": [(way, staged, (way,)) for way in ("staged", "fixed")],
    }
    return {part: [Item(part, *item, last=part == "profile") for item in items] for part, items in lists.items()}
