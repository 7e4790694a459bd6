"""Does a run end within the time that it was to fit, and does it use that time?

    python benchmarks/fit_time.py --data data/imagenette2
    python benchmarks/fit_time.py --data data/imagenette2 --runs digits mobilenet

Ten runs of train.py, started as a user starts it, of different models, image sizes, schedules and times: 72 minutes in
all. Each is timed from its start to its end, and its time, the share of it that was used and the forecast's error make a
row. Nothing else should need the processor meanwhile. Every run decodes the images anew, as a user's first run does.
`--times 0.5` halves all times.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import trees
from end_to_end import run_training

from settings.errors import ConfigError
from settings.resolve import resolve

DIGITS = "--config configs/quickstart.yaml"
B0 = "--config configs/imagenette_b0.yaml --train-list none"
PHOTOS = "--opt adamw --lr 0.001 --lr-scheduler cosineannealinglr --lr-update step --channels-last --workers 0 --batch-size 32 --eval-every 3 "  # fmt: skip

# What is run, by name: minutes, flags of train.py. Of short ones the models are small, so that one epoch of every stage
# fits in.
RUNS: dict[str, tuple[float, str]] = {
    "digits": (2, DIGITS),
    "shufflenet": (2, PHOTOS + "--model shufflenet_v2_x0_5 --stages 4 --train-crop-size 64 112 --val-crop-size 112 --val-resize-size 128"),
    "digits, fixed": (3, DIGITS + " --stages 1 --train-crop-size 48 --dropout 0.2 --random-erase 0.1 --stochastic-depth-prob 0.1 --eval-every 2"),
    "mobilenet": (5, PHOTOS + "--model mobilenet_v3_small --model-ema --train-crop-size 96 --val-crop-size 96 --val-resize-size 112"),
    "resnet, equal compute": (6, PHOTOS + "--model resnet18 --stages 3 --stage-rule compute --lr-clock compute --train-crop-size 64 128 --val-crop-size 128 --val-resize-size 144"),
    "mobilenet, a worker": (5, PHOTOS + "--model mobilenet_v3_small --stages 4 --stage-rule released --train-crop-size 64 128 --workers 1 --auto-augment ra --val-crop-size 160 --val-resize-size 176"),
    "B0": (8, B0),
    "B0, fixed": (9, B0 + " --stages 1 --train-crop-size 96 --dropout 0.2 --ra-magnitude 4 --model-ema"),
    "B0, equal compute": (12, B0 + " --stage-rule compute --lr-clock compute --augment-size 128"),
    "B0, more": (20, B0 + " --mixup-alpha 0 0.2 --val-crop-size 160 --val-resize-size 160"),
}  # fmt: skip


def link_splits(data: str, limit: int, tree: str) -> None:
    """Link to at most `limit` images of each of train/ and val/ of folder `data` from the same folders in `tree`.

    Raises:
        ConfigError: it has no two such folders with images.
    """
    for split in ("train", "val"):
        if not Path(data, split).is_dir():
            raise ConfigError(f"--data {data} has no {split}/; give a folder with train/ and val/, in class folders")
        for number, (name, file) in enumerate(trees.find_images(str(Path(data, split)), limit)):
            place = Path(tree, split, name)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:07}_{file.name}").symlink_to(file.resolve())


def measure(flags: Sequence[str], asked: float, scratch: str) -> common.Measures:
    """Run train.py in a time of so many seconds; return what it took, and what it had expected."""
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        folder, started = os.path.join(parent, "run"), time.perf_counter()
        store = [] if "--data-path" not in flags else ["--decode-cache", os.path.join(parent, "store")]
        run_training([*flags, *store], folder)
        seconds = time.perf_counter() - started
        summary = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
    fitted = summary["fit_time"]
    return {
        "asked_seconds": asked,
        "seconds": seconds,
        "share_used": seconds / asked,
        "within": seconds <= asked,
        "forecast_error": fitted["error"],
        "epochs": fitted["lengths"],
        "image_sizes": [stage["image_size"] for stage in summary["stages"]],
        "before_seconds": fitted["before"],
        "train_seconds": summary["train_seconds"],
    }


def main(args: argparse.Namespace) -> list[common.Measures]:
    """Carry the runs out one after another and print their table; return a row for each."""
    for name in args.runs:
        if name not in RUNS:
            raise ConfigError(f"--runs {name}: known are {', '.join(RUNS)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.scratch) as tree:
        link_splits(args.data, args.limit, tree)
        runs = {}
        for name in args.runs or RUNS:
            minutes, words = RUNS[name]
            asked = 60 * minutes * args.times
            flags = [*words.split(), "--device", args.device, "--fit-time", f"{asked:g}s"]
            flags += [] if words.startswith(DIGITS) else ["--data-path", tree]
            flags += args.flags
            resolve(flags)  # a mistake shows before anything runs
            runs[name] = flags, asked
        trees.read_files(tree)
        for name, (flags, asked) in runs.items():
            print(f"  {name}: {asked:.0f} s", file=sys.stderr)
            rows.append({"way": name, **measure(flags, asked, tree)})
    common.print_table(rows, {"way": "run", "asked_seconds": "asked, s", "seconds": "took, s", "share_used": "used", "within": "within", "forecast_error": "forecast's error", "epochs": "epochs"})  # fmt: skip
    return rows


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.parser("fit_time", __doc__ or "")
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder with train/ and val/, in class folders")
    parser.add_argument("--limit", type=common.positive, metavar="N", default=1200, help="use at most N images of each of the two (default: 1200)")  # fmt: skip
    parser.add_argument("--scratch", metavar="DIR", help="where stores and runs lie meanwhile (default: the system's folder for temporary files)")  # fmt: skip
    parser.add_argument(
        "--runs", nargs="+", metavar="NAME", default=[], help=f"which of: {', '.join(RUNS)} (default: all)"
    )
    parser.add_argument("--times", type=float, metavar="X", default=1.0, help="all times times this (default: 1)")
    return common.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(common.run(main, read_options(sys.argv[1:])))
