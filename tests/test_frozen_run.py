"""A run of November 2026, stopped inside an epoch: every later version must be able to go on with it.

`tests/data/run_of_2026_11` was written at commit b88a147 (torch 2.15): EfficientNetV2 of test size, two stages, four
epochs, EMA, RandAugment, mixup, erasing, RMSprop; stopped in epoch 2 after its second step of three. `final.pth` holds
what it ended with when it was left whole. The images are those of `make_tree`.
"""

import shutil

import pytest
import torch
from programs import ROOT
from runs import checkpoint, make_tree, metrics

from reporting.folder import RunFolder
from train import run

FROZEN = ROOT / "tests" / "data" / "run_of_2026_11"


@pytest.fixture
def folder(tmp_path):
    make_tree(tmp_path / "images")
    shutil.copytree(FROZEN, tmp_path / "run")
    return tmp_path / "run"


def test_it_goes_on_to_what_it_would_have_been(folder):
    flags = ["--data-path", str(folder.parent / "images"), "--output-dir", str(folder), "--clearml", "off"]
    assert run([*flags, "--resume", "auto"]) == 0
    assert [(record["epoch"], record["image_size"]) for record in metrics(folder)] == [
        (0, 32),
        (1, 32),
        (2, 48),
        (3, 48),
    ]
    final, ours = torch.load(folder / "final.pth", weights_only=True), checkpoint(folder)
    # The same torch on another processor may differ in last bits; another torch or Pillow also in a grey level.
    tolerance = 1e-4 if final["torch"] == str(torch.__version__) else 0.1
    for part in ("model", "model_ema"):
        for name, expected in final[part].items():
            assert torch.allclose(ours[part][name].double(), expected.double(), rtol=tolerance, atol=tolerance), name
    start = torch.load(FROZEN / "checkpoint.pth", weights_only=True)["model"]
    moved = max(float((start[name] - final["model"][name]).abs().max()) for name in start if start[name].is_floating_point())  # fmt: skip
    assert moved > 0.2  # what is compared has gone some way since it was stopped


def test_its_folder_is_read(folder):
    run_folder = RunFolder(str(folder))
    assert [stage.image_size for stage in run_folder.plan().stages] == [32, 48]
    assert run_folder.classes() == ["ant", "bee"] and len(run_folder.metrics()) == 2
    assert run_folder.confusion("best")[0] == 1 and run_folder.settings()["opt"] == "rmsprop"
    assert sum(weight.numel() for weight in run_folder.best_weights().values()) == 18_669


def test_its_checkpoint_is_a_start_for_another_run_s_weights(folder, tmp_path):
    flags = ["--data-path", str(tmp_path / "images"), "--output-dir", str(tmp_path / "new"), "--clearml", "off"]
    flags += [
        "--model",
        "efficientnet_v2_tiny",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--epochs",
        "1",
        "--train-crop-size",
        "32",
    ]
    sizes = ["--val-resize-size", "32", "--val-crop-size", "32"]
    assert run([*flags, *sizes, "--weights", str(folder / "checkpoint.pth")]) == 0
