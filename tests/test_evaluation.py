"""Validation images: each evaluated once, and on the device those that workers would make."""

import numpy as np
import pytest
import torch
from loading import CPU, Colours
from pictures import photo
from PIL import Image

from augment.batch import window_rows
from augment.pixels import denormalise
from images.datasets import Data, load_data
from images.evaluation import LARGE_EVALUATION, EvalImages, EvalOnDevice, large_batch
from images.loaders import eval_loader
from images.store_place import with_store
from images.workers import closing_loader
from presets import eval_preset
from settings.resolve import resolve
from utils import Runtime

SHAPES = [(50, 70), (91, 40), (33, 33), (24, 100), (20, 60)]  # of the images, height and width


class Red:
    """A transform that shows which image it got."""

    def __call__(self, image):
        return torch.tensor(image.getpixel((0, 0))[0])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Images of several shapes in a store, none of them reduced."""
    root = tmp_path_factory.mktemp("shapes")
    for split in ("train", "val"):
        (root / split / "all").mkdir(parents=True)
        for i, (height, width) in enumerate(SHAPES):
            Image.fromarray(photo(height, width, i).numpy()).save(root / split / "all" / f"{i}.png")
    config = resolve(["--data-path", str(root), "--train-crop-size", "64", "--workers", "0"])
    return with_store(config, load_data(config, CPU), CPU).val


def by_workers(images, resize_size, crop_size, rank=0, world_size=1):
    part = EvalImages(images, eval_preset(resize_size=resize_size, crop_size=crop_size), rank, world_size)
    pixels, targets = zip(*(part[i] for i in range(len(part))))
    return torch.stack(pixels), list(targets)


def on_device(images, runtime=CPU, **how):
    batches = list(EvalOnDevice(images, runtime, **how))
    return torch.cat([pixels for pixels, _ in batches]), torch.cat([targets for _, targets in batches]).tolist()


@pytest.mark.parametrize(("count", "shares"), [(5, [[0, 2, 4], [1, 3]]), (4, [[0, 2], [1, 3]]), (2, [[0], [1]])])
def test_two_processes_evaluate_each_image_once(count, shares):
    parts = [EvalImages(Colours(count), Red(), rank, 2) for rank in (0, 1)]
    assert [[int(part[i][0]) for i in range(len(part))] for part in parts] == shares
    assert [part[0][1] for part in parts] == [0, 1]


@pytest.mark.parametrize(("height", "width", "expected"), [
    (500, 375, (341, 256, 58, 16)),  # the long side is 341.33; (341 - 224) / 2 is 58.5, rounded to even
    (375, 500, (256, 341, 16, 58)),
    (256, 256, (256, 256, 16, 16)),
    (100, 1000, (256, 2560, 16, 1168)),
])  # fmt: skip
def test_windows_are_those_of_torchvision_s_resize_and_centre_crop(height, width, expected):
    assert tuple(window_rows(np.array([height]), np.array([width]), 256, 224)[0]) == expected


def test_a_crop_larger_than_the_image_has_a_black_margin():
    assert window_rows(np.array([40]), np.array([60]), 20, 25).tolist() == [[20, 30, -2, 2]]


@pytest.mark.parametrize(("resize_size", "crop_size"), [(24, 20), (33, 33), (48, 41), (20, 27), (70, 64)])
def test_images_resized_on_the_device_are_those_of_workers_to_a_grey_level(stored, resize_size, crop_size):
    expected, classes = by_workers(stored, resize_size, crop_size)
    ours, targets = on_device(stored, resize_size=resize_size, crop_size=crop_size, batch_size=2)
    assert targets == classes and ours.shape == expected.shape and ours.dtype == torch.float32
    off = (denormalise(ours).int() - denormalise(expected).int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.3


def test_processes_share_the_stored_images_as_workers_do(stored):
    for rank in (0, 1):
        runtime = Runtime(device=torch.device("cpu"), rank=rank, world_size=2)
        ours, _ = on_device(stored, runtime, resize_size=24, crop_size=20, batch_size=2)
        expected, _ = by_workers(stored, 24, 20, rank, 2)
        assert (denormalise(ours).int() - denormalise(expected).int()).abs().max() <= 1


def test_images_on_the_device_and_those_sent_there_are_the_same(stored):
    how = dict(resize_size=24, crop_size=20, batch_size=3)
    sent, _ = on_device(stored, **how)
    stored.place_on(torch.device("cpu"))
    resident, _ = on_device(stored, **how)
    stored.resident = None
    assert torch.equal(sent, resident)


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [("cuda", "", True), ("cuda", "--augment-on worker", False), ("cuda", "--auto-augment ta_wide", False), ("cpu", "--augment-on device", False)],
)  # fmt: skip
def test_where_a_gpu_augments_it_also_resizes_for_evaluation(stored, device, flags, expected):
    runtime, config = Runtime(device=torch.device(device)), resolve(["--workers", "0", *flags.split()])
    with closing_loader(eval_loader(config, Data(train=stored, val=stored), runtime, 24)) as loader:
        assert isinstance(loader, EvalOnDevice) is expected
        assert len(loader) == 1


@pytest.mark.parametrize(
    ("batch_size", "crop_size", "expected"),
    # 2**25 is 33,554,432: over 128 * 128 = 16,384 it is 2048, over 300 * 300 = 90,000 372.8, over 147,456 227.6
    [(128, 128, 512), (128, 300, 372), (128, 384, 227), (256, 384, 256), (1024, 128, 1024)],
)
def test_a_gpu_evaluates_more_images_at_once_than_it_trains_on(batch_size, crop_size, expected):
    assert large_batch(batch_size, crop_size) == expected


@pytest.mark.parametrize(
    ("device", "proven", "expected"),
    [("cuda", {LARGE_EVALUATION}, 512), ("cuda", set(), 4), ("cpu", {LARGE_EVALUATION}, 4)],
)
def test_it_does_so_where_that_was_rehearsed(stored, device, proven, expected):
    runtime = Runtime(device=torch.device(device), proven=proven)
    config = resolve(["--workers", "0", "--batch-size", "4"])
    with closing_loader(eval_loader(config, Data(train=stored, val=stored), runtime, 24)) as loader:
        assert loader.batch_size == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_resizes_as_the_cpu_does_and_is_not_waited_for(stored):
    how = dict(resize_size=40, crop_size=36, batch_size=5)
    runtime = Runtime(device=torch.device("cuda"))
    expected, classes = on_device(stored, **how)
    list(EvalOnDevice(stored, runtime, **how))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ((ours, targets),) = EvalOnDevice(stored, runtime, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    off = (denormalise(ours.cpu()).int() - denormalise(expected).int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.1 and targets.tolist() == classes
