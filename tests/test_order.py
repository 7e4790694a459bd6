"""The order of samples."""

import pytest
import torch
from loading import batches

from images.order import DrawSampler
from settings.errors import ConfigError


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


def test_repeats_come_in_one_batch_apart_and_the_epoch_stays_as_long():
    sampler = DrawSampler(12, 6, 0, repeats=3)
    sampler.start(0)
    steps = list(sampler)
    assert [len(step) for step in steps] == [6, 6]
    assert len({index for step in steps for _, index, _ in step}) == 4
    for step in steps:  # two images, thrice: mixup mixes each with the one before it
        images = [index for _, index, _ in step]
        assert images == images[:2] * 3 and images[0] != images[1]
        assert [repeat for _, _, repeat in step] == [0, 0, 1, 1, 2, 2]


def test_a_last_step_of_one_image_repeated_is_left_out():
    """100 images, 4 repeats each: 25 distinct ones; three steps of 32 leave four repeats of the 25th."""
    sampler = DrawSampler(100, 32, seed=0, repeats=4)
    assert [len(batch) for batch in sampler] == [32, 32, 32] and sampler.batch_sizes == {32}
    assert [len(batch) for batch in DrawSampler(104, 32, seed=0, repeats=4)] == [32, 32, 32, 8]  # of two images
    assert [len(batch) for batch in DrawSampler(100, 32, seed=0)] == [32, 32, 32, 4]


def test_repeats_go_to_different_processes_first():
    first, second = (batches(DrawSampler(12, 3, 0, rank, 2, repeats=2)) for rank in (0, 1))
    assert first == second and [len(set(step)) for step in first] == [3, 3]  # each image once in each process
