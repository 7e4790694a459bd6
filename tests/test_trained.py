"""A run opened for use: its weights, classes, preprocessing, and what is said where there is none."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_tree, start

from inference.trained import open_run
from settings.errors import ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    tree = make_tree(place / "images")
    assert start(tree, place / "run", "--epochs", "2", "--val-resize-size", "40", "--val-crop-size", "32") == 0
    return place / "run"


def test_best_weights_are_opened_with_the_run_s_classes_and_test_size(run):
    trained = open_run(str(run), device="cpu")
    assert trained.classes == ["ant", "bee"] and trained.finished and trained.temperature == 1.0
    assert (trained.image_size, trained.resize_size) == (32, 40) and not trained.model.training
    best = torch.load(run / "model_best.pth", weights_only=True)
    assert all(torch.equal(value, best[name]) for name, value in trained.model.state_dict().items())
    wide = Image.fromarray(np.zeros((80, 160, 3), np.uint8))
    assert trained.transform(wide).shape == (3, 32, 32)
    assert open_run(str(run), device="cpu", image_size=64).resize_size == 80  # in proportion


def test_last_weights_and_temperature(run, tmp_path):
    last = open_run(str(run), device="cpu", weights="last")
    saved = torch.load(run / "checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in last.model.state_dict().items())
    assert str(last).endswith("last weights, after epoch 2; 2 classes, 32 px")
    summary = json.loads((run / "summary.json").read_text())
    try:
        (run / "summary.json").write_text(json.dumps(summary | {"calibration": {"temperature": 1.5}}))
        assert open_run(str(run), device="cpu").temperature == 1.5
        assert open_run(str(run), device="cpu", weights="last").temperature == 1.0  # it is that of the best
        (run / "summary.json").unlink()
        assert "not finished" in str(open_run(str(run), device="cpu"))
    finally:
        (run / "summary.json").write_text(json.dumps(summary))


def test_last_weights_where_a_kill_fell_between_two_renames(run, tmp_path):
    """Or the newest is damaged: as a run would go on."""
    own = tmp_path / "run"
    shutil.copytree(run, own)
    (own / "checkpoint.pth").rename(own / "checkpoint_previous.pth")
    assert (
        open_run(str(own), device="cpu", weights="last").weights
        == "last weights of checkpoint_previous.pth, after epoch 2"
    )
    (own / "checkpoint.pth").write_bytes(b"nothing whole")
    assert (
        open_run(str(own), device="cpu", weights="last").weights
        == "last weights of checkpoint_previous.pth, after epoch 2"
    )
    (own / "checkpoint_previous.pth").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint\.pth is damaged"):
        open_run(str(own), device="cpu", weights="last")


def test_of_a_run_with_an_average_the_last_weights_are_those_of_the_average(run, tmp_path):
    tree = run.parent / "images"
    flags = ["--epochs", "1", "--model-ema", "--model-ema-steps", "1", "--model-ema-decay", "0.99"]
    assert start(tree, tmp_path / "run", *flags) == 0
    last, saved = open_run(str(tmp_path / "run"), device="cpu", weights="last"), torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)  # fmt: skip
    assert all(torch.equal(value, saved["model_ema"][name]) for name, value in last.model.state_dict().items())
    assert any(not torch.equal(value, saved["model"][name]) for name, value in last.model.state_dict().items())
    assert str(last).endswith("last weights (EMA), after epoch 1; 2 classes, 32 px")


def test_accuracy_is_that_of_the_weights_which_are_opened(run, tmp_path):
    """Not of the best or the last epoch that there was: weights are saved with a checkpoint only."""
    own = shutil.copytree(run, tmp_path / "run")
    (own / "summary.json").unlink()
    (own / "report" / "confusion_best.json").write_text('{"epoch": 0, "confusion": [[3, 1], [1, 0]]}')
    with open(own / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "top1": 99.0}\n')
    best, last = (open_run(str(own), device="cpu", weights=weights) for weights in ("best", "last"))
    assert best.weights == "best weights of epoch 1" and best.top1 == 60.0
    second = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert last.weights == "last weights, after epoch 2" and last.top1 == second["top1"] != 99.0
    saved = torch.load(own / "checkpoint.pth", weights_only=True)
    saved["state"]["step"] = 3
    torch.save(saved, own / "checkpoint.pth")
    stopped = open_run(str(own), device="cpu", weights="last")
    assert stopped.weights == "last weights, after 3 steps of epoch 3" and stopped.top1 is None


def test_mixed_precision_is_float16_if_the_run_s_was_and_else_the_device_s_choice(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    settings = (own / "config.yaml").read_text()
    for name, chosen in (("auto", "auto"), ("bfloat16", "auto"), ("float16", "float16")):
        (own / "config.yaml").write_text(re.sub("^amp_dtype: .*$", f"amp_dtype: {name}", settings, flags=re.M))
        assert open_run(str(own), device="cpu", amp=True).config.amp_dtype == chosen


def test_what_is_no_run_is_said_in_a_line(run, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: it has no config\.yaml"):
        open_run(str(tmp_path))
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="its settings, classes or summary cannot be read"):
        open_run(str(tmp_path))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "plan.json").write_text((run / "report" / "plan.json").read_text())
    for name, text in (("config.yaml", ""), ("summary.json", '{"top1": 5')):
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match="its settings, classes or summary cannot be read"):
            open_run(str(tmp_path), device="cpu")
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_text(before)
    with pytest.raises(ConfigError, match="nothing was saved yet"):
        open_run(str(tmp_path), device="cpu")
    (tmp_path / "model_best.pth").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="not a file of weights"):
        open_run(str(tmp_path), device="cpu")


def test_weights_of_more_classes_than_have_names(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    plan = json.loads((run / "report" / "plan.json").read_text())
    (tmp_path / "run" / "report" / "plan.json").write_text(json.dumps(plan | {"classes": ["ant"]}))
    with pytest.raises(
        ConfigError, match=r"have 2 outputs \(classifier.1.weight\), its report/plan.json names 1 classes"
    ):
        open_run(str(tmp_path / "run"), device="cpu")
