"""What can go wrong around a run: signals in every phase, disks, workers, files that rot, two runs in one folder."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from programs import ROOT, SMALL, popen
from runs import assert_same_bits, checkpoint, make_tree, metrics, start
from small_models import CPU
from torch.utils.data import DataLoader, Dataset

import images.workers
import reporting.log
import train
from images.workers import Watch, closing_loader, make_loader, signals_held
from learning.checkpoint import sync_folder, write_safely
from learning.faults import one_line
from learning.learner import Learner
from learning.state import RunState
from reporting.folder import RunFolder
from reporting.log import Dashboard
from settings.errors import ConfigError, RunError
from settings.values import every
from tracking.deadline import exit_now
from train import run

TWO = ["--stages", "2", "--epochs", "4", "--train-crop-size", "32", "48"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("faults") / "images")


@pytest.fixture(scope="module")
def whole(tree):
    """A run of four epochs in two stages."""
    assert start(tree, tree.parent / "whole", *TWO) == 0
    return tree.parent / "whole"


def told(capsys):
    """What stderr has, in one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("stopping after")]
    assert len(lines) == 1, lines
    return lines[0]


def at_call(monkeypatch, owner, name, do, number=1):
    """Have `do` called before the call of that number of a function; return what it returns, if it is not None."""
    calls, original = [0], getattr(owner, name)

    def called(*args, **kwargs):
        calls[0] += 1
        found = do() if calls[0] == number else None
        return original(*args, **kwargs) if found is None else found

    monkeypatch.setattr(owner, name, called)


# ---- signals ----


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "phase", ["make_plan", "find_checkpoint", "load_data", "rehearse", "with_store", "sample_grid"]
)
def test_a_signal_before_training_ends_a_new_run_in_a_line_and_leaves_nothing(
    tree, tmp_path, monkeypatch, capsys, phase
):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    at_call(monkeypatch, train, phase, interrupt)
    assert start(tree, tmp_path / "run", *TWO) == 1
    assert told(capsys) == "stopped: signal SIGTERM; nothing was saved"
    assert not (tmp_path / "run").exists() and list(tree.rglob("*.images.*")) == []
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


@pytest.mark.parametrize(
    ("owner", "name", "number", "status"),
    [
        (train, "evaluate", 1, 3),  # of the first epoch: its weights are saved, the evaluation is made again
        (train, "evaluate_outcome", 1, 3),
        (reporting.log, "summarise", 1, 3),
        (reporting.log, "report_page", 1, 3),
    ],
)
def test_a_signal_after_training_began_is_resumed_to_the_same_bits(
    tree, whole, tmp_path, monkeypatch, capsys, owner, name, number, status
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, interrupt, number)
        assert start(tree, out, *TWO) == status
    told_out, told_err = capsys.readouterr()
    assert (told_out + told_err).count("stopped: signal SIGTERM") == 1 and "--resume auto" in told_out + told_err
    if name == "evaluate":
        state = checkpoint(out)["state"]
        assert (state["epoch"], state["step"]) == (0, 3) and metrics(out) == []
    else:
        with monkeypatch.context() as patch:  # a resumed run is cut off before it trains
            at_call(patch, train, "rehearse", interrupt)
            assert run(["--output-dir", str(out), "--resume", "auto"]) == 3
        assert "what was saved before stays, `--resume auto" in told(capsys)
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0
    for part in ("model", "optimizer"):
        assert_same_bits(checkpoint(out)[part], checkpoint(whole)[part])
    for mine, other in zip(metrics(out), metrics(whole), strict=True):
        assert (mine["lr"], mine["loss"], mine["top1"]) == (other["lr"], other["loss"], other["top1"])


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc")
def test_a_signal_in_the_midst_of_what_takes_long_ends_the_program():
    code = (
        "import signal, sys, threading\nfrom learning.stop import Stop\nfrom small_models import CPU\n"
        "Stop.GRACE = 0.1\nlock = threading.Lock()\nlock.acquire()\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "with Stop(CPU, patient=False):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: None)\n"  # as if it never came to Python
        "    print('begun', flush=True)\n    lock.acquire()\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{os.path.dirname(__file__)}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 1 and errors.strip() == "ended: SIGTERM, in the midst of what takes long"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc")
