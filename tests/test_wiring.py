"""From a setting to the part that it is for: each arrives, with the numbers worked out by hand.

Parts are tested by themselves elsewhere, and whole runs are compared with runs of the same code, which would not notice
a setting that reaches nothing.
"""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import tiny  # noqa: F401, makes its model known
import torch
from loading import CPU
from runs import make_tree
from torch import nn

import learning.fit
from images.datasets import load_data
from images.loaders import train_loader
from learning.checkpoint import fingerprint
from learning.ema import EMA
from learning.fit import Costs, affordable
from learning.learner import build_learner
from learning.optim import LearningRate, build_optimizer
from learning.state import RunState
from learning.stop import Stop
from presets import batch_mix, stage_preset
from presets import test_preset as eval_preset
from reporting.assessment import receiver_operating
from reporting.folder import RunFolder
from reporting.log import FolderLog
from settings.resolve import resolve
from stages import plan_stages
from studies.statistics import Estimate
from train import train_one_epoch
from utils import Runtime

# ---- the step ----


def learner_of(*flags, class_weights=None, runtime=CPU):
    config = resolve(["--model", "efficientnet_v2_tiny", "--device", "cpu", *flags])
    return build_learner(config, 2, None, runtime, class_weights)[0]


def test_gradients_are_clipped_at_their_own_scale_not_the_scaler_s():
    """Gradients (3, 4) of length 5, shown 1,024 times as large: a step of a fifth of them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    runtime = Runtime(device=torch.device("cpu"), scaler=scaler)
    weights = nn.Parameter(torch.zeros(2))
    scaler.scale(torch.zeros(()))  # makes its state
    weights.grad = torch.tensor([3 * 1024.0, 4 * 1024.0])
    runtime.update(torch.optim.SGD([weights], lr=1.0), [weights], 1.0)
    assert weights.tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)


def test_clip_grad_norm_reaches_the_step():
    learner = learner_of("--clip-grad-norm", "0.001", "--lr", "1", "--momentum", "0", "--weight-decay", "0")
    before = [parameter.detach().clone() for parameter in learner.parameters]
    learner.train()
    learner.step(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))
    moved = sum(float((now.detach() - then).square().sum()) for now, then in zip(learner.parameters, before)) ** 0.5
    assert moved == pytest.approx(0.001, rel=1e-2)


def test_label_smoothing_and_class_weights_reach_the_losses():
    """Probabilities 3/4 and 1/4, class 0, smoothing 0.1: -(0.95 ln 0.75 + 0.05 ln 0.25) = 0.342613.

    With weights 1.6 and 0.8: -(1.6 * 0.95 ln 0.75 + 0.8 * 0.05 ln 0.25) = 0.492729.
    """
    logits, target = torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32), torch.tensor([0])
    plain = learner_of("--label-smoothing", "0.1")
    assert plain.criterion(logits, target).item() == pytest.approx(0.342613, abs=1e-5)
    weighted = learner_of("--label-smoothing", "0.1", class_weights=[1.6, 0.8])
    assert weighted.training_loss(logits, target).item() == pytest.approx(0.492729, abs=1e-5)
    assert weighted.criterion(logits, target).item() == pytest.approx(0.342613, abs=1e-5)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def test_each_weight_decay_reaches_its_group():
    flags = "--wd 0.5 --norm-weight-decay 0.1 --bias-weight-decay 0.2 --transformer-embedding-decay 0.3"
    groups = build_optimizer(resolve(flags.split()), Transformer()).param_groups
    # A matrix; weight of the norm; bias of both; the token.
    assert {group["weight_decay"]: len(group["params"]) for group in groups} == {0.5: 1, 0.1: 1, 0.2: 2, 0.3: 1}


class FourSteps:
    """A loader of two processes with 4 images each a step."""

    images_per_step, wait_seconds = 8, 0.0
    sampler = SimpleNamespace(batch_size=4)

    def __len__(self):
        return 4

    def epoch(self, epoch, first):
        for step in range(4):
            yield step, torch.zeros(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)


def test_the_average_follows_images_of_all_processes_and_epochs_of_the_stages():
    """8 images a step, every second step, ten epochs of the stages: 1 - 0.1 * 8 * 2 / 10 is 0.84.

    The weight is 1, 2, 3, 4 after the steps; taken after the first and the third: 1, then 0.84 * 1 + 0.16 * 3 = 1.32.
    """
    flags = "--model-ema --model-ema-decay 0.9 --model-ema-steps 2 --epochs 4 --stages 2 --stage-rule compute"
    config = resolve(f"{flags} --lr-clock compute --train-crop-size 64 128".split())
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, config)

    def step(images, targets):
        with torch.no_grad():
            model.weight.fill_(next(numbers))
        return torch.tensor(1.0)

    numbers = iter((1, 2, 3, 4))
    learner = SimpleNamespace(
        runtime=CPU, ema=ema, train=lambda: None, model=model, step=step,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )  # fmt: skip
    progress = SimpleNamespace(title="", step=lambda step, losses: None)
    learning_rate = LearningRate(config, plan_stages(config))
    assert train_one_epoch(learner, FourSteps(), RunState(), learning_rate, progress, Stop(CPU))
    assert ema.module.weight.item() == pytest.approx(1.32)


def test_a_scaler_goes_on_where_it_was(tmp_path):
    """At 65,536, where it begins, the first steps of a resumed run in float16 would overflow and be left out."""

    def half():
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        return replace(CPU, scaler=scaler, amp_dtype=torch.float16)

    tree = make_tree(tmp_path / "images")
    config = resolve(["--model", "efficientnet_v2_tiny", "--data-path", str(tree)])
    first, second = half(), half()
    learner = learner_of(runtime=first)
    first.scaler.scale(torch.zeros(()))
    first.scaler.update(512.0)
    checkpoint = learner.checkpoint(RunState(), config, load_data(config, CPU))
    learner_of(runtime=second).restore(checkpoint)
    assert second.scaler.get_scale() == 512.0


# ---- images ----


@pytest.mark.parametrize("on_device", [False, True])
def test_strengths_reach_the_preset_of_workers_and_of_batches(on_device):
    """15 on the paper's scale rotates by 45 degrees, half as far again as its full range of 30."""
    flags = (
        "--train-crop-scale 1 1 --hflip-prob 1 --random-erase 1 --auto-augment ra --ra-scale paper --ra-magnitude 15"
    )
    config = resolve([*flags.split(), "--augment-on", "device" if on_device else "worker"])
    preset = stage_preset(config, plan_stages(config)[0], on_device)
    if on_device:
        assert (preset.level, preset.crop_scale, preset.hflip_prob, preset.random_erase) == (45, (1, 1), 1, 1)
    else:
        crop, flip, policy, _, erase = preset.transforms
        assert (tuple(crop.scale), flip.p, policy.level, erase.p) == ((1, 1), 1, 45, 1)


