"""Learning rates by hand and against the reference's chain of torch schedulers; who gets which weight decay."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from programs import ROOT
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR, SequentialLR, StepLR
from torchvision.models import get_model

from learning.optim import LearningRate, build_optimizer, parameter_groups, set_learning_rate, with_momentum
from learning.state import RunState
from learning.stop import Stop
from settings.resolve import resolve
from stages import plan_stages
from train import train_one_epoch
from utils import Runtime


def schedule(flags):
    config = resolve(flags.split())
    return LearningRate(config, plan_stages(config))


def on_meta(name):
    with torch.device("meta"):
        return get_model(name, num_classes=10)


def names_by_decay(model, **decays):
    """Weight decay to the names of the parameters that have it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rules = {"norm": None, "bias": None, "embedding": None, **decays}
    groups = parameter_groups(model, 0.1, **rules)
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed)) == len(names)  # every parameter in one group
    assert len({group["weight_decay"] for group in groups}) == len(groups)
    return {group["weight_decay"]: {names[parameter] for parameter in group["params"]} for group in groups}


# ---- the learning rate ----

WARM = " --lr-warmup-epochs 5 --lr-warmup-method linear"
BY_HAND = [
    ("--lr 0.1", {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001}),
    ("--lr 0.8 --epochs 9 --lr-step-size 2 --lr-gamma 0.5", {0: 0.8, 1: 0.8, 2: 0.4, 3: 0.4, 4: 0.2, 8: 0.05}),
    ("--lr 0.1" + WARM, {0: 0.001, 1: 0.0208, 2: 0.0406, 4: 0.0802, 5: 0.1, 34: 0.1, 35: 0.01, 65: 0.001}),
    ("--lr 0.1 --lr-warmup-epochs 5", {0: 0.001, 4: 0.001, 5: 0.1, 34: 0.1, 35: 0.01}),
    ("--lr 0.1 --lr-warmup-decay 0" + WARM, {0: 0.0, 1: 0.02, 4: 0.08, 5: 0.1}),
    ("--lr 0.1 --lr-warmup-decay 0.5 --lr-warmup-epochs 2", {0: 0.05, 1: 0.05, 2: 0.1}),
    (
        "--lr 0.5 --epochs 100 --lr-scheduler cosineannealinglr",
        {0: 0.5, 25: 0.426777, 50: 0.25, 75: 0.073223},  # (1 + cos 45 degrees) / 2 is 0.853553
    ),
    ("--lr 0.5 --epochs 100 --lr-scheduler cosineannealinglr --lr-min 0.1", {0: 0.5, 50: 0.3}),
    ("--lr 0.5 --epochs 25 --lr-scheduler cosineannealinglr" + WARM, {5: 0.5, 15: 0.25, 10: 0.426777}),
    ("--lr 0.1 --epochs 8 --lr-scheduler exponentiallr --lr-gamma 0.5", {0: 0.1, 1: 0.05, 2: 0.025, 7: 0.00078125}),
]


