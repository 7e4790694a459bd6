"""Means, Student's intervals and paired differences, by hand, and how they are shown."""

from types import SimpleNamespace

import pytest
import study_rows

from Graphs.rows import comparison
from Graphs.tables import Tables
from studies.runner import Progress
from studies.screen import Screen
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


def test_two_differences_that_are_the_same_tell_nothing_of_their_spread():
    rows = [
        {"condition": name, "seed": seed, "top1": top1} for name, top1 in (("a", 53.3), ("b", 55.5)) for seed in (0, 1)
    ]
    found = difference(rows, "a", "b", "top1")
    assert found.low == found.high == pytest.approx(-2.2) and found.undecided


def test_without_rows_there_is_no_estimate():
    assert mean_of(ROWS, "c", "top1") is None
    assert mean_of(ROWS, "a", "top1_ema") is None
    assert difference(ROWS, "a", "c", "top1") is None


def test_an_area_under_a_curve_is_shown_with_four_decimals(capsys):
    study = SimpleNamespace(conditions=["a", "b"], metrics={"a": "auc", "b": "auc"}, controls={"a": "a", "b": "a"})
    values = {"a": (0.9012, 0.9034), "b": (0.9052, 0.9074)}
    Screen(study).outcome([{"condition": name, "seed": seed, "auc": value} for name in values for seed, value in enumerate(values[name])])  # fmt: skip
    printed = capsys.readouterr().out
    assert "auc 0.9023 [" in printed and "+0.0040 [+0.0040, +0.0040] than a" in printed


def test_a_table_shows_it_so_too(tmp_path):
    study_rows.write_transfer(tmp_path)
    table = Tables(str(tmp_path)).table("study transfer | pneumonia")
    assert "| 0.9300 [0.9300, 0.9300] | 96.20 [96.20, 96.20] |" in table


def test_conditions_are_compared_as_their_study_compares_them(tmp_path, monkeypatch):
    monkeypatch.setattr("Graphs.rows.ROOT", str(tmp_path))
    (tmp_path / "configs" / "studies").mkdir(parents=True)
    (tmp_path / "configs" / "studies" / "mine.yaml").write_text(
        "conditions:\n  0.1: {lr: 0.1}\n  off: {lr: 0.2, metric: macro_f1, control: 0.5}\n  0.5: {lr: 0.5, metric: top1_ema}\n"
    )
    rows = [{"condition": name} for name in ("0.5", "False", "0.1")]
    assert comparison("mine", rows, "0.5") == ("top1_ema", "0.1")  # the file's first condition, not the rows'
    assert comparison("mine", rows, "False") == ("macro_f1", "0.5")
    assert comparison("not_here", rows, "0.1") == ("top1", "0.5")


def test_the_live_table_keeps_what_is_under_way_in_sight():
    """75 runs on 40 lines: 66 done and 5 that wait become a line each; on 80 lines each run has its own."""
    states = ["done"] * 60 + ["failed"] + ["done"] * 6 + ["training"] * 2 + ["stopped"] + ["waiting"] * 5
    plan = SimpleNamespace(num_epochs=12)
    progress = {type("Run", (), {"name": f"run {i}", "plan": plan}): Progress(state) for i, state in enumerate(states)}
    runner = SimpleNamespace(progress=progress, seconds_left=lambda: None)
    screen = Screen(SimpleNamespace())

    def names(table):
        return list(table.columns[0].cells)

    assert names(screen.table(runner, 40)) == ["66 runs", "run 60", "run 67", "run 68", "run 69", "5 runs"]
    assert names(screen.table(runner, 80)) == names(screen.table(runner)) == [f"run {i}" for i in range(75)]
