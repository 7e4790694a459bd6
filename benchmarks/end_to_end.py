"""Whole training as a user runs it, stage by stage: does loading keep up with the training step?

    python benchmarks/end_to_end.py --data data/imagenette2 --workers 16
    python benchmarks/end_to_end.py --data data/imagenette2 --workers 16 -- --auto-augment ra --compile
    python benchmarks/end_to_end.py --data data/photos --device cpu --workers 2 --model efficientnet_v2_b0 \\
        --image-sizes 64 128 --batch-size 32 --epochs 2 --limit 256 --steps 4 --repeats 1

train       train.py, started as a program; its metrics.jsonl tells images per second and the share of time
            it waited for data
ceiling     the same step on a batch that is on the device already: what loading could reach at best
reference   the same step, images loaded the reference's way (see loader.py) by as many workers

All three in turn, each in a process of its own with the same settings; of the epochs of a stage the median
counts. On a CPU the loading takes its time from the training, so the ceiling is out of reach there. What
follows `--` goes to train.py. By default EfficientNetV2-S in four stages from 128 to 300 px, three epochs
each: some five minutes on an H200 with Imagenette (an estimate); the third command takes a minute and a half on
two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import trees
from loader import ReferenceLoader
from step import ResidentBatches, train_epoch

from learning.learner import build_learner
from reporting.folder import RunFolder
from settings.errors import ConfigError
from settings.resolve import resolve
from stages import plan_stages, set_drop_rates
from utils import find_device, start_runtime

WAYS = ("train", "ceiling", "reference")
NOT_CAPTURED = "cuda_graphs off: "  # begins the line of a run whose step had to go without graphs


def run_training(flags: Sequence[str], folder: str, uuid: str | None = None) -> str:
    """Run train.py as a program, its run in `folder`; return what it printed.

    uuid: of a GPU whose utilisation is written to `folder`/utilisation

    Raises:
        ConfigError: it failed; the message holds its own last line.
    """
    command = [sys.executable, str(common.ROOT / "train.py"), "--clearml", "off", *flags, "--output-dir", folder]
    finished = threading.Event()
    watcher = threading.Thread(target=watch_gpu, args=(uuid, folder, finished))
    watcher.start()
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        finished.set()
        watcher.join()
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(f"train.py ended with status {done.returncode}: {lines[-1].removeprefix('error: ')}")
    return done.stdout


def watch_gpu(uuid: str | None, folder: str, finished: threading.Event) -> None:
    """Write samples of a GPU's utilisation to `folder`/utilisation, one a second until `finished`.

    A sample is the epoch that trains, and the share of time that the GPU has kernels running, percent. Without `uuid`
    nothing is done.
    """
    if uuid is None:
        return
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    samples, run = [], RunFolder(folder)
    while not finished.wait(1.0):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
            samples.append((len(run.metrics()), float(done.stdout)))
        except (OSError, subprocess.SubprocessError, ValueError):
            break  # no nvidia-smi, or a slice of a GPU, whose utilisation it does not tell
    os.makedirs(folder, exist_ok=True)
    Path(folder, "utilisation").write_text(json.dumps(samples))


def train(flags: Sequence[str], scratch: str, uuid: str | None) -> list[common.Measures]:
    """Train with train.py; return the measures of each stage, from the run's own metrics."""
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        folder = os.path.join(parent, "run")
        printed = run_training(flags, folder, uuid)
        records = RunFolder(folder).metrics()
        watched = Path(folder, "utilisation")
        samples = json.loads(watched.read_text()) if watched.exists() else []
    rows = []
    for stage in plan_stages(resolve(flags)):
        epochs = [record for record in records if record["stage"] == stage.index]
        names = ("images_per_second", "data_wait_fraction", "gpu_memory_gib")
        row = {name: common.median([record[name] for record in epochs]) for name in names}
        # Not of epoch 0: its samples begin while the program still starts.
        row["gpu_utilisation"] = common.median([percent for epoch, percent in samples if 0 < epoch in stage.epochs])
        rows.append(row | {"captured": None if uuid is None else NOT_CAPTURED not in printed})
    return rows


def ceiling(flags: Sequence[str], num_classes: int, steps: int) -> list[common.Measures]:
    """Measure `train_one_epoch` in each stage on a batch that is there already.

    The first of three epochs warms up.
    """
    config = resolve(flags)
    runtime = start_runtime(config)
    learner = build_learner(config, num_classes, None, runtime)[0]
    rows = []
    for stage in plan_stages(config):
        set_drop_rates(learner.model, stage)
        learner.enter_stage(stage.image_size, {stage.batch_size})
        batches = ResidentBatches(stage.image_size, stage.batch_size, steps, num_classes, runtime)
        states = [train_epoch(config, stage, learner, batches) for _ in range(3)][1:]
        row = {"images_per_second": common.median([state.num_images / state.train_seconds for state in states])}
        rows.append(row | {"graphs": learner.graphs is not None and learner.graphs.possible})
    return rows


