"""Images of every mode, folders of them, and the data set that needs no download."""

import os

import numpy as np
import pytest
import torch
from loading import CPU
from PIL import Image
from runs import make_tree

from images import datasets
from images.datasets import Digits, ImageTree, load_data
from settings.errors import ConfigError
from settings.resolve import resolve


def folder_with(tmp_path, image, name="x.png"):
    (tmp_path / "a").mkdir(exist_ok=True)
    image.save(tmp_path / "a" / name)
    return ImageTree(str(tmp_path))


# ---- images of every mode ----


def palette(transparent):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparent:
        image.info["transparency"] = 0
    return image


def sixteen_bits(value):
    return Image.fromarray(np.full((4, 4), value, dtype=np.uint16))


MODES = [
    ("grey", Image.new("L", (4, 4), 77), "png", (77, 77, 77)),
    ("grey with alpha", Image.new("LA", (4, 4), (77, 255)), "png", (77, 77, 77)),
    ("palette", palette(False), "png", (10, 200, 30)),
    ("palette with transparency", palette(True), "png", (10, 200, 30)),
    ("CMYK", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "tiff", (0, 255, 255)),
    ("RGBA", Image.new("RGBA", (4, 4), (10, 200, 30, 255)), "png", (10, 200, 30)),
    ("1 bit, white", Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
    ("1 bit, black", Image.new("1", (4, 4), 0), "png", (0, 0, 0)),
    ("16 bits, black", sixteen_bits(0), "png", (0, 0, 0)),
    ("16 bits, white", sixteen_bits(65535), "png", (255, 255, 255)),
    ("RGB", Image.new("RGB", (4, 4), (10, 200, 30)), "bmp", (10, 200, 30)),
]


@pytest.mark.parametrize(("image", "ending", "colour"), [row[1:] for row in MODES], ids=[row[0] for row in MODES])
def test_every_mode_becomes_rgb(tmp_path, image, ending, colour):
    picture, target = folder_with(tmp_path, image, f"x.{ending}")[0]
    assert (picture.mode, picture.size, target) == ("RGB", (4, 4), 0)
    assert picture.getcolors() == [(16, colour)]


@pytest.mark.parametrize(("value", "grey"), [(0x4000, 0x40), (0x8000, 0x80), (0xC000, 0xC0)])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, value, grey):
    picture, _ = folder_with(tmp_path, sixteen_bits(value))[0]
    assert picture.getpixel((0, 0)) == pytest.approx((grey, grey, grey), abs=1)


# ---- folders ----


def test_a_tree_has_its_classes_in_order_and_finds_images_at_any_depth(tmp_path):
    tree = make_tree(tmp_path, splits=(("train", 2),), classes=("bee", "ant"))
    (tree / "train" / "ant" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(tree / "train" / "ant" / "deeper" / "z.JPG")
    (tree / "train" / "ant" / "notes.txt").write_text("not an image")
    images = ImageTree(str(tree / "train"))
    assert images.classes == ["ant", "bee"] and len(images) == 5
    assert [images[i][1] for i in range(5)] == [0, 0, 0, 1, 1]


def test_wordnet_folders_get_their_names(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),), classes=("n01440764", "n03888257"))
    assert ImageTree(str(tmp_path / "train")).classes == ["tench", "parachute"]


def test_a_class_folder_without_images_is_named(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),))
    (tmp_path / "train" / "wasp").mkdir()
    (tmp_path / "train" / "wasp" / "readme.txt").write_text("none yet")
    with pytest.raises(ConfigError, match=r"train: .*wasp") as caught:
        ImageTree(str(tmp_path / "train"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_class_folders_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: .*class folder"):
        ImageTree(str(tmp_path))


def test_a_missing_folder_is_named_with_what_leads_to_it(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),))
    config = resolve(["--data-path", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"no folder .*val; data_path and the names of its splits"):
        load_data(config, CPU)


def test_splits_with_different_classes_are_refused_and_the_odd_ones_named(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),), classes=("ant", "bee"))
    make_tree(tmp_path, splits=(("val", 1),), classes=("bee", "wasp"))
    with pytest.raises(ConfigError, match=r"train and .*val must hold the same class folders; only one has ant, wasp"):
        load_data(resolve(["--data-path", str(tmp_path)]), CPU)