@pytest.mark.parametrize(("flags", "rates"), BY_HAND, ids=[flags for flags, _ in BY_HAND])
def test_learning_rates_by_hand(flags, rates):
    at = schedule(flags)
    assert [at(epoch) for epoch in rates] == pytest.approx(list(rates.values()), rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize("main", ["steplr", "cosineannealinglr", "exponentiallr"])
def test_learning_rates_are_those_of_the_reference_s_chain_of_schedulers(main, method, warmup):
    flags = f"--lr 0.5 --epochs 40 --lr-scheduler {main}"
    flags += {
        "steplr": " --lr-step-size 7 --lr-gamma 0.3",
        "exponentiallr": " --lr-gamma 0.9",
        "cosineannealinglr": " --lr-min 0.01",
    }[main]
    if warmup:
        flags += f" --lr-warmup-epochs {warmup} --lr-warmup-method {method} --lr-warmup-decay 0.05"
    at = schedule(flags)

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    if main == "steplr":
        chain = StepLR(optimizer, step_size=7, gamma=0.3)
    elif main == "exponentiallr":
        chain = ExponentialLR(optimizer, gamma=0.9)
    else:
        chain = CosineAnnealingLR(optimizer, T_max=40 - warmup, eta_min=0.01)
    if warmup:
        if method == "linear":
            start = LinearLR(optimizer, start_factor=0.05, total_iters=warmup)
        else:
            start = ConstantLR(optimizer, factor=0.05, total_iters=warmup)
        chain = SequentialLR(optimizer, schedulers=[start, chain], milestones=[warmup])
    for epoch in range(40):
        assert at(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), epoch
        optimizer.step()
        chain.step()


FRACTIONS = [
    ("--lr 0.1 --lr-warmup-decay 0" + WARM, {0.5: 0.01, 2.25: 0.045, 4.5: 0.09, 5.5: 0.1}),
    ("--lr 0.1 --lr-warmup-epochs 2", {0.5: 0.001, 1.99: 0.001, 2.0: 0.1}),
    ("--lr 0.1", {29.99: 0.1, 30.01: 0.01}),
    ("--lr 0.5 --epochs 2 --lr-scheduler cosineannealinglr", {0.5: 0.426777, 1.0: 0.25, 1.5: 0.073223}),
    ("--lr 0.4 --epochs 8 --lr-scheduler exponentiallr --lr-gamma 0.25", {0.5: 0.2, 1.0: 0.1, 1.5: 0.05}),
]


@pytest.mark.parametrize(("flags", "rates"), FRACTIONS, ids=[flags for flags, _ in FRACTIONS])
def test_fractions_of_an_epoch_by_hand(flags, rates):
    at = schedule("--lr-update step " + flags)
    assert [at(epoch) for epoch in rates] == pytest.approx(list(rates.values()), rel=1e-5)


def rates_of_one_epoch(flags, epoch, steps=4):
    """The learning rates that the training loop sets at the steps of `epoch`."""
    config = resolve(flags.split())
    runtime = Runtime(device=torch.device("cpu"))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=123.0)
    rates = []

    class Loader:
        images_per_step, wait_seconds = 2, 0.0

        def __len__(self):
            return steps

        def epoch(self, epoch, first_step):
            for step in range(first_step, steps):
                yield step, torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)

    def step(images, targets):
        rates.append(optimizer.param_groups[0]["lr"])
        return torch.tensor(1.0)

    learner = SimpleNamespace(runtime=runtime, ema=None, train=lambda: None, model=None, optimizer=optimizer, step=step)
    progress = SimpleNamespace(title="a test", step=lambda step, losses: None)
    assert train_one_epoch(
        learner, Loader(), RunState(epoch=epoch), LearningRate(config, plan_stages(config)), progress, Stop(runtime)
    )
    return rates


COSINE = "--lr 0.5 --epochs 2 --lr-scheduler cosineannealinglr"


def test_the_learning_rate_stays_put_within_an_epoch_as_in_the_reference():
    assert rates_of_one_epoch(COSINE, epoch=0) == pytest.approx([0.5, 0.5, 0.5, 0.5])
    assert rates_of_one_epoch(COSINE, epoch=1) == pytest.approx([0.25, 0.25, 0.25, 0.25])


def test_the_learning_rate_follows_the_schedule_at_every_step_if_asked():
    rates = rates_of_one_epoch(COSINE + " --lr-update step", epoch=1)
    assert rates == pytest.approx(
        [0.25, 0.154329, 0.073223, 0.019030], rel=1e-4
    )  # cos of 90, 112.5, 135, 157.5 degrees


# Two stages of 64 px and one of 128, of 4, 4 and 2 epochs: 1/4 of the compute in each of the first two, 1/2 in the last.
CLOCK = (
    "--lr 0.8 --lr-clock compute --lr-update step --stages 3 --stage-epochs 4 4 2 --train-crop-size 64 64 128 "
    "--lr-warmup-epochs 2 --lr-warmup-method linear --lr-warmup-decay 0 --lr-scheduler cosineannealinglr"
)


def test_the_compute_clock_by_hand():
    """Ten epochs on the clock are all of the compute: one of it is 1.6 epochs at 64 px, 0.4 at 128 px."""
    at = schedule(CLOCK)
    assert at(1.6) == pytest.approx(0.4)  # 1/10 of the compute, half of warm-up
    assert at(3.2) == pytest.approx(0.8)  # 2/10: its end
    assert at(6.4) == pytest.approx(0.682843)  # 4/10, a quarter of the cosine: 0.8 (1 + cos 45 degrees) / 2
    assert at(8.4) == pytest.approx(0.4)  # 6/10, in the last stage: half
    assert at(9.2) == pytest.approx(0.117157, rel=1e-5)  # 8/10: 0.8 (1 + cos 135 degrees) / 2
    assert at.warming_up(3.0) and not at.warming_up(3.2)


