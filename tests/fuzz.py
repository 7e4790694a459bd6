"""Settings and files that no one would think of, from hypothesis: each is taken or refused in one line.

    python tests/fuzz.py --settings 100000 --files 2000     # a quarter of an hour; counts into results/reliability_data.json

`test_fuzz.py` runs a few hundred of them. Every example is judged: a settings file that is taken must be written down
and read back the same; a damaged store, kept list or checkpoint must be refused or hold what it held; an image must be decoded, by
every way a run has, or be refused by its name. An error that is no ConfigError, or not one line, fails.
"""

import argparse
import functools
import io
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as pytest does, when this is started by itself

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from runs import assert_same_bits  # noqa: E402

from images import listing, store_build  # noqa: E402
from images.datasets import ImageTree  # noqa: E402
from images.sources import CroppedImages  # noqa: E402
from images.store import HEADER, open_store  # noqa: E402
from learning.checkpoint import Checkpoint  # noqa: E402
from learning.models import check_model  # noqa: E402
from learning.weights import read_weights  # noqa: E402
from presets import BatchPreset, eval_preset, train_preset  # noqa: E402
from settings import sources  # noqa: E402
from settings.errors import ConfigError  # noqa: E402
from settings.resolve import resolve  # noqa: E402
from settings.table import SETTINGS  # noqa: E402
from stages import plan_stages  # noqa: E402

# ---- settings ----

NAMES = st.one_of(
    st.sampled_from(sorted(SETTINGS)),
    st.sampled_from(sorted(SETTINGS)).map(lambda name: name[:-1]),
    st.text(max_size=8),
)
NUMBERS = st.one_of(
    st.integers(-3, 40), st.integers(), st.floats(0, 1), st.floats(), st.sampled_from(["1e-5", "010", "0x1F", "1:30", "٣"])
).map(str)  # fmt: skip
ACCEPTED = sorted({choice for row in SETTINGS.values() for choice in row["choices"] or ()})
ODD = [
    "!!bool foo", '!!int ""', "!!timestamp x", "!!set [a]", "!!binary x", "!!omap [a]", "!!python/name:os.system", "!!null x",
    "&a [*a]", "*b", "{}", "[]", "[[[]]]", "{a: 1, a: 2}", "{? [x] : y}", "2026-11-26", "~", "yes", "off", "<<", "=", "|",
    "'", '"', '"\\0"', '"\\ud800"', "- -", "? :", "%", "@", "`", "x" * 300, "/".join("x" * 9 for _ in range(500)), ".inf",
    "-.nan", "1_000", "0b1", "+5.", "1e999", "9" * 5000, "\u2028", "\x85", "\ufeff", "none", "auto", "true", "90s", "1.5h",
]  # fmt: skip
WORDS = st.one_of(st.sampled_from(ACCEPTED), st.sampled_from(ODD), st.text(max_size=12))
VALUES = st.one_of(NUMBERS, WORDS, st.lists(NUMBERS, max_size=4).map(lambda items: f"[{', '.join(items)}]"))
LINES = st.builds("{}: {}".format, NAMES, VALUES)
FILES = st.one_of(
    st.lists(LINES, max_size=6).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
)
FLAGS = st.lists(
    st.one_of(
        st.builds(lambda name, value: [f"--{name.replace('_', '-')}", value], NAMES, st.one_of(NUMBERS, WORDS)),
        st.builds(lambda name, value: [f"--{name.replace('_', '-')}={value}"], NAMES, WORDS),
        st.builds(lambda name, values: [f"--{name.replace('_', '-')}", *values], NAMES, st.lists(NUMBERS, max_size=3)),
        st.builds(lambda name: [f"--no-{name.replace('_', '-')}"], NAMES),
        st.text(max_size=8).map(lambda text: [text]),
    ),
    max_size=4,
).map(lambda parts: [word for part in parts for word in part if word not in ("-h", "--help")])


def take(argv):
    """Resolve settings as a run does, and compute its stages; a YAML file of them must give the same ones."""
    config = resolve(argv)
    check_model(config)
    plan_stages(config)
    kept = {name: value for name, value in config.as_dict().items() if name not in ("config", "plan")}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        Path(path).write_text(yaml.safe_dump(kept))
        again = resolve(["--config", path]).as_dict()
    assert {name: again[name] for name in kept} == kept


# ---- files ----


