"""Augmentation of batches against torchvision: its rules in loops of Python, its operations image by image, its
statistics over many draws."""

import math
import random

import numpy as np
import pytest
import torch
from pictures import keys, photo
from torchvision import transforms as v1
from torchvision.transforms import functional as v1_functional
from torchvision.transforms.v2 import functional as F

from augment import batch
from augment.batch import crop_batch, crop_rows, crop_tensor
from augment.draws import CROP, ERASED, NUM_DRAWS, crop_boxes, erase_boxes, uniforms
from augment.pixels import denormalise
from augment.randaugment import OPERATIONS
from images.loaders import augment_on
from presets import BatchPreset
from settings.errors import ConfigError
from settings.resolve import resolve
from utils import Runtime


def finish(preset, images, draws):
    return preset.finish(images, torch.from_numpy(preset.choose(draws)).to(images.device))


# ---- draws ----


def test_draws_are_uniform_and_unrelated():
    draws = uniforms(3, keys(20_000))
    assert draws.shape == (20_000, NUM_DRAWS) and draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 5 * math.sqrt(1 / 12 / 20_000)
    assert np.abs(draws.var(axis=0) - 1 / 12).max() < 0.003
    columns = np.corrcoef(draws, rowvar=False) - np.eye(NUM_DRAWS)
    assert np.abs(columns).max() < 5 / math.sqrt(20_000)
    following = [np.corrcoef(draws[:-1, i], draws[1:, i])[0, 1] for i in range(NUM_DRAWS)]
    assert np.abs(following).max() < 5 / math.sqrt(20_000)


def test_an_image_s_draws_follow_from_its_own_key():
    whole = uniforms(7, [(2, 5, 0), (2, 6, 0), (3, 5, 0), (2, 5, 1)])
    assert np.array_equal(uniforms(7, [(3, 5, 0)])[0], whole[2])
    assert np.array_equal(uniforms(7, [(2, 6, 0)], slice(4, 9))[0], whole[1, 4:9])
    others = [*whole, uniforms(8, [(2, 5, 0)])[0]]
    assert len({row[0] for row in others}) == 5 and len(np.unique(whole)) == whole.size


# ---- boxes ----


def crop_in_a_loop(draws, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop.get_params, its random numbers given."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * draws[10 + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(draws[20] * (height - h + 1)), math.floor(draws[21] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0), (0.3, 0.3)])
def test_crops_are_torchvision_s_for_the_same_draws(scale):
    draw = random.Random(1)
    heights, widths = (np.array([draw.choice([1, 2, 7, 31, 64, 100, 375, 1000]) for _ in range(500)]) for _ in "hw")
    draws = uniforms(0, keys(500))[:, CROP]
    boxes = crop_boxes(draws, heights, widths, scale)
    fallbacks = 0
    for row, height, width, box in zip(draws, heights, widths, boxes):
        expected = crop_in_a_loop(row, int(height), int(width), scale)
        assert tuple(box) == expected
        fallbacks += expected[2] == height or expected[3] == width
    assert fallbacks > 20  # narrow images were among them


def test_statistics_of_crops_and_flips_are_torchvision_s():
    count, height, width = 8000, 200, 300
    draws = uniforms(1, keys(count))
    preset = BatchPreset(image_size=8, hflip_prob=0.3)
    ours = preset.boxes(draws, np.full(count, height), np.full(count, width)).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [v1.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)], float
    )
    for name, statistic in {
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width),
        "aspect": lambda b: np.log(b[:, 3] / b[:, 2]),
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
    }.items():
        one, other = np.sort(statistic(ours)), np.sort(statistic(theirs))
        for level in (0.05, 0.25, 0.5, 0.75, 0.95):  # five standard errors of the share below a quantile
            share = np.searchsorted(one, np.quantile(other, level), side="right") / count
            at = np.searchsorted(other, np.quantile(other, level), side="right") / count
            assert abs(share - at) < 5 * math.sqrt(2 * level * (1 - level) / count), (name, level)
    assert abs(preset.flips(draws).mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / count)


def test_statistics_of_erased_rectangles_are_torchvision_s():
    count, size = 4000, 64
    ours = erase_boxes(uniforms(2, keys(count))[:, ERASED], size)
    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    theirs = np.array([v1.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(count)])
    assert (ours[:, 2:] > 0).all() and (ours[:, 2:] < size).all()
    assert (ours[:, 0] + ours[:, 2] <= size).all() and (ours[:, 1] + ours[:, 3] <= size).all()
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        one, other = np.sort(statistic(ours)), np.sort(statistic(theirs))
        for level in (0.1, 0.5, 0.9):
            value = np.quantile(other, level)
            share, at = (np.searchsorted(values, value, side="right") / count for values in (one, other))
            assert abs(share - at) < 5 * math.sqrt(2 * level * (1 - level) / count)


# ---- pixels of crops ----


