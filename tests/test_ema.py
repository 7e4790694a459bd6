"""The average of the weights, by hand."""

import pytest
import torch
from runs import assert_same_bits
from small_models import copied, small_model, train_a_step
from torch import nn

from learning.ema import EMA, ema_decay
from settings.resolve import resolve


class Scalar(nn.Module):
    """One weight, one buffer of each kind; all hold `value`."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.set(value)

    def set(self, value):
        with torch.no_grad():
            self.weight.fill_(value)
            self.mean.fill_(value)
            self.count.fill_(int(value))


def ema_of(model, *flags):
    return EMA(model, resolve(["--model-ema", *flags]))


def held(ema):
    module = ema.module
    return pytest.approx((float(module.weight), float(module.mean), int(module.count)))


@pytest.mark.parametrize(
    ("setting", "images_per_step", "steps", "epochs", "decay"),
    [
        (0.99998, 128, 32, 600, 0.99986347),  # 0.00002 * 128 * 32 / 600 is 0.00013653
        (0.99998, 1024, 32, 600, 0.99890773),  # torchvision's own run: 8 GPUs of 128
        (0.99998, 32, 32, 90, 0.99977244),
        (0.9, 1, 1, 1, 0.9),
        (0.9, 100, 32, 1, 0.0),  # no less
        (0.0, 5, 1, 10, 0.5),
    ],
)
def test_decay_per_update(setting, images_per_step, steps, epochs, decay):
    assert ema_decay(setting, images_per_step, steps, epochs) == pytest.approx(decay, abs=1e-8)


def test_the_average_by_hand():
    """Decay 0.9: the first update copies, then 0.9 of the average and 0.1 of the model."""
    model = Scalar(50)
    ema = ema_of(model, "--model-ema-decay", "0.9", "--model-ema-steps", "1")
    ema.begin_epoch(images_per_step=1, num_epochs=1, warming_up=False)
    for value, average in ((1, 1.0), (2, 1.1), (3, 1.29), (11, 2.261)):
        model.set(value)
        ema.update(model)
        assert held(ema) == (average, average, value)  # the whole number is copied, not averaged
    assert ema.num_updates == 4 and model.weight.item() == 11


def test_a_smaller_decay_for_larger_batches():
    model = Scalar(1)
    ema = ema_of(model, "--model-ema-decay", "0.9", "--model-ema-steps", "2")
    ema.begin_epoch(images_per_step=10, num_epochs=4, warming_up=False)  # 1 - 0.1 * 10 * 2 / 4
    ema.update(model)
    model.set(3)
    ema.update(model)
    assert held(ema) == (2.0, 2.0, 3)


def test_warm_up_copies_and_the_average_begins_after_it():
    model = Scalar(0)
    ema = ema_of(model, "--model-ema-decay", "0.9", "--model-ema-steps", "1")
    for value in (1, 2, 5):
        ema.begin_epoch(images_per_step=5, num_epochs=10, warming_up=True)  # 0.95
        model.set(value)
        ema.update(model)
        assert held(ema) == (value, value, value)
    ema.begin_epoch(images_per_step=5, num_epochs=10, warming_up=False)
    for value, average in ((7, 7.0), (27, 8.0)):
        model.set(value)
        ema.update(model)
        assert held(ema) == (average, average, value)


def test_the_average_is_apart_from_the_model():
    model = small_model().train()
    ema = ema_of(model)
    assert not ema.module.training and model.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = copied(ema.module.state_dict())
    train_a_step(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=1)
    assert_same_bits(dict(ema.module.state_dict()), dict(before))


def test_batch_norm_statistics_are_averaged_and_its_counter_copied():
    model = small_model()
    ema = ema_of(model, "--model-ema-decay", "0.75", "--model-ema-steps", "1")
    ema.begin_epoch(images_per_step=1, num_epochs=1, warming_up=False)
    norm, averaged = model[1], ema.module[1]
    for number, value in ((1, 4.0), (2, 8.0)):
        norm.running_mean.fill_(value)
        norm.running_var.fill_(2 * value)
        norm.num_batches_tracked.fill_(number)
        ema.update(model)
    assert averaged.running_mean.tolist() == pytest.approx([5.0] * 6)  # 0.75 * 4 + 0.25 * 8
    assert averaged.running_var.tolist() == pytest.approx([10.0] * 6)
    assert averaged.num_batches_tracked.item() == 2
