"""Images of the Hugging Face Hub, from folders of Parquet: nothing here asks a network."""

import importlib.util
import io
import json
import multiprocessing
import pickle
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from programs import SMALL, ranks
from runs import assert_same_bits, checkpoint, make_tree, metrics, start

from images import hub
from images.datasets import ImageTree, load_data
from images.loaders import augment_on
from images.store_build import store_key
from reporting.assessment import path_of
from settings.errors import ConfigError
from settings.resolve import resolve
from utils import Runtime

CPU = Runtime(device=torch.device("cpu"))
NAMES = ["ant", "bee"]
LABELLED = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """The library's cache and torch's are folders of the test; the library asks no one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    datasets.disable_progress_bars()


def picture(number, size=(20, 16)):
    """A JPEG of one colour, whose red is `number`."""
    file = io.BytesIO()
    Image.new("RGB", size, (number, 90, 200)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(folder, split="train", features=None, **columns):
    """A split in a Parquet file, as the library writes it: by default four rows of two classes."""
    columns = columns or {"image": [{"bytes": picture(10 * i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, datasets.Features(features or LABELLED))
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def config(folder, *flags):
    return resolve(["--dataset", "hub", "--data-path", str(folder), *map(str, flags)])


def load(folder, *flags):
    return load_data(config(folder, *flags), CPU)


@pytest.fixture
def parquet(tmp_path):
    write(tmp_path / "parquet", "train")
    return write(tmp_path / "parquet", "validation")


# ---- what is found ----


def test_columns_by_type_classes_by_name_and_validation_for_val(parquet, capsys):
    data = load(parquet)
    assert data.classes == NAMES and data.train.targets.tolist() == [0, 1, 0, 1] and len(data.val) == 4
    assert path_of(data.train, 2) == f"row 2 of {parquet}, split train"
    image, target = data.train[3]
    assert (image.mode, image.size, target) == ("RGB", (20, 16), 1)
    assert image.getpixel((5, 5)) == pytest.approx((30, 90, 200), abs=3)
    assert "images of column image, classes of column label, splits train and validation" in capsys.readouterr().out


def test_words_are_classes_in_their_order(tmp_path):
    for split, labels in (("train", ["wasp", "bee", "ant", "bee"]), ("test", ["ant", "ant", "bee", "wasp"])):
        pictures = [{"bytes": picture(0), "path": None}] * 4
        write(tmp_path / "data", split, {"image": datasets.Image(), "label": datasets.Value("string")}, image=pictures, label=labels)  # fmt: skip
    data = load(tmp_path / "data")
    assert data.classes == ["ant", "bee", "wasp"]
    assert data.train.targets.tolist() == [2, 1, 0, 1] and data.val.targets.tolist() == [0, 0, 1, 2]


def test_numbers_are_classes_in_their_order(tmp_path):
    pictures = [{"bytes": picture(0), "path": None}] * 3
    for split in ("train", "val"):
        write(tmp_path / "data", split, {"image": datasets.Image(), "label": datasets.Value("int64")}, image=pictures, label=[10, 9, 10])  # fmt: skip
    data = load(tmp_path / "data")
    assert data.classes == ["9", "10"] and data.train.targets.tolist() == [1, 0, 1]


def test_columns_that_are_named(tmp_path):
    columns = {name: [{"bytes": picture(value), "path": None}] * 2 for name, value in (("front", 50), ("back", 150))}
    features = {"front": datasets.Image(), "back": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"]), "coarse": datasets.ClassLabel(names=["x", "y"])}  # fmt: skip
    for split in ("train", "val"):
        write(tmp_path / "data", split, features, **columns, fine=[1, 0], coarse=[0, 1])
    data = load(tmp_path / "data", "--image-column", "back", "--label-column", "coarse")
    assert data.classes == ["x", "y"] and data.train.targets.tolist() == [0, 1]
    assert data.train[0][0].getpixel((5, 5))[0] == pytest.approx(150, abs=3)
    with pytest.raises(ConfigError, match=r"several columns of images \(front, back\).*--image-column"):
        load(tmp_path / "data", "--label-column", "coarse")
    with pytest.raises(ConfigError, match=r"several columns of labels \(fine, coarse\).*--label-column"):
        load(tmp_path / "data", "--image-column", "back")
    with pytest.raises(ConfigError, match=r"image_column side: .* has the columns front, back, fine, coarse"):
        load(tmp_path / "data", "--image-column", "side")
    with pytest.raises(ConfigError, match=r"image_column fine of .* holds no images; name another"):
        load(tmp_path / "data", "--image-column", "fine", "--label-column", "coarse")


def test_plain_bytes_that_no_library_has_marked_are_images_if_named(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        table = pyarrow.table({"jpg": [picture(70), picture(80)], "cls": ["b", "a"]})
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{split}.parquet")
    data = load(tmp_path / "data", "--image-column", "jpg", "--label-column", "cls")
    assert data.classes == ["a", "b"] and data.train[0][1] == 1
    assert data.train[0][0].getpixel((5, 5))[0] == pytest.approx(70, abs=3)


def test_slices_of_the_only_split(tmp_path):
    write(tmp_path / "data")
    data = load(tmp_path / "data", "--train-split", "train[:50%]", "--val-split", "train[50%:]")
    assert [len(data.train), len(data.val)] == [2, 2]
    assert data.val[0][0].getpixel((5, 5))[0] == pytest.approx(20, abs=3)
    assert data.train.fingerprint() != data.val.fingerprint()


def test_one_split_for_both_is_doubted(parquet, capsys):
    assert len(load(parquet, "--val-split", "train").val) == 4
    assert "warning: training and validation images are one split, train" in capsys.readouterr().out


# ---- training ----


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same files as a tree and as Parquet, in the tree's order."""
    folder = tmp_path_factory.mktemp("both")
    tree = make_tree(folder / "tree", size=(44, 36))
    for path in tree.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    for split in ("train", "val"):
        samples = list(ImageTree(str(tree / split)).samples)
        pictures = [{"bytes": Path(path).read_bytes(), "path": None} for path, _ in samples]
        write(folder / "parquet", split, image=pictures, label=[target for _, target in samples])
    return tree, folder / "parquet"


