"""Images of every mode, the order of samples worked out by hand, and loaders that give the same bits anywhere."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tree
from loading import loader_of
from PIL import Image

from augment.pixels import denormalise
from images import datasets, loaders
from images.datasets import Data, Digits, ImageTree, load_data
from images.loaders import EvalImages, TrainLoader, eval_loader, sample_grid, train_loader
from images.order import DrawSampler
from images.sources import DrawnImages
from images.store_place import with_store
from images.workers import close_loader
from presets import BatchPreset, batch_mix, train_preset
from settings.errors import ConfigError
from settings.resolve import resolve
from stages import StageScheduler, plan_stages
from utils import Runtime

CPU = Runtime(device=torch.device("cpu"))


class Colours:
    """Image i of 12 is plain, its red i; even ones are of class 0, odd ones of class 1."""

    classes = ("even", "odd")

    def __init__(self, count=12):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8), (index, 100, 200)), index % 2


class Noted(TrainLoader):
    """Remembers when its workers were asked to start."""

    def start(self, epoch, first_step=0):
        if self.position != (epoch, first_step):
            self.starts = [*getattr(self, "starts", []), (epoch, first_step)]
        super().start(epoch, first_step)


class Itself:
    """A transform that shows which image it got: its red."""

    def __call__(self, image):
        return torch.tensor(image.getpixel((0, 0))[0])


def batches(sampler, epoch=0, first_step=0):
    """Numbers of the images in each step."""
    sampler.start(epoch, first_step)
    return [[index for _, index, _ in step] for step in sampler]


def loader(workers=0, mix=None, count=12, rank=0, world_size=1, seed=0):
    transform = train_preset(image_size=16, auto_augment="ra", ra_magnitude=9, random_erase=0.5)
    sampler = DrawSampler(count, 4, seed, rank, world_size)
    runtime = Runtime(device=torch.device("cpu"), rank=rank, world_size=world_size)
    return loader_of(Colours(count), transform, sampler, runtime, workers=workers, mix=mix)


def loaded(one, epoch, first_step=0):
    """Everything an epoch gives; the workers are gone afterwards."""
    try:
        return list(one.epoch(epoch, first_step))
    finally:
        one.close()


def assert_same(one, other):
    assert [step for step, _, _ in one] == [step for step, _, _ in other]
    for (_, images, targets), (_, images_too, targets_too) in zip(one, other):
        assert torch.equal(images, images_too) and torch.equal(targets, targets_too)


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


# ---- the order of samples ----


@pytest.mark.parametrize(
    ("images", "batch", "processes", "sizes"),
    [
        (10, 4, 1, [4, 4, 2]),
        (9, 4, 1, [4, 4]),  # one image is too few for batch norm
        (8, 4, 1, [4, 4]),
        (3, 4, 1, [3]),
        (5, 1, 1, [1, 1, 1, 1, 1]),
        (11, 2, 2, [2, 2]),  # 3 left, one each
        (14, 4, 2, [4, 3]),
        (13, 4, 2, [4, 2]),  # 5 left, two each
        (12, 4, 3, [4]),
        (4, 32, 2, [2]),
    ],
)
def test_steps_and_their_sizes(images, batch, processes, sizes):
    seen = []
    for rank in range(processes):
        sampler = DrawSampler(images, batch, 0, rank, processes)
        steps = batches(sampler)
        assert [len(step) for step in steps] == sizes  # the same for every process
        assert len(sampler) == sampler.num_steps == len(sizes)
        seen += [index for step in steps for index in step]
    assert len(seen) == len(set(seen)) == sum(sizes) * processes  # no image twice
    assert set(seen) <= set(range(images))


@pytest.mark.parametrize(("images", "batch", "processes"), [(1, 4, 1), (3, 4, 2), (1, 2, 1)])
def test_too_few_images_for_a_single_step_are_refused(images, batch, processes):
    with pytest.raises(ConfigError, match=rf"{images} training image\(s\) are too few for {processes} process\(es\)"):
        DrawSampler(images, batch, 0, 0, processes)


def test_each_epoch_has_each_image_once_in_an_order_of_its_own():
    sampler = DrawSampler(10, 4, seed=0)
    orders = [[index for step in batches(sampler, epoch) for index in step] for epoch in range(6)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(10)) not in orders


def test_the_order_follows_from_seed_and_epoch_alone():
    one, same, other = DrawSampler(20, 4, seed=3), DrawSampler(20, 4, seed=3), DrawSampler(20, 4, seed=4)
    batches(one, epoch=7)
    torch.manual_seed(99)
    assert batches(one, epoch=2) == batches(same, epoch=2) != batches(other, epoch=2)


def test_seeds_do_not_give_each_other_s_epochs():
    orders = {tuple(map(tuple, batches(DrawSampler(20, 4, seed), epoch))) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("seed", [0, 4294967295])
def test_the_ends_of_the_range_of_seeds_work(seed):
    steps = batches(DrawSampler(10, 4, seed), epoch=100_000)
    assert sorted(index for step in steps for index in step) == list(range(10))


@pytest.mark.parametrize("first_step", [0, 1, 2, 3])
def test_a_middle_step_starts_the_tail_of_the_whole_epoch(first_step):
    whole = batches(DrawSampler(14, 4, 0), epoch=5)
    sampler = DrawSampler(14, 4, 0)
    assert batches(sampler, epoch=5, first_step=first_step) == whole[first_step:]
    assert len(sampler) == 4 - first_step and sampler.num_steps == 4


def test_every_draw_carries_its_epoch_and_repeat():
    sampler = DrawSampler(4, 2, 0)
    sampler.start(9)
    assert {(epoch, repeat) for step in sampler for epoch, _, repeat in step} == {(9, 0)}


def test_repeats_come_in_a_row_and_the_epoch_stays_as_long():
    sampler = DrawSampler(12, 4, 0, repeats=3)
    sampler.start(0)
    draws = [draw for step in sampler for draw in step]
    assert len(draws) == 12
    images = [index for _, index, _ in draws]
    assert images[0] == images[1] == images[2] and len(set(images)) == 4
    assert [repeat for _, _, repeat in draws] == [0, 1, 2] * 4


def test_repeats_go_to_different_processes_first():
    first, second = (batches(DrawSampler(12, 3, 0, rank, 2, repeats=2)) for rank in (0, 1))
    assert first == second and [len(set(step)) for step in first] == [3, 3]  # each image once in each process


# ---- training batches ----


def test_batches_are_the_same_bits_at_any_number_of_workers_and_from_any_step():
    mix = batch_mix(0.4, 1.0, 2)
    here = loaded(loader(workers=0, mix=mix, count=14), epoch=3)
    assert [step for step, _, _ in here] == [0, 1, 2, 3] and [len(images) for _, images, _ in here] == [4, 4, 4, 2]
    assert here[0][1].dtype == torch.float32 and here[0][1].shape == (4, 3, 16, 16) and here[0][2].shape == (4, 2)
    torch.manual_seed(1234)  # what was drawn elsewhere does not count
    assert_same(here, loaded(loader(workers=2, mix=mix, count=14), epoch=3))
    assert_same(here[2:], loaded(loader(workers=2, mix=mix, count=14), epoch=3, first_step=2))
    assert_same(here[3:], loaded(loader(workers=0, mix=mix, count=14), epoch=3, first_step=3))


def test_epochs_of_one_loader_are_those_of_a_fresh_one():
    workers = loader(workers=1)
    one = [list(workers.epoch(epoch)) for epoch in (0, 1)]
    workers.close()
    assert_same(one[1], loaded(loader(), epoch=1))
    assert not torch.equal(one[0][0][1], one[1][0][1])


def test_augmentation_differs_from_epoch_to_epoch_image_to_image_and_seed_to_seed():
    """The same image in each case."""
    transform = train_preset(image_size=16, auto_augment="ra", ra_magnitude=9)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)

    class Same(Colours):
        def __getitem__(self, index):
            return Image.fromarray(noise), 0

    def drawn(seed, *draw):
        return DrawnImages(Same(), transform, seed)[draw][0]

    pictures = [drawn(0, 0, 0, 0), drawn(0, 1, 0, 0), drawn(0, 0, 1, 0), drawn(0, 0, 0, 1), drawn(1, 0, 0, 0)]
    assert torch.equal(pictures[0], drawn(0, 0, 0, 0))
    assert all(not torch.equal(pictures[i], pictures[j]) for i in range(5) for j in range(i))


def test_mixing_differs_between_processes_and_steps():
    class OwnClasses(Colours):
        def __getitem__(self, index):
            return Image.new("RGB", (8, 8)), index

    shares = set()
    for rank in (0, 1):
        runtime = Runtime(device=torch.device("cpu"), rank=rank, world_size=2)
        sampler = DrawSampler(16, 4, 0, rank, 2)
        mix = batch_mix(1.0, 0.0, 16)
        steps = loader_of(OwnClasses(16), train_preset(image_size=8), sampler, runtime, mix=mix).epoch(0)
        shares |= {float(targets.max()) for _, _, targets in steps}
    assert len(shares) == 4


def test_loading_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    loaded(loader(mix=batch_mix(0.4, 1.0, 2)), epoch=0)
    assert torch.equal(before, torch.get_rng_state())


def test_targets_belong_to_their_images():
    images = loader_of(Colours(), Itself(), DrawSampler(12, 4, 0), CPU, workers=0)
    pairs = [(int(red), int(target)) for _, reds, targets in images.epoch(0) for red, target in zip(reds, targets)]
    assert sorted(pairs) == [(red, red % 2) for red in range(12)]


@pytest.mark.parametrize(
    ("count", "world_size", "per_step", "sizes", "steps"),
    [(14, 1, 4, {4, 2}, 4), (12, 1, 4, {4}, 3), (3, 1, 4, {3}, 1), (13, 2, 8, {4, 2}, 2)],
)
def test_a_loader_knows_its_steps_and_batch_sizes(count, world_size, per_step, sizes, steps):
    one = loader(count=count, world_size=world_size)
    assert (one.images_per_step, one.batch_sizes, len(one)) == (per_step, sizes, steps)
    assert {len(images) for _, images, _ in one.epoch(0)} == sizes


def test_worker_processes_are_gone_after_close_over_five_rebuilds():
    for epoch in range(5):
        one = loader(workers=2)
        next(one.epoch(epoch))  # left in the middle of an epoch
        assert len(multiprocessing.active_children()) == 2
        one.close()
        assert multiprocessing.active_children() == []
        one.close()  # twice does no harm


def test_a_damaged_image_in_a_worker_is_named(tree):
    (tree / "train" / "ant" / "0.png").write_bytes(b"no image")
    images = ImageTree(str(tree / "train"))
    one = loader_of(images, train_preset(image_size=8), DrawSampler(24, 24, 0), CPU, workers=1)
    with pytest.raises(ConfigError, match=r"0\.png cannot be read as an image"):
        loaded(one, epoch=0)


def test_the_loader_of_a_stage_has_its_size_batch_and_mix(tree):
    config = resolve([
        "--data-path", str(tree), "--stages", "2", "--epochs", "2", "--train-crop-size", "16", "24", "--batch-size", "4", "6",
        "--mixup-alpha", "0", "1", "--workers", "0", "--ra-sampler", "--ra-reps", "2",
    ])  # fmt: skip
    whole = load_data(config, CPU)
    first, second = (train_loader(config, whole, CPU, stage) for stage in plan_stages(config))
    _, images, targets = next(first.epoch(0))
    assert images.shape == (4, 3, 16, 16) and targets.dtype == torch.int64
    _, images, targets = next(second.epoch(1))
    assert images.shape == (6, 3, 24, 24) and targets.shape == (6, 2)
    assert second.sampler.repeats == 2 and first.mix is None


def test_images_take_the_memory_format_of_the_run():
    runtime = Runtime(device=torch.device("cpu"), memory_format=torch.channels_last)
    one = loader_of(Colours(), train_preset(image_size=8), DrawSampler(12, 4, 0), runtime)
    assert next(one.epoch(0))[1].is_contiguous(memory_format=torch.channels_last)


def test_a_grid_of_samples_is_a_picture_of_what_the_epoch_will_see():
    one = loader(count=12)
    grid = sample_grid(one, epoch=0, num_images=12)
    assert grid.dtype == torch.uint8 and grid.ndim == 3 and grid.shape[0] == 3
    assert grid.shape[1:] == (2 * 18 + 2, 8 * 18 + 2)  # two rows of eight, 16 px each and 2 between
    assert torch.equal(grid, sample_grid(loader(count=12), epoch=0, num_images=12))


# ---- batches augmented on the device ----


def device_loader(workers=0, mix=None, count=14, rank=0, world_size=1, images=None, epochs=range(0)):
    preset = BatchPreset(image_size=16, ra_magnitude=9, random_erase=0.5)
    runtime = Runtime(device=torch.device("cpu"), rank=rank, world_size=world_size)
    sampler = DrawSampler(count, 4, 0, rank, world_size)
    return loader_of(images or Colours(count), preset, sampler, runtime, workers=workers, mix=mix, epochs=epochs)


def test_batches_of_the_device_are_the_same_bits_at_any_number_of_workers_and_from_any_step():
    mix = batch_mix(0.4, 1.0, 2)
    here = loaded(device_loader(mix=mix), epoch=3)
    assert [len(images) for _, images, _ in here] == [4, 4, 4, 2]
    assert here[0][1].dtype == torch.float32 and here[0][1].shape == (4, 3, 16, 16) and here[0][2].shape == (4, 2)
    torch.manual_seed(1234)
    assert_same(here, loaded(device_loader(workers=2, mix=mix), epoch=3))
    assert_same(here[2:], loaded(device_loader(workers=2, mix=mix), epoch=3, first_step=2))


def test_an_image_is_augmented_alike_in_any_batch_and_process():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)

    class Same(Colours):
        def __getitem__(self, index):
            return Image.fromarray(noise), index

    def by_image(*batches):
        return {int(t): image for batch in batches for _, images, ts in batch for t, image in zip(ts, images)}

    whole = by_image(loaded(device_loader(images=Same(14)), 1))
    halves = by_image(*(loaded(device_loader(images=Same(14), rank=rank, world_size=2), 1) for rank in (0, 1)))
    assert whole.keys() == halves.keys() == set(range(14))
    assert all(torch.equal(whole[i], halves[i]) for i in whole)
    assert len({tuple(image.flatten().tolist()) for image in whole.values()}) == 14
    again = by_image(loaded(device_loader(images=Same(14)), 2))
    assert not torch.equal(whole[3], again[3])


def test_images_on_the_device_are_cropped_there_to_a_grey_level(tree):
    """Here the device is the CPU; the parts that differ on a GPU are its products and its stream."""
    flags = ["--data-path", str(tree), "--workers", "0", "--augment-on", "device", "--train-crop-size", "16"]
    config = resolve([*flags, "--batch-size", "5", "--val-resize-size", "24", "--val-crop-size", "20"])
    kept = with_store(config, load_data(config, CPU), CPU)
    (stage,) = plan_stages(config)
    on_host = loaded(train_loader(config, kept, CPU, stage), 0)
    kept.train.place_on(torch.device("cpu"))
    resident = train_loader(config, kept, CPU, stage)
    assert len(resident) == 5 and resident.source.samples([(0, 3, 0)]).shape == (1, 3, 16, 16)
    for (_, images, targets), (_, expected, expected_targets) in zip(loaded(resident, 0), on_host, strict=True):
        assert torch.equal(targets, expected_targets)
        grey = (denormalise(images).int() - denormalise(expected).int()).abs()
        assert grey.max() <= 1 and images.is_contiguous()


def test_files_and_stores_are_cropped_alike_by_workers(tree):
    flags = ["--data-path", str(tree), "--workers", "0", "--augment-on", "device", "--train-crop-size", "16"]
    config = resolve([*flags, "--batch-size", "5"])
    plain = load_data(config, CPU)
    (stage,) = plan_stages(config)
    kept = with_store(config, plain, CPU)
    pairs = zip(*(loaded(train_loader(config, source, CPU, stage), 0) for source in (kept, plain)))
    for (_, images, targets), (_, others, other_targets) in pairs:
        assert torch.equal(targets, other_targets)
        assert (denormalise(images).int() - denormalise(others).int()).abs().max() <= 1  # torch's resize and PIL's


# ---- loaders that cost nothing to change ----


def test_an_epoch_s_last_step_is_followed_by_loading_the_next_epoch():
    one = loader_of(
        Colours(14), train_preset(image_size=8), DrawSampler(14, 4, 0), CPU, workers=2, epochs=range(2, 5), kind=Noted
    )
    epochs = [list(one.epoch(epoch)) for epoch in (2, 3, 4)]
    assert one.starts == [(2, 0)]  # once for all three
    for epoch, steps in zip((2, 3, 4), epochs):
        fresh = loader_of(Colours(14), train_preset(image_size=8), DrawSampler(14, 4, 0), CPU)
        assert_same(steps, list(fresh.epoch(epoch)))
    again = list(one.epoch(3, 2))  # out of order: started anew
    one.close()
    assert_same(again, epochs[1][2:])
    assert one.starts == [(2, 0), (3, 2)]


def test_leaving_an_epoch_in_its_middle_and_going_on_is_seamless():
    one = loader_of(
        Colours(14), train_preset(image_size=8), DrawSampler(14, 4, 0), CPU, workers=1, epochs=range(2), kind=Noted
    )
    steps = iter(one.epoch(0))
    first = [next(steps), next(steps)]
    rest = list(one.epoch(0, 2))
    one.close()
    assert one.starts == [(0, 0)]
    assert_same(first + rest, loaded(plain_loader(14), 0))


def plain_loader(count):
    return loader_of(Colours(count), train_preset(image_size=8), DrawSampler(count, 4, 0), CPU)


@pytest.mark.parametrize("workers", [0, 2])
def test_when_drained_is_called_once_when_the_last_batch_is_handed_out(workers):
    one, calls, step_of_call = device_loader(workers=workers, count=40, epochs=range(2)), [], []
    one.when_drained = lambda: calls.append(len(step_of_call))
    for epoch in (0, 1):
        for step, _, _ in one.epoch(epoch):
            step_of_call.append(step)
    one.close()
    # Before which of the 20 steps: the last, or the one at whose arrival four more are with the workers.
    assert calls == ([19] if workers == 0 else [15])


def staged(tree, stages, workers):
    config = resolve([
        "--data-path", str(tree), "--stages", str(stages), "--epochs", str(stages), "--train-crop-size", "8", "16",
        "--batch-size", "8", "--workers", str(workers), "--decode-cache", "off",
    ])  # fmt: skip
    whole = load_data(config, CPU)
    plan = plan_stages(config)
    return plan, StageScheduler(lambda stage: train_loader(config, whole, CPU, stage), [], plan)


def test_the_next_stage_s_workers_are_there_before_it_begins(tree):
    plan, scheduler = staged(tree, 3, workers=2)
    with scheduler:
        for stage in plan:
            loader = scheduler.enter(stage)
            before = multiprocessing.active_children()
            assert len(before) == (0 if stage.index == 0 else 2)
            for _, images, _ in loader.epoch(stage.epochs.start):
                assert images.shape[-1] == stage.image_size
            assert len(multiprocessing.active_children()) == (2 if stage.index == 2 else 4)
    assert multiprocessing.active_children() == []


def test_stopping_in_a_stage_s_last_steps_closes_both_loaders(tree):
    plan, scheduler = staged(tree, 2, workers=1)
    with scheduler:
        for _ in scheduler.enter(plan[0]).epoch(0):
            pass
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's account of memory")
def test_fifty_changes_of_stage_leave_no_process_no_file_and_no_memory(tree):
    plan, scheduler = staged(tree, 50, workers=1)
    files, memory = [], []
    with scheduler:
        for stage in plan:
            for _ in scheduler.enter(stage).epoch(stage.epochs.start):
                pass
            assert len(multiprocessing.active_children()) <= 2
            files.append(len(os.listdir("/proc/self/fd")))
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert multiprocessing.active_children() == []
    assert max(files[25:]) <= max(files[5:25]) + 5
    assert memory[-1] - memory[10] < 20 * 2**20


# ---- evaluation ----


@pytest.mark.parametrize(("count", "shares"), [(5, [[0, 2, 4], [1, 3]]), (4, [[0, 2], [1, 3]]), (2, [[0], [1]])])
def test_two_processes_evaluate_each_image_once(count, shares):
    parts = [EvalImages(Colours(count), Itself(), rank, 2) for rank in (0, 1)]
    assert [[int(part[i][0]) for i in range(len(part))] for part in parts] == shares
    assert [part[0][1] for part in parts] == [0, 1]


def test_evaluation_keeps_order_and_the_short_last_batch(tree):
    config = resolve(
        [
            "--data-path",
            str(tree),
            "--workers",
            "2",
            "--batch-size",
            "4",
            "--val-crop-size",
            "16",
            "--val-resize-size",
            "20",
        ]
    )
    one = eval_loader(config, load_data(config, CPU), CPU, 16)
    targets = [batch.tolist() for _, batch in one]
    close_loader(one)
    assert targets == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1]]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("crop", "resize", "size", "expected"),
    [(224, 256, 224, 256), (224, 256, 112, 128), (384, 384, 300, 300), (224, 256, 300, 343), (32, 36, 16, 18)],
)
def test_other_sizes_are_resized_in_proportion(tree, monkeypatch, crop, resize, size, expected):
    asked, preset = [], loaders.eval_preset
    monkeypatch.setattr(loaders, "eval_preset", lambda **kwargs: (asked.append(kwargs), preset(**kwargs))[1])
    flags = ["--data-path", str(tree), "--workers", "0", "--val-crop-size", str(crop), "--val-resize-size", str(resize)]
    config = resolve(flags)
    one = eval_loader(config, load_data(config, CPU), CPU, size)
    assert (asked[0]["crop_size"], asked[0]["resize_size"]) == (size, expected)
    assert next(iter(one))[0].shape == (10, 3, size, size)


def test_data_is_what_both_splits_share():
    colours = Colours()
    assert Data(train=colours, val=colours).classes == colours.classes
