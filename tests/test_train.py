"""Whole runs of train.py on small images: what they leave, how they stop and go on, what each stage changes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, SMALL, assert_same_bits, checkpoint, make_tree, metrics, program
from torch import nn
from torchvision.ops import StochasticDepth

import train
from augment import randaugment
from learning import models
from learning.learner import Learner
from reporting.folder import RunFolder
from reporting.page import report_page
from train import run
from utils import Stop

STAGED = [
    "--stages",
    "4",
    "--epochs",
    "8",
    "--train-crop-size",
    "32",
    "48",
    "--dropout",
    "0.1",
    "0.3",
    "--stochastic-depth-prob",
    "0",
    "0.2",
]
STRONG = ["--auto-augment", "ra", "--ra-magnitude", "2", "9", "--mixup-alpha", "0", "0.4", "--cutmix-alpha", "0.5", "--random-erase", "0.5", "--model-ema", "--model-ema-steps", "2", "--opt", "rmsprop", "--clip-grad-norm", "1"]  # fmt: skip
LARGER = ["--model", "mobilenet_v3_small"]  # in a process of its own, where the tiny model is not known


def start(tree, out, *flags):
    return run([*SMALL, "--data-path", str(tree), "--output-dir", str(out), *map(str, flags)])


# ---- what a run leaves ----


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A finished run of two stages, four epochs, on a model of torchvision's."""
    folder = tmp_path_factory.mktemp("two")
    tree = make_tree(folder / "images")
    flags = [
        "--model",
        "mobilenet_v3_small",
        "--stages",
        "2",
        "--epochs",
        "4",
        "--train-crop-size",
        "32",
        "64",
        "--val-resize-size",
        "96",
    ]
    flags += [
        "--val-crop-size",
        "80",
        "--dropout",
        "0.1",
        "0.4",
        "--model-ema",
        "--model-ema-steps",
        "1",
        "--model-ema-decay",
        "0.7",
    ]
    assert start(tree, folder / "run", *flags) == 0
    return folder / "run", tree, flags


def test_metrics_has_a_line_per_epoch_with_the_stage_s_settings(two_stages):
    records = metrics(two_stages[0])
    assert [(r["epoch"], r["stage"], r["image_size"], r["dropout"]) for r in records] == [
        (0, 0, 32, 0.1), (1, 0, 32, 0.1), (2, 1, 64, 0.4), (3, 1, 64, 0.4),
    ]  # fmt: skip
    for record in records:
        assert {
            "epoch", "stage", "image_size", "lr", "loss", "top1", "top5", "top1_ema", "images_per_second", "epoch_seconds",
            "data_wait_fraction", "gpu_memory_gib", "ra_magnitude", "mixup_alpha", "cutmix_alpha", "dropout",
            "stochastic_depth_prob", "random_erase", "batch_size",
        } <= record.keys()  # fmt: skip
        assert record["loss"] > 0 and 0 <= record["data_wait_fraction"] <= 1
        assert record["top5"] == 100  # of two classes
        assert record["gpu_memory_gib"] is None
        # 24 images in so many seconds
        assert record["images_per_second"] * record["epoch_seconds"] == pytest.approx(24)


def test_summary_has_accuracy_at_three_sizes(two_stages):
    folder = two_stages[0]
    summary, records = json.loads((folder / "summary.json").read_text()), metrics(folder)
    assert summary["top1"] == records[-1]["top1"] and summary["top1_ema"] == records[-1]["top1_ema"]
    assert summary["best_top1"] == max(max(r["top1"], r["top1_ema"]) for r in records)
    for moment in ("final", "best"):
        assert summary[moment]["test_size"]["image_size"] == 80
        assert summary[moment]["last_training_size"]["image_size"] == 64
    assert summary["final"]["stage_size"]["image_size"] == 64
    assert summary["best"]["stage_size"]["image_size"] == records[summary["best_epoch"]]["image_size"]
    assert summary["best"]["test_size"]["top1"] == summary["best_top1"]
    assert [stage["image_size"] for stage in summary["stages"]] == [32, 64]
    assert summary["train_seconds"] == pytest.approx(sum(r["epoch_seconds"] for r in records))
    assert summary["parameters"] == 1_519_906  # 2,542,856 at 1000 classes, less 998 outputs of 1024 + 1
    assert summary["versions"]["torch"] == torch.__version__ and summary["seed"] == 0