def test_interpolation_and_severity_reach_the_preset():
    config = resolve("--interpolation bicubic --auto-augment augmix --augmix-severity 7".split())
    crop, _, policy, *_ = stage_preset(config, plan_stages(config)[0], False).transforms
    assert (crop.interpolation.value, policy.interpolation.value, policy.severity) == ("bicubic", "bicubic", 7)
    assert eval_preset(config, 32).transforms[0].interpolation.value == "bicubic"


GREYS = torch.tensor([10.0, 20.0, 40.0, 80.0])


@pytest.mark.parametrize(
    ("alphas", "of_mixup", "variance"),
    [((0.2, 1.0), True, 1 / 5.6), ((0.2, 1.0), False, 1 / 12), ((1.0, 0.0), True, 1 / 12), ((0.0, 1.0), False, 1 / 12)],
)
def test_shares_vary_as_each_alpha_says(alphas, of_mixup, variance):
    """Beta(a, a) has the variance 1 / (4 (2 a + 1)). A share of cutmix is that of whole pixels, here of 48 x 48."""
    mix, shares = batch_mix(*alphas, 4), []
    images = GREYS.view(4, 1, 1, 1).expand(4, 3, 48, 48)
    for seed in range(1500):
        torch.manual_seed(seed)
        mixed, targets = mix(images.clone(), torch.arange(4))
        blended = not torch.isin(mixed, GREYS).all()
        unmixed = not blended and len(mixed[0].unique()) == 1  # either's, with a share of 0 or 1
        if unmixed or blended == of_mixup:
            shares.append(float(targets[0, 0]))
    assert np.mean((np.array(shares) - 0.5) ** 2) == pytest.approx(variance, rel=0.25)


