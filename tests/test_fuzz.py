"""A few of the settings and damaged files of fuzz.py, the same ones each time; `make fuzz` runs a hundred thousand."""

import fuzz
import pytest


@pytest.mark.parametrize(
    ("kind", "count"), [("settings", 250), ("images", 100), ("stores", 100), ("lists", 60), ("checkpoints", 60)]
)
def test_each_is_taken_or_refused_in_one_line(kind, count):
    counts = fuzz.KINDS[kind](count)
    assert counts.total() >= count and counts["refused"] > count / 4 and counts["taken"] > 0