def test_best_weights_load_into_plain_torchvision_and_score_what_was_said(two_stages, capsys):
    folder, tree, flags = two_stages
    model = torchvision.models.mobilenet_v3_small(num_classes=2)
    model.load_state_dict(torch.load(folder / "model_best.pth", weights_only=True))
    sizes = flags[flags.index("--val-resize-size") : flags.index("--dropout")]
    weights = ["--model", "mobilenet_v3_small", "--weights", folder / "model_best.pth", "--test-only", *sizes]
    capsys.readouterr()
    assert start(tree, folder.parent / "other", *weights) == 0
    best = json.loads((folder / "summary.json").read_text())["best_top1"]
    assert f"top1 {best:.3f}" in capsys.readouterr().out
    assert not (folder.parent / "other").exists()  # it writes nothing


def test_config_yaml_repeats_the_run(two_stages, tmp_path):
    folder = two_stages[0]
    assert run(["--config", str(folder / "config.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    assert_same_bits(checkpoint(folder)["model"], checkpoint(tmp_path / "again")["model"])
    assert_same_bits(checkpoint(folder)["model_ema"], checkpoint(tmp_path / "again")["model_ema"])
    assert "resume" not in yaml.safe_load((folder / "config.yaml").read_text())


def test_report_is_one_page_that_needs_nothing_else(two_stages):
    folder = two_stages[0]
    page = (folder / "report.html").read_text()

    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

    Reader().feed(page)
    tags = [tag for tag, _ in seen]
    assert tags.count("img") == 2  # a grid of images per stage
    assert tags.count("svg") == 5  # two rows of curves, drop rates and lr, speed, confusions
    links = [
        attributes.get("src") or attributes.get("href") for tag, attributes in seen if tag in ("img", "script", "link")
    ]
    assert all(link.startswith("data:") for link in links)
    for words in (
        "ant",
        "bee",
        "dropout",
        "32 px",
        "64 px",
        "Settings",
        f"{json.loads((folder / 'summary.json').read_text())['top1']:.2f} %",
    ):
        assert words in page
    assert report_page(RunFolder(str(folder))) == page  # drawn again from the folder alone


def test_a_folder_with_a_run_is_neither_overwritten_nor_continued_unasked(two_stages, tmp_path, capsys):
    folder, tree, flags = two_stages
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert start(tree, folder, *flags) == 2
    told = capsys.readouterr().err
    assert "--resume auto" in told and "--overwrite" in told and told.count("\n") == 1
    assert start(tree, folder, *flags, "--resume", "auto", "--lr", "0.5") == 2
    assert "lr 0.01 -> 0.5" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_overwrite_replaces_the_run_and_leaves_other_files(tree, tmp_path):
    out = tmp_path / "run"
    assert start(tree, out, "--epochs", "2") == 0
    (out / "notes.txt").write_text("mine")
    assert start(tree, out, "--epochs", "1", "--overwrite") == 0
    assert len(metrics(out)) == 1 and (out / "notes.txt").read_text() == "mine"
    assert not (out / "checkpoint_previous.pth").exists()


def test_a_mistake_costs_an_overwritten_run_nothing(tree, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert start(tree, out, "--epochs", "1") == 0
    assert start(tree, out, "--epochs", "1", "--overwrite", "--model", "inception_v3") == 2  # 32 px are too few for it
    assert (out / "summary.json").exists() and len(metrics(out)) == 1


def test_an_image_that_cannot_be_read_is_named_and_costs_an_overwritten_run_nothing(tree, tmp_path, capsys):
    out = tmp_path / "run"
    assert start(tree, out, "--epochs", "1") == 0
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    capsys.readouterr()
    assert start(tree, out, "--epochs", "1", "--overwrite", "--workers", "2") == 2
    told = capsys.readouterr().err
    assert ".png cannot be read as an image" in told and told.count("\n") == 1
    assert (out / "summary.json").exists() and len(metrics(out)) == 1


def test_an_unreadable_image_of_validation_is_named_in_one_line_from_a_worker_too(tree, tmp_path, capsys):
    (tree / "val" / "bee" / "4.png").write_bytes(b"no image")
    assert start(tree, tmp_path / "run", "--epochs", "1", "--workers", "1") == 2
    told = capsys.readouterr().err
    assert "bee/4.png cannot be read as an image" in told and told.count("\n") == 1
    assert multiprocessing.active_children() == []


def test_a_run_can_be_evaluated_in_its_own_folder(two_stages, capsys):
    folder, tree, flags = two_stages
    sizes = flags[flags.index("--val-resize-size") : flags.index("--dropout")]
    test = ["--model", "mobilenet_v3_small", "--test-only", *sizes]
    assert start(tree, folder, *test, "--weights", folder / "model_best.pth") == 0
    capsys.readouterr()
    assert start(tree, folder, *test, "--resume", "auto") == 0
    assert f"top1 {metrics(folder)[-1]['top1']:.3f}" in capsys.readouterr().out
    assert start(tree, folder.parent / "nothing", *test, "--resume", "auto") == 2
    assert "to evaluate" in capsys.readouterr().err


def test_evaluation_every_third_epoch_and_after_the_last(tree, tmp_path):
    assert start(tree, tmp_path / "run", "--epochs", "4", "--eval-every", "3") == 0
    assert [record["top1"] is not None for record in metrics(tmp_path / "run")] == [False, False, True, True]


# ---- stopping and going on ----


def cut(monkeypatch, at_call):
    """Send SIGTERM to the run when it asks for the `at_call`-th time whether to stop."""
    calls, ask = [0], Stop.__call__

    def counting(self, step=0):
        calls[0] += 1
        if calls[0] == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, step)

    monkeypatch.setattr(Stop, "__call__", counting)


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
    timing = ("images_per_second", "epoch_seconds", "data_wait_fraction")
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
        with pytest.raises(MemoryError):
            start(tree, out, *STAGED, *STRONG)
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
    flags = ["--epochs", "2", "--lr-warmup-epochs", "5", "--lr-warmup-method", "linear", "--lr-warmup-decay", "0.5"]
    assert start(tree, tmp_path / "run", *flags, "--lr-scheduler", "cosineannealinglr") == 0
    assert [record["lr"] for record in metrics(tmp_path / "run")] == pytest.approx([0.005, 0.006])


def test_sigterm_and_sigint_save_and_end_with_3(tree, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / number.name
        flags = [
            *SMALL,
            *LARGER,
            "--data-path",
            tree,
            "--output-dir",
            out,
            "--epochs",
            "500",
            "--workers",
            "2",
            "--eval-every",
            "500",
        ]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, number)  # workers get it too, as from a terminal
        told, errors = process.communicate(timeout=60)
        assert process.returncode == 3, errors
        assert number.name in told and "--resume auto" in told
        assert "Traceback" not in errors
        assert checkpoint(out)["state"]["epoch"] < 499


def test_time_budget_ends_with_3(tree, tmp_path, capsys):
    assert start(tree, tmp_path / "run", "--epochs", "500", "--time-budget", "2s") == 3
    assert "time budget" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_names_stage_epoch_and_step(tree, tmp_path, capsys):
    flags = ["--stages", "2", "--epochs", "4", "--lr-warmup-epochs", "2", "--lr-warmup-decay", "0", "--lr", "1e30"]
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


def test_seed_changes_everything(tree, tmp_path):
    for seed in (0, 1):
        assert start(tree, tmp_path / str(seed), "--epochs", "1", "--seed", seed) == 0
    one, other = (checkpoint(tmp_path / str(seed))["model"]["features.0.0.weight"] for seed in (0, 1))
    assert not torch.equal(one, other)


# ---- what a stage changes, seen from inside the loop ----


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
    flags = [
        "--model",
        "probe",
        "--stages",
        "2",
        "--epochs",
        "6",
        "--train-crop-size",
        "32",
        "64",
        "--dropout",
        "0.1",
        "0.6",
    ]
    flags += [
        "--stochastic-depth-prob",
        "0.05",
        "0.5",
        "--auto-augment",
        "ra",
        "--ra-scale",
        "paper",
        "--ra-magnitude",
        "5",
        "15",
    ]
    flags += ["--mixup-alpha", "0", "1", "--compile"][: 4 if compiled else 3]
    assert start(tree, tmp_path / "run", *flags) == 0
    (first_step, first_turn), (second_step, second_turn) = entered
    warm_up = 1 if compiled else 0  # the step that compiles, on noise, undone
    stages = probe[first_step + warm_up : second_step], probe[second_step + warm_up :]
    assert [{step["size"] for step in stage} for stage in stages] == [{32}, {64}]
    for name, rates in (("dropped", (0.1, 0.6)), ("skipped", (0.05, 0.5))):
        for stage, rate in zip(stages, rates):
            assert {round(step[name], 1) for step in stage} == {round(rate, 1)} or all(
                abs(step[name] - rate) < 0.02 for step in stage
            )
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
    flags = [
        "--epochs",
        "4",
        "--model-ema",
        "--model-ema-steps",
        "1",
        "--model-ema-decay",
        "0.9",
        "--lr-scheduler",
        "exponentiallr",
        "--lr-gamma",
        "0.5",
    ]
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
    flags = ["--stages", "3", "--epochs", "3", "--workers", "2", "--train-crop-size", "32", "40"]
    assert start(tree, tmp_path / "run", *flags) == 0
    # None yet; then two of validation, which stay, and two of the stage that begins.
    assert counts == [0, 4, 4]
    assert multiprocessing.active_children() == []


# ---- the reference's ways ----


def test_the_reference_s_command_line_trains(tree, tmp_path):
    flags = (
        "--model mobilenet_v3_small --batch-size 128 --lr 0.5 --lr-scheduler cosineannealinglr --lr-warmup-epochs 1 "
        "--lr-warmup-method linear --auto-augment ta_wide --epochs 2 --random-erase 0.1 --label-smoothing 0.1 --mixup-alpha 0.2 "
        "--cutmix-alpha 1.0 --weight-decay 0.00002 --norm-weight-decay 0.0 --train-crop-size 64 --model-ema --val-crop-size 64 "
        "--val-resize-size 64 --ra-sampler --ra-reps 4 --workers 0 --device cpu"
    )
    assert run([*flags.split(), "--data-path", str(tree), "--output-dir", str(tmp_path / "run")]) == 0
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    "flags", [["--amp", "--channels-last"], ["--amp", "--amp-dtype", "float16"], ["--backend", "tensor", "--use-v2"]]
)
def test_precision_memory_format_and_backends_train(tree, tmp_path, flags):
    assert start(tree, tmp_path / "run", "--epochs", "2", "--auto-augment", "ra", *flags) == 0
    assert metrics(tmp_path / "run")[-1]["loss"] < 2


def test_grey_images_with_folders_of_other_names(tmp_path):
    tree = make_tree(tmp_path / "images", splits=(("training", 6), ("validation", 3)))
    for path in tree.glob("training/ant/*.png"):
        from PIL import Image

        Image.open(path).convert("L").save(path)
    assert start(tree, tmp_path / "run", "--epochs", "1", "--train-split", "training", "--val-split", "validation") == 0


# ---- several processes ----


def torchrun(*flags):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29517",
        str(ROOT / "train.py"),
    ]
    return subprocess.run(
        [*command, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is set up for Linux here")
def test_two_processes_train_one_run_and_count_each_image_once(tmp_path):
    tree = make_tree(tmp_path / "images", splits=(("train", 11), ("val", 5)))
    (tree / "val" / "ant" / "0.png").unlink()  # nine images, which two processes cannot share evenly
    flags = [
        *SMALL,
        *LARGER,
        "--batch-size",
        "4",
        "--data-path",
        tree,
        "--stages",
        "2",
        "--epochs",
        "2",
        "--train-crop-size",
        "32",
        "48",
    ]
    done = torchrun(*flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    records = metrics(tmp_path / "run")
    assert [(record["epoch"], record["image_size"]) for record in records] == [(0, 32), (1, 48)]
    assert done.stdout.count("epoch 1/2: loss") == 1  # rank 0 talks
    # 22 images, 8 a step: 8, 8, 6
    assert records[0]["images_per_second"] * records[0]["epoch_seconds"] == pytest.approx(22)
    test = [*SMALL, *LARGER, "--data-path", tree, "--test-only", "--weights", tmp_path / "run" / "model_best.pth"]
    line = "on 9 images"
    one, two = program(*test).stdout, torchrun(*test).stdout
    assert (
        line in one
        and one.splitlines()[-1].split(", loss")[0] == two.splitlines()[-1].split(", loss")[0]
        and line in two
    )


# ---- a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "--channels-last"],
        ["--amp", "--amp-dtype", "float16", "--opt", "sgd"],
        ["--compile"],
        ["--augment-on", "worker", "--opt", "adamw"],
        ["--decode-cache", "off", "--workers", "2"],
    ],
)
def test_stages_on_a_gpu(tree, tmp_path, flags):
    assert start(tree, tmp_path / "run", "--device", "cuda", *STAGED, *STRONG, *flags) == 0
    assert all(record["gpu_memory_gib"] > 0 for record in metrics(tmp_path / "run"))
