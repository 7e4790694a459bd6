"""What a model says of images: read by workers, predicted in batches, told in the order of their names."""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import Compose

from augment.pixels import to_rgb
from images.verify import open_image, reason_of
from images.workers import as_it_is, closing_loader, make_loader
from inference.inputs import Named, NamedBatches
from inference.trained import Trained
from learning.rehearse import is_out_of_memory
from settings.errors import ConfigError, first_line

# Paths of a batch, why each cannot be read ("" where it can), and those that can be read as (N, 3, S, S), None without any.
Loaded = tuple[list[str], list[str], Tensor | None]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    fault: why it says nothing; "" if it does, and the rest is known
    classes: numbers of the most probable classes, the first is the most probable
    probabilities: of these
    """

    path: str
    fault: str = ""
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()


@contextmanager
def quietly() -> Iterator[None]:
    """Print no warnings within the block: PIL's are of large images and broken tags, which are read all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class NamedImages(Dataset):
    """Image files, loaded a batch of names at a time, as the model takes them; of those that cannot be read, why."""

    def __init__(self, transform: Compose):
        self.transform = transform

    def __getitems__(self, names: list[Named]) -> Loaded:
        images, faults = [], []
        with quietly():
            for path, fault in names:
                try:
                    if not fault:
                        images.append(self.load(path))
                except Exception as error:  # what PIL raises on a damaged file varies with the damage
                    fault = reason_of(error)
                faults.append(fault)
        # In a worker default_collate writes them to shared memory at once.
        return [path for path, _ in names], faults, default_collate(images) if images else None

    def load(self, path: str) -> Tensor:
        with open_image(path) as image:
            return self.transform(to_rgb(image))


def predict(trained: Trained, names: Iterable[Named], *, top: int, batch_size: int, workers: int) -> "Predicting":
    """Predict images as their names come.

    top: how many classes of each image
    workers: processes that read images; 0 reads them in this one
    """
    return Predicting(trained, NamedBatches(names, batch_size), top, workers)


class Predicting:
    """The predictions of images, in the order of their names, in lists as they come.

    Memory does not grow with the number of images: what a worker reads ahead is bounded by torch, two batches each, and
    names by `inputs.AHEAD`.

    total: images in all, None as long as that is not known
    """

    def __init__(self, trained: Trained, batches: NamedBatches, top: int, workers: int):
        self.trained, self.batches, self.top, self.workers = trained, batches, top, workers

    @property
    def total(self) -> int | None:
        return self.batches.total

    def __iter__(self) -> Iterator[list[Prediction]]:
        images = NamedImages(self.trained.transform)
        loader = make_loader(
            images, self.trained.runtime, self.workers, batch_sampler=self.batches, collate_fn=as_it_is
        )
        with closing_loader(loader):
            loaded = iter(loader)
            self.batches.start()  # after workers are forked: a thread's locks would stay locked in them
            for predictions in self.from_loaded(loaded):
                self.batches.done(len(predictions))
                yield predictions

    def from_loaded(self, loaded: Iterable[Loaded]) -> Iterator[list[Prediction]]:
        """Predict loaded batches; on a GPU the next one is queued there before the answers to one are waited for."""
        on_cuda = self.trained.runtime.device.type == "cuda"
        waiting: deque[Answers] = deque()
        for paths, faults, images in loaded:
            if paths:
                waiting.append(Answers(self.trained, paths, faults, images, self.top))
            while len(waiting) > (1 if paths and on_cuda else 0):
                yield waiting.popleft().read()
        while waiting:
            yield waiting.popleft().read()


class Answers:
    """The answers to a batch, on their way from the device."""

    def __init__(self, trained: Trained, paths: list[str], faults: list[str], images: Tensor | None, top: int):
        self.paths, self.faults = paths, faults
        self.found = None if images is None else infer(trained, images, top)
        self.copied: torch.cuda.Event | None = None
        if self.found is not None and trained.runtime.device.type == "cuda":
            # Copied behind this batch's kernels. To be read later it would be copied behind those of the next.
            self.found = tuple(part.to("cpu", non_blocking=True) for part in self.found)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> list[Prediction]:
        """Wait for the answers, and tell them."""
        if self.copied is not None:
            self.copied.synchronize()
        answers = iter(() if self.found is None else zip(*(part.tolist() for part in self.found)))
        return [
            Prediction(path, fault) if fault else answer(path, *next(answers))
            for path, fault in zip(self.paths, self.faults)
        ]


def answer(path: str, probabilities: list[float], classes: list[int]) -> Prediction:
    """Make the prediction of an image, unless the model's outputs are no numbers."""
    if probabilities[0] != probabilities[0]:  # topk holds NaN for the largest; half precision may overflow
        return Prediction(path, "the model's output is not finite")
    return Prediction(path, "", tuple(classes), tuple(probabilities))


@torch.inference_mode()
def infer(trained: Trained, images: Tensor, top: int) -> tuple[Tensor, ...]:
    """Compute the `top` largest probabilities of each image (N, top), and their classes.

    images: (N, 3, S, S) float32, normalised
    """
    runtime = trained.runtime
    images = images.to(runtime.device, non_blocking=True, memory_format=runtime.memory_format)
    with runtime.autocast():
        output = trained.model(images)  # (N, K)
    return tuple((output.float() / trained.temperature).softmax(1).topk(top))


def check_size(trained: Trained) -> None:
    """Predict an image of zeros: a size that the model cannot take shows before images are read.

    Raises:
        ConfigError: it cannot.
    """
    size = trained.image_size
    try:
        infer(trained, torch.zeros(1, 3, size, size), 1)
    except (RuntimeError, AssertionError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"--image-size {size}: {trained.config.model} cannot take images of that size ({first_line(error)}); "
            f"leave it out for the run's own, {trained.config.val_crop_size}"
        ) from error


def choose_top(asked: int | None, trained: Trained) -> int:
    """Choose how many classes are told of an image: 5, or all of fewer, unless asked otherwise.

    Raises:
        ConfigError: more are asked for than there are.
    """
    count = len(trained.classes)
    if asked is not None and asked > count:
        raise ConfigError(f"--top {asked}: the model of {trained.folder.path} has {count} classes; give at most that")
    return min(5, count) if asked is None else asked