def first_batch(tree, seed):
    flags = f"--data-path {tree} --workers 0 --batch-size 24 --train-crop-size 32 --seed {seed}"
    config = resolve(flags.split())
    loader = train_loader(config, load_data(config, CPU), CPU, plan_stages(config)[0])
    (_, images, targets), *_ = loader.epoch(0, 0)
    return images, targets


def test_the_seed_reaches_order_and_augmentation(tmp_path):
    """Else the runs of a study would be nearly one run, and its intervals too narrow."""
    tree = make_tree(tmp_path / "images")
    (one, order), (same, again), (other, another) = (first_batch(tree, seed) for seed in (3, 3, 4))
    assert torch.equal(one, same) and torch.equal(order, again) and not torch.equal(order, another)
    for path in (tree / "train").glob("*/*.png"):  # one picture 24 times over: what differs now is augmentation
        path.write_bytes((tree / "train" / "ant" / "0.png").read_bytes())
    one, other = (first_batch(tree, seed)[0].sum((1, 2, 3)).sort().values for seed in (3, 4))
    assert not torch.allclose(one, other)


# ---- time, figures ----


def test_a_fitted_run_counts_its_start_and_keeps_a_twentieth(monkeypatch):
    """300 s asked, 100 gone: of 200 a twentieth is kept, and 4 for the end; epochs of 10 s: 18."""
    monkeypatch.setattr(learning.fit, "since_start", lambda: 100.0)
    chosen = []

    def afford(costs, shape, eval_every, limit):
        chosen.append(limit)
        return affordable(costs, shape, eval_every, limit)

    monkeypatch.setattr(learning.fit, "affordable", afford)
    costs = Costs([10.0], [0.0], 0.0, 0.0)
    monkeypatch.setattr(learning.fit, "measure", lambda *_: costs)
    config = resolve(["--fit-time", "300s", "--clearml", "off"])
    plan = plan_stages(config)
    fitted, forecast = learning.fit.fit(config, None, SimpleNamespace(runtime=CPU), plan, None, None, None)
    assert chosen == [pytest.approx(186.0)] and fitted.epochs == 18 and forecast.lengths == [18]


def test_the_curve_is_that_of_the_second_class():
    """Margins of the second class at 3, 2, 0, of the first at 1, -1: five of six pairs are the right way round."""
    margin = np.array([3.0, 2.0, 1.0, 0.0, -1.0])
    area, (false, true) = receiver_operating(np.stack([-margin / 2, margin / 2], 1), np.array([1, 1, 0, 1, 0]))
    assert area == pytest.approx(5 / 6)
    points = list(zip(false, true))
    assert (0.0, pytest.approx(2 / 3)) in points and (0.5, 1.0) in points and (0.0, 0.5) not in points


def test_an_interval_that_touches_zero_is_undecided():
    assert Estimate(1.0, 5, 1.0, 0.0, 2.0).undecided and not Estimate(1.0, 5, 1.0, 0.01, 2.0).undecided


# ---- the best weights ----


def test_the_best_weights_are_the_average_s_where_that_was_best():
    average, model = nn.Linear(1, 1), nn.Linear(1, 1)
    for copy, value in ((average, 2.0), (model, 1.0)):
        nn.init.constant_(copy.weight, value)
    log = FolderLog.__new__(FolderLog)
    log.dashboard = Mock()
    learner = SimpleNamespace(copies={"model": model, "ema": average}, model=model)
    for best, value in (("ema", 2.0), ("model", 1.0)):
        log.save_best(learner, RunState(best_weights=best), SimpleNamespace(confusion=None))
        assert log.best[0]["weight"].item() == value


def test_best_weights_of_another_epoch_are_not_taken_for_those(tmp_path):
    folder = RunFolder(str(tmp_path))
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "other.pth")
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "model_best.pth")
    wanted, other = (fingerprint(str(tmp_path / name)) for name in ("model_best.pth", "other.pth"))
    assert folder.has_best(wanted) and folder.has_best(None) and not folder.has_best(other)