def crops(flat, starts, strides, boxes, flips, size):
    rows = torch.from_numpy(crop_rows(starts, strides, boxes, flips)).to(flat.device)
    return crop_batch(flat, rows, boxes[:, 2:].max(axis=0).tolist(), size)


def reference_crop(pixels, box, flip, size):
    crop = F.resized_crop(pixels.permute(2, 0, 1), *box, [size, size], antialias=True)
    return F.horizontal_flip(crop) if flip else crop


@pytest.mark.parametrize("size", [24, 64])
def test_one_crop_is_torchvision_s(size):
    pixels = photo(60, 90)
    for box in ([0, 0, 60, 90], [10, 20, 30, 40], [59, 89, 1, 1], [5, 5, 24, 24], [0, 80, 60, 10]):
        difference = crop_tensor(pixels, box, size).int() - reference_crop(pixels, box, False, size).int()
        assert difference.abs().max() <= 1  # some versions of torchvision resize in floating point


@pytest.mark.parametrize("chunk", [1, 5000, 2**24])
@pytest.mark.parametrize("size", [16, 40])
def test_crops_by_matrix_products_are_torchvision_s_to_a_grey_level(monkeypatch, size, chunk):
    monkeypatch.setattr(batch, "CHUNK", chunk)
    shapes = [(50, 70), (33, 30), (16, 16), (90, 41), (7, 60), (1, 1)]
    images = [photo(*shape, seed=i) for i, shape in enumerate(shapes)]
    boxes = np.array([[3, 5, 40, 60], [0, 0, 33, 30], [0, 0, 16, 16], [80, 1, 10, 40], [2, 10, 3, 50], [0, 0, 1, 1]])
    flips = np.array([False, True, True, False, True, False])
    starts = np.cumsum([0] + [height * width for height, width in shapes])[:-1]
    flat = torch.cat([image.view(-1, 3) for image in images])
    ours = crops(flat, starts, np.array([width for _, width in shapes]), boxes, flips, size)
    assert ours.shape == (6, 3, size, size) and ours.dtype == torch.uint8
    for image, box, flip, mine in zip(images, boxes.tolist(), flips, ours):
        exact = reference_crop(image.float(), box, flip, size)  # without rounding between the axes
        assert (mine - exact).abs().max() <= 0.5 + 1e-3
        difference = (mine.int() - reference_crop(image, box, flip, size).int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.3


def test_products_in_half_precision_keep_a_grey_level():
    """What a GPU computes in, its sums in float32: here rounded by hand at the same places."""
    pixels = photo(300, 300)
    pixels[:20] = 255
    exact = reference_crop(pixels.float(), [0, 0, 300, 300], False, 128)
    weights = batch.triangle_weights(torch.tensor([300]), 128, 300)[0].half().float()
    rows = torch.einsum("yh,hwc->ywc", weights, pixels.float()).half().float()
    ours = torch.einsum("xw,ywc->cyx", weights, rows).half().float()
    assert (ours - exact).abs().max() < 0.4 and (ours.round() - exact).abs().max() <= 0.9
    assert (ours[:, :8].round() == 255).all()  # white stays white


# ---- the preset ----


def test_normalising_equals_torchvision_s():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    ours = finish(BatchPreset(image_size=16), images, uniforms(0, keys(2)))
    theirs = v1_functional.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_a_rectangle_of_some_images_is_erased_after_normalising(probability):
    images = torch.full((400, 3, 20, 20), 255, dtype=torch.uint8)
    ours = finish(BatchPreset(image_size=20, random_erase=probability), images, uniforms(0, keys(400)))
    erased = (ours == 0).all(1)
    assert torch.equal(erased, (ours == 0).any(1))
    hit = erased.flatten(1).any(1)
    assert abs(hit.float().mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / 400)
    for mask in erased[hit][:50]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


def test_operations_and_signs_are_drawn_equally_often(monkeypatch):
    counts = {}

    def noting(name, operation):
        def apply(images, amount, mode):
            counts[name, amount < 0] = counts.get((name, amount < 0), 0) + len(images)
            return images

        return batch.OPERATIONS[name].__class__(apply, operation.amount, operation.signed)

    noted = {name: noting(name, operation) for name, operation in OPERATIONS.items()}
    monkeypatch.setattr(batch, "OPERATIONS", noted)
    preset = BatchPreset(image_size=4, ra_magnitude=9)
    total = 14_000
    for epoch in range(7):
        finish(preset, torch.zeros(1000, 3, 4, 4, dtype=torch.uint8), uniforms(0, keys(1000, epoch)))
    for name, operation in OPERATIONS.items():
        each = total / 14
        here, negative = counts.get((name, False), 0), counts.get((name, True), 0)
        assert abs(here + negative - each) < 5 * math.sqrt(each)
        assert abs(negative - here) < 5 * math.sqrt(each) if operation.signed else negative == 0


SOLARIZE = 2 * list(OPERATIONS).index("Solarize")


def test_what_augment_size_does_to_pixels_by_hand():
    """Columns of 100 and 200, reduced 4 to 2: the first is 4/7 of one and 3/7 of the other, the second the reverse.

    Solarize inverts from 128 on, at the level where its threshold is that. At full size 200 becomes 55; after the
    reduction both columns are grey, 143 and 157, and both are inverted.
    """
    columns = torch.tensor([100, 200, 100, 200], dtype=torch.uint8).expand(1, 3, 4, 4)
    level = 30 * (255 - 128) / 255  # bins: a threshold of 128
    choices = torch.tensor([[SOLARIZE, 0, 0, 0, 0, 0]])
    full = BatchPreset(image_size=2, augment_size=4, ra_magnitude=level / 3, ra_scale="paper")
    small = BatchPreset(image_size=2, ra_magnitude=level / 3, ra_scale="paper")
    assert (full.crop_size, small.crop_size) == (4, 2)
    assert denormalise(full.finish(columns, choices))[0, 0, 0].tolist() == [81, 74]  # of 100 and 55
    reduced = batch.reduce(columns, 2)
    assert reduced[0, 0, 0].tolist() == [143, 157]
    assert denormalise(small.finish(reduced, choices))[0, 0, 0].tolist() == [255 - 143, 255 - 157]


def test_a_rectangle_is_erased_at_the_final_size():
    images = torch.full((200, 3, 40, 40), 255, dtype=torch.uint8)
    ours = finish(BatchPreset(image_size=20, augment_size=40, random_erase=1.0), images, uniforms(0, keys(200)))
    assert ours.shape == (200, 3, 20, 20)
    white = (255 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    near = torch.isclose(ours, white.view(3, 1, 1), atol=1e-4)
    assert (near | (ours == 0)).all() and (ours == 0).flatten(1).any(1).float().mean() > 0.9  # edges sharp


# ---- where ----


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cpu", "", "worker"),
        ("cpu", "--augment-on device", "device"),
        ("cuda", "", "device"),
        ("cuda", "--auto-augment ra", "device"),
        ("cuda", "--auto-augment ta_wide", "worker"),
        ("cuda", "--interpolation bicubic", "worker"),
        ("cuda", "--backend tensor", "worker"),
        ("cuda", "--augment-on worker", "worker"),
    ],
)
def test_auto_augments_on_a_gpu_what_has_a_form_for_batches(device, flags, expected):
    assert augment_on(resolve(flags.split()), Runtime(device=torch.device(device))) == expected


