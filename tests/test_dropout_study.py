"""The dropout study's proof that dropout acts. The original's could not: its layer had gone with the classifier."""

import pytest
from programs import ROOT, SMALL

from learning.learner import Learner
from studies.study import read_study
from train import run


@pytest.fixture
def losses(monkeypatch, tree, tmp_path):
    """Trains a condition of the study, four stages of an epoch of three steps; returns the loss of each step."""
    monkeypatch.chdir(ROOT)  # from where the list of the base's images is named, which is left out here
    flags = [*SMALL, "--data-path", str(tree), "--train-list", "none", "--epochs", "4", "--image-size-multiple", "1"]
    study = read_study("configs/studies/dropout_small.yaml", str(tmp_path), [word for word in flags if word])
    step = Learner.step

    def train(condition):
        seen = []

        def noting(self, images, targets, net=None):
            seen.append(step(self, images, targets, net))
            return seen[-1]

        monkeypatch.setattr(Learner, "step", noting)
        (config,) = [run for run in study.runs if (run.condition, run.seed) == (condition, 0)]
        assert run(config.flags) == 0
        return [
            float(loss) for loss in seen[4:]
        ]  # before the first epoch a step of each stage is rehearsed, and undone

    return train


def test_dropout_acts_from_the_first_step_of_the_stage_in_which_it_differs(losses):
    low, high, none = losses("0.1 → 0.3"), losses("0.1 → 0.7"), losses("none")
    assert len(low) == len(high) == len(none) == 12
    assert low[:3] == high[:3]  # 0.1 in the first stage of both: images, order and draws are the same
    assert low[3] != high[3]  # 0.167 and 0.3 in the second
    assert none[0] != low[0]