def test_ctrl_c_again_ends_a_run_that_waits_for_another_process():
    """In a collective no handler runs; the first is to be heard after the step, which never ends."""
    code = (
        "import signal, sys, threading\nfrom learning.stop import Stop\nfrom small_models import CPU\n"
        "Stop.GRACE = 0.1\nlock = threading.Lock()\nlock.acquire()\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n"
        "with Stop(CPU, patient=True):\n"
        "    signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
        "    print('begun', flush=True)\n    while True:\n        lock.acquire()\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{os.path.dirname(__file__)}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "heard\n"
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 1 and errors.strip() == "ended: SIGINT, in the midst of what takes long"


def test_errors_between_processes_say_what_they_are():
    assert one_line(torch.distributed.DistNetworkError("EADDRINUSE: address already in use")) == (
        "the processes of this run do not find each other (EADDRINUSE: address already in use); see to the address they are given"
    )
    nccl = "NCCL error in: x.cpp:1, invalid usage\nncclInvalidUsage: This usually ...\nLast error:\nDuplicate GPU detected : rank 1"
    assert one_line(RuntimeError(nccl)).startswith(
        "the processes of this run cannot work together (Duplicate GPU detected : rank 1): look at what each of them says"
    )
    assert one_line(RuntimeError("Connection closed by peer")).startswith("another process of this run has ended")


# ---- two runs ----


def test_a_second_run_in_a_folder_is_refused_and_a_lock_of_the_dead_does_not_block(tree, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*SMALL, "--data-path", str(tree), "--output-dir", str(out), "--epochs", "100000", "--workers", "1"]
    first = popen(*flags)
    first.wait_for_epochs(out, 1)
    workers = [int(pid) for pid in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
    for again in (["--resume", "auto"], ["--overwrite"], []):
        assert start(tree, out, *again) == 2
        line = told(capsys)
        assert f"another run uses it (process {first.pid} on " in line or (not again and "already holds a run" in line)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # which outlives the run, and has what it had open
    first.kill()
    first.wait()
    assert start(tree, out, "--epochs", "1", "--overwrite") == 0
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


# ---- disks ----


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some space there"),
        (errno.EROFS, "Read-only file system; make it writable again"),
        (errno.EIO, "Input/output error; its disk fails: mend it"),
    ],
)
def test_a_disk_that_fails_is_one_line_with_the_file_and_what_helps(tree, tmp_path, monkeypatch, capsys, number, words):
    def fail(content, file):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        at_call(patch, torch, "save", lambda: fail(None, None), 3)  # best and checkpoint of the first epoch are whole
        assert start(tree, tmp_path / "run", *TWO) == 1
    line = told(capsys)
    assert line.startswith(f"error: {tmp_path / 'run'}/") and f".pth: {words}, then --resume auto continues" in line
    assert checkpoint(tmp_path / "run")["state"]["epoch"] == 1
    assert run(["--output-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0


def test_a_full_disk_in_earnest_and_a_folder_that_is_gone(tmp_path):
    with open("/dev/full", "wb") if os.path.exists("/dev/full") else pytest.skip("needs /dev/full"):
        (tmp_path / "checkpoint.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=r"checkpoint\.pth: No space left on device; free some space"):
        write_safely(str(tmp_path / "checkpoint.pth"), {"w": torch.zeros(10**6)})
    folder = RunFolder(str(tmp_path / "gone" / "run"))
    for write in (lambda: folder.add_metrics({}), lambda: write_safely(folder.checkpoint, {})):
        with pytest.raises(
            RuntimeError, match=r"gone/run/.*: No such file or directory; the folder is gone: bring it back"
        ):
            write()


def test_an_error_of_the_program_is_a_line_and_a_traceback_in_a_file(tree, tmp_path, monkeypatch, capsys):
    at_call(monkeypatch, Learner, "checkpoint", lambda: {}["nothing"])
    assert start(tree, tmp_path / "run", "--epochs", "1") == 1
    assert told(capsys) == f"error: KeyError: 'nothing'; its traceback is in {tmp_path}/run/error.txt"
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()
    at_call(monkeypatch, Learner, "checkpoint", lambda: {}["nothing"])
    assert start(tree, tmp_path / "run", "--epochs", "1", "--overwrite", "--debug") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "error.txt").exists()


def test_a_report_that_cannot_be_drawn_costs_no_epoch(tree, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting.log, "REPORT_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(reporting.log, "report_page", lambda folder: {}["a class name"])
        assert start(tree, tmp_path / "run", *TWO) == 0
    said = capsys.readouterr().out
    assert said.count("report.html is not drawn: KeyError: 'a class name'") == 5  # after each epoch, and at the end
    assert_same_bits(checkpoint(tmp_path / "run")["model"], checkpoint(whole)["model"])


# ---- workers ----


def test_a_signal_waits_until_workers_are_started_also_if_another_thread_receives_it():
    over, reached = threading.Event(), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a test before has left of it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=over.wait, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt), signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):
                time.sleep(0.001)
            reached.append(True)
    finally:
        over.set()
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def few(folder):
    (folder / "few.txt").write_text("ant/0.png\nbee/0.png\n")
    return folder / "few.txt"


def send_to_workers(number):
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed; where no one did that, memory has run out: lower --workers"),
        (signal.SIGBUS, "was ended by the system: /dev/shm is too small"),
        (signal.SIGSTOP, "the workers have brought no images for 1 s; process "),
    ],
)
def test_workers_that_are_gone_or_halted_end_the_run_saved(tree, whole, tmp_path, monkeypatch, capsys, number, words):
    monkeypatch.setattr(images.workers, "LOOK_EVERY", 0.5)
    out = tmp_path / "run"
    list(DataLoader([0], num_workers=1))  # of others: it leaves torch's handler of SIGCHLD, which raises anywhere
    with monkeypatch.context() as patch:

        def end():
            patch.setattr(images.workers, "PATIENCE", 1.0)  # not before: on a busy machine they take as long to start
            send_to_workers(number)

        at_call(patch, Learner, "step", end, 2 + 4)  # two rehearsed; the first of epoch 2
        assert start(tree, out, *TWO, "--workers", "1") == 1
    assert words in told(capsys)
    assert multiprocessing.active_children() == []
    state = checkpoint(out)["state"]
    assert state["epoch"] == 1  # with what was trained of it
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0
    assert_same_bits(checkpoint(out)["model"], checkpoint(whole)["model"])