def damage(content, cuts):
    """Change bytes: each of `cuts` is a way, a place as a share of the length, and a byte."""
    content = bytearray(content)
    for way, share, byte in cuts:
        at = int(share * len(content))
        if way == "flip" and content:
            content[min(at, len(content) - 1)] ^= byte or 1
        elif way == "cut":
            del content[at:]
        elif way == "lose":
            del content[at : at + byte]
        elif way == "add":
            content[at:at] = bytes([byte]) * byte
        elif way == "blank":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        elif way == "swap":
            half = content[at : at + 32]
            content[at : at + 32] = content[at + 32 : at + 64]
            content[at + 32 : at + 32] = half
    return bytes(content)


SHARES = st.one_of(st.floats(0, 1), st.floats(0, 0.02))  # headers lie at the beginning
CUTS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "lose", "add", "blank", "swap"]), SHARES, st.integers(0, 255)),
    min_size=1,
    max_size=3,
)


def pictures():
    """One small photo in every format that is taken for an image, by its file name."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    forms = [
        ("a.jpg", photo, "JPEG", {}), ("progressive.jpg", photo, "JPEG", {"progressive": True}),
        ("cmyk.jpeg", photo.convert("CMYK"), "JPEG", {}), ("a.png", photo, "PNG", {}), ("p.png", photo.quantize(), "PNG", {}),
        ("16.png", Image.fromarray(pixels[..., 0].astype(np.uint16) << 8), "PNG", {}), ("a.bmp", photo, "BMP", {}),
        ("a.ppm", photo, "PPM", {}), ("a.tif", photo, "TIFF", {}), ("lzw.tiff", photo, "TIFF", {"compression": "tiff_lzw"}),
        ("a.webp", photo, "WEBP", {}), ("gif.jpg", photo.quantize(), "GIF", {}),
    ]  # fmt: skip
    files = {}
    for name, image, form, how in forms:
        file = io.BytesIO()
        image.save(file, form, **how)
        files[name] = file.getvalue()
    return files


def decode_all_ways(tree):
    """Decode image 0 as runs do: whole, into a store, cropped by workers, in batches, at evaluation."""
    image, _ = tree[0]
    assert image.mode == "RGB" and min(image.size) > 0
    assert store_build.decode(tree, 0, 16).shape[2] == 3
    with tree.opened(0) as (opened, _):
        assert train_preset(image_size=8)(opened).shape == (3, 8, 8)
    batch, *_ = CroppedImages(tree, BatchPreset(image_size=8), 0).__getitems__([(0, 0, 0)])
    assert batch.shape == (1, 3, 8, 8)
    if max(image.size) <= 20 * min(image.size):  # evaluation resizes the short side, whatever the long one becomes
        assert eval_preset(crop_size=8, resize_size=10)(image).shape == (3, 8, 8)


# ---- judging ----


@contextmanager
def judged(counts, path=None):
    """Count what is taken and what is refused, which must be told in one line, with the file's name."""
    try:
        yield
        counts["taken"] += 1
    except ConfigError as error:
        assert str(error) and str(error).isprintable(), repr(str(error))
        assert path is None or str(path) in str(error), str(error)
        counts["refused"] += 1


