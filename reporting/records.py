"""What is measured: the line of an epoch and the summary of a run."""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import torch
import torchvision

from learning.learner import Learner
from learning.scores import Score
from learning.state import RunState
from reporting.assessment import Assessment, scores_of
from settings.errors import printable
from settings.table import Config
from stages import Plan, Stage
from utils import Runtime

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def epoch_record(stage: Stage, state: RunState, learner: Learner, scores: Mapping[str, Score]) -> dict[str, Any]:
    """Build an epoch's line of metrics.jsonl.

    None stands for what was not evaluated, is not there on this device, or is listed in `non_finite`.
    """
    plain, average = scores.get("model"), scores.get("ema")
    # JSON has no infinity; a training loss that is not finite ends the run
    diverged = plain is not None and not math.isfinite(plain.loss)
    return {
        "epoch": state.epoch,
        "stage": stage.index,
        "image_size": stage.image_size,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "loss": state.loss_sum / state.num_images,
        "val_loss": None if plain is None or diverged else plain.loss,
        "top1": plain and plain.top1,
        "top5": plain and plain.top5,
        "top1_ema": average and average.top1,
        "images_per_second": state.num_images / state.train_seconds,
        "epoch_seconds": state.train_seconds,
        "cpu_seconds": state.cpu_seconds,
        "data_wait_fraction": state.wait_seconds / state.train_seconds,
        "gpu_memory_gib": learner.runtime.peak_memory_gib(),
        "non_finite": ["val_loss"] if diverged else [],
        **stage.settings(),
    }


def is_whole(record: Mapping[str, Any]) -> bool:
    """Check whether a line of metrics.jsonl has what a summary and its figures need."""
    return all(
        isinstance(record.get(key), int | float)
        for key in ("stage", "lr", "loss", "epoch_seconds", "images_per_second")
    ) and all(key in record for key in ("top1", "top1_ema", "gpu_memory_gib"))


def summarise(
    config: Config,
    plan: Plan,
    state: RunState,
    learner: Learner,
    sizes: Mapping[str, int],
    closing: Mapping[int, Mapping[str, Score]],
    records: Sequence[dict[str, Any]],
    skipped: Mapping[str, Sequence[tuple[str, str]]],
    assessment: Assessment,
    inference: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Build a finished run's summary.json.

    sizes: what the last evaluations were made at, by name, pixels
    closing: their scores, by size and by copy of the weights ("model", "ema", "best")
    skipped: of each split, the images that were left out: path and fault
    assessment: of the best weights at test size
    inference: speeds of the model by batch size

    Speeds are None where the records of what they are measured over are lost.
    """

    def at_sizes(copy: str) -> dict[str, dict[str, Any]]:
        rows = {}
        for name, size in sizes.items():
            score = closing[size][copy]
            rows[name] = {"image_size": size, "top1": score.top1, "top5": score.top5}
            if copy == "model" and "ema" in closing[size]:
                rows[name].update(top1_ema=closing[size]["ema"].top1, top5_ema=closing[size]["ema"].top5)
        return rows

    # The final weights come from the last stage, the best ones perhaps not.
    final: dict[str, Any] = at_sizes("model")
    final["stage_size"] = final["last_training_size"]
    final |= scores_of(closing[sizes["test_size"]]["model"].confusion.numpy())
    weights = getattr(learner.training_loss, "weight", None)
    of_classes = [{}] * len(assessment.classes) if weights is None else [{"weight": w} for w in weights.tolist()]
    stages = []
    for row in plan.as_dict()["stages"]:
        seconds, speed = stage_speed(records, row["index"])
        stages.append(row | {"train_seconds": seconds, "images_per_second": speed})
    seconds = sum(stage["train_seconds"] for stage in stages)
    images = sum(stage["train_seconds"] * stage["images_per_second"] for stage in stages)
    trained = [stage for stage in stages if not stage["finetune"]]  # what a run of fixed size would do otherwise
    trained_seconds = sum(stage["train_seconds"] for stage in trained)
    trained_images = sum(stage["train_seconds"] * stage["images_per_second"] for stage in trained)
    last_speed = trained[-1]["images_per_second"]
    return {
        "model": config.model,
        "dataset": config.dataset,
        "top1": final["test_size"]["top1"],
        "top5": final["test_size"]["top5"],
        "top1_ema": final["test_size"].get("top1_ema"),
        "best_top1": closing[sizes["test_size"]]["best"].top1,
        "best_epoch": state.best_epoch,
        "final": final,
        "best": {"epoch": state.best_epoch, "weights": state.best_weights, **at_sizes("best"), **assessment.scores},
        "per_class": [row | more for row, more in zip(assessment.classes, of_classes)],
        "calibration": assessment.calibration_figures(),
        "inference": list(inference),
        "stages": stages,
        "relative_cost": plan.relative_cost,
        "train_seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        # As many images at the last stage's measured speed, over the time the stages took
        "speedup_over_fixed_size": trained_images / last_speed / trained_seconds if last_speed else None,
        "epochs": plan.num_epochs,
        "skipped_images": {
            "count": sum(map(len, skipped.values())),
            **{split: {printable(path): fault for path, fault in images} for split, images in skipped.items()},
        },
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
        "memory_gib": host_memory_gib(),
        "gpu_memory_gib": max(
            (record["gpu_memory_gib"] for record in records if record["gpu_memory_gib"]), default=None
        ),
        "device": device_name(learner.runtime),
        "processes": learner.runtime.world_size,
        "seed": config.seed,
        "commit": commit(),
        "versions": versions(learner.runtime),
    }


def stage_speed(records: Sequence[Mapping[str, Any]], index: int) -> tuple[float, float]:
    """Compute the seconds of training in a stage, and images per second over them."""
    seconds = images = 0.0
    for record in records:
        if record["stage"] == index:
            seconds += record["epoch_seconds"]
            images += record["epoch_seconds"] * record["images_per_second"]
    return seconds, images / seconds if seconds else 0.0


def worst_confusions(matrix: np.ndarray, classes: Sequence[str], most: int = 20) -> list[tuple[str, str, int]]:
    """List the commonest mistakes: true class, predicted class and number of images.

    matrix: (K, K) images, rows true
    most: number of mistakes that are listed
    """
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(wrong, axis=None)[::-1][:most]
    return [(classes[i // len(classes)], classes[i % len(classes)], int(wrong.flat[i])) for i in order if wrong.flat[i]]


def versions(runtime: Runtime) -> dict[str, str | None]:
    """List the versions of Python, the libraries and the system."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if runtime.device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def device_name(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    return runtime.device.type


def host_memory_gib() -> float | None:
    """Find the most memory that the training process has held, GiB, workers left out.

    Returns: None where the system does not count it.
    """
    # psutil has no peak on Linux, whose getrusage begins at that of the program that started this one.
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) / 2**20 for line in file if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def commit() -> str | None:
    """Find the commit of this code, `-dirty` if it was changed since; None outside a clone.

    Rows in results/ that earlier runs have added do not make the code another one.
    """
    try:
        name = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}-dirty" if changed else name


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout


def cpu_seconds() -> float:
    """Sum the processor seconds of this process and of those it started, as far as the system tells."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # ended meanwhile; its parent then counts it
            total += sum(process.cpu_times()[:4])  # user, system, and of the children that have ended
    return total