def test_workers_that_are_gone_in_an_evaluation_alone_are_told(tree, whole, tmp_path, monkeypatch, capsys):
    """Not taken for an end without scores, of status 0."""
    monkeypatch.setattr(images.workers, "LOOK_EVERY", 0.5)
    at_call(monkeypatch, train.Score, "add", lambda: send_to_workers(signal.SIGKILL))
    flags = ["--test-only", "--weights", whole / "model_best.pth", "--workers", "1", "--batch-size", "1"]
    assert start(tree, tmp_path / "run", *flags) == 1
    assert told(capsys).endswith("was killed; where no one did that, memory has run out: lower --workers")


def test_workers_that_are_gone_in_the_closing_evaluation_are_told(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images.workers, "LOOK_EVERY", 0.5)
    gone = lambda: at_call(monkeypatch, train.Score, "add", lambda: send_to_workers(signal.SIGKILL))  # noqa: E731
    at_call(monkeypatch, train, "evaluate_outcome", gone)
    flags = ["--val-crop-size", "32", "--train-crop-size", "40", "--workers", "1", "--batch-size", "1"]
    assert start(tree, tmp_path / "run", *flags, "--train-list", str(few(tmp_path))) == 1
    assert "was killed; where no one did that" in told(capsys)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "was killed; where no one did"), (signal.SIGSTOP, "no images for 1 s; process ")],
)
def test_workers_that_go_between_two_evaluations_cost_no_epoch(
    tree, whole, tmp_path, monkeypatch, capsys, number, words
):
    """Each evaluation asks those that are there to begin anew, and torch waits for their answers."""
    monkeypatch.setattr(images.workers, "LOOK_EVERY", 0.5)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def end():
            patch.setattr(images.workers, "PATIENCE", 1.0)
            send_to_workers(number)

        at_call(patch, train, "evaluate", end, 2)
        assert start(tree, out, *TWO, "--workers", "1") == 1
    assert words in told(capsys)
    assert multiprocessing.active_children() == []
    state = checkpoint(out)["state"]
    assert (state["epoch"], state["step"]) == (1, 3)  # all of it trained, and not evaluated
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0
    assert_same_bits(checkpoint(out)["model"], checkpoint(whole)["model"])


