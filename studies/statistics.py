"""Means, intervals and paired differences of the rows of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its standard deviation and 95 % interval.

    sd, low, high: None of a single value, which tells nothing about its spread
    """

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def undecided(self) -> bool:
        """Check whether a difference of 0 lies within the interval, or there is none that tells of the spread.

        Accuracies of few images are coarse: two differences that are the same do not make it sure.
        """
        if self.low is None or self.high is None or (self.n < 3 and self.high - self.low < 1e-9):
            return True
        return self.low <= 0 <= self.high


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of independent values, with Student's interval.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, n)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / n**0.5
    return Estimate(mean, n, sd, mean - half, mean + half)


def number_form(column: str) -> str:
    """Choose how many decimals the values of a column are shown with: percent two, `auc`, which lies in [0, 1], four."""
    return ".4f" if column == "auc" else ".2f"


def values_by_seed(rows: Sequence[Mapping[str, Any]], condition: str, column: str) -> dict[int, float]:
    """Collect a column of a condition's rows by seed; rows without a value are left out."""
    return {row["seed"]: row[column] for row in rows if row["condition"] == condition and row.get(column) is not None}


def mean_of(rows: Sequence[Mapping[str, Any]], condition: str, column: str) -> Estimate | None:
    """Estimate the mean of a column over the seeds of a condition; None without rows."""
    values = list(values_by_seed(rows, condition, column).values())
    return estimate(values) if values else None


def difference(rows: Sequence[Mapping[str, Any]], one: str, other: str, column: str) -> Estimate | None:
    """Estimate how much condition `one` lies above `other`, from the differences within each seed.

    Runs of one seed share their order of images and draws of augmentation, so that part of what seeds differ by falls
    out. None where no seed has both.
    """
    left, right = values_by_seed(rows, one, column), values_by_seed(rows, other, column)
    shared = sorted(left.keys() & right.keys())
    return estimate([left[seed] - right[seed] for seed in shared]) if shared else None


def estimate_text(found: Estimate | None, form: str) -> str:
    """Format an estimate as `71.20 [69.80, 72.60]`."""
    if found is None:
        return ""
    text = format(found.mean, form)
    return text if found.low is None or found.high is None else f"{text} [{found.low:{form}}, {found.high:{form}}]"
