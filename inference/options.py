"""The command line of predict.py, read and checked without torch, so that help and mistakes are told at once."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from settings.errors import ConfigError
from settings.sources import Parser
from settings.values import nearest

STDIN = "-"
BATCH_SIZE, GALLERY_SIZE = 32, 100


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: unknown flag, wrong value, an option that has no effect, a place that is taken or not there.
    """
    parser = build_parser()
    options, rest = parser.parse_known_intermixed_args(list(argv))
    if rest:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = nearest(rest[0].split("=")[0], flags)
        raise ConfigError(
            f"unknown flag {rest[0]}; {f'did you mean {near}?' if near else 'predict.py --help lists all'}"
        )
    check_effects(options)
    check_places(options)
    return options


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = Parser(
        prog="predict.py", description="Say what the model of a run sees in images.", allow_abbrev=False,
        epilog="Exit status: 0 done; 1 some images could not be read (their rows say why), or something failed; "
        "2 wrong input, or no image could be read; 3 stopped early, what was written is valid.",
    )  # fmt: skip
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run: the output_dir of a training, finished or not")
    add("images", metavar="IMAGES", nargs="+", help="folders, with every image below them; files; - for names on standard input, one a line, as long as they come")  # fmt: skip
    add("-0", "--null", action="store_true", help="names on standard input end in a zero byte, as of `find -print0`")
    add = parser.add_argument_group("the model").add_argument
    add("--weights", choices=("best", "last"), default="best", help="of the best epoch, or of the last checkpoint (default: best)")  # fmt: skip
    add("--image-size", type=whole(1, 8192), metavar="PX", help="side of the images that the model is given (default: the run's val_crop_size)")  # fmt: skip
    add("--device", default="auto", metavar="TEXT", help="auto: cuda, then mps, then cpu (default: auto)")
    add("--amp", action="store_true", help="mixed precision; without it full precision, as the run's files are made")
    add("--batch-size", type=whole(1, 100_000), metavar="N", default=BATCH_SIZE, help=f"images at once (default: {BATCH_SIZE})")  # fmt: skip
    add("-j", "--workers", type=whole(0, 1024), metavar="N", help="processes that read images (default: as many as cores)")  # fmt: skip
    add = parser.add_argument_group("the rows").add_argument
    add("--top", type=whole(1, 1_000_000), metavar="K", help="the K most probable classes of each image (default: 5, or all of fewer)")  # fmt: skip
    add("--format", choices=("csv", "jsonl"), default="csv", help="a table, or an object a line (default: csv)")
    add("--output", metavar="FILE", help="write them to FILE, which appears when it is whole (default: standard output)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the files of --output and --gallery that are there")
    add = parser.add_argument_group("pictures").add_argument
    add("--sort", metavar="DIR", help="copy each image into the folder of its class in DIR, which must be new or empty")
    add("--sort-by", choices=("copy", "link"), help="copies, or symbolic links to the images (default: copy)")
    add("--gallery", metavar="FILE", help="write a page of the images that the model is least certain of (.html)")
    add("--gallery-size", type=whole(1, 100_000), metavar="N", help=f"as many, least certain first (default: {GALLERY_SIZE})")  # fmt: skip
    add("--gradcam", action="store_true", help="show in the gallery where the model looked (needs the package grad-cam)")  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error that is none of the input")
    return parser


def whole(low: int, high: int) -> Callable[[str], int]:
    """Make a reader of whole numbers in [low, high]."""

    def read(text: str) -> int:
        if text.isdecimal() and len(text) < 10 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")

    return read


def check_effects(options: argparse.Namespace) -> None:
    """Raise ConfigError for an option that could not take effect, and for a package that is not there."""
    for name, needed, there in (
        ("null", STDIN, STDIN in options.images),
        ("overwrite", "--output or --gallery", options.output or options.gallery),
        ("sort_by", "--sort", options.sort),
        ("gallery_size", "--gallery", options.gallery),
        ("gradcam", "--gallery", options.gallery),
    ):
        if getattr(options, name) and not there:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without {needed}; give both or neither")
    if options.images.count(STDIN) > 1:
        raise ConfigError("- stands for standard input, which can be read once; give it once")
    if STDIN in options.images and sys.stdin is None:
        raise ConfigError("- stands for standard input, which is closed; give names, or leave it out")
    if options.gradcam and importlib.util.find_spec("pytorch_grad_cam") is None:
        raise ConfigError("--gradcam needs the package grad-cam; install it (pip install grad-cam) or leave it out")


def check_places(options: argparse.Namespace) -> None:
    """Raise ConfigError for a place where nothing can be written, or where something is that must not be overwritten."""
    for name in ("output", "gallery", "sort"):
        if getattr(options, name) == "":  # of a variable that is not set
            raise ConfigError(f"--{name} was given an empty name; give a path, or leave it out")
    for name in ("output", "gallery"):
        path = getattr(options, name)
        if path is None:
            continue
        fault, folder = None, os.path.dirname(path) or "."
        if os.path.exists(path) and not os.path.isfile(path):  # a device would be replaced by a file
            fault = "is no file"
        elif not os.path.isdir(folder):
            fault = "is in no folder that is there"
        elif not os.access(folder, os.W_OK):
            fault = "is in a folder that cannot be written to"
        if fault is not None:
            raise ConfigError(f"--{name} {path} {fault}; give the path of a file to write")
        if os.path.lexists(path) and not options.overwrite:  # also a link that leads nowhere
            raise ConfigError(f"--{name} {path} is there already; give another, or --overwrite to replace it")
        if os.path.realpath(path) in map(os.path.realpath, options.images):
            raise ConfigError(f"--{name} {path} is one of the images; give another file to write")
    if options.output and options.gallery and os.path.realpath(options.output) == os.path.realpath(options.gallery):
        raise ConfigError("--output and --gallery are one file; give two")
    if options.sort is None:
        return
    if os.path.exists(options.sort) and not (os.path.isdir(options.sort) and not os.listdir(options.sort)):
        raise ConfigError(f"--sort {options.sort} is there already; give a folder that is new or empty")
    above = nearest_there(options.sort)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise ConfigError(f"--sort {options.sort}: {above} is no folder that can be written to; give another")
    place = Path(os.path.realpath(options.sort))
    for path in options.images:  # it would be read while it is filled, without end
        if os.path.isdir(path) and place.is_relative_to(os.path.realpath(path)):
            raise ConfigError(
                f"--sort {options.sort} lies in {path}, whose images are read; give a folder outside of it"
            )


def nearest_there(path: str) -> str:
    """Find the nearest that is there of a path and the folders above it."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return place