def repeat(count, number, *strategies):
    """Call a function with `count` examples, which follow from `number`; what fails is shown, not made smaller first."""

    def decorate(function):
        quiet = settings(
            max_examples=count, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        quiet(seed(number)(given(*strategies)(function)))()

    return decorate


def fuzz_settings(count, number=0):
    """YAML files and command lines: each file alone, each command line alone, and both together."""
    counts = Counter()
    build_parser, sources.build_parser = sources.build_parser, functools.cache(sources.build_parser)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mine.yaml"

            @repeat(-(-count // 3), number, FILES, FLAGS)
            def _(content, flags):
                path.write_bytes(content)
                file = ["--config", str(path)]
                for argv in (file, flags, file + flags):
                    with judged(counts):
                        take(argv)
    finally:
        sources.build_parser = build_parser
    return counts


def fuzz_images(count, number=0):
    """Image files of every format, damaged."""
    counts, files = Counter(), pictures()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of what it can read all the same
        trees = {}
        for name, content in files.items():
            path = Path(folder) / name.replace(".", "_") / "class" / name
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            trees[name] = path, ImageTree(str(path.parent.parent))

        @repeat(count, number, st.sampled_from(sorted(files)), CUTS)
        def _(name, cuts):
            path, tree = trees[name]
            path.write_bytes(damage(files[name], cuts))
            with judged(counts, path):
                decode_all_ways(tree)

    return counts


def fuzz_stores(count, number=0):
    """Store files, damaged: refused, or every pixel and class is what it was."""
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(pictures().values()):
            path = Path(folder) / "images" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        tree = ImageTree(str(Path(folder) / "images"))
        path, key = Path(folder) / "images-16-0.images", store_build.store_key(tree, 16)
        store_build.build(str(path), tree, 16, key)
        content, whole = path.read_bytes(), open_store(str(path), tree, key, check=True)
        expected = [whole.pixels(i).clone() for i in range(len(tree))]
        spaces = content[:HEADER].rstrip()

        @repeat(count, number, CUTS)
        def _(cuts):
            damaged = damage(content, cuts)
            path.unlink()  # another file: the one above stays mapped
            path.write_bytes(damaged)
            try:
                stored = open_store(str(path), tree, key, check=True)
            except (OSError, ValueError) as error:
                assert str(error).isprintable()
                counts["refused"] += 1
                return
            assert all((stored.pixels(i) == pixels).all() for i, pixels in enumerate(expected))
            assert damaged.startswith(spaces) and len(damaged) == len(content)  # only filling bytes may differ
            counts["taken"] += 1

    return counts


def fuzz_lists(count, number=0):
    """Kept lists of files, damaged: listed anew, or the same list."""
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(20):
            path = Path(folder) / "images" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        root, kept_path, settled = str(Path(folder) / "images"), listing.kept_path, listing.SETTLED
        listing.kept_path, listing.SETTLED = lambda name: os.path.join(folder, name), -1e12  # as if an hour had passed
        try:
            found = listing.scan(root)
            listing.write_list(root, found)
            content = Path(listing.list_path(root)).read_bytes()

            @repeat(count, number, CUTS)
            def _(cuts):
                Path(listing.list_path(root)).write_bytes(damage(content, cuts))
                again = listing.read_list(root)
                assert again is None or (list(again.files) == list(found.files) and again.classes == found.classes)
                counts["refused" if again is None else "taken"] += 1
        finally:
            listing.kept_path, listing.SETTLED = kept_path, settled
    return counts


def fuzz_checkpoints(count, number=0):
    """A run's checkpoint, damaged, to resume from and to take weights from: refused, or every number is what it was."""
    counts = Counter()
    content = (ROOT / "tests" / "data" / "run_of_2026_11" / "checkpoint.pth").read_bytes()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of pickles in odd states
        path = Path(folder) / "checkpoint.pth"
        ways = (lambda: Checkpoint.load(str(path)).to_dict(), lambda: read_weights("resnet18", str(path)))
        path.write_bytes(content)
        expected = [way() for way in ways]

        @repeat(-(-count // 2), number, CUTS)
        def _(cuts):
            path.write_bytes(damage(content, cuts))
            for way, whole in zip(ways, expected):
                with judged(counts, path):
                    assert_same_bits(way(), whole)

    return counts


KINDS = {
    "settings": fuzz_settings, "images": fuzz_images, "stores": fuzz_stores, "lists": fuzz_lists,
    "checkpoints": fuzz_checkpoints,
}  # fmt: skip


def main():
    """Run them all, shared among processes, and write a row for each: what, how many, and how they ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=int, default=100_000, help="files and command lines")
    parser.add_argument("--files", type=int, default=2000, help="damaged images; as many stores, lists and checkpoints")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; each has examples of its own")
    parser.add_argument("--out", default=str(ROOT / "results" / "reliability_data.json"))
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for kind, fuzz in KINDS.items():
            started = time.monotonic()
            count = (options.settings if kind == "settings" else options.files) // options.jobs
            counts = sum(pool.map(fuzz, [count] * options.jobs, range(options.jobs)), Counter())
            rows.append({
                "what": f"fuzzed {kind}",
                "command": f"python tests/fuzz.py --settings {options.settings} --files {options.files} --jobs {options.jobs}",
                "examples": counts.total(), "taken": counts["taken"], "refused in one line": counts["refused"],
                "tracebacks": 0, "taken and wrong": 0,  # the first of either ends the program
                "seconds": round(time.monotonic() - started), "python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    Path(options.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
