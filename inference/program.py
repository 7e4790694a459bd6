"""From the command line of predict.py to its rows, folders and gallery."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from inference.gallery import Gallery
from inference.gradcam import GradCam
from inference.inputs import check_arguments, names_of
from inference.options import GALLERY_SIZE, STDIN
from inference.predictions import Prediction, check_size, choose_top, predict
from inference.rows import FORMATS, opened
from inference.sorting import Sorter
from inference.trained import open_run
from settings.errors import ConfigError, tell
from settings.machine import cores

FEW = 16  # images, which are read before a worker has started


def carry_out(options: argparse.Namespace) -> int:
    """Predict the images that the command line asks for; return the exit status.

    Raises:
        ConfigError: of the run, of a folder without images; no image came at all.
        RunError, OSError: something cannot be written.
    """
    check_arguments(options.images)
    trained = open_run(
        options.run, weights=options.weights, image_size=options.image_size, device=options.device, amp=options.amp
    )
    top = choose_top(options.top, trained)
    check_size(trained)
    gallery, sorter = None, None
    if options.gallery:
        gradcam = GradCam(trained) if options.gradcam else None
        gallery = Gallery(trained, options.gallery_size or GALLERY_SIZE, gradcam)
    if options.sort:
        sorter = Sorter(options.sort, trained.classes, options.sort_by or "copy")
    tell(str(trained))
    names = names_of(options.images, b"\0" if options.null else b"\n")
    workers = cores() if options.workers is None else options.workers
    workers = 0 if are_few(options.images) else workers
    predicting = predict(trained, names, top=top, batch_size=options.batch_size, workers=workers)
    rows, tally = FORMATS[options.format](trained.classes, top), Tally()
    kept = "the rows written so far"
    with opened(options.output, options.overwrite, kept) as output, progress(options.output) as bar:
        for predictions in predicting:
            for prediction in predictions:
                output.write(("" if tally.count else rows.head()) + rows.row(prediction))
                tally.add(prediction)
                if sorter is not None and not sorter.put(prediction, tally.count):
                    tally.note_gone(prediction.path)
                if gallery is not None:
                    gallery.add(prediction, tally.count)
            bar.total = predicting.total
            bar.update(len(predictions))
        if not tally.count:
            raise ConfigError("no names came on standard input; give one image a line")
    tally.stop()
    if gallery is not None:
        gallery.write(options.gallery, options.overwrite)
    return tally.conclude()


def are_few(arguments: Sequence[str]) -> bool:
    """Check whether the command line names a few files alone."""
    return len(arguments) <= FEW and not any(path == STDIN or os.path.isdir(path) for path in arguments)


def progress(output: str | None) -> tqdm:
    """Make the progress bar; rows on a terminal show by themselves how far it is.

    output: file of the rows, None for standard output
    """
    shown = is_terminal(sys.stderr) and not (output is None and is_terminal(sys.stdout))
    return tqdm(desc="predicting", unit="images", delay=1, leave=False, disable=not shown)


def is_terminal(stream: TextIO | None) -> bool:
    """Check whether a standard stream, None where it is closed, shows on a terminal."""
    return stream is not None and stream.isatty()


class Tally:
    """Counts images, those that could not be read, and those that were gone before they were sorted."""

    def __init__(self) -> None:
        self.started, self.seconds = time.perf_counter(), 0.0
        self.count, self.num_bad, self.num_gone = 0, 0, 0
        self.first_bad: Prediction | None = None
        self.first_gone = ""

    def add(self, prediction: Prediction) -> None:
        self.count += 1
        if prediction.fault:
            self.num_bad += 1
            self.first_bad = self.first_bad or prediction

    def note_gone(self, path: str) -> None:
        self.num_gone += 1
        self.first_gone = self.first_gone or path

    def stop(self) -> None:
        """Note that the last row has been written."""
        self.seconds = time.perf_counter() - self.started

    def conclude(self) -> int:
        """Say what came of the images on stderr; return the exit status."""
        if self.num_gone:
            tell(
                f"error: {self.num_gone:,} of {self.count:,} images were gone before they were sorted, first {self.first_gone}"
            )
        if self.first_bad is None and self.num_gone:
            return 1
        if self.first_bad is None:
            tell(f"{self.count:,} images in {self.seconds:.1f} s, {self.count / self.seconds:,.0f} images/s")
            return 0
        how_many = f"{self.num_bad:,} of {self.count:,} images"
        tell(f"error: {how_many} could not be read, first {self.first_bad.path}: {self.first_bad.fault}")
        return 2 if self.num_bad == self.count else 1