WAYS = [
    "--decode-cache off --workers 2", "--workers 1", "--decode-cache off --augment-on device --workers 1",
    "--augment-on device",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_to_the_bits_of_the_same_images_in_folders(both, tmp_path, way):
    tree, parquet = both
    flags = ["--epochs", "1", "--auto-augment", "ra", "--ra-magnitude", "9", *way.split()]
    assert start(tree, tmp_path / "tree", *flags) == 0
    assert start(parquet, tmp_path / "hub", *flags, "--dataset", "hub") == 0
    assert_same_bits(checkpoint(tmp_path / "hub")["model"], checkpoint(tmp_path / "tree")["model"])
    assert metrics(tmp_path / "hub")[0]["val_loss"] == metrics(tmp_path / "tree")[0]["val_loss"]
    stores = list((tmp_path / "hub" / "decode_cache").glob("*.images"))
    assert len(stores) == (0 if "off" in way else 2)
    assert not (parquet / ".decode_cache").exists() and multiprocessing.active_children() == []


def test_a_store_is_found_again_and_made_anew_when_the_data_change(parquet):
    keys = [store_key(load(parquet).train, 64) for _ in range(2)]
    assert keys[0] == keys[1] != store_key(load(parquet).val, 64)
    write(parquet, "train", image=[{"bytes": picture(i), "path": None} for i in range(4)], label=[0, 1, 0, 1])
    assert store_key(load(parquet).train, 64) != keys[0]


def test_nothing_is_decoded_or_read_into_memory_at_the_start(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    pictures = [{"bytes": draw.bytes(500_000), "path": None} for _ in range(40)]  # 20 MB that are no images
    for split in ("train", "val"):
        write(tmp_path / "data", split, image=pictures, label=[0, 1] * 20)
    del pictures
    load(tmp_path / "data")  # the library makes its own tables, once
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *words, **more: pytest.fail("decoded by the library"))
    before = pyarrow.total_allocated_bytes()
    data = load(tmp_path / "data")
    assert pyarrow.total_allocated_bytes() - before < 1_000_000 and len(data.train) == 40
    there = pickle.loads(pickle.dumps(data.train))  # as a worker that is not forked gets it
    assert len(pickle.dumps(data.train)) < 100_000 and there.targets.tolist() == [0, 1] * 20
    assert data.train.table[0]["image"]["bytes"] == there.table[0]["image"]["bytes"]


# ---- what cannot be read ----


@pytest.fixture
def damaged(tmp_path):
    rows = [{"bytes": picture(10 * i), "path": None} for i in range(6)]
    write(tmp_path / "data", "val", image=rows, label=[0, 1] * 3)
    rows[2], rows[5] = {"bytes": b"no image", "path": None}, None
    return write(tmp_path / "data", "train", image=rows, label=[0, 1] * 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_row_is_named(damaged, tmp_path, capsys, workers):
    flags = ["--dataset", "hub", "--epochs", "1", "--decode-cache", "off", "--workers", workers]
    assert start(damaged, tmp_path / "run", *flags) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"row 2 of {damaged}, split train cannot be read as an image: it is no image of a known format" in told or (
        f"row 5 of {damaged}, split train cannot be read as an image: it is empty" in told
    )


def test_damaged_rows_are_left_out_and_listed(damaged, tmp_path):
    flags = ["--dataset", "hub", "--epochs", "1", "--on-bad-image", "skip", "--batch-size", "2"]
    assert start(damaged, tmp_path / "run", *flags) == 0
    skipped = json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_images"]
    assert skipped["count"] == 2 and skipped["train"] == {
        f"row 2 of {damaged}, split train": "it is no image of a known format",
        f"row 5 of {damaged}, split train": "it is empty",
    }
    images = load(damaged, "--on-bad-image", "skip").train
    assert images.targets.tolist() == [0, 1, 1, 0] and images[3][0].getpixel((5, 5))[0] == pytest.approx(40, abs=3)
    assert store_key(images, 64) != store_key(load(damaged).train, 64)


def test_two_processes_have_the_same_rows(damaged, tmp_path):
    flags = [*SMALL, "--dataset", "hub", "--data-path", damaged, "--on-bad-image", "skip", "--epochs", "1", "--batch-size", "2"]  # fmt: skip
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path / "torch")}
    done = ranks(2, tmp_path, *flags, "--output-dir", tmp_path / "run", env=env)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "4 training and 6 validation images of 2 classes; 2 left out" in done[0].stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (record,) = metrics(tmp_path / "run")
    assert summary["processes"] == 2 and record["images_per_second"] * record["epoch_seconds"] == pytest.approx(4)


