"""What a stage changes, seen from inside the loop."""

import multiprocessing

import pytest
import torch
from runs import assert_same_bits, checkpoint, metrics, start
from torch import nn
from torchvision.ops import StochasticDepth

import train
from augment import randaugment
from learning import models
from learning.learner import Learner


class Probe(nn.Module):
    """A model that measures its own drop rates; the buffers are written inside the compiled graph too."""

    def __init__(self, num_classes=2, **kwargs):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.depth = StochasticDepth(0.5, "row")
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, num_classes)
        self.register_buffer("dropped", torch.zeros(()))
        self.skipped: torch.Tensor
        self.register_buffer("skipped", torch.zeros(()))

    def forward(self, x):
        if self.training:
            ones = torch.ones(20000, 1, device=x.device)
            self.dropped.copy_((self.dropout(ones) == 0).float().mean())
            self.skipped.copy_((self.depth(ones) == 0).float().mean())
        return self.head(self.norm(x.mean((2, 3))))


@pytest.fixture
def probe(monkeypatch):
    """Registers the model `probe`; yields what each training step saw."""
    seen, step = [], Learner.step
    monkeypatch.setattr(models, "available", lambda: ["probe"])
    monkeypatch.setattr(models, "get_model", lambda name, weights=None, num_classes=2: Probe(num_classes))

    def watching(self, images, targets, net=None):
        loss = step(self, images, targets, net)
        model = self.model
        seen.append(
            {
                "size": images.shape[-1],
                "dropped": float(model.dropped),
                "skipped": float(model.skipped),
                "targets": targets.clone(),
            }
        )
        return loss

    monkeypatch.setattr(Learner, "step", watching)
    return seen


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_each_stage_is_seen_to_change_size_drop_rates_randaugment_and_mixup(
    tree, tmp_path, monkeypatch, probe, compiled
):
    rotations, rotate = [], randaugment.F.rotate
    monkeypatch.setattr(
        randaugment.F,
        "rotate",
        lambda image, angle, **kwargs: (rotations.append(abs(angle)), rotate(image, angle, **kwargs))[1],
    )
    entered = []
    enter = train.StageScheduler.enter

    def noting(self, stage):
        entered.append((len(probe), len(rotations)))
        return enter(self, stage)

    monkeypatch.setattr(train.StageScheduler, "enter", noting)
    flags = (
        "--model probe --stages 2 --epochs 6 --train-crop-size 32 64 --dropout 0.1 0.6 "
        "--stochastic-depth-prob 0.05 0.5 --auto-augment ra --ra-scale paper --ra-magnitude 5 15"
    ).split()
    flags += ["--mixup-alpha", "0", "1", "--compile"][: 4 if compiled else 3]
    assert start(tree, tmp_path / "run", *flags) == 0
    (first_step, first_turn), (second_step, second_turn) = entered
    warm_up = 1 if compiled else 0  # the step that compiles, on noise, undone
    stages = probe[first_step + warm_up : second_step], probe[second_step + warm_up :]
    assert [{step["size"] for step in stage} for stage in stages] == [{32}, {64}]
    for name, rates in (("dropped", (0.1, 0.6)), ("skipped", (0.05, 0.5))):
        for stage, rate in zip(stages, rates):
            assert all(abs(step[name] - rate) < 0.02 for step in stage), [step[name] for step in stage]
    assert {round(angle, 3) for angle in rotations[first_turn:second_turn]} == {15.0}  # 5 tenths of 30 degrees
    assert {round(angle, 3) for angle in rotations[second_turn:]} == {45.0}
    assert all(step["targets"].ndim == 1 for step in stages[0])
    assert all(
        step["targets"].ndim == 2 and torch.allclose(step["targets"].sum(1), torch.ones(8)) for step in stages[1]
    )
    assert any(((step["targets"] > 0.01) & (step["targets"] < 0.99)).any() for step in stages[1])


def test_optimizer_schedule_and_ema_carry_on_over_a_stage_boundary(tree, tmp_path, monkeypatch):
    enter, states = train.StageScheduler.enter, []

    def noting(self, stage):
        states.append(stage.index)
        return enter(self, stage)

    monkeypatch.setattr(train.StageScheduler, "enter", noting)
    flags = (
        "--epochs 4 --model-ema --model-ema-steps 1 --model-ema-decay 0.9 --lr-scheduler exponentiallr --lr-gamma 0.5"
    ).split()
    assert start(tree, tmp_path / "one", *flags) == 0
    assert start(tree, tmp_path / "two", *flags, "--stages", "2", "--train-crop-size", "32", "32") == 0
    assert states == [0, 0, 1]
    # Two stages with equal settings are one stage: nothing was restarted between them.
    for part in ("model", "model_ema", "optimizer"):
        assert_same_bits(checkpoint(tmp_path / "one")[part], checkpoint(tmp_path / "two")[part])
    assert [record["lr"] for record in metrics(tmp_path / "two")] == [0.01, 0.005, 0.0025, 0.00125]


def test_workers_of_a_stage_are_gone_when_the_next_begins_and_its_own_are_there(tree, tmp_path, monkeypatch):
    counts, enter = [], train.StageScheduler.enter

    def counting(self, stage):
        loader = enter(self, stage)
        counts.append(len(multiprocessing.active_children()))
        return loader

    monkeypatch.setattr(train.StageScheduler, "enter", counting)
    flags = "--stages 3 --epochs 3 --workers 2 --train-crop-size 32 40".split()
    assert start(tree, tmp_path / "run", *flags) == 0
    # None yet; then two of validation, which stay, and two of the stage that begins.
    assert counts == [0, 4, 4]
    assert multiprocessing.active_children() == []
