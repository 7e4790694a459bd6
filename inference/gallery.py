"""A page of the images that a model is least certain of: one file that needs nothing else."""

import base64
import heapq
import io
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from augment.pixels import to_rgb
from images.verify import open_image, reason_of
from inference.gradcam import GradCam
from inference.predictions import Prediction, quietly
from inference.rows import opened
from inference.trained import Trained
from settings.errors import printable

SIDE = 240  # pixels of the longer side of a picture on the page: some 10 KB
AT_ONCE = 8  # images in one pass of Grad-CAM, which keeps what it needs for gradients
MOST_BAD = 100  # names of images that could not be read


class Gallery:
    """Keeps the images that the model is least certain of, then writes the page.

    Their pictures are read again then, so that it holds no more than names meanwhile.

    size: how many images
    """

    def __init__(self, trained: Trained, size: int, gradcam: GradCam | None):
        self.trained, self.size, self.gradcam = trained, size, gradcam
        self.heap: list[tuple[float, int, Prediction]] = []  # the most certain of those kept comes first
        self.counts: Counter[int] = Counter()
        self.bad: list[Prediction] = []
        self.num_bad = 0

    def add(self, prediction: Prediction, number: int) -> None:
        """Look at a prediction; `number` is that of its image among all."""
        if prediction.fault:
            self.num_bad += 1
            if self.num_bad <= MOST_BAD:
                self.bad.append(prediction)
            return
        self.counts[prediction.classes[0]] += 1
        entry = (-prediction.probabilities[0], -number, prediction)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        else:
            heapq.heappushpop(self.heap, entry)

    def write(self, path: str, overwrite: bool = False) -> None:
        """Write the page, a picture at a time.

        Raises:
            RunError: it cannot be written.
        """
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
            autoescape=True,  # names of files and classes are other people's text
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        total = sum(self.counts.values())
        counts = [(self.trained.classes[number], count, count / total) for number, count in self.counts.most_common()]
        pieces = environment.get_template("gallery.html.j2").generate(
            trained=printable(str(self.trained)),
            total=total,
            shown=len(self.heap),
            gradcam=self.gradcam is not None,
            counts=counts,
            num_classes=len(self.trained.classes),
            cards=self.cards(),
            num_bad=self.num_bad,
            bad=[(printable(prediction.path), prediction.fault) for prediction in self.bad],
        )
        with opened(path, overwrite) as output:
            for piece in pieces:
                output.write(piece)

    def cards(self) -> Iterator[dict[str, Any]]:
        """Make the cards of the images that were kept, least certain first."""
        least = iter([prediction for *_, prediction in sorted(self.heap, reverse=True)])
        while batch := list(islice(least, AT_ONCE)):
            pictures = [self.pictures(prediction) for prediction in batch]
            given = {i: tensor for i, (_, _, tensor) in enumerate(pictures) if tensor is not None}
            overlays: dict[int, str] = {}
            if self.gradcam is not None and given:
                drawn = self.gradcam.overlays([*given.values()], [batch[i].classes[0] for i in given])
                overlays = dict(zip(given, map(as_data, drawn)))
            for i, prediction in enumerate(batch):
                picture, fault, _ = pictures[i]
                yield {
                    "path": printable(prediction.path),
                    "picture": picture,
                    "fault": fault,
                    "overlay": overlays.get(i),
                    "classes": [
                        (self.trained.classes[number], share)
                        for number, share in zip(prediction.classes, prediction.probabilities)
                    ],
                }

    def pictures(self, prediction: Prediction) -> tuple[str | None, str, Tensor | None]:
        """Read an image again: its picture, or why there is none, and what the model is given, for Grad-CAM."""
        try:
            with quietly(), open_image(prediction.path) as image:
                if self.gradcam is None:
                    image.draft(None, (2 * SIDE, 2 * SIDE))  # a JPEG is decoded no larger than it needs to be
                    return as_data(to_rgb(image)), "", None
                image = to_rgb(image)
                return as_data(image), "", self.trained.transform(image)
        except Exception as error:  # gone or changed meanwhile
            return None, reason_of(error), None


def as_data(picture: Image.Image | NDArray[np.uint8]) -> str:
    """Write a small picture as a data URL, an address that holds all of it."""
    small = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).copy()
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
