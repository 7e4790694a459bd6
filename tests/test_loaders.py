"""Training batches and evaluation: the same bits whoever loads them."""

import multiprocessing

import numpy as np
import pytest
import torch
from loading import CPU, Colours, assert_same, loaded, loader, loader_of
from PIL import Image

import presets
from images.datasets import Data, ImageTree, load_data
from images.loaders import eval_loader, sample_grid, train_loader
from images.order import DrawSampler
from images.sources import DrawnImages
from images.workers import close_loader
from presets import batch_mix, train_preset
from settings.errors import ConfigError
from settings.resolve import resolve
from stages import plan_stages
from utils import Runtime


class Itself:
    """A transform that shows which image it got: its red."""

    def __call__(self, image):
        return torch.tensor(image.getpixel((0, 0))[0])


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
    one.mix = lambda images, targets: (images.contiguous(), targets)  # as `roll`, with which a mix begins, on a GPU
    assert next(one.epoch(1))[1].is_contiguous(memory_format=torch.channels_last)


def test_a_grid_of_samples_is_a_picture_of_what_the_epoch_will_see():
    one = loader(count=12)
    grid = sample_grid(one, epoch=0, num_images=12)
    assert grid.dtype == torch.uint8 and grid.ndim == 3 and grid.shape[0] == 3
    assert grid.shape[1:] == (2 * 18 + 2, 8 * 18 + 2)  # two rows of eight, 16 px each and 2 between
    assert torch.equal(grid, sample_grid(loader(count=12), epoch=0, num_images=12))


# ---- evaluation ----


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
    asked, preset = [], presets.eval_preset
    monkeypatch.setattr(presets, "eval_preset", lambda **kwargs: (asked.append(kwargs), preset(**kwargs))[1])
    flags = ["--data-path", str(tree), "--workers", "0", "--val-crop-size", str(crop), "--val-resize-size", str(resize)]
    config = resolve(flags)
    one = eval_loader(config, load_data(config, CPU), CPU, size)
    assert (asked[0]["crop_size"], asked[0]["resize_size"]) == (size, expected)
    assert next(iter(one))[0].shape == (10, 3, size, size)


def test_data_is_what_both_splits_share():
    colours = Colours()
    assert Data(train=colours, val=colours).classes == colours.classes