def test_data_tells_what_it_holds(tree):
    whole = load_data(resolve(["--data-path", str(tree)]), CPU)
    assert str(whole) == "24 training and 10 validation images of 2 classes"
    assert whole.classes == ["ant", "bee"]


@pytest.mark.parametrize("damage", [
    lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"GIF89a, or so it says",
    lambda whole: bytes(20) + whole[20:],
], ids=["cut off", "empty", "other content", "overwritten"])  # fmt: skip
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_damaged_image_is_named(tmp_path, ending, damage):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tree = folder_with(tmp_path, Image.fromarray(pixels), f"broken.{ending}")
    path = tmp_path / "a" / f"broken.{ending}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"a.broken\.{ending} cannot be read as an image"):
        tree[0]


def test_an_image_file_that_claims_to_be_huge_is_named(tmp_path):
    tree = folder_with(tmp_path, Image.new("RGB", (4, 4)), "huge.bmp")
    path = tmp_path / "a" / "huge.bmp"
    whole = bytearray(path.read_bytes())
    whole[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"huge\.bmp cannot be read as an image"):
        tree[0]


# ---- the kept list of an imagefolder ----


@pytest.fixture
def kept(tree, tmp_path, monkeypatch):
    """The training folder of a tree with its list kept, its class folders last changed an hour ago."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    root = tree / "train"
    for folder in root.iterdir():
        before = folder.stat().st_mtime - 3600
        os.utime(folder, (before, before))
    return root, ImageTree(str(root), keep_list=True)


def forbid_listing(monkeypatch):
    def listing(*args, **kwargs):
        raise AssertionError("listed anew")

    monkeypatch.setattr(datasets, "make_dataset", listing)


def test_the_kept_list_is_read_the_next_time(kept, monkeypatch):
    root, first = kept
    forbid_listing(monkeypatch)
    second = ImageTree(str(root), keep_list=True)
    assert second.samples == first.samples and second.classes == first.classes and len(second) == 24
    with pytest.raises(AssertionError, match="listed anew"):
        ImageTree(str(root))  # unless it is not asked for


@pytest.mark.parametrize("change", ["file added", "file removed", "class added", "list damaged"])
def test_the_list_is_made_anew_after_a_change(kept, change):
    root, first = kept
    expected = {"file added": 25, "file removed": 23, "class added": 25, "list damaged": 24}[change]
    if change == "file added":
        Image.new("RGB", (4, 4)).save(root / "bee" / "new.png")
    elif change == "file removed":
        (root / "bee" / "3.png").unlink()
    elif change == "class added":
        (root / "cat").mkdir()
        Image.new("RGB", (4, 4)).save(root / "cat" / "new.png")
    else:
        with open(datasets.list_path(str(root)), "w") as file:
            file.write('{"folders": ["ant"')
    again = ImageTree(str(root), keep_list=True)
    assert len(again) == expected
    assert (again.samples == first.samples) == (change == "list damaged")
    assert ImageTree(str(root), keep_list=True).samples == again.samples


def test_two_folders_keep_two_lists(kept, tree):
    other = ImageTree(str(tree / "val"), keep_list=True)
    assert len(other) == 10 and len(ImageTree(str(tree / "train"), keep_list=True)) == 24
    assert len(os.listdir(os.path.dirname(datasets.list_path(str(tree))))) == 2


# ---- digits ----


def test_digits():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == val.classes == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    assert sorted({train[i][1] for i in range(1437)}) == list(range(10))
    counts = np.bincount([val[i][1] for i in range(360)])
    assert counts.min() >= 35 and counts.max() <= 37  # stratified
    image, _ = train[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    values = np.stack([np.asarray(train[i][0]) for i in range(200)])
    assert (values.min(), values.max()) == (0, 240)  # white would be solarized at any strength
    assert (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all()


def test_digits_of_training_and_validation_are_the_same_every_time_and_no_digit_is_in_both():
    whole = [Digits(train=True), Digits(train=False), Digits(train=False)]
    train, val, again = (
        [(image.tobytes(), target) for image, target in map(d.__getitem__, range(len(d)))] for d in whole
    )
    assert val == again
    assert len(train) + len(val) == 1797
    assert len(set(train) & set(val)) <= 2  # a few digits of 8 x 8 pixels may be alike
