"""What does a run cost besides its epochs: starting, decoding, rehearsing, the closing evaluations, the report?

    python benchmarks/overhead.py --data photos

ours        train.py as a user starts it, nothing decoded yet
bare        a loop over torchvision's public transforms, ImageFolder and DataLoader

Each for one epoch and for three, in processes of their own. Processor seconds of the program and its workers count, so
that neither a second core nor another program changes them much. An epoch is half of what three cost more than one;
what the run of one epoch costs beyond that is fixed. On a CPU; 20 minutes on two cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import common
import torch
import trees
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import get_model

from augment.pixels import IMAGENET_MEAN, IMAGENET_STD
from settings.errors import ConfigError

VAL_SHARE = 5  # one image of so many is for validation


def link(data: str, tree: Path, count: int) -> None:
    """Link to `count` images as a tree of two classes with train/ and val/."""
    files = sorted(path for path in Path(data).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise ConfigError(f"--data {data}: no images there; give a folder of images")
    for i in range(count):
        file = files[i % len(files)]
        place = tree / ("val" if i % VAL_SHARE == 0 else "train") / str(i // VAL_SHARE % 2)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:06}{file.suffix}").symlink_to(file.resolve())


def bare_loop(tree: str, epochs: int, args: argparse.Namespace) -> None:
    """Train as one would by hand: ImageFolder, DataLoader, SGD; evaluate after each epoch."""
    normalise = [v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    train = ImageFolder(f"{tree}/train", v1.Compose([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip(), *normalise]))
    val = ImageFolder(f"{tree}/val", v1.Compose([v1.Resize(256), v1.CenterCrop(224), *normalise]))
    load = partial(
        DataLoader, batch_size=args.batch_size, num_workers=args.workers, persistent_workers=args.workers > 0
    )
    train_loader, val_loader = load(train, shuffle=True), load(val)
    model = get_model(args.model, num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    for _ in range(epochs):
        model.train()
        for images, targets in train_loader:
            optimizer.zero_grad(set_to_none=True)
            criterion(model(images), targets).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            correct = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in val_loader)
        print(f"top1 {100 * correct / len(val):.2f}")


def measure(way: str, epochs: int, tree: Path, args: argparse.Namespace) -> float:
    """Run one program; return the processor seconds that it and its workers took."""
    shared = ["--model", args.model, "--batch-size", str(args.batch_size), "--workers", str(args.workers)]
    with tempfile.TemporaryDirectory(prefix="overhead-", dir=args.scratch) as folder:
        if way == "ours":
            command = ["train.py", "--data-path", str(tree), "--epochs", str(epochs), "--lr", "0.01", "--device", "cpu"]
            command += ["--clearml", "off", "--output-dir", f"{folder}/run", "--decode-cache", f"{folder}/store"]
        else:
            command = [os.path.abspath(__file__), "--data", ".", "--bare-loop", str(tree), str(epochs)]
        before = os.times()
        done = subprocess.run(
            [sys.executable, *command, *shared, *(args.flags if way == "ours" else [])],
            cwd=common.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        after = os.times()
    if done.returncode != 0:
        raise ConfigError(f"{way} failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(args: argparse.Namespace) -> list[common.Measures]:
    """Measure both ways for one and three epochs and print their table; return a row for each way."""
    with tempfile.TemporaryDirectory(prefix="overhead-", dir=args.scratch) as folder:
        link(args.data, Path(folder), args.images)
        trees.read_files(folder)
        ways = {
            f"{way} {epochs}": partial(measure, way, epochs, Path(folder), args)
            for way in ("ours", "bare")
            for epochs in (1, 3)
        }
        rounds = common.interleave(ways, args.repeats, discard=0)
    rows: list[common.Measures] = []
    for way in ("ours", "bare"):
        one, three = (common.median(rounds[f"{way} {epochs}"]) or 0.0 for epochs in (1, 3))
        epoch = (three - one) / 2
        row = {"way": way, "one_epoch": one, "three_epochs": three}
        rows.append(row | {"cpu_seconds_per_epoch": epoch, "fixed_cpu_seconds": one - epoch})
    for row in rows:
        row["times_bare"] = row["fixed_cpu_seconds"] / rows[1]["fixed_cpu_seconds"]
    common.print_table(
        rows,
        {"way": "way", "one_epoch": "1 epoch, CPU s", "three_epochs": "3 epochs, CPU s",
         "cpu_seconds_per_epoch": "an epoch, CPU s", "fixed_cpu_seconds": "fixed, CPU s", "times_bare": "x bare"},
    )  # fmt: skip
    return rows


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.parser("overhead", __doc__ or "")
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder of images, at any depth")
    parser.add_argument("--images", type=common.positive, metavar="N", default=2600, help="link to as many, to some of them again if there are fewer (default: 2600)")  # fmt: skip
    parser.add_argument("--model", default="resnet18", help="of torchvision (default: resnet18)")
    parser.add_argument(
        "--batch-size", type=common.positive, metavar="N", default=32, help="images per step (default: 32)"
    )
    parser.add_argument("--workers", type=int, metavar="N", default=common.cores(), help="processes that load (default: as many as cores)")  # fmt: skip
    parser.add_argument("--repeats", type=common.positive, default=1, help="rounds (default: 1)")
    parser.add_argument("--scratch", metavar="DIR", help="where links, store and runs lie meanwhile (default: the system's folder for temporary files)")  # fmt: skip
    parser.add_argument("--bare-loop", nargs=2, metavar=("TREE", "EPOCHS"), help=argparse.SUPPRESS)
    return common.parse(parser, argv)


if __name__ == "__main__":
    options = read_options(sys.argv[1:])
    if options.bare_loop:  # the process that `measure` starts
        torch.manual_seed(0)
        bare_loop(options.bare_loop[0], int(options.bare_loop[1]), options)
    else:
        sys.exit(common.run(main, options))