def test_batches_are_augmented_on_cuda_and_the_cpu_alone():
    assert augment_on(resolve([]), Runtime(device=torch.device("mps"))) == "worker"
    with pytest.raises(ConfigError, match="augment_on device works on CUDA GPUs and the CPU, the device is mps"):
        augment_on(resolve(["--augment-on", "device"]), Runtime(device=torch.device("mps")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--auto-augment ta_wide", "augment_on device has no batch form of auto_augment ta_wide, only of ra"),
        ("--interpolation nearest", "augment_on device is bilinear; use augment_on worker for nearest"),
        ("--backend tensor", "backend tensor has no effect with augment_on device"),
        ("--use-v2", "use_v2 true has no effect with augment_on device"),
    ],
)
def test_what_batches_cannot_do_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        resolve(["--augment-on", "device", *flags.split()])


# ---- a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
def test_crops_on_a_gpu_are_those_of_the_cpu_to_a_grey_level():
    shapes = [(50, 70), (333, 500), (16, 16), (600, 400)] * 8
    flat = torch.cat([photo(*shape, seed=i).view(-1, 3) for i, shape in enumerate(shapes)])
    heights, widths = np.array(shapes).T
    starts = np.cumsum([0, *(heights * widths)])[:-1]
    preset, draws = BatchPreset(image_size=96), uniforms(0, keys(len(shapes)))
    boxes, flips = preset.boxes(draws, heights, widths), preset.flips(draws)
    here = crops(flat, starts, widths, boxes, flips, 96)
    there = crops(flat.cuda(), starts, widths, boxes, flips, 96).cpu()
    difference = (here.int() - there.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.1


@pytest.mark.gpu
@needs_gpu
def test_batches_on_a_gpu_are_those_of_the_cpu():
    images = torch.stack([photo(48, 48, seed).permute(2, 0, 1) for seed in range(64)])
    preset, draws = BatchPreset(image_size=48, ra_magnitude=9, random_erase=0.5), uniforms(0, keys(64))
    here, there = finish(preset, images, draws), finish(preset, images.cuda(), draws).cpu()
    assert torch.equal(here == 0, there == 0)
    grey = (here - there).abs() * 0.226 * 255
    # A warp's coordinates differ in their last bits, which moves a pixel here and there over a rounding edge.
    assert grey.mean() < 0.1 and (grey > 1.5).float().mean() < 0.01
