"""Runs in processes of their own, started as a user starts them: signals, and several processes at once."""

import json
import os
import signal
import sys

import pytest
import torch
from programs import LARGER, ROOT, SMALL, honest_popen, ranks, torchrun
from runs import STRONG, assert_same_bits, checkpoint, make_tree, metrics


def shown(folder):
    """What a finished run says of its best weights, image by image."""
    return json.loads((folder / "report" / "best.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_3(tree, tmp_path, number):
    out = tmp_path / "run"
    flags = [*SMALL, *LARGER, "--data-path", tree, "--output-dir", out, *["--epochs", "100000", "--workers", "2", "--eval-every", "100000"]]  # fmt: skip
    process = honest_popen(*flags, own_session=True)
    process.wait_for_epochs(out, 1)
    os.killpg(process.pid, number)  # workers get it too, as from a terminal
    told, errors = process.communicate()
    assert process.returncode == 3, errors
    assert number.name in told and "--resume auto" in told
    assert "Traceback" not in errors
    assert checkpoint(out)["state"]["epoch"] < 99999


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is set up for Linux here")
def test_two_processes_train_one_run_and_count_each_image_once(tmp_path):
    tree = make_tree(tmp_path / "images", splits=(("train", 11), ("val", 5)))
    (tree / "val" / "ant" / "0.png").unlink()  # nine images, which two processes cannot share evenly
    flags = [*SMALL, *LARGER, "--data-path", tree]
    stages = "--batch-size 4 --stages 2 --epochs 2 --train-crop-size 32 48".split()
    done = torchrun(*flags, *stages, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    records = metrics(tmp_path / "run")
    assert [(record["epoch"], record["image_size"]) for record in records] == [(0, 32), (1, 48)]
    assert done.stdout.count("epoch 1/2: loss") == 1  # rank 0 talks
    # 22 images, 8 a step: 8, 8, 6
    assert records[0]["images_per_second"] * records[0]["epoch_seconds"] == pytest.approx(22)
    # What was said of each image stayed with it: one process that evaluates them anew says the same.
    together = shown(tmp_path / "run")
    again = ranks(1, tmp_path, *flags, *stages, "--output-dir", tmp_path / "run", "--resume", "auto")
    assert again[0].returncode == 0, again[0].stderr
    alone = shown(tmp_path / "run")
    assert together["mistakes"] and len(together["mistakes"]) == len(alone["mistakes"])
    for ours, theirs in zip(together["mistakes"], alone["mistakes"]):
        assert ours.pop("probability") == pytest.approx(theirs.pop("probability"), rel=1e-4) and ours == theirs
    assert together["roc"] == alone["roc"]
    assert together["reliability"]["before"]["counts"] == alone["reliability"]["before"]["counts"]
    test = [*flags, "--test-only", "--weights", tmp_path / "run" / "model_best.pth"]
    one, two = (ranks(count, tmp_path, *test)[0].stdout for count in (1, 2))
    assert "on 9 images" in one and "on 9 images" in two
    assert one.splitlines()[-1].split(", loss")[0] == two.splitlines()[-1].split(", loss")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is set up for Linux here")
def test_the_gradients_of_two_processes_are_those_of_one_with_the_joint_batch(tmp_path):
    """One step of plain SGD at lr 1, so that what the weights have lost is the gradient. SqueezeNet has no batch norm,
    whose statistics would be each process's own; dropout, which each process draws for itself, is off."""
    tree = make_tree(tmp_path / "images", splits=(("train", 4), ("val", 2)))
    flags = [*SMALL, "--data-path", tree, *"--model squeezenet1_1 --dropout 0 --train-crop-size 64 --epochs 1".split()]
    flags += "--lr 1 --momentum 0 --weight-decay 0 --random-erase 0.5 --auto-augment ra --class-weights 3 1".split()
    torch.manual_seed(0)
    for count, batch_size in ((1, 8), (2, 4)):
        done = ranks(count, tmp_path, *flags, "--batch-size", batch_size, "--output-dir", tmp_path / str(count))
        assert [process.returncode for process in done] == count * [0], done[0].stderr
    one, two = (checkpoint(tmp_path / name)["model"] for name in "12")
    assert one.keys() == two.keys() and len(one) == 52
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-6), name
    torch.save(one, tmp_path / "other.pth")
    shuffled = ranks(1, tmp_path, *flags, "--batch-size", 8, "--seed", 1, "--output-dir", tmp_path / "3")
    assert shuffled[0].returncode == 0  # other weights and images: what is compared does move
    assert not torch.allclose(one["classifier.1.weight"], checkpoint(tmp_path / "3")["model"]["classifier.1.weight"], atol=1e-3)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is set up for Linux here")
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_stopped_inside_an_epoch_go_on_to_the_same_bits(tmp_path, rank):
    """Six steps an epoch, agreed upon every second one. Each epoch asks seven times: after each step and at its end;
    the tenth call is after the third step of epoch 1, so both stop after its fourth."""
    tree = make_tree(tmp_path / "images")
    flags = [*SMALL, "--data-path", tree, *STRONG, *"--batch-size 2 --stages 2 --epochs 3 --workers 1".split()]
    flags += "--train-crop-size 32 48 --dropout 0.1 0.3".split()

    def run(out, *more, **stop):
        env = {"STOP_RANK": "none", "STOP_CALL": "0"} | stop
        done = ranks(2, tmp_path, *flags, "--output-dir", tmp_path / out, *more, script="tests/stopped.py", env=env)
        return [process.returncode for process in done], done

    assert run("whole")[0] == [0, 0]
    codes, done = run("cut", STOP_RANK=str(rank), STOP_CALL="10")
    assert codes == [3, 3], done[0].stderr + done[1].stderr
    state = checkpoint(tmp_path / "cut")["state"]
    assert (state["epoch"], state["step"]) == (1, 4)
    codes, done = run("cut", "--resume", "auto")
    assert codes == [0, 0], done[0].stderr + done[1].stderr
    for part in ("model", "model_ema", "optimizer", "ema_updates"):
        assert_same_bits(checkpoint(tmp_path / "cut")[part], checkpoint(tmp_path / "whole")[part])


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is set up for Linux here")
def test_two_processes_leave_out_the_same_images_or_name_the_one_that_is_bad(tmp_path):
    tree = make_tree(tmp_path / "images")
    (tree / "train" / "bee" / "3.png").write_bytes(b"")
    flags = [*SMALL, "--data-path", tree, "--epochs", "1", "--output-dir"]
    env = {"TORCH_HOME": str(tmp_path / "home")}
    done = ranks(2, tmp_path, *flags, tmp_path / "skip", "--on-bad-image", "skip", env=env)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "23 training and 10 validation images of 2 classes; 1 left out" in done[0].stdout
    (record,) = metrics(tmp_path / "skip")
    assert record["images_per_second"] * record["epoch_seconds"] == pytest.approx(22)  # the odd one is left for later
    done = ranks(2, tmp_path, *flags, tmp_path / "error", env=env)
    assert [process.returncode for process in done] == [2, 2]
    for rank, process in enumerate(done):
        (line,) = [line for line in process.stderr.splitlines() if "rror" in line]  # torch warns of what it deprecates
        assert line.startswith(("error: ", "[rank 1] error: ")[rank]) and "bee/3.png cannot be read as an image" in line


SLOW = """import sys, time
sys.path.insert(0, {root!r})
import train
from learning.checkpoint import Checkpoint
from tracking.deadline import exit_now

save = Checkpoint.save
Checkpoint.save = lambda *args: (time.sleep(3), save(*args))[1]
exit_now(train.run(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is set up for Linux here")
def test_the_launcher_lets_the_first_process_save(tree, tmp_path):
    """It ends all processes as soon as one has ended with another status than 0, as those that save nothing do."""
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    out = tmp_path / "run"
    flags = [*SMALL, *LARGER, "--data-path", tree, "--output-dir", out, "--epochs", "100000", "--time-budget", "1s"]
    flags += ["--checkpoint-every", "1h"]  # but at the stop
    done = torchrun(*flags, "--eval-every", "100000", script=str(tmp_path / "slow.py"))
    assert "stopped: time budget spent; saved" in done.stdout, done.stderr
    assert checkpoint(out)["world_size"] == 2 and "stopped: signal" not in done.stderr
