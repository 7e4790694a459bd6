"""Does predict.py keep up with the evaluation of a training, and does its memory stay the same for any number of images?

    python benchmarks/prediction.py --data photos

evaluate    `evaluate` of train.py, with its own loader, over images as a run's validation images
predict     the loop of predict.py over the same images, every one answered by name
memory      predict.py over --images images, and, memory-tenfold, over ten times as many, one in a hundred of them
            damaged: the most memory of the program and its workers, and whether every damaged image has its row

The first two in turn, in this process, with the same weights, workers and batches; `times_evaluate` is the median of the
ratios within the rounds. The images are links to those of --data, to some of them again where there are too few.
Without --run a model is trained for a moment. Some ten minutes on two cores.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path

import common
import trees
from end_to_end import run_training
from torch import nn

from images.datasets import Data, ImageTree
from images.loaders import eval_loader
from images.workers import closing_loader
from inference.inputs import names_of
from inference.predictions import predict
from inference.trained import Trained, open_run
from predict import run as run_predict
from settings.errors import ConfigError
from train import evaluate

DAMAGED_EVERY = 100


def link(files: Sequence[Path], folder: Path, count: int, damaged: bool = False) -> None:
    """Link to `count` images in two class folders; with `damaged`, one in a hundred is a file that is cut or none."""
    for i in range(count):
        file = files[i % len(files)]
        place = folder / str(i % 2) / f"{i:06}{file.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        if damaged and i % DAMAGED_EVERY == 0:
            whole = file.read_bytes()
            kinds = (whole[: len(whole) // 2], whole[:200], b"", b"no image")
            place.write_bytes(kinds[i // DAMAGED_EVERY % len(kinds)])
        else:
            place.symlink_to(file.resolve())


def train_briefly(files: Sequence[Path], folder: Path, args: argparse.Namespace) -> str:
    """Train a model for one epoch of a few images; return its run's folder."""
    link(files, folder / "train", 16)
    link(files, folder / "val", 2)
    size = str(args.image_size)
    flags = [
        "--data-path",
        str(folder),
        "--model",
        args.model,
        "--device",
        args.device,
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    flags += ["--batch-size", "8", "--train-crop-size", size, "--val-crop-size", size, "--val-resize-size", size]
    run_training([*flags, "--decode-cache", "off"], str(folder / "run"))
    return str(folder / "run")


def rates(count: int, started: float, cpu_before: float | None, workers: int) -> common.Measures:
    """Compute images per second, by the clock and by the processor time of the process and its workers, since then."""
    seconds, cpu_after = time.perf_counter() - started, common.cpu_seconds(workers)
    spent = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
    return {"images_per_second": count / seconds, "images_per_cpu_second": count / spent if spent else None}


def time_evaluate(trained: Trained, folder: Path, args: argparse.Namespace) -> common.Measures:
    """Evaluate all images as train.py does."""
    started, cpu_before = time.perf_counter(), common.cpu_seconds(args.workers)
    config = replace(trained.config, workers=args.workers, batch_size=(args.batch_size,))
    images = ImageTree(str(folder))
    with closing_loader(eval_loader(config, Data(images, images), trained.runtime, trained.image_size)) as loader:
        score = evaluate({"model": trained.model}, loader, nn.CrossEntropyLoss(), trained.runtime)["model"]
    assert score.num_images == args.images
    return rates(args.images, started, cpu_before, args.workers)


def time_predict(trained: Trained, folder: Path, args: argparse.Namespace) -> common.Measures:
    """Predict all images as predict.py does."""
    started, cpu_before = time.perf_counter(), common.cpu_seconds(args.workers)
    predicting = predict(trained, names_of([str(folder)]), top=1, batch_size=args.batch_size, workers=args.workers)
    count = sum(map(len, predicting))
    assert count == args.images
    return rates(args.images, started, cpu_before, args.workers)


def predict_all(words: Sequence[str]) -> int:
    """Run predict.py in this process, without a word; return its exit status."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        return run_predict(words)


def measure_memory(run: str, files: Sequence[Path], count: int, args: argparse.Namespace) -> common.Measures:
    """Predict `count` images, some of them damaged, in a new process, and measure the most memory it takes."""
    with tempfile.TemporaryDirectory(prefix="prediction-", dir=args.scratch) as folder:
        link(files, Path(folder, "images"), count, damaged=True)
        rows = os.path.join(folder, "rows.csv")
        words = [run, os.path.join(folder, "images"), "--output", rows, "--device", args.device]
        words += ["--workers", str(args.workers), "--batch-size", str(args.batch_size)]
        status, peak = common.fresh_process(predict_all, words, watch=True)
        if status != 1:
            raise ConfigError(f"predict.py ended with status {status}, not 1, of images some of which are damaged")
        with open(rows, encoding="utf-8", newline="") as file:
            told = list(csv.DictReader(file))
    errors = [row["image"] for row in told if row["error"]]
    number = [int(os.path.basename(image).split(".")[0]) for image in errors]
    right = sorted(number) == list(range(0, count, DAMAGED_EVERY)) and len(told) == count
    return {"images": count, "damaged": len(errors), "every_one_a_row": right, "peak_rss_gib": peak}


def main(args: argparse.Namespace) -> list[common.Measures]:
    """Measure speed and memory and print their tables; return the rows."""
    files = [file for _, file in trees.find_images(args.data, args.images)]
    with tempfile.TemporaryDirectory(prefix="prediction-", dir=args.scratch) as scratch:
        run = args.run or train_briefly(files, Path(scratch, "brief"), args)
        images = Path(scratch, "images")
        link(files, images, args.images)
        for path in files:
            path.read_bytes()  # so that both ways find them in memory
        trained = open_run(run, device=args.device)
        ways = {
            "evaluate": partial(time_evaluate, trained, images, args),
            "predict": partial(time_predict, trained, images, args),
        }
        rounds = common.interleave(ways, args.repeats)
        rows: list[common.Measures] = []
        for way, measures in rounds.items():
            times = common.ratio(measures, rounds["evaluate"], "images_per_second")
            of = {"model": trained.config.model, "image_size": trained.image_size}
            rows.append({"way": way, **of, **common.medians(measures), "times_evaluate": times})
        for way, count in {"memory": args.images, "memory-tenfold": 10 * args.images}.items():
            print(f"  {way}: {count:,} images", file=sys.stderr)
            rows.append({"way": way, **of, **measure_memory(run, files, count, args)})
        peak = rows[-2]["peak_rss_gib"]
        rows[-1]["times_fewer"] = rows[-1]["peak_rss_gib"] / peak if peak else None
    common.print_table(
        rows[:2],
        {"way": "way", "model": "model", "image_size": "size, px", "images_per_second": "images/s",
         "images_per_cpu_second": "images/CPU s", "times_evaluate": "x evaluate"},
    )  # fmt: skip
    common.print_table(
        rows[2:],
        {"way": "way", "images": "images", "damaged": "damaged", "every_one_a_row": "each a row",
         "peak_rss_gib": "memory, GiB", "times_fewer": "x a tenth of them"},
    )  # fmt: skip
    return rows


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.parser("prediction", __doc__ or "")
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder of images: with train/ in it, with class folders, or flat")  # fmt: skip
    parser.add_argument("--run", metavar="DIR", help="folder of a run whose model predicts (default: one trained for a moment)")  # fmt: skip
    parser.add_argument("--model", default="efficientnet_v2_b0", help="of that one (default: efficientnet_v2_b0)")
    parser.add_argument("--image-size", type=common.positive, metavar="PX", default=224, help="of that one (default: 224)")  # fmt: skip
    parser.add_argument("--images", type=common.positive, metavar="N", default=1000, help="a hundred or more (default: 1000)")  # fmt: skip
    parser.add_argument("--batch-size", type=common.positive, metavar="N", default=32, help="images at once (default: 32)")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", default=common.cores(), help="processes that load (default: as many as cores)")  # fmt: skip
    parser.add_argument("--repeats", type=common.positive, default=3, help="rounds (default: 3)")
    parser.add_argument("--scratch", metavar="DIR", help="where links, run and rows lie meanwhile (default: the system's folder for temporary files)")  # fmt: skip
    return common.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(common.run(main, read_options(sys.argv[1:])))