def test_a_class_of_which_no_image_can_be_read_is_an_error(tmp_path):
    rows = [{"bytes": picture(0), "path": None}, {"bytes": b"", "path": None}]
    for split in ("train", "val"):
        write(tmp_path / "data", split, image=rows, label=[0, 1])
    with pytest.raises(ConfigError, match=r"split train: no image of class bee can be read; .* row 1 of"):
        load(tmp_path / "data", "--on-bad-image", "skip")


# ---- one line ----


def refused(capsys, folder, out, *flags):
    assert start(folder, out, "--dataset", "hub", *flags) == 2
    told = capsys.readouterr().err.splitlines()
    (line,) = [line for line in told if line.startswith("error: ")]
    assert not out.exists() and "Traceback" not in "".join(told)
    return line


def test_wrong_splits_columns_and_labels(parquet, tmp_path, capsys):
    out = tmp_path / "run"
    told = refused(capsys, parquet, out, "--val-split", "held_out")
    assert "has no split held_out, it has train, validation; name them with --train-split and --val-split" in told
    assert "has no split train[:x], it has" in refused(capsys, parquet, out, "--train-split", "train[:x]")
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    texts = write(tmp_path / "texts", features=features, text=["a", "b"], label=[0, 1])
    write(texts, "val", features, text=["a", "b"], label=[0, 1])
    assert "has no column of images; its columns are text, label; name one with --image-column" in refused(capsys, texts, out)  # fmt: skip
    pictures = [{"bytes": picture(0), "path": None}] * 2
    bare = write(tmp_path / "bare", features={"image": datasets.Image()}, image=pictures)
    write(bare, "val", {"image": datasets.Image()}, image=pictures)
    assert "has no column of labels; its columns are image; name one with --label-column" in refused(capsys, bare, out)
    without = write(tmp_path / "without", image=pictures, label=[0, 1])
    write(without, "test", image=pictures, label=[-1, -1])  # as test splits of challenges are
    told = refused(capsys, without, out)
    assert "split test: 2 of 2 rows have a label of no training class, first row 0 (-1)" in told
    write(without, "validation", image=pictures, label=[None, 1])
    assert "label_column label has no classes, 1 of its 2 values are missing" in refused(capsys, without, out)
    numbers = write(tmp_path / "numbers", features={"image": datasets.Image(), "label": datasets.Value("float32")}, image=pictures, label=[0.5, 1.5])  # fmt: skip
    write(numbers, "val", {"image": datasets.Image(), "label": datasets.Value("float32")}, image=pictures, label=[0.5, 1.5])  # fmt: skip
    assert "label_column label has no classes, it holds float" in refused(capsys, numbers, out)


