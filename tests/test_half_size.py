"""Copies at half size in the store: out of them large crops are made small, as they would be out of the whole image."""

import numpy as np
import pytest
import torch
from loading import CPU, loaded
from pictures import photo
from PIL import Image

from augment.batch import crop_tensor
from images.datasets import load_data
from images.loaders import train_loader
from images.store_build import with_half
from images.store_place import store_halves, with_store
from settings.resolve import resolve
from stages import plan_stages

SIDE, COUNT = 96, 12


@pytest.mark.parametrize(
    ("flags", "halves"),
    [
        ("--train-crop-size 128 300 --val-resize-size 384 --val-crop-size 384", True),  # 600 px against 128
        ("--train-crop-size 200 300 --val-resize-size 384 --val-crop-size 384", True),  # 600 px, three times 200
        ("--train-crop-size 201 300 --val-resize-size 384 --val-crop-size 384", False),
        ("--train-crop-size 128 300 --augment-on worker", False),  # whose transforms take whole images
    ],
)
def test_where_stages_differ_much_in_size(flags, halves):
    assert store_halves(resolve(["--augment-on", "device", "--stages", "4", "--epochs", "4", *flags.split()])) == halves


def test_half_of_a_ramp_by_hand():
    """Grey levels 4 i; the half-size pixel i lies between 2 i and 2 i + 1, so it is 8 i + 2, but at the borders."""
    ramp = np.broadcast_to((4 * np.arange(40, dtype=np.uint8))[None, :, None], (10, 40, 3))
    block = with_half(np.ascontiguousarray(ramp))
    assert len(block) == 1344 + 5 * 20 * 3  # 1,200 bytes end at the next multiple of 192
    assert np.array_equal(block[:1200].reshape(10, 40, 3), ramp) and not block[1200:1344].any()
    half = block[1344:].reshape(5, 20, 3)
    assert np.array_equal(half[:, 1:-1], np.broadcast_to((8 * np.arange(1, 19) + 2)[None, :, None], (5, 18, 3)))


def test_an_image_one_pixel_thin_has_no_half():
    assert len(with_half(np.zeros((1, 7, 3), np.uint8))) == 192  # 21 bytes, and what follows to the next image's start


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("half") / "images"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(COUNT):
            pixels = photo(SIDE - i, SIDE + 2 * i, seed=i).numpy()
            Image.fromarray(pixels).save(root / split / "a" / f"{i:02}.png")
    return root


def opened(tree, folder):
    flags = f"--data-path {tree} --decode-cache {folder} --augment-on device --workers 0 --batch-size {COUNT}"
    sizes = "--stages 2 --epochs 2 --train-crop-size 16 48 --val-resize-size 48 --val-crop-size 48 --hflip-prob 0.5"
    settings = resolve([*flags.split(), *sizes.split()])
    return settings, with_store(settings, load_data(settings, CPU), CPU), plan_stages(settings)[0]


def test_crops_out_of_the_half_size_copy(tree, tmp_path):
    _, data, _ = opened(tree, tmp_path / "halves")
    assert data.train.header["half"] and not data.val.header["half"] and not data.train.damaged()

    rows = data.train.index[:2]  # 96 x 96 and 95 x 98 pixels
    boxes = np.array([[3, 5, 33, 41], [3, 5, 31, 41]])
    offsets, heights, widths, boxes = data.train.for_crops(rows, boxes, 16)
    # Only the first has twice 16 pixels each way; after its 27,648 bytes, 144 times 192, follows its half
    assert offsets.tolist() == [rows["offset"][0] + 27648, rows["offset"][1]]
    assert (heights.tolist(), widths.tolist()) == ([48, 95], [48, 98])
    assert boxes.tolist() == [[1, 2, 16, 20], [3, 5, 31, 41]]

    for i, (top, left, height, width) in enumerate([(2, 4, 48, 64), (20, 10, 32, 40), (0, 0, 84, 96)]):
        out_of_half = from_store(data.train, i, [top, left, height, width], 16)
        out_of_whole = crop_tensor(data.train.pixels(i), [top, left, height, width], 16)
        levels = (out_of_half.int() - out_of_whole.int()).abs()
        assert 0 < levels.max() <= 6 and levels.float().mean() < 1.5  # the noise of the picture is 8


def from_store(images, index, box, size):
    *place, boxes = images.for_crops(images.index[[index]], np.array([box]), size)
    assert boxes.tolist() == [[side // 2 for side in box]]
    return crop_tensor(images.view([int(part[0]) for part in place]), boxes[0].tolist(), size)


def test_a_loader_takes_large_crops_from_there(tree, tmp_path, monkeypatch):
    config, data, stage = opened(tree, tmp_path / "halves")
    ((_, halves, _),) = loaded(train_loader(config, data, CPU, stage), 0)
    monkeypatch.setitem(data.train.header, "half", False)
    ((_, whole, _),) = loaded(train_loader(config, data, CPU, stage), 0)
    levels = (halves - whole).abs().flatten(1) * 255 * 0.225  # of grey
    assert 6 <= (levels.amax(1) > 0).sum() < COUNT  # the others are the same to the bit
    assert levels.mean() < 10  # at most a pixel away, and neighbours differ by about 15


def test_on_the_device_they_are_the_same_to_a_grey_level(tree, tmp_path):
    config, data, stage = opened(tree, tmp_path / "halves")
    ((_, by_workers, _),) = loaded(train_loader(config, data, CPU, stage), 0)
    data.train.place_on(torch.device("cpu"))
    ((_, resident, _),) = loaded(train_loader(config, data, CPU, stage), 0)
    assert ((by_workers - resident).abs() * 255 * 0.225).max() < 1.05


def test_damage_in_a_copy_is_noticed(tree, tmp_path):
    _, data, _ = opened(tree, tmp_path / "halves")
    row = data.train.index[4]
    at = 4096 + int(row["offset"]) + -(-3 * int(row["height"] * row["width"]) // 192) * 192 + 5
    with open(data.train.path, "r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1]))
    assert data.train.damaged()
