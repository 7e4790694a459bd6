"""Probabilities that mean what they say: bins, halves, the temperature."""

import math

import numpy as np
import pytest
import torch

from learning.calibration import calibrate, confidences, fit_temperature, halves, reliability
from learning.scores import Outputs


def outputs_of(logits, targets):
    logits = torch.tensor(logits)
    return Outputs(logits, torch.tensor(targets), logits.argmax(1))


def too_sure(count=400):
    """All images look alike, at a margin of 2; three quarters are of the class that is named."""
    return outputs_of(count * [[2.0, 0.0]], (3 * count // 4) * [0] + (count // 4) * [1])


def test_the_error_of_bins_by_hand():
    """Four images: two at 0.95, one of them right; one at 0.55, right; one at 0.35, wrong."""
    found = reliability(np.array([0.95, 0.95, 0.55, 0.35]), np.array([True, False, True, False]))
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert found.confidence[[5, 8, 14]] == pytest.approx([0.35, 0.55, 0.95])
    assert found.accuracy[[5, 8, 14]].tolist() == [0, 1, 0.5]
    assert found.error == pytest.approx(0.425)  # (2 x 0.45 + 0.45 + 0.35) / 4


def test_the_upper_bound_of_a_bin_is_in_it():
    assert reliability(np.array([0.2, 1.0, 0.01]), np.ones(3, bool)).counts.nonzero()[0].tolist() == [0, 2, 14]


def test_halves_divide_every_class_and_follow_from_the_seed():
    targets = np.array(31 * [0] + 8 * [1] + 3 * [2] + [3])
    one, other = halves(targets, 5)
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(43)) and abs(len(one) - len(other)) == 1
    for number, count in ((0, 31), (1, 8), (2, 3), (3, 1)):
        shares = [int((targets[half] == number).sum()) for half in (one, other)]
        assert sum(shares) == count and abs(shares[0] - shares[1]) <= 1
    assert torch.equal(halves(targets, 5)[0], one) and not torch.equal(halves(targets, 6)[0], one)


def test_the_temperature_is_that_of_the_share_that_is_right():
    """The likelihood is largest where 1 / (1 + exp(-2 / T)) is 3/4, so that 2 / T is the logarithm of 3."""
    found = calibrate(too_sure(), seed=0)
    assert found.temperature == pytest.approx(2 / math.log(3), abs=1e-3)  # 1.8205
    assert (found.fitted_on, found.measured_on) == (200, 200)
    assert found.before.error == pytest.approx(0.880797 - 0.75, abs=1e-5)  # the logistic function at 2
    assert found.after.error == pytest.approx(0, abs=1e-4)


def test_a_model_that_is_not_sure_enough_has_a_temperature_below_one():
    outputs = outputs_of(200 * [[1.0, 0.0]], 180 * [0] + 20 * [1])
    assert calibrate(outputs, 0).temperature == pytest.approx(1 / math.log(9), rel=1e-3)  # 0.455


def test_what_is_measured_was_not_fitted_on():
    """The half that is fitted on is right throughout the likelihood; the other one is changed, and only its error moves."""
    sure, other = too_sure(), too_sure()
    rest = halves(sure.targets.numpy(), 0)[1]
    other.logits[rest] = torch.tensor([4.0, 0.0])
    one, two = calibrate(sure, 0), calibrate(other, 0)
    assert one.temperature == two.temperature and one.after.error < 0.001 < 0.1 < two.after.error


@pytest.mark.parametrize(
    ("outputs", "measured"),
    [
        (too_sure(96), 48),  # 48 images are few
        (outputs_of(200 * [[2.0, 0.0]], 200 * [0]), 100),  # without a mistake the likelihood has no end
    ],
)
def test_where_it_cannot_be_fitted_it_stays_one(outputs, measured):
    found = calibrate(outputs, 0)
    assert (found.temperature, found.fitted_on, found.measured_on) == (1.0, 0, measured)
    assert found.before.error == found.after.error > 0.1


def test_nothing_is_said_of_one_image_and_something_of_two():
    """One image is the first half, and the other is empty; of two, one is measured: right, at 1 / (1 + exp(-2))."""
    assert calibrate(outputs_of([[2.0, 0.0]], [0]), 0) is None
    found = calibrate(outputs_of(2 * [[2.0, 0.0]], [0, 0]), 0)
    assert found.measured_on == 1 and found.before.error == pytest.approx(1 - 0.880797, abs=1e-5)


def test_many_images_and_half_precision_are_fitted_in_parts(monkeypatch):
    monkeypatch.setattr("learning.calibration.ROWS", 7)
    outputs = too_sure()
    outputs.logits = outputs.logits.bfloat16()
    assert calibrate(outputs, 0).temperature == pytest.approx(2 / math.log(3), abs=1e-3)


def test_the_class_that_comes_first_stays_first():
    logits = 8 * torch.randn(500, 10)
    temperature = fit_temperature(logits, torch.randint(10, (500,)), torch.arange(500))
    assert temperature > 2  # it knows nothing
    assert torch.equal((logits / temperature).softmax(1).argmax(1), logits.argmax(1))


def test_confidence_is_the_largest_probability_without_overflow():
    logits = torch.tensor([[math.log(3), 0.0], [1000.0, 0.0], [0.0, 0.0]])
    assert confidences(logits, 1.0, torch.tensor([2, 0, 1])).tolist() == pytest.approx([0.5, 0.75, 1.0])
    assert confidences(logits, 0.5, torch.tensor([0])).item() == pytest.approx(0.9)  # odds of 3 squared