def test_falls_on_the_compute_clock_come_by_passes_at_the_last_size():
    """Equal compute: 8 epochs at 64 px and 2 at 128 px are 4 at 128 px, of which each step of 1 is a half stage."""
    flags = "--lr 0.1 --lr-step-size 1 --lr-gamma 0.5 --lr-clock compute --epochs 4 --stages 2 --stage-rule compute"
    at = schedule(flags + " --train-crop-size 64 128")
    assert at.num_epochs == 10 and at.span == 4
    expected = {0: 0.1, 3: 0.1, 4: 0.05, 7: 0.05, 8: 0.025, 9: 0.0125}
    assert {epoch: at(epoch) for epoch in expected} == pytest.approx(expected)


def test_the_epochs_clock_ends_with_the_stages_of_equal_compute():
    at = schedule(
        COSINE.replace("--epochs 2", "--epochs 4") + " --stages 2 --stage-rule compute --train-crop-size 64 128"
    )
    assert at.span == 10 and at(5) == pytest.approx(0.25)  # half of 0.5 after half of the epochs trained


def test_the_batch_size_of_a_stage_moves_nothing_on_the_compute_clock():
    """A step begins at its share of the epoch's images: the second of two where the third of four does."""
    (first, second), four = (rates_of_one_epoch(CLOCK, epoch=8, steps=steps) for steps in (2, 4))
    assert [first, second] == [four[0], four[2]] and four[1] != first


PAPER = (
    "--lr 0.256 --epochs 350 --lr-scheduler exponentiallr --lr-gamma 0.98739 --lr-warmup-decay 0 --lr-update step"
    + WARM
)


def test_the_paper_s_rate_warms_up_from_nothing_then_falls_by_three_hundredths_every_2_4_epochs():
    at = schedule(PAPER)
    assert [at(0), at(2.5), at(5)] == pytest.approx([0, 0.128, 0.256])
    assert at(6) == pytest.approx(0.256 * 0.98739)
    assert at(7.4) == pytest.approx(0.24832, rel=1e-4)  # x 0.97
    assert at(29) == pytest.approx(0.188781, rel=1e-4)  # ten times: 0.97^10 is 0.737424
    assert at(245) == pytest.approx(0.0121734, rel=1e-3)  # a hundred times: 0.97^100 is 0.0475525


@pytest.mark.parametrize("name", ["imagenet_s", "imagenet_m", "imagenet_l"])
def test_the_paper_s_configs_have_its_optimizer_and_rate(name):
    given = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert (given["opt"], given["lr_scheduler"], given["lr_warmup_method"]) == ("rmsprop", "exponentiallr", "linear")
    assert given["lr_gamma"] == pytest.approx(0.98739, abs=1e-5)
    assert (given["weight_decay"], given["bn_momentum"], given["label_smoothing"]) == (1e-5, 0.01, 0.1)


def test_set_learning_rate_reaches_every_group():
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=1.0
    )
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# ---- who decays how much ----


def test_without_rules_there_is_one_group():
    model = on_meta("resnet18")
    assert names_by_decay(model) == {0.1: {name for name, _ in model.named_parameters()}}


def test_norm_layers_of_an_efficientnet_do_not_decay():
    groups = names_by_decay(on_meta("efficientnet_b0"), norm=0.0)
    assert groups.keys() == {0.1, 0.0}
    # A stem, a head, 16 blocks of three batch norms of which the first has two: 49, each of a weight and a bias.
    assert len(groups[0.0]) == 2 * 49
    assert {"features.0.1.weight", "features.0.1.bias", "features.8.1.weight"} <= groups[0.0]
    assert {"features.0.0.weight", "classifier.1.weight", "classifier.1.bias"} <= groups[0.1]
    assert "features.1.0.block.1.fc1.bias" in groups[0.1]  # squeeze and excitation has biases but no norm


def test_biases_of_norm_layers_follow_the_rule_for_biases():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert names_by_decay(model, norm=0.0, bias=0.02) == {
        0.1: {"0.weight", "3.weight"}, 0.0: {"1.weight"}, 0.02: {"0.bias", "1.bias", "3.bias"},
    }  # fmt: skip


