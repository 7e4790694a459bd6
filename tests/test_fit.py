"""Runs that fit a time: which epochs it affords, by hand; what is measured and undone; what stands afterwards."""

import json
import os
import time

import pytest
import torch
import yaml
from programs import SMALL, ranks
from runs import assert_same_bits, checkpoint, metrics, start
from test_resume import cut

import train
from learning import fit
from learning.fit import Costs, Few, Forecast, affordable, marks_of, with_lengths
from learning.optim import LearningRate
from reporting import log
from settings.errors import ConfigError
from settings.resolve import resolve
from stages import plan_stages
from utils import Runtime

# ---- arithmetic ----

COSTS = Costs(epochs=[10.0, 20.0], entries=[1.0, 2.0], evaluation=5.0, closing=7.0)


def test_what_a_run_takes_by_hand():
    # 3 x 10 + 2 x 20 + 1 + 2; five epochs evaluated after the second, fourth and last: 3 x 5 + 7
    assert (COSTS.training([3, 2]), COSTS.evaluations([3, 2], 2)) == (73, 22)
    assert COSTS.total([3, 2], 2) == 95


@pytest.mark.parametrize(
    ("shape", "limit", "lengths"),
    [
        ([1, 1], 44, None),  # 1 + 2 + 10 + 20 + 5 + 7 are 45
        ([1, 1], 45, [1, 1]),
        ([50, 50], 45, [1, 1]),
        ([1, 1], 55, [2, 1]),  # what is left has room for one of 10 s
        ([1, 1], 75, [2, 2]),
        ([87, 88], 165, [5, 5]),  # 5 x 30 + 15
        ([4, 2], 105, [5, 2]),  # 4 and 2 take 95
        ([300, 100], 115, [6, 2]),
    ],
)
def test_the_epochs_that_a_time_affords_by_hand(shape, limit, lengths):
    assert affordable(COSTS, shape, 1000, limit) == lengths


def test_a_time_is_used_up_to_the_shortest_epoch():
    costs = Costs([25.0, 25.0, 46.0, 75.0], [0.0] * 4, 2.0, 3.0)
    for limit in range(180, 2000, 37):
        lengths = affordable(costs, [87, 87, 87, 87], 3, limit)
        assert limit - 27.0 <= costs.total(lengths, 3) <= limit
        assert max(lengths) - min(lengths) <= 3


def fitted(lengths, flags):
    config = resolve(flags.split())
    return with_lengths(config, lengths, LearningRate(config, plan_stages(config)))


def test_what_counts_epochs_keeps_its_proportion():
    stages = "--stages 2 --train-crop-size 64 128 --epochs 40 --fit-time 1h "
    config = fitted([3, 7], stages.replace("--epochs 40", "") + "--lr-step-size 36 --lr-warmup-epochs 18")
    assert (config.epochs, config.stage_epochs, config.lr_step_size, config.lr_warmup_epochs) == (10, (3, 7), 4, 2)
    config = fitted([4, 5], stages.replace("--epochs 40", "") + "--lr-scheduler exponentiallr --lr-gamma 0.9")
    assert config.lr_gamma == pytest.approx(0.9**10)  # 90 epochs were the default
    assert config.lr_warmup_epochs == 0 and config.fit_time is None
    one = fitted([7], "--fit-time 1h --lr-warmup-epochs 8 --lr-scheduler cosineannealinglr")
    assert (one.epochs, one.stage_epochs, one.lr_warmup_epochs) == (7, None, 1)  # 0.6 of an epoch
    again = resolve(["--epochs", "7", "--lr-warmup-epochs", "1", "--lr-scheduler", "cosineannealinglr"])
    assert one == again


def test_a_run_of_few_epochs_does_not_spend_them_warming_up():
    """5 of 90 epochs come to 0.06 of one: a whole one would be trained at a hundredth of the learning rate."""
    flags = "--fit-time 1h --lr 0.5 --lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear --lr-warmup-decay 0.02"
    one = fitted([1], flags)
    assert one == resolve(
        "--epochs 1 --lr 0.5 --lr-scheduler cosineannealinglr".split()
    )  # which resolve does not refuse
    assert LearningRate(one, plan_stages(one))(0) == 0.5


