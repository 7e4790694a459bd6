"""Small runs in this process, small trees of images for them, and what they leave."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from programs import RUN, SMALL

from learning.models import build_model
from learning.stop import Stop
from reporting.folder import RunFolder
from settings.resolve import resolve
from stages import make_plan
from train import run

STAGED = "--stages 4 --epochs 8 --train-crop-size 32 48 --dropout 0.1 0.3 --stochastic-depth-prob 0 0.2".split()
STRONG = (
    "--auto-augment ra --ra-magnitude 2 9 --mixup-alpha 0 0.4 --cutmix-alpha 0.5 --random-erase 0.5 "
    "--model-ema --model-ema-steps 2 --opt rmsprop --clip-grad-norm 1"
).split()


def start(tree, out, *flags):
    return run([*SMALL, "--data-path", str(tree), "--output-dir", str(out), *map(str, flags)])


def cut(monkeypatch, at_call):
    """Send SIGTERM to the run when it asks for the `at_call`-th time whether to stop, evaluations not counted."""
    calls, ask = [0], Stop.__call__

    def counting(self, step=0, budget=True):
        calls[0] += budget
        if calls[0] == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, step, budget)

    monkeypatch.setattr(Stop, "__call__", counting)


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


def write_run(folder, classes, *flags, model=None):
    """The folder of an unfinished run, written here; by default its model answers each image with 3 : 1 : 1 and so on."""
    config = resolve([*RUN, "--val-resize-size", "40", "--output-dir", str(folder), *flags])
    if model is None:
        model, _ = build_model(config.model, len(classes))
        with torch.no_grad():
            model.classifier[-1].weight.zero_()
            model.classifier[-1].bias.zero_()[0] = math.log(3)
    written = RunFolder(str(folder))
    written.write_settings(config.as_dict())
    written.write_plan(make_plan(config), classes)
    written.write_best_weights(model.state_dict())
    return Path(folder)


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