def reference(flags: Sequence[str], num_classes: int) -> list[common.Measures]:
    """Measure `train_one_epoch` in each stage on what the reference's loader brings."""
    config = resolve(flags)
    runtime = start_runtime(config)
    learner = build_learner(config, num_classes, None, runtime)[0]
    root = os.path.join(config.data_path, "train")
    policy = "ra" if config.auto_augment == "ra" else "none"
    rows = []
    for stage in plan_stages(config):
        set_drop_rates(learner.model, stage)
        loader = ReferenceLoader(root, stage.image_size, policy, stage.batch_size, config.workers, runtime)
        learner.enter_stage(stage.image_size, {stage.batch_size})
        states = [train_epoch(config, stage, learner, loader) for _ in stage.epochs]
        rows.append(
            {
                "images_per_second": common.median([state.num_images / state.train_seconds for state in states]),
                "data_wait_fraction": common.median([state.wait_seconds / state.train_seconds for state in states]),
            }
        )
    return rows


def main(args: argparse.Namespace) -> list[common.Measures]:
    """Measure the ways in turn and print their table; return a row for each stage and way."""
    device = find_device(args.device, 0)
    uuid = None
    if device.type == "cuda":
        uuid = "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    with trees.image_tree(args.data, args.limit, args.scratch) as tree:
        num_classes = len(os.listdir(os.path.join(tree, "train")))
        sizes = args.image_sizes
        flags = [*common.machine_flags(args.device), "--data-path", tree, "--decode-cache", os.path.join(tree, "store")]
        flags += ["--model", args.model, "--batch-size", *map(str, args.batch_size), "--workers", str(args.workers)]
        flags += ["--stages", str(len(sizes)), "--train-crop-size", *map(str, sizes)]
        flags += ["--epochs", str(args.epochs * len(sizes)), "--lr", "0.01", *args.flags]
        stages = plan_stages(resolve(flags))  # a mistake shows before anything runs
        trees.read_files(tree)
        ways: dict[str, Callable[[], Any]] = {
            "train": partial(train, flags, tree, uuid),
            "ceiling": lambda: common.fresh_process(ceiling, flags, num_classes, args.steps)[0],
            "reference": lambda: common.fresh_process(reference, flags, num_classes)[0],
        }
        rounds = common.interleave({way: ways[way] for way in args.ways}, args.repeats, discard=0)
    rows = []
    for stage in stages:
        of_stage = {way: [measures[stage.index] for measures in rounds[way]] for way in args.ways}
        for way in args.ways:
            place = {"way": way, "stage": stage.index, "image_size": stage.image_size, "batch_size": stage.batch_size}
            row = place | common.medians(of_stage[way])
            compared = partial(common.ratio, of_stage[way], key="images_per_second")
            if "ceiling" in of_stage:
                row["share_of_ceiling"] = compared(of_stage["ceiling"])
            if "reference" in of_stage:
                row["times_reference"] = compared(of_stage["reference"])
            rows.append(row)
    common.print_table(
        rows,
        {
            "way": "way", "image_size": "px", "batch_size": "batch", "images_per_second": "images/s",
            "data_wait_fraction": "waiting", "share_of_ceiling": "of ceiling", "times_reference": "x reference",
            "gpu_memory_gib": "GPU GiB", "gpu_utilisation": "GPU %",
        },
    )  # fmt: skip
    return rows


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.parser("end_to_end", __doc__ or "")
    common.add_data(parser)
    parser.add_argument("--model", default="efficientnet_v2_s", help="as train.py's (default: efficientnet_v2_s)")
    parser.add_argument("--image-sizes", nargs="+", type=common.positive, metavar="S", default=[128, 185, 242, 300], help="pixels, one for each stage (default: 128 185 242 300)")  # fmt: skip
    parser.add_argument("--batch-size", nargs="+", type=common.positive, metavar="N", default=[128], help="images; one, first and last, or one for each stage (default: 128)")  # fmt: skip
    parser.add_argument("--epochs", type=common.positive, default=3, help="of each stage; the first starts the workers (default: 3)")  # fmt: skip
    parser.add_argument("--steps", type=common.positive, default=50, help="of the ceiling, twice for each stage (default: 50)")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", default=common.cores(), help="processes that load (default: as many as cores)")  # fmt: skip
    parser.add_argument("--repeats", type=common.positive, default=1, help="rounds (default: 1)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which ways (default: all)")
    return common.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(common.run(main, read_options(sys.argv[1:])))
