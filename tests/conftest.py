"""What several test files use: small runs of the program, and small trees of images."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learning import models

# Every kind of layer of EfficientNetV2, in a size that trains in milliseconds. Known in this process only.
TINY = (((True, 1, 1, 32, 16, 1), (True, 4, 2, 16, 32, 2), (False, 4, 2, 32, 48, 2)), 0.25, 1.0, 0.2)
models.EXTRA_MODELS["efficientnet_v2_tiny"] = TINY
models.register("efficientnet_v2_tiny", *TINY)

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # small models: a second thread waits more than it works


def make_tree(root, splits=(("train", 12), ("val", 5)), classes=("ant", "bee"), size=(40, 32)):
    """A folder of images of two colours with noise: classes a model can learn, `count` of each per split."""
    draw = np.random.default_rng(0)
    for split, count in splits:
        for number, name in enumerate(classes):
            folder = Path(root) / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (size[1], size[0], 3))
                pixels[..., number] += 120
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    return Path(root)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "images")


SMALL = ["--model", "efficientnet_v2_tiny", "--clearml", "off", "--device", "cpu", "--workers", "0", "--lr", "0.01", "--batch-size", "8", "--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32", "--print-freq", "100"]  # fmt: skip


def program(*flags, env=None, **kwargs):
    """train.py in a process of its own, as a user starts it."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT, **kwargs)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pth", weights_only=True)


def assert_same_bits(one, other):
    """Nested state, equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other):
            assert_same_bits(left, right)
    else:
        assert one == other


@pytest.fixture(autouse=True)
def same_draws():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