def test_a_fitted_run_of_equal_compute_has_its_lengths_written_out(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("stages: 2\nstage_rule: compute\ntrain_crop_size: [64, 128]\nepochs: 20\nlr_warmup_epochs: 5\nlr_clock: compute\n")  # fmt: skip
    config = fitted([8, 2], f"--config {file} --fit-time 1h")
    assert (config.stage_rule, config.stage_epochs, config.epochs) == ("paper", (8, 2), 10)
    at = LearningRate(config, plan_stages(config))
    assert config.lr_warmup_epochs == 2  # a quarter of 10, rounded to even
    assert at.warming_up(3.1) and not at.warming_up(3.3)  # a fifth of the compute: 3.2 of the 8 epochs at 64 px


def test_a_forecast_and_its_error():
    forecast = Forecast(100.0, before=10.0, training=60.0, evaluating=10.0, ending=4.0, lengths=[2, 1], epochs=[15, 30])
    outcome = forecast.outcome(84.0)
    assert (outcome["forecast"], outcome["taken"], outcome["error"]) == (80.0, 84.0, pytest.approx(0.05))
    assert "84 of 100 s expected: 10 until now, 60 training (2 x 15 + 1 x 30), 10 evaluating, 4 for the end" in str(
        forecast
    )


@pytest.mark.parametrize(
    ("count", "skipped", "marks"),
    [(1, 0, [0, 1]), (5, 0, [0, 1, 2, 3, 4, 5]), (12, 4, [4, 5, 6, 7, 8, 9]), (24, 4, [4, 8, 12, 16, 20, 24]), (3, 32, [1, 2, 3])],
)  # fmt: skip
def test_steps_are_measured_in_blocks_after_those_that_were_loaded_meanwhile(count, skipped, marks):
    assert marks_of(count, skipped) == marks


def test_the_median_block_counts():
    few = Few(Runtime(device=torch.device("cpu")), [1, 3, 5, 7])
    few.times = [10.0, 12.0, 13.0, 23.0]  # 1, 0.5 and 5 seconds a step
    assert few.per_step(in_bursts=False) == 1.0
    assert [few() for _ in range(7)] == [False] * 6 + [True]


def test_batches_that_come_many_at_once_cost_their_wait_too():
    """Two workers of 4 s a batch bring two every 4 s: 2 s a step, which blocks of one step show as 0 and 4."""
    few = Few(Runtime(device=torch.device("cpu")), [2, 3, 4, 5, 6, 7])
    few.times = [0.0, 0.0, 4.0, 4.0, 8.0, 8.0]
    assert few.per_step(in_bursts=False) == 0.0
    assert few.per_step(in_bursts=True) == pytest.approx(8 / 5)


# ---- runs ----

STAGES = "--stages 2 --train-crop-size 32 48 --dropout 0 0.2 --model-ema --model-ema-steps 1 --lr-warmup-epochs 9 --lr-update step".split()  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """The start of the run, which these tests' process began long before."""
    begun = [time.time()]
    for module in (fit, log):
        monkeypatch.setattr(module, "since_start", lambda: time.time() - begun[0])
    return begun


@pytest.fixture
def of_three(monkeypatch, clock):
    """Three epochs are what any time affords; costs are measured all the same."""
    measured = []

    def chosen(costs, shape, eval_every, limit):
        measured.append(costs)
        return [1, 2]

    monkeypatch.setattr(fit, "affordable", chosen)
    return measured


def test_a_fitted_run_is_the_run_of_its_config(images, tmp_path, of_three, capsys):
    out, again = tmp_path / "run", tmp_path / "again"
    assert start(images, out, *STAGES, "--fit-time", "10m", "--mixup-alpha", "0.2", "--finetune-epochs", "1") == 0
    (costs,) = of_three
    assert all(seconds > 0 for seconds in [*costs.epochs, costs.evaluation, costs.closing]) and len(costs.epochs) == 2
    printed = capsys.readouterr().out
    assert "of 600 s expected" in printed and "epoch 4/4" in printed  # the last of them fine-tunes, as it was given
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert (written["epochs"], written["stage_epochs"], written["lr_step_size"]) == (3, [1, 2], 1)  # 30 of 90 epochs
    assert written["lr_warmup_epochs"] == 0 and "fit_time" not in written  # 9 of 90 are 0.3 of an epoch
    summary = json.loads((out / "summary.json").read_text())["fit_time"]
    assert summary["asked"] == 600 and summary["lengths"] == [1, 2] and 0 < summary["taken"] < 600
    assert summary["error"] == pytest.approx(summary["taken"] / summary["forecast"] - 1)
    assert "Fitted to 600 s" in (out / "report.html").read_text()
    assert not list(out.glob("*.tmp")) and not list(out.glob(".fit*"))  # the checkpoint whose writing was timed
    assert train.run(["--config", str(out / "config.yaml"), "--output-dir", str(again)]) == 0
    for part in ("model", "model_ema", "optimizer", "ema_updates"):
        assert_same_bits(checkpoint(out)[part], checkpoint(again)[part])
    assert "fit_time" not in json.loads((again / "summary.json").read_text())


def test_a_run_killed_while_it_measures_leaves_nothing_to_go_on_from(images, tmp_path, of_three, monkeypatch):
    def killed(*args):
        write(*args)
        raise KeyboardInterrupt

    write, out = fit.write_beside, tmp_path / "run"
    flags = [*STAGES, "--fit-time", "10m", "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "write_beside", killed)
        assert start(images, out, *flags) == 1
    assert len(list(out.glob("*.tmp"))) == 1
    assert start(images, out, *flags) == 0
    assert [record["epoch"] for record in metrics(out)] == [0, 1, 2] and not list(out.glob("*.tmp"))
    assert json.loads((out / "summary.json").read_text())["fit_time"]["asked"] == 600


def test_a_resumed_run_keeps_to_what_was_chosen(images, tmp_path, of_three, clock, monkeypatch):
    flags = [*STAGES, "--fit-time", "10m", "--resume", "auto"]
    with monkeypatch.context() as patch:
        cut(patch, 6)  # the third epoch: calls at three steps and an end of the first, and one of the second
        assert start(images, tmp_path / "run", *flags) == 3
    left = checkpoint(tmp_path / "run")["state"]
    assert (left["epoch"], left["step"]) == (1, 2) and left["seconds"] > 0
    monkeypatch.setattr(train, "fit", None)  # not again
    clock[0] = time.time() - 1000  # a second part that took so long already
    assert start(images, tmp_path / "run", *flags) == 0
    assert [record["epoch"] for record in metrics(tmp_path / "run")] == [0, 1, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["fit_time"]["taken"] == pytest.approx(1000 + left["seconds"], abs=100)
    clock[0] = time.time()
    monkeypatch.undo()
    whole = tmp_path / "whole"
    assert train.run(["--config", str(tmp_path / "run" / "config.yaml"), "--output-dir", str(whole)]) == 0
    assert_same_bits(checkpoint(tmp_path / "run")["model_ema"], checkpoint(whole)["model_ema"])


def test_too_little_time_says_how_much_it_takes(images, tmp_path, clock, capsys):
    assert start(images, tmp_path / "run", *STAGES, "--fit-time", "3s") == 2
    told = capsys.readouterr().err
    assert "fit_time 3s is too short: an epoch of every stage, evaluation and the end take" in told
    assert told.count("\n") == 1 and told.strip().endswith("s or more")
    assert not (tmp_path / "run").exists()


def test_images_that_take_too_long_to_decode_are_told_before_they_are_decoded(
    images, tmp_path, clock, capsys, monkeypatch
):
    monkeypatch.setattr(fit, "building_seconds", lambda config, data: 700.0)
    monkeypatch.setattr(train, "with_store", None)
    assert start(images, tmp_path / "run", "--fit-time", "10m") == 2
    assert "decoding the images, once for all runs, takes about 700 s alone" in capsys.readouterr().err


def test_two_processes_measure_together(images, tmp_path):
    """What is kept for the end is more than this time, whatever they measure."""
    flags = [
        *SMALL,
        "--stages",
        "2",
        "--data-path",
        str(images),
        "--output-dir",
        str(tmp_path / "run"),
        "--fit-time",
        "3s",
    ]
    for done in ranks(2, tmp_path, *flags):
        assert done.returncode == 2 and "fit_time 3s is too short" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 5 --fit-time 5m", "epochs 5 has no effect with fit_time 5m"),
        ("--fit-time 5m --plan", "plan needs neither data nor time"),
        ("--fit-time soon", "fit_time must be a time such as 90s"),
        ("--fit-time 5m --start-epoch 3", "fit_time plans a whole run"),
    ],
)
def test_what_cannot_go_with_a_time_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        resolve(flags.split())


def test_a_recipe_gives_its_epochs_up_and_a_begun_run_does_not(images, tmp_path, clock):
    assert resolve(["--config", "configs/imagenette_b0.yaml", "--fit-time", "5m"]).fit_time == "5m"
    out = tmp_path / "run"
    assert start(images, out, "--epochs", "1") == 0
    with pytest.raises(ConfigError, match="has its epochs already"):
        resolve(["--output-dir", os.fspath(out), "--resume", "auto", "--fit-time", "5m"])