def test_kinds_of_the_same_decay_share_a_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert names_by_decay(model, norm=0.0, bias=0.0) == {0.1: {"0.weight"}, 0.0: {"0.bias", "1.weight", "1.bias"}}


def test_layer_norms_group_norms_and_instance_norms_are_norm_layers():
    model = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.Linear(4, 4))
    groups = names_by_decay(model, norm=0.0)
    assert groups[0.0] == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}


def test_class_token_and_position_embedding_of_a_vision_transformer():
    groups = names_by_decay(on_meta("vit_b_16"), norm=0.03, bias=0.02, embedding=0.01)
    assert {"class_token", "encoder.pos_embedding"} == groups[0.01]
    # 12 blocks of two norms, and one after them
    assert len(groups[0.03]) == 25 and "encoder.ln.weight" in groups[0.03]
    assert {"conv_proj.bias", "heads.head.bias", "encoder.ln.bias"} <= groups[0.02]
    assert {"conv_proj.weight", "heads.head.weight", "encoder.layers.encoder_layer_0.mlp.0.weight"} <= groups[0.1]


@pytest.mark.parametrize(("name", "tables"), [("swin_t", 12), ("maxvit_t", 22)])
def test_relative_position_tables_are_embeddings(name, tables):
    groups = names_by_decay(on_meta(name), embedding=0.01)
    assert len(groups[0.01]) == tables
    assert all(parameter.endswith("relative_position_bias_table") for parameter in groups[0.01])


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = parameter_groups(model, 0.1, None, None, None)
    assert [id(parameter) for parameter in group["params"]] == [id(model[1].weight), id(model[1].bias)]


# ---- optimizers by name ----


@pytest.mark.parametrize(
    ("flags", "kind", "options"),
    [
        ("--opt sgd --lr 0.3", torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": False}),
        ("--opt sgd --momentum 0", torch.optim.SGD, {"momentum": 0, "nesterov": False}),
        ("--opt sgd_nesterov --momentum 0.8", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("--opt rmsprop --lr 0.256", torch.optim.RMSprop, {"lr": 0.256, "momentum": 0.9, "eps": 0.0316, "alpha": 0.9}),
        ("--opt adamw --lr 0.001", torch.optim.AdamW, {"lr": 0.001, "betas": (0.9, 0.999)}),
    ],
)
def test_optimizers_by_name(flags, kind, options):
    config = resolve([*flags.split(), "--wd", "0.02", "--norm-weight-decay", "0"])
    optimizer = build_optimizer(config, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    assert type(optimizer) is kind
    for group, decay, count in zip(optimizer.param_groups, (0.02, 0.0), (2, 2), strict=True):
        assert {name: group[name] for name in options} == options
        assert (group["weight_decay"], len(group["params"])) == (decay, count)


@pytest.mark.parametrize(
    ("flags", "after_two"),
    [
        ("--opt sgd", -0.29),  # 0.1 * 1, then 0.1 * (0.9 + 1)
        ("--opt sgd_nesterov", -0.461),  # 0.1 * (1 + 0.9), then 0.1 * (1 + 0.9 * 1.9)
        ("--opt sgd --momentum 0.5", -0.25),
        ("--opt rmsprop --momentum 0", -0.501407),  # 0.1 / (sqrt(0.1) + 0.0316), then 0.1 / (sqrt(0.19) + 0.0316)
    ],
)
def test_two_steps_by_hand_on_a_gradient_of_one(flags, after_two):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(resolve([*flags.split(), "--lr", "0.1", "--wd", "0"]), model)
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert model.weight.item() == pytest.approx(after_two, rel=1e-5)


def test_a_first_step_that_overflows_leaves_no_momentum():
    """torch's fused kernel skips it, and would leave what lay in the memory that was to be the momentum."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = with_momentum(torch.optim.SGD([weight], lr=1.0, momentum=0.5, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for gradient in (torch.inf, 1.0, 1.0):
        weight.grad = scaler.scale(torch.full((3,), gradient))
        scaler.step(optimizer)
        scaler.update()
    assert weight.tolist() == [-2.5] * 3  # nothing, 1, then 1.5; the scale's halving is undone by the scaler itself
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [1.5] * 3


def test_momentum_that_begins_at_zeros_is_the_first_gradient():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01) for weight in weights]
    with_momentum(optimizers[1])
    for gradient in (0.3, -0.7):
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = torch.full((3,), gradient)
            optimizer.step()
    assert torch.equal(*weights)
