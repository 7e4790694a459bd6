"""The command line of export.py, and what it alone shows to be wrong; without torch, which takes seconds to import."""

import argparse
import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from inference.options import nearest_there
from settings.errors import ConfigError
from settings.resolve import RUN_SETTINGS
from settings.sources import Parser

MODEL_FILE = {
    "onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors", "hub": "model.safetensors",
}  # fmt: skip
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "safetensors": ("safetensors",), "hub": ("safetensors",),
}  # fmt: skip
QUANTIZED, PREPROCESSING, CARD, CONFIG, FIGURES = (
    "model_int8.onnx", "preprocessing.json", "README.md", "config.json", "figures",
)  # fmt: skip
OWN_FIGURE = r"(progress|what_grows|speed|curve|confusions)(_\d+)?\.svg"  # others there are not of an export


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and how; as the flags of the same names say.

    check: run the gate
    max_drop: of the quantised file's top-1, percent points
    """

    run: str
    to: str
    preprocessing: str
    output: str
    overwrite: bool
    weights: str
    image_size: int | None
    data_path: str | None
    data_license: str
    workers: int | None
    quantize: str | None
    calibration_images: int
    max_drop: float
    check: bool
    upload: str | None
    debug: bool

    @property
    def model_file(self) -> str:
        return MODEL_FILE[self.to]

    def outdated(self) -> list[str]:
        """List the files of an earlier export that stand where this one's are to go."""
        names = {MODEL_FILE[self.to], PREPROCESSING, CARD}
        names |= {QUANTIZED} if self.to == "onnx" else {CONFIG} if self.to == "hub" else set()
        found = [os.path.join(self.output, name) for name in sorted(names)]
        if self.to == "hub":
            found += sorted(
                path
                for path in glob.glob(os.path.join(glob.escape(self.output), FIGURES, "*.svg"))
                if re.fullmatch(OWN_FIGURE, os.path.basename(path))
            )
        return [path for path in found if os.path.lexists(path)]


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = Parser(
        "export.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # fmt: off
    add("run", metavar="RUN", help="folder of a run, finished or not")
    add("--to", required=True, choices=tuple(MODEL_FILE), help="onnx: for onnxruntime and others; torch: a program of torch.export; safetensors: weights alone, with a model card; hub: a folder for the Hugging Face Hub")
    add("--preprocessing", choices=("beside", "crops", "inside"), default="beside", help="beside: the model takes normalised float32 crops, and preprocessing.json says how they are made; crops: it takes uint8 crops and normalises them; inside: it takes uint8 images of any size, and resizes and crops them too (default: beside)")
    add("--weights", choices=("best", "last"), default="best", help="of the run (default: best)")
    add("--image-size", type=int, metavar="PX", help="side of the crops (default: the run's test size)")
    add("--output", metavar="DIR", help="where the files go (default: RUN/exports/TARGET)")
    add("--overwrite", action="store_true", help="replace an earlier export there")
    add("--data-path", metavar="DIR", help="where the run's images lie now (default: where they lay)")
    add("--data-license", default="unknown", metavar="TEXT", help="licence of the images that it was trained on, for the file's metadata and the model card (default: unknown)")
    add("--workers", type=int, metavar="N", help="processes that load images for the gate (default: the run's)")
    add("--quantize", choices=("dynamic", "static"), help="also write model_int8.onnx: weights in 8 bits, and activations by ranges found as it runs, or found before on training images")
    add("--calibration-images", type=int, metavar="N", help="training images that --quantize static looks at (default: 256)")
    add("--max-drop", type=float, metavar="POINTS", help="write nothing if the quantised model's top-1 is lower by more percent points (default: 1)")
    add("--no-gate", dest="check", action="store_false", help="write a file that was not run; its metadata and its card say so")
    add("--upload", metavar="USER/NAME", help="upload the folder (--to hub) to this repository, which is made private if it is not there")
    add("--debug", action="store_true", help="show the traceback of an error of the program")
    # fmt: on
    return parser


def read_options(argv: Sequence[str], description: str | None = None) -> Options:
    """Read the command line, and check it against itself, the packages that are there and the disk.

    Raises:
        ConfigError: what cannot be carried out.
    """
    given = vars(build_parser(description).parse_args(list(argv)))
    check_flags(given)
    given["output"] = given["output"] or os.path.join(given["run"], "exports", given["to"])
    given["calibration_images"] = given["calibration_images"] or 256
    given["max_drop"] = 1.0 if given["max_drop"] is None else given["max_drop"]
    options = Options(**given)
    check_packages(options)
    check_places(options)
    return options


def check_flags(given: dict) -> None:
    """Raise ConfigError for numbers out of range, and for flags that could not take effect."""

    def idle(flag: str, why: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        if given[name] is not None and given[name] is not False and given[name] != "beside":  # 0 is given, too
            raise ConfigError(f"{flag} {why}; leave it out")

    if given["to"] in ("safetensors", "hub"):
        idle(
            "--preprocessing",
            f"{given['preprocessing']} has no effect with --to {given['to']}, which holds weights alone",
        )
    if given["to"] != "onnx":
        idle("--quantize", f"has no effect with --to {given['to']}, only with --to onnx")
    if given["to"] != "hub":
        idle("--upload", f"has no effect with --to {given['to']}, only with --to hub")
    if given["quantize"] is None:
        idle("--max-drop", "has no effect without --quantize")
    if given["quantize"] != "static":
        idle("--calibration-images", "has no effect without --quantize static")
    if not given["check"]:
        idle("--data-path", "has no effect with --no-gate")
        idle("--workers", "has no effect with --no-gate")
    if given["quantize"] is not None and not given["check"]:
        raise ConfigError("--no-gate: a quantised model is not written without its accuracy; leave out one of the two")
    for name, least, most in (("image_size", 1, 8192), ("workers", 0, 1024), ("calibration_images", 1, 10**6), ("max_drop", 0, 100)):  # fmt: skip
        if given[name] is not None and not (math.isfinite(given[name]) and least <= given[name] <= most):
            raise ConfigError(f"--{name.replace('_', '-')} must be in [{least}, {most}], got {given[name]:g}")
    if given["upload"] is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", given["upload"], re.ASCII):
        raise ConfigError(f"--upload takes USER/NAME, got {given['upload']!r}")


def check_packages(options: Options) -> None:
    """Raise ConfigError if a package that the target needs is not installed."""
    needed = PACKAGES[options.to] + (("huggingface_hub",) if options.upload else ())
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to {options.to} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def check_places(options: Options) -> None:
    """Raise ConfigError unless there is a run, and a place to write to where nothing stands in the way."""
    if not os.path.isfile(os.path.join(options.run, RUN_SETTINGS)):
        raise ConfigError(f"{options.run} holds no run: it has no {RUN_SETTINGS}; give the output_dir of a training")
    place = nearest_there(options.output)
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        raise ConfigError(f"{options.output}: {place} is no folder that can be written to; give another --output")
    outdated = options.outdated()
    if outdated and not options.overwrite:
        raise ConfigError(f"{outdated[0]} is there already; --overwrite replaces it, another --output leaves it alone")
