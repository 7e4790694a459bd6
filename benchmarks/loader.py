"""How fast training images come: the reference's way of loading against this program's ways.

    python benchmarks/loader.py --data data/imagenette2/train --image-size 128 --policy ra
    python benchmarks/loader.py --data data/imagenette2/train --build
    python benchmarks/loader.py --data data/imagenette2/train --last-size 300

reference     ImageFolder, PIL, torchvision's transforms per image, default collate
worker        this program, every image decoded each time
store-worker  from the decode-once store, transforms per image
store-device  from the decode-once store, transforms per batch, on the device

With --last-size the first of two stages is measured, in a store that is large enough for the last, beside the reference:
first-stage        as store-device, large crops out of the copies at half size
first-stage-whole  the same, all crops out of whole images

A way's images end as a normalised float32 batch on the device. Without --workers all work is done by one
process on one thread, and images per second are per CPU core; with them, images per CPU second count the
time of all processes. With --build: what building the store costs against decoding every file once, with
as many processes as there are cores. Four ways, five rounds of three seconds and one to warm up: a minute
and a half; --build decodes every file eleven times.
"""

import argparse
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import common
import torch
import trees
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from augment.pixels import IMAGENET_MEAN, IMAGENET_STD
from images.datasets import load_data
from images.loaders import TrainLoader, train_loader
from images.store import StoredImages
from images.store_place import with_store
from settings.resolve import resolve
from stages import plan_stages
from utils import Runtime, start_runtime

OURS = {  # our ways: whether images come from the store, and where they are augmented
    "worker": (False, "worker"),
    "store-worker": (True, "worker"),
    "store-device": (True, "device"),
}
FIRST_STAGE = {"first-stage": (True, "device"), "first-stage-whole": (True, "device")}