def test_a_store_that_is_cut_short_is_named(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images.workers, "LOOK_EVERY", 0.5)
    kept = tmp_path / "kept"

    def cut():
        for path in kept.glob("*.images"):
            os.truncate(path, 4096)

    at_call(monkeypatch, train, "make_plan", lambda: None)
    at_call(monkeypatch, Learner, "step", cut, 2)  # the first is rehearsed
    flags = ["--epochs", "3", "--workers", "1", "--decode-cache", kept]
    assert start(tree, tmp_path / "run", *flags) == 1
    line = told(capsys)
    assert str(kept) in line and "was cut short while it was used" in line
    assert run(["--output-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0


# ---- files that rot, or are lost ----


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture
def cut_off(tree, tmp_path, monkeypatch):
    """A run that was stopped in its third epoch of four, the second of which was the best so far."""
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", interrupt, 2 + 8)
        assert start(tree, tmp_path / "run", *TWO) == 3
    return tmp_path / "run"


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink()], ids=["flipped", "gone"])
def test_best_weights_that_are_lost_are_noticed_at_resume_and_looked_for_anew(cut_off, capsys, damage):
    damage(cut_off / "model_best.pth")
    capsys.readouterr()
    assert run(["--output-dir", str(cut_off), "--resume", "auto"]) == 0
    assert (
        "model_best.pth is missing, damaged or of another epoch; the best is looked for anew" in capsys.readouterr().out
    )
    summary = json.loads((cut_off / "summary.json").read_text())
    assert summary["best_epoch"] in (2, 3) and summary["best_top1"] == metrics(cut_off)[summary["best_epoch"]]["top1"]
    RunFolder(str(cut_off)).best_weights()
    assert RunFolder(str(cut_off)).confusion("best")[0] == summary["best_epoch"]


def test_best_weights_that_are_lost_after_the_last_epoch_are_the_last(tree, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, train, "evaluate_outcome", interrupt)
        assert start(tree, out, *TWO) == 3
    flip(out / "model_best.pth")
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0
    assert "built anew from the weights of epoch 4" in capsys.readouterr().out
    assert_same_bits(dict(RunFolder(str(out)).best_weights()), checkpoint(out)["model"])
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["best_epoch"], summary["best_top1"]) == (3, metrics(out)[3]["top1"])