def test_what_is_no_data_set(tmp_path, capsys):
    out = tmp_path / "run"
    assert "is neither a folder nor a data set's name on the Hub (owner/name)" in refused(capsys, tmp_path / "no", out)
    (tmp_path / "empty").mkdir()
    assert "empty cannot be loaded by the library datasets: " in refused(capsys, tmp_path / "empty", out)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 no PAR1")
    assert "broken cannot be loaded by the library datasets: " in refused(capsys, tmp_path / "broken", out)
    told = refused(capsys, "owner/name", out)  # the library is offline here
    assert "owner/name cannot be loaded" in told and "without a network give a data set that was fetched before" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "doesn't exist on the Hub; mind the spelling"),
        (ConnectionError("Couldn't reach the Hugging Face Hub for dataset 'a/b'"), "for dataset 'a/b'; without a network give"),
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['320px', 'full_size']"), "available configs: ['320px', 'full_size']; name one with --hub-config"),
        (ValueError("BuilderConfig 'x' not found. Available: ['320px']"), "Available: ['320px']; name one with --hub-config"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "found b.py; the library runs no code of a data set any more"),
        (OSError("disk"), "datasets: disk; see its page on the Hub"),
    ],
)  # fmt: skip
def test_what_the_library_says_is_one_line_with_what_helps(monkeypatch, capsys, tmp_path, error, told):
    def fail(*words):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    assert told in refused(capsys, "a/b", tmp_path / "run")


def test_without_the_package_one_line(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "datasets" else find(name))
    told = refused(capsys, tmp_path, tmp_path / "run")
    assert told == "error: dataset hub needs the package: pip install datasets, or give another --dataset"


def test_ways_and_settings_that_it_cannot_have_are_refused(parquet):
    settings = config(parquet, "--decode-on", "device", "--decode-cache", "off")
    with pytest.raises(ConfigError, match="decode_on device needs image files"):
        augment_on(settings, Runtime(device=torch.device("cuda")))
    for flags in ("--train-list x", "--download", "--cache-dataset"):
        with pytest.raises(ConfigError, match="has no effect with dataset hub"):
            config(parquet, *flags.split())
    with pytest.raises(ConfigError, match="hub_config 320px has no effect with dataset imagefolder"):
        resolve(["--hub-config", "320px"])


def test_a_configuration_is_given_to_the_library(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *words: asked.append(words))
    hub.find_builder(config("frgfm/imagenette", "--hub-config", "320px"))
    assert asked == [("frgfm/imagenette", "320px")]
