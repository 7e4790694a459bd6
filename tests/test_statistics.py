"""Means, Student's intervals and paired differences, by hand."""

import pytest

from studies.statistics import difference, estimate, mean_of

T2 = 4.302653  # Student's t at 0.975 with 2 degrees of freedom, from a table


def test_mean_deviation_and_interval_of_three_values():
    found = estimate([70.0, 72.0, 74.0])
    assert (found.mean, found.n) == (72.0, 3)
    assert found.sd == pytest.approx(2.0)  # ((4 + 0 + 4) / 2) ** 0.5
    half = T2 * 2.0 / 3**0.5  # 4.9683
    assert (found.low, found.high) == pytest.approx((72 - half, 72 + half), abs=1e-4)


def test_a_single_value_has_no_interval_and_decides_nothing():
    found = estimate([71.5])
    assert (found.mean, found.n, found.sd, found.low, found.high) == (71.5, 1, None, None, None)
    assert found.undecided


ROWS = [
    {"condition": "a", "seed": seed, "top1": top1, "top1_ema": None} for seed, top1 in ((0, 60.0), (1, 70.0), (2, 80.0))
] + [{"condition": "b", "seed": seed, "top1": top1, "top1_ema": None} for seed, top1 in ((2, 82.0), (0, 61.0), (1, 71.5), (7, 0.0))]  # fmt: skip


def test_differences_are_taken_within_each_seed_whatever_the_order_of_rows():
    found = difference(ROWS, "b", "a", "top1")  # 1, 1.5, 2; seed 7 has no partner
    assert (found.mean, found.n, found.sd) == (pytest.approx(1.5), 3, pytest.approx(0.5))
    assert (found.low, found.high) == pytest.approx((1.5 - T2 * 0.5 / 3**0.5, 1.5 + T2 * 0.5 / 3**0.5), abs=1e-4)
    assert not found.undecided  # 0.26 to 2.74, though the two means' own intervals overlap widely
    assert difference(ROWS, "a", "b", "top1").mean == pytest.approx(-1.5)


def test_a_difference_whose_interval_holds_zero_is_undecided():
    rows = [{"condition": name, "seed": seed, "top1": value} for name, values in (("a", (1, 5, 3)), ("b", (2, 4, 3))) for seed, value in enumerate(values)]  # fmt: skip
    assert difference(rows, "a", "b", "top1").undecided


def test_without_rows_there_is_no_estimate():
    assert mean_of(ROWS, "c", "top1") is None
    assert mean_of(ROWS, "a", "top1_ema") is None
    assert difference(ROWS, "a", "c", "top1") is None