@pytest.mark.parametrize("step", ["checkpoint", "best"])
def test_a_death_between_checkpoint_and_best_weights_leaves_both_of_one_epoch(tree, tmp_path, monkeypatch, step):
    """Each is put in place in turn; the program dies before one of them, in the first epoch and in the last."""
    out, real, note_best = tmp_path / "run", os.replace, RunState.note_best

    def always_better(state, scores):
        state.best_top1 = -1.0
        return note_best(state, scores)

    monkeypatch.setattr(RunState, "note_best", always_better)  # so that each epoch has best weights to write
    for number in (1, 2):

        def die(source, target, wanted={"checkpoint": "checkpoint.pth", "best": "model_best.pth"}[step]):
            if os.path.basename(target) == wanted:
                raise MemoryError
            return real(source, target)

        with monkeypatch.context() as patch:
            at_call(
                patch, Learner, "checkpoint", lambda patch=patch, die=die: patch.setattr(os, "replace", die), number
            )
            assert start(tree, out, *TWO, "--overwrite") == 1
        assert run(["--output-dir", str(out), "--resume", "auto", "--time-budget", "0.001s"]) == 3
        found = checkpoint(out)
        if found["state"]["best_epoch"] == found["state"]["epoch"] - 1 and found["state"]["step"] == 0:
            assert_same_bits(dict(RunFolder(str(out)).best_weights()), found["model"])
    assert run(["--output-dir", str(out), "--resume", "auto"]) == 0


@pytest.mark.parametrize("lost", ["", "nonsense\n[1]\n{}\n", '{"epoch": 0}\n{"epoch": 1, "sta'])
def test_metrics_that_are_lost_cost_a_run_its_speeds_alone(cut_off, whole, capsys, lost):
    (cut_off / "metrics.jsonl").write_text(lost)
    capsys.readouterr()
    assert run(["--output-dir", str(cut_off), "--resume", "auto"]) == 0
    assert "metrics.jsonl has lost 2 epochs" in capsys.readouterr().out
    assert [record["epoch"] for record in metrics(cut_off)] == [2, 3]
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (cut_off, whole))
    assert ours["top1"] == theirs["top1"] and ours["stages"][0]["images_per_second"] == 0


# ---- what is loaded, what is saved ----


def test_evaluation_of_a_checkpoint_takes_its_weights_alone(whole, tree, tmp_path, capsys):
    flags = ["--test-only", "--resume", whole / "checkpoint.pth", "--opt", "rmsprop", "--norm-weight-decay", "0"]
    capsys.readouterr()
    assert start(tree, tmp_path / "none", *flags) == 0
    printed = capsys.readouterr().out
    assert f"top1 {metrics(whole)[-1]['top1']:.3f}" in printed and not (tmp_path / "none").exists()
    assert "with other settings" not in printed
    assert start(tree, tmp_path / "none", *flags, "--val-crop-size", "24", "--model-ema", "--lr", "7") == 0
    told = "with other settings than its run: model_ema False -> True, val_crop_size 32 -> 24\n"
    assert f"evaluating {whole / 'checkpoint.pth'} {told}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("period", "saved"), [("1e", [1, 2, 3, 4]), ("3", [2, 4]), ("1000h", [2, 4]), ("0.001s", [1, 2, 3, 4])]
)
def test_checkpoints_come_as_asked_and_at_the_end_of_each_stage(tree, tmp_path, monkeypatch, period, saved):
    found, make = [], Learner.checkpoint
    monkeypatch.setattr(
        Learner, "checkpoint", lambda self, state, *rest: found.append(state.epoch) or make(self, state, *rest)
    )
    assert start(tree, tmp_path / "run", *TWO, "--checkpoint-every", period) == 0
    assert found == saved and checkpoint(tmp_path / "run")["state"]["epoch"] == 4
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best_epoch"]
    assert RunFolder(str(tmp_path / "run")).confusion("best")[0] == best


@pytest.mark.parametrize(
    "period", ["05m", "0.0001s", "999999999h", "0", "0s", "-1", "1.5", "5m3", "e", "1:30", "٣", ""]
)
def test_a_period_that_is_none_is_refused(period):
    with pytest.raises(ConfigError, match="checkpoint_every must be epochs such as 5e, or a time such as 90s"):
        every(period)
    assert every(" 5 ") == every("5e") == (5, None) and every("1.5h") == (None, 5400)


