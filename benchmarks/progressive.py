"""Does training in stages save the time that its arithmetic promises?

    python benchmarks/progressive.py --data data/imagenette2
    python benchmarks/progressive.py --data data/photos --device cpu --model efficientnet_v2_b0 \\
        --stages 2 --image-size 64 128 --epochs 4 --batch-size 32 --workers 0 --repeats 2 --limit 512

staged      train.py, image sizes growing from stage to stage
fixed       train.py, one stage: as many epochs at the last size throughout

Training time of the one over that of the other, beside the plan's `relative_cost`, which counts multiply-adds;
the target is at most 1.10 times that. Both from the runs' own summary.json; evaluation is not counted.
What follows `--` goes to train.py, in both runs. By default EfficientNetV2-S, eight epochs from 128 to 300 px:
some five minutes on an H200 with Imagenette (an estimate); the second command takes three on two CPU cores.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import common
import trees
from end_to_end import run_training

from settings.resolve import resolve


def measure(flags: Sequence[str], scratch: str) -> common.Measures:
    """Train with train.py; return the seconds of training, and the plan's relative cost."""
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        folder = os.path.join(parent, "run")
        run_training(flags, folder)
        summary = json.loads(Path(folder, "summary.json").read_text())
    return {"train_seconds": summary["train_seconds"], "relative_cost": summary["relative_cost"]}


def main(args: argparse.Namespace) -> list[common.Measures]:
    """Measure both runs in turn and print their table; return a row for each."""
    with trees.image_tree(args.data, args.limit, args.scratch) as tree:
        flags = [*common.machine_flags(args.device), "--data-path", tree, "--decode-cache", os.path.join(tree, "store")]
        flags += ["--model", args.model, "--workers", str(args.workers), "--epochs", str(args.epochs), "--lr", "0.01"]
        flags += args.flags
        staged = [*flags, "--stages", str(args.stages), "--train-crop-size", *map(str, args.image_size)]
        staged += ["--batch-size", *map(str, args.batch_size)]
        fixed = [*flags, "--train-crop-size", str(args.image_size[-1]), "--batch-size", str(args.batch_size[-1])]
        for one in (staged, fixed):
            resolve(one)  # a mistake shows before anything runs
        trees.read_files(tree)
        ways = {"staged": partial(measure, staged, tree), "fixed": partial(measure, fixed, tree)}
        rounds = common.interleave(ways, args.repeats, discard=0)
    rows = [{"way": way, **common.medians(rounds[way])} for way in rounds]
    time_ratio = common.ratio(rounds["staged"], rounds["fixed"], "train_seconds")
    relative_cost = rows[0]["relative_cost"]
    rows[0].update(time_ratio=time_ratio, times_relative_cost=time_ratio and time_ratio / relative_cost)
    common.print_table(rows, {"way": "way", "train_seconds": "seconds", "relative_cost": "relative cost", "time_ratio": "time ratio", "times_relative_cost": "x relative cost"})  # fmt: skip
    return rows


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.parser("progressive", __doc__ or "")
    common.add_data(parser)
    parser.add_argument("--model", default="efficientnet_v2_s", help="as train.py's (default: efficientnet_v2_s)")
    parser.add_argument("--stages", type=common.positive, default=4, help="of the staged run (default: 4)")
    parser.add_argument("--image-size", nargs="+", type=common.positive, metavar="S", default=[128, 300], help="pixels; first and last, or one for each stage (default: 128 300)")  # fmt: skip
    parser.add_argument("--batch-size", nargs="+", type=common.positive, metavar="N", default=[128], help="images; as --image-size (default: 128)")  # fmt: skip
    parser.add_argument("--epochs", type=common.positive, default=8, help="of each run (default: 8)")
    parser.add_argument("--workers", type=int, metavar="N", default=common.cores(), help="processes that load (default: as many as cores)")  # fmt: skip
    parser.add_argument("--repeats", type=common.positive, default=1, help="rounds (default: 1)")
    return common.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(common.run(main, read_options(sys.argv[1:])))
