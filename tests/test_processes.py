"""Runs in processes of their own, started as a user starts them: signals, and several processes at once."""

import os
import signal
import sys

import pytest
from programs import LARGER, SMALL, honest_popen, honest_program, torchrun
from runs import checkpoint, make_tree, metrics


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
    test = [*flags, "--test-only", "--weights", tmp_path / "run" / "model_best.pth"]
    one, two = (start(*test).stdout for start in (honest_program, torchrun))
    assert "on 9 images" in one and "on 9 images" in two
    assert one.splitlines()[-1].split(", loss")[0] == two.splitlines()[-1].split(", loss")[0]