def test_whole_numbers_of_images_and_pixels(tree, tmp_path, capsys):
    for flag in ("--batch-size", "--train-crop-size"):
        assert start(tree, tmp_path / "run", flag, "32.7") == 2
        assert told(capsys) == f"error: {flag[2:].replace('-', '_')} must be whole numbers, got 32.7"


def test_the_page_has_the_counts_of_the_last_torture_and_fuzzing(tmp_path, monkeypatch):
    import torture

    page = tmp_path / "reliability.md"
    page.write_text(torture.PAGE.read_text())
    monkeypatch.setattr(torture, "PAGE", page)
    assert torture.main(["--write"]) == 0
    assert page.read_text() == (ROOT / "docs" / "reliability.md").read_text()


class Hanging(Dataset):
    """As images on a disk that does not answer."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(600 if index == 2 else 0)
        return index


def test_a_worker_that_hangs_is_ended_with_the_run(monkeypatch):
    """It ignores SIGTERM, and at its end Python waits for all processes that it has started."""
    monkeypatch.setattr(images.workers, "LOOK_EVERY", 0.5)
    monkeypatch.setattr(images.workers, "PATIENCE", 3.0)
    with (
        closing_loader(make_loader(Hanging(), CPU, 1, batch_size=1)) as loader,
        pytest.raises(RunError, match="the workers have brought no images for 3 s; see to the disk of the images"),
    ):
        list(loader)
    assert multiprocessing.active_children() == []


def test_seconds_in_which_the_run_itself_was_suspended_are_no_waiting(monkeypatch):
    """Ctrl-Z and `fg`: the clock has gone on, nothing else has. Six of its seconds are three looks here."""
    watch = Watch([])
    watch.over.set()
    watch.join()
    ticks = iter([False, False, False, True])
    monkeypatch.setattr(watch.over, "wait", lambda seconds: next(ticks))
    monkeypatch.setattr(images.workers, "LOOK_EVERY", 0.5)
    watch.begin()
    watch.run()
    assert watch.waited == 1.5


def test_a_signal_after_the_end_changes_no_status(tree, tmp_path, monkeypatch):
    class Late(Dashboard):
        def __exit__(self, *exception):
            signal.raise_signal(signal.SIGTERM)

    flags = [*SMALL, "--data-path", str(tree), "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(train, "find_dashboard", lambda config: Late())
    for status in (0, 3):
        monkeypatch.setattr(train, "main", lambda *args, status=status: status)
        assert run(flags) == status
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("tracking.deadline.abandoned", False)  # as another test may have left it
    try:
        with pytest.raises(SystemExit) as end:
            exit_now(3)
        signal.raise_signal(signal.SIGTERM)  # while Python ends
        assert end.value.code == 3
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_disks_that_cannot_sync_a_folder_or_lock_a_file_do(tmp_path, monkeypatch):
    sync_folder("/proc")  # EINVAL, as of some shared folders

    for number, fine in ((errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EACCES, False)):
        refused = OSError(number, os.strerror(number))
        monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=refused))
        outcome = nullcontext() if fine else pytest.raises(ConfigError, match="Permission denied")
        with outcome, RunFolder(str(tmp_path / "run")).used_alone(CPU):
            pass


def test_overwriting_removes_all_that_a_run_may_have_left_and_nothing_else(tmp_path):
    ours = ["error.txt", "error_1.txt", "fit_time.tmp", "checkpoint.pth.tmp", "metrics.jsonl"]
    for name in [*ours, "error_of_mine.txt", "fit_time"]:
        (tmp_path / name).touch()
    RunFolder(str(tmp_path)).clear()
    assert sorted(os.listdir(tmp_path)) == ["error_of_mine.txt", "fit_time"]
