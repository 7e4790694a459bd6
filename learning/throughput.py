"""How fast a trained model answers, by batch size."""

import statistics
import time
from typing import Any

import torch

from learning.learner import Learner

SIZES = (1, 8, 64, 512)
SECONDS = 1.0  # for all of it
SHARE = 0.01  # of the time that training took, if that is less


@torch.inference_mode()
def inference_speed(learner: Learner, image_size: int, largest: int, train_seconds: float) -> list[dict[str, Any]]:
    """Measure images per second of the model alone, on noise that lies on the device; the median of several passes.

    A batch size that would not be done in the time left is not tried: on a CPU only small ones are. One image is always
    measured.

    largest: images in a batch of the run, which is known to fit
    train_seconds: of the run; no more than a hundredth of them is spent here

    Returns: batch_size, images_per_second and milliseconds of a batch, for each size.
    """
    runtime, model = learner.runtime, learner.model.eval()
    left = min(SECONDS, SHARE * train_seconds)

    def seconds_for(images: torch.Tensor) -> float:
        runtime.synchronize()
        started = time.perf_counter()
        with runtime.autocast():
            model(images)
        runtime.synchronize()
        return time.perf_counter() - started

    rows: list[dict[str, Any]] = []
    sizes = sorted({size for size in SIZES if size < largest} | {largest})
    for i, size in enumerate(sizes):
        if rows and 2 * size / rows[-1]["images_per_second"] > left:
            break
        images, _ = learner.noise(image_size, size)
        first = seconds_for(images)  # in which libraries choose kernels and take their memory
        passes = min(max(1, int(left / (len(sizes) - i) / first) - 1), 50)
        taken = [seconds_for(images) for _ in range(passes)]
        left -= first + sum(taken)
        middle = statistics.median(taken)
        rows.append({"batch_size": size, "images_per_second": size / middle, "milliseconds": 1000 * middle})
    return rows
