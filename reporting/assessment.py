"""What the outputs of a model for labelled images say of it: class by class, of two classes, and where it is most wrong."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from images.datasets import Images
from images.encoded import EncodedImages
from learning.calibration import BINS, Calibration, Reliability, calibrate, confidences
from learning.scores import Outputs, Score
from settings.errors import printable

MISTAKES = 12  # that are shown
THUMBNAIL = 160  # pixels, the longer side
POINTS = 200  # of a ROC curve that is kept


@dataclass(frozen=True)
class Assessment:
    """What is said of the best weights of a run.

    calibration: None where the outputs were not kept, or are not finite, or of one image
    roc: false and true positive rates of the second of two classes, in [0, 1]; None for more classes, without outputs and
        where the images are all of one class
    mistakes: the most confident ones: number of the image, its file, true and predicted class, and probability
    """

    scores: dict[str, Any]
    classes: list[dict[str, Any]]
    calibration: Calibration | None
    roc: tuple[list[float], list[float]] | None
    mistakes: list[dict[str, Any]]

    def shown(self) -> dict[str, Any]:
        """Convert what is drawn of it, but not written into the summary, to plain values."""
        found = self.calibration
        return {
            "reliability": found and {"before": plain(found.before), "after": plain(found.after)},
            "roc": self.roc and {"false_positive_rate": self.roc[0], "true_positive_rate": self.roc[1]},
            "mistakes": self.mistakes,
        }

    def calibration_figures(self) -> dict[str, Any] | None:
        """Convert the temperature and what came of it to plain values, for the summary."""
        found = self.calibration
        if found is None:
            return None
        return {
            "temperature": found.temperature,
            "ece_before": found.before.error,
            "ece_after": found.after.error,
            "fitted_on": found.fitted_on,
            "measured_on": found.measured_on,
            "bins": BINS,
        }


def plain(curve: Reliability) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in asdict(curve).items()}


def assess(score: Score, classes: Sequence[str], images: Images, seed: int) -> Assessment:
    """Say what an evaluation found.

    images: those that were evaluated
    seed: of the run, by which they are divided for the calibration
    """
    confusion, outputs = score.confusion.numpy(), score.outputs
    if outputs is not None and not bool(torch.isfinite(outputs.logits).all()):
        outputs = None
    calibration = None if outputs is None else calibrate(outputs, seed)
    scores, roc = scores_of(confusion), None
    if outputs is not None and len(classes) == 2:
        found = receiver_operating(outputs.logits.float().numpy(), outputs.targets.numpy())
        scores["auc"], roc = found if found is not None else (None, None)
    temperature = 1.0 if calibration is None else calibration.temperature
    mistakes = [] if outputs is None else worst_mistakes(outputs, temperature)
    for mistake in mistakes:
        mistake |= {"path": path_of(images, mistake["index"])}
        mistake |= {key: classes[mistake[key]] for key in ("true", "predicted")}
    return Assessment(scores, class_table(confusion, classes), calibration, roc, mistakes)


def scores_of(confusion: NDArray[np.int64]) -> dict[str, float | None]:
    """Compute balanced accuracy and macro-F1, for two classes also sensitivity and specificity, percent.

    confusion: (K, K) images, rows true. Classes without an image have no part in the means: an image that is called one
        of them is a miss of its own class. Of two classes the second is the positive one.
    """
    from sklearn import metrics

    pairs = pairs_of(confusion)
    present = np.flatnonzero(confusion.sum(1))
    recall = metrics.recall_score(**pairs, labels=present, average="macro", zero_division=0)
    f1 = metrics.f1_score(**pairs, labels=present, average="macro", zero_division=0)
    found: dict[str, float | None] = {"balanced_accuracy": 100 * float(recall), "macro_f1": 100 * float(f1)}
    if len(confusion) == 2:
        for number, name in ((1, "sensitivity"), (0, "specificity")):
            count = confusion[number].sum()
            found[name] = 100 * float(confusion[number, number] / count) if count else None
    return found


def class_table(confusion: NDArray[np.int64], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Compute of each class precision, recall and F1, percent, and support, the number of its images.

    confusion: (K, K) images, rows true. A precision of no predictions and a recall of no images are 0.
    """
    from sklearn import metrics

    numbers = range(len(classes))
    found = metrics.precision_recall_fscore_support(**pairs_of(confusion), labels=numbers, zero_division=0)
    return [
        {"class": name, "precision": 100 * float(p), "recall": 100 * float(r), "f1": 100 * float(f), "support": int(n)}
        for name, p, r, f, n in zip(classes, *found[:3], confusion.sum(1))
    ]


def pairs_of(confusion: NDArray[np.int64]) -> dict[str, Any]:
    """Write counts of true and predicted classes as scikit-learn takes them."""
    true, predicted = np.nonzero(confusion)
    return {"y_true": true, "y_pred": predicted, "sample_weight": confusion[true, predicted]}


def receiver_operating(
    outputs: NDArray[np.floating], targets: NDArray[np.int64]
) -> tuple[float, tuple[list[float], list[float]]] | None:
    """Compute the area under the ROC curve of the second of two classes, in [0, 1], and the curve.

    outputs: (N, 2) logits or probabilities; images are ordered by the difference of the two. Probabilities near 1 that
        float32 does not tell apart lie apart as logits.

    Returns: area; false and true positive rates of at most `POINTS` points. None if there are images of one class only.
    """
    from sklearn import metrics

    positive, margin = targets == 1, outputs[:, 1] - outputs[:, 0]
    if positive.all() or not positive.any():
        return None
    false, true, _ = metrics.roc_curve(positive, margin)
    kept = np.unique(np.linspace(0, len(false) - 1, POINTS).round().astype(int))
    return float(metrics.roc_auc_score(positive, margin)), (false[kept].tolist(), true[kept].tolist())


def worst_mistakes(outputs: Outputs, temperature: float) -> list[dict[str, Any]]:
    """List the wrong images whose class was said to be most probable: number, true and predicted class, probability."""
    wrong = (outputs.predicted != outputs.targets).nonzero()[:, 0]
    if not len(wrong):
        return []
    probability = confidences(outputs.logits, temperature, wrong)
    order = torch.sort(probability, descending=True, stable=True).indices[:MISTAKES]
    return [
        {
            "index": int(wrong[i]),
            "true": int(outputs.targets[wrong[i]]),
            "predicted": int(outputs.predicted[wrong[i]]),
            "probability": float(probability[i]),
        }
        for i in order
    ]


def path_of(images: Images, index: int) -> str | None:
    """Say where an image lies, a file or a row; None for images that are made in memory."""
    source = getattr(images, "source", images)  # of a decode-once store
    return printable(source.describe(index)) if isinstance(source, EncodedImages) else None


def thumbnail(images: Images, index: int) -> Image.Image:
    """Make a small picture of an image."""
    picture = images[index][0].copy()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture
