"""Batches augmented on the device, and loaders that cost nothing to change."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import CPU, Colours, assert_same, loaded, loader_of
from PIL import Image

from augment.pixels import denormalise
from images.datasets import load_data
from images.loaders import TrainLoader, train_loader
from images.order import DrawSampler
from images.sources import CroppedImages
from images.store_place import with_store
from presets import BatchPreset, batch_mix, train_preset
from settings.resolve import resolve
from stages import StageScheduler, plan_stages
from utils import Runtime


class Noted(TrainLoader):
    """Remembers when its workers were asked to start."""

    def start(self, epoch, first_step=0):
        if self.position != (epoch, first_step):
            self.starts = [*getattr(self, "starts", []), (epoch, first_step)]
        super().start(epoch, first_step)


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


def test_workers_send_crops_as_they_come(tree):
    """Channels last: taking crops apart into planes costs a worker more than it saves."""
    config = resolve(["--data-path", str(tree), "--train-crop-size", "16"])
    for images in (load_data(config, CPU).train, with_store(config, load_data(config, CPU), CPU).train):
        pixels, targets, choices = CroppedImages(images, BatchPreset(image_size=16), 0).__getitems__(
            [(0, 3, 0), (0, 5, 0)]
        )
        assert pixels.is_contiguous(memory_format=torch.channels_last) and pixels.shape == (2, 3, 16, 16)
        assert targets.tolist() == [0, 0] and choices.shape == (2, BatchPreset.CHOICES)


def test_batches_are_cropped_at_augment_size_and_come_at_the_stage_s(tree):
    """Out of files and out of a store: what is cropped at 24 px is reduced to 16 after RandAugment."""
    flags = ["--data-path", str(tree), "--workers", "0", "--augment-on", "device", "--train-crop-size", "16"]
    config = resolve([*flags, "--augment-size", "24", "--auto-augment", "ra"])
    (stage,) = plan_stages(config)
    for images in (load_data(config, CPU), with_store(config, load_data(config, CPU), CPU)):
        source = train_loader(config, images, CPU, stage).source
        crops, _, choices = source.dataset.__getitems__([(0, 3, 0), (0, 5, 0)])
        assert crops.shape == (2, 3, 24, 24)
        (_, batch, _), *_ = loaded(train_loader(config, images, CPU, stage), 0)
        assert batch.shape[1:] == (3, 16, 16)
        assert torch.equal(source.samples([(0, 3, 0), (0, 5, 0)]), source.preset.finish(crops, choices))


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
