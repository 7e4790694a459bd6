"""Training loaders as tests make them: images and a transform, the rest of a run left out."""

import torch
from PIL import Image

from images.loaders import TrainLoader
from images.order import DrawSampler
from images.sources import find_source
from presets import train_preset
from utils import Runtime

CPU = Runtime(device=torch.device("cpu"))


def loader_of(images, transform, sampler, runtime, *, workers=0, decode_on_device=False, kind=TrainLoader, **how):
    source = find_source(images, transform, sampler.seed, runtime, workers, decode_on_device)
    return kind(source, sampler, runtime, **how)


class Colours:
    """Image i of 12 is plain, its red i; even ones are of class 0, odd ones of class 1."""

    classes = ("even", "odd")

    def __init__(self, count=12):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8), (index, 100, 200)), index % 2


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
