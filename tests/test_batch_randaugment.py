"""RandAugment of batches against torchvision, operation by operation: sorted by operation, as on a CPU, and all at once,
as on a GPU."""

import numpy as np
import pytest
import torch
from pictures import BILINEAR, keys, photo

from augment import at_once
from augment.at_once import augment_at_once
from augment.batch import augment_by_group, draw_groups, to_device
from augment.draws import uniforms
from augment.randaugment import OPERATIONS
from images.sources import augment_whole
from presets import BatchPreset
from utils import Runtime

NAMES = list(OPERATIONS)


# ---- by operation ----


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_equals_the_one_of_a_single_image(name, negative):
    images = torch.stack([photo(32, 32, seed).permute(2, 0, 1) for seed in range(6)])
    drawn = np.array([[True], [False], [True], [True], [False], [True]])
    middle = (NAMES.index(name) + 0.5) / len(NAMES)
    choices = np.where(drawn, middle, 0.0)  # the others: Identity
    signs = np.full((6, 1), 0.1 if negative else 0.9)
    ours = augment_by_group(images, draw_groups(choices, signs), level=9.0)
    operation = OPERATIONS[name]
    amount = operation.amount(9.0, 32, 32) * (-1 if negative and operation.signed else 1)
    for image, mine, is_drawn in zip(images, ours, drawn):
        expected = operation.apply(image, amount, BILINEAR) if is_drawn else image
        assert (mine.int() - expected.int()).abs().max() <= (1 if name in ("Color", "Contrast") else 0)


def test_two_layers_are_applied_in_order_and_every_image_keeps_its_place():
    images = torch.stack([photo(24, 24, seed).permute(2, 0, 1) for seed in range(40)])
    draws = uniforms(5, keys(40))
    choices, signs = draws[:, 0:2], draws[:, 2:4]
    ours = augment_by_group(images, draw_groups(choices, signs), level=12.0)
    for i, image in enumerate(images):
        for choice, sign in zip(choices[i], signs[i]):
            operation = OPERATIONS[NAMES[int(choice * 14)]]
            amount = operation.amount(12.0, 24, 24) * (-1 if operation.signed and sign < 0.5 else 1)
            image = operation.apply(image, amount, BILINEAR)
        assert (ours[i].int() - image.int()).abs().max() <= 1


# ---- all at once ----

EXACT = ("Identity", "TranslateX", "TranslateY", "Brightness", "Posterize", "Solarize", "AutoContrast", "Equalize")


def varied(size):
    """Photos, noise of all and of few grey levels, and a plain image, uint8 (N, 3, size, size)."""
    photos = [photo(size, size, seed).permute(2, 0, 1) for seed in range(4)]
    wide, narrow = (torch.randint(*range_, (3, size, size), dtype=torch.uint8) for range_ in ((0, 256), (60, 100)))
    return torch.stack([*photos, wide, narrow, torch.full((3, size, size), 77, dtype=torch.uint8)])


@pytest.mark.parametrize("level", [0.0, 9.0, 13.7, 45.0])  # 45: the paper's 15, beyond torchvision's range
@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_an_operation_are_torchvision_s(name, level):
    for size in (2, 31, 48):
        images, operation = varied(size), OPERATIONS[name]
        for negative in (False, True) if operation.signed else (False,):
            groups = np.full((len(images), 1), 2 * NAMES.index(name) + negative)
            amount = operation.amount(level, size, size) * (-1 if negative else 1)
            expected = operation.apply(images, amount, BILINEAR).int()
            grouped = (augment_by_group(images, groups, level).int() - expected).abs()
            assert grouped.max() <= (1 if name in ("Color", "Contrast") else 0)
            whole = augment_at_once(images, torch.from_numpy(groups), level)
            assert whole.dtype == torch.float32 and torch.equal(whole, whole.round())
            difference = (whole.int() - expected).abs()
            # A warp's coordinates differ in their last bits, which takes values that end in .5 to the other side.
            assert difference.max() <= (0 if name in EXACT else 1), (size, negative)
            assert difference.float().mean() < 0.05, (size, negative)


def test_both_forms_apply_two_layers_in_order_and_leave_every_image_in_its_place():
    images = torch.stack([photo(40, 40, seed).permute(2, 0, 1) for seed in range(60)])
    draws = uniforms(5, keys(60))
    groups = draw_groups(draws[:, 0:2], draws[:, 2:4])
    assert len(np.unique(groups // 2)) == 14
    difference = augment_at_once(images, torch.from_numpy(groups), 9.0) - augment_by_group(images, groups, 9.0)
    off = difference.abs()  # a grey level before equalizing may be several after it
    assert off.mean() < 0.05 and (off > 1).float().mean() < 0.003


def test_a_batch_is_the_same_however_it_lies_in_memory():
    images, groups = varied(24), torch.arange(14).view(7, 2) * 2
    turned = images.to(memory_format=torch.channels_last)
    assert torch.equal(augment_at_once(turned, groups, 9.0), augment_at_once(images, groups, 9.0))


def test_a_batch_too_large_for_the_device_s_memory_is_augmented_in_parts(monkeypatch):
    images, groups = varied(24), torch.arange(14).view(7, 2) * 2
    whole, sizes, part = augment_at_once(images, groups, 9.0), [], at_once.augment_part
    monkeypatch.setattr(at_once, "CHUNK", 3 * 24 * 24)
    monkeypatch.setattr(
        at_once, "augment_part", lambda images, *rest: (sizes.append(len(images)), part(images, *rest))[1]
    )
    assert torch.equal(augment_at_once(images, groups, 9.0), whole) and sizes == [3, 3, 1]


def test_an_operation_without_a_form_for_batches_is_noticed():
    with pytest.raises(NotImplementedError, match="Solarise has no form"):
        at_once.recipe("Solarise", 1.0, 8)


# ---- a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
def test_every_operation_on_a_gpu_is_the_cpu_s_to_a_grey_level():
    images = torch.stack([photo(97, 97, seed).permute(2, 0, 1) for seed in range(28)])
    groups = torch.arange(28)[:, None]
    there = augment_at_once(images.cuda(), groups.cuda(), 9.0).cpu()
    off = (there - augment_at_once(images, groups, 9.0)).abs().flatten(1)
    assert off.max() <= 1 and off.mean(1).max() < 0.05, off.mean(1)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_is_never_waited_for_and_is_given_few_kernels():
    device = torch.device("cuda")
    runtime = Runtime(device=device, memory_format=torch.channels_last)
    preset = BatchPreset(image_size=64, ra_magnitude=9, random_erase=0.25)
    flat = torch.randint(0, 256, (32 * 80 * 90, 3), dtype=torch.uint8, device=device)
    starts, sides, classes = np.arange(32) * 80 * 90, np.full(32, 80), np.zeros(32, np.int64)

    def cropped_and_augmented(epoch):
        draws = uniforms(0, keys(32, epoch))
        boxes = preset.boxes(draws, sides, np.full(32, 90))
        return augment_whole(flat, starts, np.full(32, 90), boxes, classes, preset, draws, runtime)[0]

    assert cropped_and_augmented(0).is_contiguous(memory_format=torch.channels_last)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cropped_and_augmented(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    crops, choices = torch.zeros(32, 3, 64, 64, dtype=torch.uint8, device=device), preset.choose(uniforms(0, keys(32)))
    with torch.profiler.profile() as profile:
        preset.finish(crops, to_device(choices, device))
        torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if event.key.startswith("cudaLaunchKernel"))
    assert 50 < launches <= 100
