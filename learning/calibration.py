"""How far probabilities can be believed, and the temperature by which they can be.

A network trained to the end of its loss says 99 % where it is right nine times in ten. Its logits divided by one number,
the temperature, say what they mean; the class that comes first stays the first.

Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599: expected calibration error with 15 bins
    (section 2, section 5), temperature scaling by the likelihood of held-out images (section 4.2).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from learning.scores import Outputs
from utils import HALF, keys_to_seeds

BINS = 15
LEAST = 50  # images that a temperature is fitted on; fewer say more about themselves than about the model
RANGE = (0.05, 20.0)  # of temperatures
ROWS = 4096  # images at a time, so that no second copy of all logits is made


@dataclass(frozen=True)
class Reliability:
    """How often images were right, by how probable their class was said to be.

    counts, confidence, accuracy: (BINS,) images, mean probability of the class named, share that is of it; the last two
        are 0 where there are none
    """

    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error, in [0, 1]: how far confidence and accuracy are apart, over all images."""
        return float((self.counts * abs(self.confidence - self.accuracy)).sum() / max(self.counts.sum(), 1))


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does for images that it was not fitted on.

    temperature: 1 where it could not be fitted; `fitted_on` is 0 then
    fitted_on, measured_on: images, of two halves that share none
    before, after: of the second half, without and with the temperature
    """

    temperature: float
    fitted_on: int
    measured_on: int
    before: Reliability
    after: Reliability


def calibrate(outputs: Outputs, seed: int) -> Calibration | None:
    """Fit the temperature on half of the images, and measure on the other half what it does; None if that has none.

    It stays 1 where the half is small, or has no mistake: the likelihood is then largest for a temperature of 0, which
    calls everything certain.
    """
    fit, rest = halves(outputs.targets.numpy(), seed)
    if not len(rest):  # of one image; an error of nothing would read as none
        return None
    wrong = (outputs.predicted != outputs.targets)[fit]
    fitted = len(fit) >= LEAST and bool(wrong.any())
    temperature = fit_temperature(outputs.logits, outputs.targets, fit) if fitted else 1.0
    right = (outputs.predicted == outputs.targets)[rest].numpy()
    before, after = (reliability(confidences(outputs.logits, t, rest).numpy(), right) for t in (1.0, temperature))
    return Calibration(temperature, len(fit) if fitted else 0, len(rest), before, after)


def halves(targets: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor]:
    """Divide images in two, every class too: which goes where follows from seed and number of the image.

    targets: class numbers (N,)

    Returns: numbers of the images of each half, in order. The halves of all, and of every class, differ by one at most.
    """
    order = np.lexsort((keys_to_seeds(seed, np.arange(len(targets), dtype=np.uint64), HALF), targets))
    one, other = np.sort(order[::2]), np.sort(order[1::2])
    return torch.from_numpy(one), torch.from_numpy(other)


def parts(numbers: Tensor) -> Iterator[Tensor]:
    """Yield numbers of images, `ROWS` at a time."""
    yield from numbers.split(ROWS)


def fit_temperature(logits: Tensor, targets: Tensor, numbers: Tensor) -> float:
    """Find the temperature of the largest likelihood for the images of these `numbers`, to four digits.

    The loss is convex in its inverse, so that there is one.
    """
    from scipy.optimize import minimize_scalar  # takes a third of a second, once a run

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        each = [cross_entropy(logits[some].float() * scale, targets[some], reduction="sum") for some in parts(numbers)]
        return float(sum(each)) / len(numbers)

    bounds = (math.log(RANGE[0]), math.log(RANGE[1]))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(f"{math.exp(found.x):.4g}")


def confidences(logits: Tensor, temperature: float, numbers: Tensor) -> Tensor:
    """Compute for the images of these `numbers` the probability (N,) of the class that has the largest logit."""
    found = []
    for some in parts(numbers):
        scaled = logits[some].float() / temperature
        found.append((scaled.amax(1) - scaled.logsumexp(1)).exp())
    return torch.cat(found)


def reliability(confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> Reliability:
    """Sort images into bins of equal width by their confidence, the upper bound included.

    confidence: (N,) in (0, 1]; right: (N,)
    """
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    some = np.maximum(counts, 1)
    sums = (np.bincount(place, weights=values, minlength=BINS) for values in (confidence, right))
    mean, share = (total / some for total in sums)
    return Reliability(counts, mean, share)
