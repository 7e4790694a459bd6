"""The gate: an exported file is run over all validation images, beside the model that it was made of."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose
from tqdm import tqdm

from exports.formats import Artifact
from exports.preprocessing import prepare
from images.datasets import Images
from images.encoded import EncodedImages
from images.workers import closing_loader, make_loader
from inference.trained import Trained
from settings.errors import RunError

TOLERANCE = 1e-3  # of a logit; of the largest of an image, where that is above 1
BATCH, WHOLE = (
    32,
    4,
)  # images, and where they are whole, of a camera, say, which a resize inside makes four times as large
NUMBERS = 2**24  # of images that a file is given at once


@dataclass(frozen=True)
class Comparison:
    """What a file and the run's model answer to the same images.

    top1, run_top1: percent of `images`, of the file and of the run's model
    same: images that both give the same class
    difference: the largest, of any logit
    """

    images: int
    top1: float
    run_top1: float
    same: int
    difference: float


class Pairs(Dataset):
    """Each image twice, as the run's model and as the exported file take it: tensor (3, S, S), array; class number.

    The second is made by what preprocessing.json says, so that a mistake in it is seen too.
    """

    def __init__(self, images: Images, transform: Compose, how: Mapping[str, Any]):
        self.images, self.transform, self.how = images, transform, dict(how)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, NDArray, int]:
        image, target = self.images[index]
        return self.transform(image), prepare(image, self.how), target


def collate(batch: Sequence[tuple[Tensor, NDArray, int]]) -> tuple[Tensor, list[NDArray], list[int]]:
    """Stack the tensors alone: whole images differ in size."""
    tensors, arrays, targets = zip(*batch)
    return torch.stack(tensors), list(arrays), list(targets)


def batches_of(count: int, size: int) -> Iterator[list[int]]:
    """Yield the numbers of the images of each batch: one, then `size` each."""
    yield [0]
    for start in range(1, count, size):
        yield list(range(start, min(start + size, count)))


@torch.inference_mode()
def compare(
    artifact: Artifact,
    trained: Trained,
    how: Mapping[str, Any],
    images: Images,
    *,
    workers: int = 0,
    name: str = "the file",
    strict: bool = True,
) -> Comparison:
    """Run an exported file and the run's model over `images`.

    name: of the file
    strict: refuse the file at the first image whose class differs, or a logit by more than TOLERANCE

    Raises:
        RunError: it is refused; the message names the image.
    """
    same = right = right_of_run = 0
    largest = 0.0
    pairs = Pairs(images, trained.transform, how)
    batches = list(batches_of(len(images), WHOLE if "resize" in how["inside"] else BATCH))
    loader = make_loader(pairs, trained.runtime, workers, batch_sampler=batches, collate_fn=collate)
    bar = tqdm(total=len(images), desc=f"checking {name}", unit="image", leave=False, disable=None)
    seen = 0
    with closing_loader(loader), bar:
        for tensors, arrays, targets in loader:
            expected, given = trained.model(tensors).numpy(), ask(artifact, arrays)
            if not seen:
                first_image, first_answer = arrays[0], given[:1]
            answers, answers_of_run = given.argmax(axis=1), expected.argmax(axis=1)
            differences = np.abs(given - expected).max(axis=1)
            agree = answers == answers_of_run
            accepted = accepted_difference(expected)
            fine = agree & np.isfinite(differences) & (differences <= accepted)  # NaN and infinity are not
            if strict and not fine.all():
                first = int(fine.argmin())
                classes = [trained.classes[row[first]] for row in (answers, answers_of_run)]
                raise RunError(
                    f"{name} is refused, nothing was written: for {name_of(images, seen + first)} it answers "
                    f"{classes[0]}, the run's model {classes[1]}; their logits differ by up to {differences[first]:.2g}, "
                    f"at most {accepted[first]:.2g} is accepted"
                )
            same += int(agree.sum())
            right += int((answers == targets).sum())
            right_of_run += int((answers_of_run == targets).sum())
            largest = max(largest, float(differences.max()))
            seen += len(targets)
            bar.update(len(targets))
    if strict:  # images of many sizes may never have made a batch of two
        check_pair(artifact, first_image, first_answer, name)
    return Comparison(seen, 100 * right / seen, 100 * right_of_run / seen, same, largest)


def accepted_difference(logits: NDArray) -> NDArray:
    """Compute how far logits may lie from those (N, K) of the run's model, for each image (N,): float32 rounds to a part."""
    return TOLERANCE * np.maximum(1, np.abs(logits).max(axis=1))


def check_pair(artifact: Artifact, array: NDArray, alone: NDArray, name: str) -> None:
    """Raise RunError unless a file answers to an image twice in a batch as it does to it alone."""
    difference = np.abs(artifact(np.stack([array, array])) - alone).max()
    if not (np.isfinite(difference) and difference <= accepted_difference(alone)[0]):
        raise RunError(
            f"{name} is refused, nothing was written: in a batch of two its logits differ by {difference:.2g} from those of one"
        )


def ask(artifact: Artifact, arrays: Sequence[NDArray]) -> NDArray:
    """Run a file on images, those of one size together as far as memory allows; return logits (N, K) in their order."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, array in enumerate(arrays):
        places.setdefault(array.shape, []).append(place)
    logits: dict[int, NDArray] = {}
    for shape, those in places.items():
        at_once = max(1, NUMBERS // math.prod(shape))
        for start in range(0, len(those), at_once):
            some = those[start : start + at_once]
            logits.update(zip(some, artifact(np.stack([arrays[place] for place in some]))))
    return np.stack([logits[place] for place in range(len(arrays))])


def name_of(images: Images, index: int) -> str:
    """Name an image: its file, or its number where it has none."""
    return images.describe(index) if isinstance(images, EncodedImages) else f"validation image {index}"
