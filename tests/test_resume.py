"""How runs stop and go on: with the same bits where nothing was asked to change."""

import multiprocessing

import pytest
import torch
import yaml
from programs import SMALL
from runs import STAGED, STRONG, assert_same_bits, checkpoint, cut, make_tree, metrics, start

import train
from learning.checkpoint import Checkpoint
from learning.learner import Learner, build_learner
from settings.resolve import resolve
from train import run
from utils import Runtime


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four stages, eight epochs of three steps, left whole: everything on that draws or remembers."""
    folder = tmp_path_factory.mktemp("whole")
    tree = make_tree(folder / "images")
    assert start(tree, folder / "run", *STAGED, *STRONG) == 0
    return folder / "run", tree


# Calls: three steps and an end per epoch. 10: epoch 3, its second step. 8: the end of epoch 1, which ends
# stage 0. 13: the first step of stage 2.
@pytest.mark.parametrize(
    ("at_call", "workers", "left"), [(10, 0, (2, 2)), (10, 2, (2, 2)), (8, 0, (2, 0)), (17, 0, (4, 1))]
)
def test_a_run_cut_and_resumed_ends_with_the_same_bits(whole, tmp_path, monkeypatch, at_call, workers, left):
    folder, tree = whole
    out, flags = tmp_path / "cut", [*STAGED, *STRONG, "--workers", workers]
    with monkeypatch.context() as patch:
        cut(patch, at_call)
        assert start(tree, out, *flags) == 3
    state = checkpoint(out)["state"]
    assert (state["epoch"], state["step"]) == left
    assert start(tree, out, *flags, "--resume", "auto") == 0
    ours, theirs = checkpoint(out), checkpoint(folder)
    for part in ("model", "model_ema", "optimizer", "ema_updates"):
        assert_same_bits(ours[part], theirs[part])
    timing = ("images_per_second", "epoch_seconds", "cpu_seconds", "data_wait_fraction")
    for mine, other in zip(metrics(out), metrics(folder), strict=True):
        assert {k: v for k, v in mine.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_augmented_in_batches_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, workers):
    flags = [*STAGED, *STRONG, "--augment-on", "device"]
    tree = whole[1]
    assert start(tree, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        cut(patch, 10)
        assert start(tree, tmp_path / "cut", *flags, "--workers", workers) == 3
    assert start(tree, tmp_path / "cut", "--augment-on", "worker", *flags[:-2], "--resume", "auto") == 2
    assert start(tree, tmp_path / "cut", *flags, "--workers", workers, "--resume", "auto") == 0
    for part in ("model", "model_ema", "optimizer"):
        assert_same_bits(checkpoint(tmp_path / "cut")[part], checkpoint(tmp_path / "whole")[part])
    assert yaml.safe_load((whole[0] / "config.yaml").read_text())["augment_on"] == "worker"  # auto, resolved


def test_stages_of_equal_compute_resume_to_the_same_bits(whole, tmp_path, monkeypatch):
    """Four epochs of three steps, then two of six, the learning rate following compute: cut within both stages."""
    flags = (
        "--stages 2 --stage-rule compute --epochs 4 --train-crop-size 32 48 --batch-size 8 4 --augment-size 56 --auto-augment "
        "ra --lr-clock compute --lr-update step --lr-scheduler cosineannealinglr --lr-warmup-epochs 1 --model-ema "
        "--model-ema-steps 1"
    ).split()
    tree = whole[1]
    assert start(tree, tmp_path / "whole", *flags) == 0
    for at_call, left in ((7, (1, 3)), (13, (4, 4))):  # calls at each step and each end of an epoch
        with monkeypatch.context() as patch:
            cut(patch, at_call)
            assert start(tree, tmp_path / "cut", *flags, "--resume", "auto") == 3
        state = checkpoint(tmp_path / "cut")["state"]
        assert (state["epoch"], state["step"]) == left
    assert start(tree, tmp_path / "cut", *flags, "--resume", "auto") == 0
    for part in ("model", "model_ema", "optimizer", "ema_updates"):
        assert_same_bits(checkpoint(tmp_path / "cut")[part], checkpoint(tmp_path / "whole")[part])
    rates = [[record["lr"] for record in metrics(tmp_path / name)] for name in ("cut", "whole")]
    assert rates[0] == rates[1] and len(rates[0]) == 6


def test_a_crash_inside_an_epoch_costs_that_epoch_and_no_bit(whole, tmp_path, monkeypatch):
    folder, tree = whole
    out, steps, step = tmp_path / "crash", [0], Learner.step

    def failing(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == 4 + 11:  # four rehearsals first: epoch 3, its second step
            raise MemoryError("the machine went away")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", failing)
        assert start(tree, out, *STAGED, *STRONG) == 1
    assert len(metrics(out)) == 3
    # The checkpoint was being written when it happened: the one before it is taken.
    (out / "checkpoint.pth").write_bytes(b"half")
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0  # its own config.yaml has the settings
    assert_same_bits(checkpoint(out)["model_ema"], checkpoint(folder)["model_ema"])
    assert [record["epoch"] for record in metrics(out)] == list(range(8))


def test_resume_auto_starts_a_run_where_there_is_none(tree, tmp_path):
    assert start(tree, tmp_path / "run", "--epochs", "1", "--resume", "auto") == 0


def test_another_run_may_start_from_a_checkpoint_and_says_what_differs(tree, tmp_path, capsys):
    assert start(tree, tmp_path / "one", "--epochs", "1") == 0
    again = ["--resume", tmp_path / "one" / "checkpoint.pth", "--lr", "0.001"]
    assert start(tree, tmp_path / "two", *again, "--epochs", "1") == 2
    assert "has trained 1 epochs already" in capsys.readouterr().err
    assert start(tree, tmp_path / "two", *again, "--epochs", "2") == 0
    assert "lr 0.01 -> 0.001" in capsys.readouterr().out
    assert [record["epoch"] for record in metrics(tmp_path / "two")] == [1]


def test_a_run_begun_with_a_file_is_that_run_however_it_goes_on(tree, tmp_path, monkeypatch, capsys):
    assert start(tree, tmp_path / "one", "--epochs", "1") == 0
    began, out = tmp_path / "one" / "checkpoint.pth", tmp_path / "two"
    flags = ["--resume", began, "--epochs", "3"]
    assert start(tree, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        cut(patch, 5)
        assert start(tree, out, *flags) == 3
    capsys.readouterr()
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0
    assert "has lost" not in capsys.readouterr().out  # epoch 0 was never its own
    assert f"resume: {began}" in (out / "config.yaml").read_text()
    assert_same_bits(checkpoint(out)["model"], checkpoint(tmp_path / "whole")["model"])
    for name in ("checkpoint.pth", "checkpoint_previous.pth", "model_best.pth", "summary.json"):
        (out / name).unlink(missing_ok=True)  # as if it had been killed before it saved anything
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0
    assert f"it begins with {began} again" in capsys.readouterr().out
    assert [record["epoch"] for record in metrics(out)] == [1, 2]
    assert_same_bits(checkpoint(out)["model"], checkpoint(tmp_path / "whole")["model"])


def test_a_run_goes_on_without_the_weights_it_began_with(tree, tmp_path, capsys):
    assert start(tree, tmp_path / "first", "--epochs", "1") == 0
    began = tmp_path / "began.pth"
    (tmp_path / "first" / "model_best.pth").rename(began)
    flags = ["--weights", began, "--epochs", "2", "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, 5)
        assert start(tree, tmp_path / "run", *flags) == 3
    began.unlink()
    capsys.readouterr()
    assert run(["--output-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0
    assert f"weights of {tmp_path}/run/checkpoint.pth" in capsys.readouterr().out
    assert start(tree, tmp_path / "another", *flags) == 2  # where there is nothing to go on with
    assert "is neither a file nor weights of" in capsys.readouterr().err


def test_settings_given_on_resume_take_effect_and_others_are_refused(tree, tmp_path, capsys):
    assert start(tree, tmp_path / "one", "--epochs", "1", "--weight-decay", "0.1") == 0
    again = ["--epochs", "2", "--resume", tmp_path / "one" / "checkpoint.pth"]
    assert start(tree, tmp_path / "two", *again, "--weight-decay", "0.3", "--momentum", "0.5") == 0
    (group,) = checkpoint(tmp_path / "two")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.3, 0.5)
    assert checkpoint(tmp_path / "two")["config"]["weight_decay"] == 0.3
    for flags, message in (
        (["--opt", "adamw"], "the checkpoint has opt sgd, not adamw"),
        (["--norm-weight-decay", "0"], "the checkpoint does not fit these settings"),
        (["--model", "resnet18"], "the checkpoint has model efficientnet_v2_tiny, not resnet18"),
    ):
        capsys.readouterr()
        assert start(tree, tmp_path / "three", *again, *flags) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    other = make_tree(tmp_path / "other", classes=("ant", "bee", "wasp"))
    assert start(other, tmp_path / "three", *again) == 2
    assert "the checkpoint has 2 classes, the data 3" in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run_is_the_run(tree, tmp_path):
    flags = "--epochs 2 --lr-warmup-epochs 5 --lr-warmup-method linear --lr-warmup-decay 0.5".split()
    assert start(tree, tmp_path / "run", *flags, "--lr-scheduler", "cosineannealinglr") == 0
    assert [record["lr"] for record in metrics(tmp_path / "run")] == pytest.approx([0.005, 0.006])


def test_time_budget_ends_with_3(tree, tmp_path, capsys):
    assert start(tree, tmp_path / "run", "--epochs", "500", "--time-budget", "2s") == 3
    assert "time budget" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_names_stage_epoch_and_step(tree, tmp_path, capsys):
    flags = "--stages 2 --epochs 4 --lr-warmup-epochs 2 --lr-warmup-decay 0 --lr 1e30".split()
    assert start(tree, tmp_path / "run", *flags) == 1
    told = capsys.readouterr().err
    assert "not finite in stage 1, 32 px, epoch 3/4, step" in told and told.count("\n") == 1
    assert checkpoint(tmp_path / "run")["state"]["epoch"] == 2  # the last whole epoch is safe


def test_out_of_memory_shows_before_the_first_epoch_and_names_the_stage(tree, tmp_path, monkeypatch, capsys):
    step = Learner.step

    def small_gpu(self, images, *args, **kwargs):
        if images.shape[-1] >= 48:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(self, images, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", small_gpu)
    assert start(tree, tmp_path / "run", *STAGED) == 2
    told = capsys.readouterr().err
    assert "stage 3 (48 px, batch_size 8)" in told and "lower batch_size" in told
    assert not (tmp_path / "run").exists()


def test_rehearsal_changes_nothing(whole, tmp_path, monkeypatch):
    folder, tree = whole
    monkeypatch.setattr(train, "rehearse", lambda *args: 0)
    assert start(tree, tmp_path / "run", *STAGED, *STRONG) == 0
    assert_same_bits(checkpoint(folder)["model_ema"], checkpoint(tmp_path / "run")["model_ema"])


def test_averages_of_the_optimizer_take_the_memory_format_of_this_run(tree, tmp_path):
    """The fused step of a GPU refuses others."""
    assert start(tree, tmp_path / "plain", *STAGED, "--opt", "adamw") == 0
    saved = Checkpoint.load(str(tmp_path / "plain" / "checkpoint.pth"))
    config = resolve([*SMALL, *STAGED, "--opt", "adamw", "--channels-last"])
    runtime = Runtime(device=torch.device("cpu"), memory_format=torch.channels_last)
    learner, _ = build_learner(config, 2, None, runtime)
    learner.restore(saved)
    of_filters = [(weight, state) for weight, state in learner.optimizer.state.items() if weight.dim() == 4]
    assert any(weight.shape[1] > 1 and weight.shape[2] > 1 for weight, _ in of_filters)
    for weight, state in of_filters:
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == weight.stride()
    assert_same_bits(learner.optimizer.state_dict()["state"], saved.optimizer["state"])


def test_seed_changes_everything(tree, tmp_path):
    for seed in (0, 1):
        assert start(tree, tmp_path / str(seed), "--epochs", "1", "--seed", seed) == 0
    one, other = (checkpoint(tmp_path / str(seed))["model"]["features.0.0.weight"] for seed in (0, 1))
    assert not torch.equal(one, other)