class ReferenceLoader:
    """The reference's loading, built from torchvision's public parts; yields batches as `TrainLoader` does.

    Source: torchvision references/classification, presets.py and train.py.
    """

    def __init__(self, root: str, image_size: int, policy: str, batch_size: int, workers: int, runtime: Runtime):
        steps = [
            transforms.RandomResizedCrop(image_size, interpolation=InterpolationMode.BILINEAR, antialias=True),
            transforms.RandomHorizontalFlip(0.5),
        ]
        if policy == "ra":
            steps.append(transforms.RandAugment(magnitude=9, interpolation=InterpolationMode.BILINEAR))
        steps += [
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        self.runtime = runtime
        self.wait_seconds = 0.0
        self.images_per_step = batch_size
        self.loader = DataLoader(
            ImageFolder(root, transforms.Compose(steps)),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=runtime.device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield step number, images and targets of each step, as `TrainLoader.epoch` does."""
        self.wait_seconds = 0.0
        asked = time.perf_counter()
        for step, (images, targets) in enumerate(self.loader, first_step):
            self.wait_seconds += time.perf_counter() - asked
            images = images.to(self.runtime.device, non_blocking=True, memory_format=self.runtime.memory_format)
            yield step, images, targets.to(self.runtime.device, non_blocking=True)
            asked = time.perf_counter()


def our_flags(args: argparse.Namespace, tree: str, way: str, store: str) -> list[str]:
    """List the flags of train.py that make it load by one of OURS."""
    stored, augment_on = (OURS | FIRST_STAGE)[way]
    flags = ["--data-path", tree, "--device", args.device, "--workers", str(args.workers or 0)]
    flags += ["--train-crop-size", str(args.image_size), "--batch-size", str(args.batch_size), "--epochs", "1000000"]
    if args.last_size is not None:
        flags += ["--stages", "2", "--train-crop-size", str(args.image_size), str(args.last_size)]
    flags += ["--decode-cache", store if stored else "off", "--augment-on", augment_on]
    return flags + (["--auto-augment", "ra"] if args.policy == "ra" else []) + args.flags


def endless(loader: ReferenceLoader | TrainLoader) -> Iterator[Tensor]:
    """Yield the images of each batch, epoch after epoch."""
    for epoch in itertools.count():
        for _, images, _ in loader.epoch(epoch):
            yield images


def turn(
    batches: Iterator[Tensor], shape: tuple[int, ...], seconds: float, workers: int, runtime: Runtime
) -> common.Measures:
    """Measure the speed of a loader over about `seconds`.

    What its workers hold ready is taken first, and not counted: two batches each, and one that is being moved.
    """
    for _ in range(2 * workers + 1):
        next(batches)
    runtime.synchronize()
    count, cpu, start = 0, common.cpu_seconds(workers), time.perf_counter()
    while time.perf_counter() - start < seconds:
        images = next(batches)
        assert images.shape[1:] == shape and images.dtype == torch.float32, (images.shape, images.dtype)
        count += len(images)
    runtime.synchronize()
    wall, spent = time.perf_counter() - start, common.cpu_seconds(workers)
    if workers:
        common.settle()
    return {
        "images_per_second": count / wall,
        "images_per_cpu_second": count / (spent - cpu) if spent is not None and cpu is not None else None,
    }


def ways_of(args: argparse.Namespace) -> list[str]:
    """List the ways that are measured."""
    return args.ways if args.last_size is None else ["reference", *FIRST_STAGE]


def compare(args: argparse.Namespace, tree: str) -> list[common.Measures]:
    """Measure the ways of loading in turn and print their table; return a row for each."""
    workers = args.workers or 0
    if args.workers is None:
        torch.set_num_threads(1)
    trees.read_files(tree)
    ways: dict[str, Callable[[], common.Measures]] = {}
    opened: list[TrainLoader] = []
    for way in ways_of(args):
        config = resolve(our_flags(args, tree, "worker" if way == "reference" else way, os.path.join(tree, "store")))
        runtime = start_runtime(config)
        if way == "reference":
            root = os.path.join(tree, "train")
            batches = endless(ReferenceLoader(root, args.image_size, args.policy, args.batch_size, workers, runtime))
        else:
            data = with_store(config, load_data(config, runtime), runtime)
            if way == "first-stage-whole":
                assert isinstance(data.train, StoredImages)
                data.train.header["half"] = False  # as if there were none
            opened.append(train_loader(config, data, runtime, plan_stages(config)[0]))
            batches = endless(opened[-1])
        shape = (3, args.image_size, args.image_size)
        ways[way] = partial(turn, batches, shape, args.seconds, workers, runtime)
    try:
        rounds = common.interleave(ways, args.repeats)
    finally:
        for loader in opened:
            loader.close()
    rows = []
    for way in ways_of(args):
        row = {"way": way, **common.medians(rounds[way])}
        if "reference" in rounds:
            key = "images_per_cpu_second" if row["images_per_cpu_second"] else "images_per_second"
            row["times_reference"] = common.ratio(rounds[way], rounds["reference"], key)
        if args.last_size is not None:
            key = "images_per_cpu_second" if row["images_per_cpu_second"] else "images_per_second"
            row["times_whole"] = common.ratio(rounds[way], rounds["first-stage-whole"], key)
            row["way"] = way if way in FIRST_STAGE else f"first-stage-{way}"  # of other settings than with one stage
        rows.append(row)
    common.print_table(rows, {"way": "way", "images_per_second": "images/s", "images_per_cpu_second": "images/CPU s", "times_reference": "x reference", "times_whole": "x whole"})  # fmt: skip
    return rows


# ---- building the store ----


def decode(path: str) -> tuple[int, int]:
    """Decode one file to RGB; return its width and height."""
    with Image.open(path) as image:
        return image.convert("RGB").size


def decode_once(tree: str) -> float:
    """Measure the seconds it takes to decode every training image once, on all cores."""
    files = [str(path) for path in sorted(Path(tree, "train").rglob("*.*"))]
    start = time.perf_counter()
    with Pool(common.cores()) as pool:
        for _ in pool.imap_unordered(decode, files, chunksize=16):
            pass
    return time.perf_counter() - start


def build_store(flags: Sequence[str]) -> float:
    """Measure the seconds it takes to build the store."""
    config = resolve(flags)
    runtime = start_runtime(config)
    data = load_data(config, runtime)
    start = time.perf_counter()
    with_store(config, data, runtime)
    return time.perf_counter() - start


def compare_building(args: argparse.Namespace, tree: str) -> list[common.Measures]:
    """Measure building the store against decoding every file once; print the table, return the rows."""
    trees.read_files(tree)
    number = sum(1 for _ in Path(tree, "train").rglob("*.*"))

    store = os.path.join(tree, "store")
    flags = our_flags(args, tree, "store-worker" if args.last_size is None else "first-stage", store)

    def timed(function: Callable[..., float], *parts: object, watch: bool = False) -> common.Measures:
        seconds, peak = common.fresh_process(function, *parts, watch=watch)
        shutil.rmtree(store, ignore_errors=True)  # one that is there would be taken as it is
        return {"seconds": seconds, "images_per_second": number / seconds} | ({"peak_rss_gib": peak} if watch else {})

    # Memory in a run of its own, whose time does not count.
    peak = timed(build_store, flags, watch=True)["peak_rss_gib"]
    ways = {"decode-once": partial(timed, decode_once, tree), "build-store": partial(timed, build_store, flags)}
    rounds = common.interleave(ways, args.repeats, discard=0)
    rows = [{"way": way, **common.medians(rounds[way])} for way in rounds]
    rows[1]["peak_rss_gib"] = peak
    rows[1]["times_decode_once"] = common.ratio(rounds["build-store"], rounds["decode-once"], "seconds")
    common.print_table(rows, {"way": "way", "seconds": "seconds", "images_per_second": "images/s", "peak_rss_gib": "peak GiB", "times_decode_once": "x decode-once"})  # fmt: skip
    return rows


def main(args: argparse.Namespace) -> list[common.Measures]:
    with trees.image_tree(args.data, args.limit, args.scratch) as tree:
        return compare_building(args, tree) if args.build else compare(args, tree)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.parser("loader", __doc__ or "")
    common.add_data(parser)
    parser.add_argument("--image-size", type=common.positive, default=128, help="side of the training crop, pixels (default: 128)")  # fmt: skip
    parser.add_argument("--last-size", type=common.positive, metavar="PX", help="of a run whose first stage is measured (default: there is one stage)")  # fmt: skip
    parser.add_argument("--policy", choices=("ra", "none"), default="ra", help="RandAugment at magnitude 9, or crop and flip alone (default: ra)")  # fmt: skip
    parser.add_argument("--batch-size", type=common.positive, default=128, help="images (default: 128)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load (default: none, and one thread)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way in each round (default: 3)")
    parser.add_argument("--repeats", type=common.positive, default=5, help="rounds (default: 5)")
    parser.add_argument("--ways", nargs="+", choices=("reference", *OURS), default=["reference", *OURS], help="which ways (default: all)")  # fmt: skip
    parser.add_argument("--build", action="store_true", help="measure building the store instead")
    return common.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(common.run(main, read_options(sys.argv[1:])))
