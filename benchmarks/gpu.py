"""What does this GPU give? Everything that half an hour can tell, in order of worth, on one page.

    python benchmarks/gpu.py --minutes 30 --data data/imagenette2 --out runs/gpu
    python benchmarks/gpu.py --minutes 15 --out runs/gpu --plan
    python benchmarks/gpu.py --minutes 4 --data data/imagenette2 --out runs/gpu --parts ceilings step --box step=3
    python benchmarks/gpu.py --rehearse --out runs/rehearsal

smoke         a step at every image size
tests         pytest -m gpu
ceilings      the card's own: bfloat16 products, memory, uploads, launches
whole         training by train.py, against the same step on images that are on the device (end_to_end.py)
step          a loop by hand, ours with and without CUDA graphs, the reference's style (step.py)
profile       20 steps of training: the kernels that take longest, the share of time in which none runs
reference     training on images loaded the reference's way
batch         the step at growing batch sizes, up to the first that does not fit
progressive   stages against the last size throughout (progressive.py)
race          trainings: candidates for the row of five epochs in Imagenette's leaderboard,
leaderboard   its short rows, by its rules where DATA is the 160 px set,
staged        and stages against a fixed size, with as many epochs and with as much arithmetic

A measurement begins only while the box of its part lasts, and is cut when twice the box or --minutes are over; a study
is stopped at the end of its box, and gets half a minute more to save its runs. The boxes are of half an hour: with fewer
--minutes than that, and than the wanted parts' boxes add up to, all shrink alike. Rows are in rows.jsonl as soon as they
are there, those of the studies in results/; the same command goes on where the last one ended. report.html shows what
there is. The minutes are of an H100 with 16 cores (an estimate); --rehearse runs all of it, tiny, in three minutes on
two CPU cores.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import common
import trees
from gpu_page import PAGE, write_page
from gpu_parts import Item, plan_items
from gpu_rows import CUT, DONE, FAILED, Rows, card_of
from gpu_setup import TINY, Setup, make_images
from gpu_work import SAVING, Ended, Worker, run_study

from settings.errors import ConfigError, first_line, tell

# Part: its box in minutes, of half an hour. Without --parts all but the race, whose winners the leaderboard's study names.
BOXES = {
    "smoke": 1.0, "tests": 2.0, "ceilings": 0.5, "whole": 4.0, "step": 4.0, "profile": 1.5, "reference": 1.5,
    "batch": 2.0, "progressive": 2.0, "race": 4.0, "leaderboard": 8.0, "staged": 8.0,
}  # fmt: skip
HALF_AN_HOUR = 30.0
WITHOUT_IMAGES = ("smoke", "tests", "ceilings", "step", "batch")
STUDY_BOX = 8.0  # of a study that is named by its file
STUDIES = {
    "race": "configs/leaderboard/studies/race.yaml",
    "leaderboard": "configs/leaderboard/studies/leaderboard.yaml",
    "staged": "configs/studies/staged_192px.yaml",
}


def main(args: argparse.Namespace) -> int:
    """Carry out the parts; return the exit status: 0 all done, 1 some failed, 3 some are left for the same command."""
    if args.rehearse:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: a second thread waits more than it works
    setup = prepare(args)
    rows, items = Rows(args.out), items_of(args, setup)
    if args.plan:
        show_plan(args, setup, items, rows)
        return 0
    origin = common.origin("gpu", described(setup), setup.device)
    card = card_of(origin)
    deadline = time.monotonic() + 60 * args.minutes
    worker = Worker(setup, os.path.join(args.out, "log.txt"))
    try:
        for part, measurements in items.items():
            start = time.monotonic()
            end = min(deadline, start + 60 * box_of(part, args))
            for item in measurements:
                if rows.ended(card).get((part, item.name)) == DONE or time.monotonic() >= end:
                    continue
                limit = min(end, deadline - SAVING) if item.function is None else min(deadline, 2 * end - start)
                status = carry_out(item, worker, rows, origin, limit, args)
                print(f"{part}: {item.name}: {status}", flush=True)
            show_page(args.out)
    finally:
        worker.close()
        show_page(args.out)
    print(f"{os.path.join(args.out, PAGE)} shows it")
    ended = rows.ended(card)
    states = [ended.get((part, item.name), CUT) for part in items for item in items[part]]
    return 1 if FAILED in states else 3 if CUT in states else 0


def carry_out(
    item: Item, worker: Worker, rows: Rows, origin: common.Measures, limit: float, args: argparse.Namespace
) -> str:
    """Carry out a measurement until `limit`, on the clock of time.monotonic; keep its rows, say how it ended."""
    key, start = {"part": item.part, "item": item.name}, time.monotonic()
    status, reason = DONE, None
    try:
        if item.function is None:
            worker.close()  # its memory is the trainings'
            run_study(item.name, worker.setup, args.data, args.parallel, limit, worker.log)
        else:
            for row in worker.measure(item, limit):
                rows.add(key | row | origin)
    except Ended as end:
        status, reason = CUT if end.cut else FAILED, str(end)
    ended = {"status": status, "seconds": time.monotonic() - start}
    rows.add(key | ended | ({"reason": reason} if reason else {}) | origin)
    return f"{status}, {ended['seconds']:.0f} s" + (f": {reason}" if reason else "")


def show_page(folder: str) -> None:
    """Write the page; one that cannot be drawn costs no measurement, as its rows are kept."""
    try:
        write_page(folder)
    except Exception as error:
        print(f"{PAGE}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)


def prepare(args: argparse.Namespace) -> Setup:
    """Decide how large everything is, check that the folder's rows are of the same, and link to the images.

    Raises:
        ConfigError: no images; the folder holds rows of other settings.
    """
    base = replace(
        TINY if args.rehearse else Setup(workers=common.cores()), out=args.out, scratch=args.scratch or args.out
    )
    given = {"device": args.device, "model": args.model, "batch_size": args.batch_size, "workers": args.workers}
    given |= {"limit": args.limit, "data": args.data and os.path.basename(os.path.normpath(args.data))}
    given["sizes"] = tuple(args.image_sizes) if args.image_sizes else None
    setup = replace(base, **{name: value for name, value in given.items() if value is not None})
    if args.plan:
        return setup
    note = os.path.join(args.out, "setup.json")
    text = json.dumps(described(setup))
    if os.path.exists(note):
        with open(note, encoding="utf-8") as file:
            before = file.read()
        earlier = json.loads(before)
        # The parts that need no images may have gone before, or follow.
        earlier["data"] = earlier["data"] or setup.data
        setup = replace(setup, data=setup.data or earlier["data"])
        text = json.dumps(described(setup))
        names = [name for name, value in earlier.items() if json.loads(text).get(name) != value]
        if names:
            raise ConfigError(f"--out {args.out} holds rows of another {', '.join(names)}; give another folder")
    if args.data is None and args.rehearse:
        args.data = os.path.join(setup.scratch, "made")
        if not os.path.isdir(args.data):
            make_images(args.data)
    needing = [part for part in args.parts or BOXES if part not in WITHOUT_IMAGES]
    if args.data is None and needing:
        raise ConfigError(
            f"--data DIR is missing, a folder of images with train/ and val/, as Imagenette's; {', '.join(needing)} "
            f"need it, {', '.join(WITHOUT_IMAGES)} do not"
        )
    if args.data is not None:
        trees.link_again(trees.find_images(args.data, args.limit), setup.tree)
    os.makedirs(args.out, exist_ok=True)
    with open(note, "w", encoding="utf-8") as file:
        file.write(text)
    return setup


def described(setup: Setup) -> common.Measures:
    """List what the rows depend on, as it stands in each of them."""
    return {name: value for name, value in asdict(setup).items() if name not in ("out", "scratch", "device")}


def items_of(args: argparse.Namespace, setup: Setup) -> dict[str, list[Item]]:
    """List the measurements of the parts that are wanted, in the order in which they were named."""
    studies = {"staged": "benchmarks/rehearsal.yaml"} if args.rehearse else STUDIES
    known = plan_items(setup) | {part: [Item(part, study)] for part, study in studies.items()}
    if args.parts:
        return {part: known[part] if part in known else [Item(part, part)] for part in args.parts}
    return {part: items for part, items in known.items() if part != "race"}


def show_plan(args: argparse.Namespace, setup: Setup, items: dict[str, list[Item]], rows: Rows) -> None:
    """Print what would be measured, in its order, with the boxes and what is done already."""
    done = [
        key for key, status in rows.ended(card_of({"machine": common.machine(setup.device)})).items() if status == DONE
    ]
    for part, measurements in items.items():
        names = [f"{item.name}{' (done)' if (part, item.name) in done else ''}" for item in measurements]
        print(f"{part:12} {box_of(part, args):4g} min  {'; '.join(names)}")


def box_of(part: str, args: argparse.Namespace) -> float:
    """Find the box of a part, minutes: as --box says, else its share of --minutes; in a rehearsal all have time enough."""
    wanted = args.parts or [name for name in BOXES if name != "race"]
    boxes = {name: args.box.get(name, BOXES.get(name, STUDY_BOX)) for name in wanted}
    if part in args.box or args.rehearse:
        return boxes[part]
    return boxes[part] * min(1.0, args.minutes / min(HALF_AN_HOUR, sum(boxes.values())))


def named(part: str) -> str:
    """Check the name of a part on the command line."""
    if part not in BOXES and not (part.endswith(".yaml") and os.path.isfile(part)):
        raise argparse.ArgumentTypeError(f"{part!r} is no part; accepted: {', '.join(BOXES)}, or the file of a study")
    return part


def boxed(text: str) -> tuple[str, float]:
    """Convert PART=MINUTES of the command line."""
    part, _, minutes = text.partition("=")
    try:
        return named(part), float(minutes)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be PART=MINUTES, got {text!r}") from None


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of all parts together (default: 30)")
    parser.add_argument("--data", metavar="DIR", help="a folder of images with train/ and val/; whole, profile, reference and progressive take any folder of images, the parts without images none")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", required=True, help="where rows, page, log and runs lie; the same folder goes on where it ended")  # fmt: skip
    parser.add_argument("--scratch", metavar="DIR", help="where links to the images, the decoded images and the runs lie; 0.3 MB an image (default: as --out)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", type=named, metavar="PART", help="which, in this order, or files of studies (default: all but race)")  # fmt: skip
    parser.add_argument("--box", nargs="+", type=boxed, default=[], metavar="PART=MINUTES", help="other boxes than those of --plan")  # fmt: skip
    parser.add_argument("--parallel", type=common.positive, default=1, metavar="N", help="trainings at once, of the studies alone: their times mean nothing then (default: 1)")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="all of it tiny, on the CPU unless --device says otherwise; without --data on images of its own")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print parts, boxes and measurements, measure nothing")
    parser.add_argument("--device", help="as train.py's (default: auto)")
    parser.add_argument("--model", help="of the parts before the trainings (default: efficientnet_v2_s)")
    parser.add_argument("--image-sizes", nargs="+", type=common.positive, metavar="S", help="of the stages, pixels (default: 128 185 242 300)")  # fmt: skip
    parser.add_argument("--batch-size", type=common.positive, metavar="N", help="images (default: 128)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load (default: as many as cores)")
    parser.add_argument("--limit", type=common.positive, metavar="N", default=10_000, help="use at most N images before the trainings (default: 10000)")  # fmt: skip
    args = parser.parse_args(argv)
    args.box = dict(args.box)
    return args


if __name__ == "__main__":
    try:
        sys.exit(main(read_options(sys.argv[1:])))
    except ConfigError as error:
        tell(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(3)
