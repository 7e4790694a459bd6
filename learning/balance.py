"""Weights of the classes in the training loss, for data sets with far more images of some than of others."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn, tensor

from images.datasets import Data
from settings.errors import ConfigError, printable
from settings.table import Config

BETA = 0.999  # an image that comes after 1,000 of its class adds 0.37 of what the first one did
FEW = 6  # classes whose weights are told one by one


def find_class_weights(config: Config, data: Data) -> list[float] | None:
    """Compute what each class counts in the training loss, in the order of the class names; None: all alike.

    `auto` takes the inverse of the effective number of samples, (1 - beta) / (1 - beta**n) for a class of n images: with
    few it is nearly 1 / n, with many more than 1 / (1 - beta) of them all classes come to the same.

    They are scaled so that their mean over the training images is 1. The mean gradient is then about as large as without
    weights, and a learning rate that was right stays so. Weights whose mean over the classes is 1, as in the paper, would
    shrink it where most images are of few classes.

    Raises:
        ConfigError: not as many numbers as there are classes.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", arXiv:1901.05555, equations 2 and 8;
        beta 0.999 is among the values of its section 5.
    """
    if config.class_weights is None:
        return None
    counts = np.bincount(np.asarray(data.train.targets), minlength=len(data.classes))
    if config.class_weights == "auto":
        weights = (1 - BETA) / (1 - BETA ** np.maximum(counts, 1))
    else:
        weights = np.array(config.class_weights, dtype=float)
        if len(weights) != len(counts):
            names = ", ".join(data.classes[:FEW]) + (", …" if len(counts) > FEW else "")
            raise ConfigError(
                f"class_weights has {len(weights)} numbers, the data has {len(counts)} classes ({names}); give one per "
                "class, in the order of their names"
            )
    return scaled(weights, counts)


def scaled(weights: NDArray[np.float64], counts: NDArray[np.int64]) -> list[float]:
    """Scale weights of classes to a mean of 1 over the images, of which there are `counts`."""
    return (weights * counts.sum() / (weights * counts).sum()).tolist()


def tell_class_weights(weights: Sequence[float], classes: Sequence[str]) -> str:
    """Say in a line what the classes count; of many the least and the most."""
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    chosen = range(len(weights)) if len(weights) <= FEW else (order[0], order[-1])
    told = (", " if len(weights) <= FEW else " to ").join(f"{classes[i]} {weights[i]:.3g}" for i in chosen)
    return printable(f"class weights: {told}")


class WeightedLoss(nn.CrossEntropyLoss):
    """Cross-entropy in which classes count differently: the mean over images, for class numbers and for soft targets.

    torch's own mean divides class numbers by the weights in the batch, and soft targets by the number of images: an
    image would count by what else is in its batch, differently in each process, and less or more once a stage mixes.
    Here it is the number of images always. As in torch, each class's share of a soft or smoothed target has the weight of
    that class.

    weights: (K,) a buffer, on the device
    """

    def __init__(self, weights: Sequence[float], label_smoothing: float):
        super().__init__(weight=tensor(weights), reduction="none", label_smoothing=label_smoothing)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return super().forward(output, targets).mean()
