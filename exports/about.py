"""What an exported file says of itself: its metadata, text by name, the same in each format."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from exports.formats import arguments_of
from exports.gate import TOLERANCE
from inference.trained import Trained
from reporting.records import commit


def describe_file(trained: Trained, how: Mapping[str, Any], data_license: str, images: int | None) -> dict[str, str]:
    """Build the metadata of a file.

    It says that the gate was passed before it was: a file that does not pass never appears.

    data_license: of the images that the run was trained on
    images: of validation, that the file will be run over; None: it will not be run
    """
    config, summary = trained.config, trained.folder.summary() or {}
    checked = f"top-1 the same as the run's model for each of {images} validation images, logits within {TOLERANCE:g}, or that part of the largest"
    place = (
        os.path.basename(os.path.abspath(config.data_path))
        if config.dataset in ("imagefolder", "hub")
        else config.dataset
    )
    return {
        "format": "1",
        "model": config.model,
        "arguments": json.dumps(arguments_of(trained)),
        "weights": trained.weights,
        "run_finished": "yes" if trained.finished else "no",
        "classes": json.dumps(trained.classes, ensure_ascii=False),
        "image_size": str(trained.image_size),
        "input": how["input"],
        "preprocessing": json.dumps({key: how[key] for key in how if key not in ("classes", "temperature", "input")}),
        "temperature": repr(trained.temperature),
        "top1_of_run": top1_of_run(trained),
        "data": place,
        "data_license": data_license,
        "gate": "not checked (--no-gate)" if images is None else checked,
        "commit_of_run": summary.get("commit") or "unknown",
        "commit": commit() or "unknown",
        "torch": str(torch.__version__),
    }


def top1_of_run(trained: Trained) -> str:
    """Say what the run itself has measured of these weights, at its test size."""
    return "unknown" if trained.top1 is None else f"{trained.top1:.3f} % at {trained.config.val_crop_size} px"
