"""sweep.py: what runs when, what is kept, and what a cut leaves. Most runs here are by fake_train.py, which trains nothing."""

import csv
import os
import re
import shutil
import signal
from contextlib import suppress

import psutil
import pytest
from programs import ROOT, Process, environment, finished, sweep_popen, wait_until
from runs import make_tree

from settings.errors import ConfigError
from studies import launch, runner
from studies.rows import Results, read_rows, write_rows
from studies.study import read_study

FLAGS = "--model efficientnet_v2_tiny --device cpu --workers 0 --train-crop-size 32 --val-crop-size 32 --val-resize-size 32 --batch-size 8 --clearml off".split()  # fmt: skip


@pytest.fixture
def place(tmp_path, images):
    """A folder for studies, and how sweep.py is called there."""

    def call(text, *options, flags=()):
        study = call.folder / "study.yaml"
        study.write_text(text)
        where = ["--output-dir", call.folder / "runs", "--results", call.folder / "results"]
        return sweep_popen(study, *where, *options, "--", *FLAGS, "--data-path", images, *flags)

    def hold(run, epoch):
        call.runs.mkdir(parents=True, exist_ok=True)
        (call.runs / f"hold_{run}").write_text(str(epoch))

    call.folder, call.runs = tmp_path, tmp_path / "runs" / "study"
    call.hold, call.release = hold, lambda run: (call.runs / f"hold_{run}").unlink()
    return call


def ended(sweep):
    """False as long as it runs; a test that waits for what it does need not wait longer."""
    assert sweep.poll() is None, sweep.printed()
    return False


def rows_of(folder, part=""):
    with open(folder / "results" / f"study{part}.csv", newline="") as file:
        return list(csv.DictReader(file))


def starts(folder):
    """How often each run was started."""
    return {path.parent.name: len(path.read_text()) for path in (folder / "runs" / "study").glob("*/starts")}


TWO = "settings: {epochs: 3}\nconditions: {low: {lr: 0.05}, high: {lr: 0.07}}\nseeds: [0, 1, 2]\n"


def test_each_run_leaves_a_row_and_its_epochs_and_the_study_its_statistics(place):
    done = finished(place(TWO))
    assert done.returncode == 0, done.stderr
    rows = rows_of(place.folder)
    assert [(row["condition"], row["seed"], row["lr"], row["top1"]) for row in rows] == [
        ("low", "0", "0.05", "50"), ("low", "1", "0.05", "51"), ("low", "2", "0.05", "52"),
        ("high", "0", "0.07", "70"), ("high", "1", "0.07", "71"), ("high", "2", "0.07", "72"),
    ]  # fmt: skip
    assert {(row["train_seconds"], row["cpu_seconds"], row["images"], row["best_top1"][1:]) for row in rows if row["seed"] == "0"} == {("6", "4.5", "600", "1")}  # fmt: skip
    assert {float(row["top1"]) - float(row["balanced_accuracy"]) for row in rows} == {2}
    assert {row["condition"]: row["mean"] for row in rows_of(place.folder, "_means") if row["column"] == "balanced_accuracy"} == {"low": "49", "high": "69"}  # fmt: skip
    epochs = rows_of(place.folder, "_epochs")
    assert len(epochs) == 18 and [row["train_seconds"] for row in epochs[:3]] == ["2", "4", "6"]
    means = {row["condition"]: row for row in rows_of(place.folder, "_means") if row["column"] == "top1"}
    assert (means["low"]["mean"], means["low"]["sd"], means["low"]["n"]) == ("51", "1", "3")
    assert float(means["low"]["high"]) == pytest.approx(51 + 4.302653 / 3**0.5, abs=1e-3)
    (pair,) = [row for row in rows_of(place.folder, "_differences") if row["column"] == "top1"]
    assert (pair["one"], pair["other"], pair["mean"], pair["sd"], pair["n"]) == ("high", "low", "20", "0", "3")
    assert re.search(
        r"high +3 +top1 71\.00 \[68\.52, 73\.48\] +\+20\.00 \[\+20\.00, \+20\.00\] than low +differs", done.stdout
    )
    assert not list(place.folder.glob("runs/study/*/checkpoint*.pth"))  # of finished runs; best weights stay
    assert len(list(place.folder.glob("runs/study/*/model_best.pth"))) == 6


def test_finished_runs_are_not_run_again_and_a_new_condition_is_added(place):
    finished(place(TWO))
    before = rows_of(place.folder)
    done = finished(place(TWO.replace("high: {lr: 0.07}", "high: {lr: 0.07}, highest: {lr: 0.09}")))
    assert done.returncode == 0 and "9 runs, 6 of them finished" in done.stdout
    assert rows_of(place.folder)[:6] == before and len(rows_of(place.folder)) == 9
    assert set(starts(place.folder).values()) == {1}


PARTS = ("", "_epochs", "_means", "_differences")


def test_killed_twice_it_ends_with_the_rows_of_an_undisturbed_one_and_no_run_twice(place, tmp_path):
    def kill_when_started(run):
        sweep = place(TWO)
        wait_until(lambda: (place.runs / run / "starts").exists() or ended(sweep), f"the start of {run}")
        sweep.kill()
        sweep.wait()

    place.hold("low_seed0", epoch=1)
    place.hold("low_seed1", epoch=1)  # the third run
    kill_when_started("low_seed0")
    place.release("low_seed0")
    kill_when_started("low_seed1")
    sweep = place(TWO)
    wait_until(lambda: "low, seed 1: training, 1 of 3 epochs" in sweep.printed()[0] or ended(sweep), "its finding")
    place.release("low_seed1")
    assert sweep.wait() == 0, sweep.printed()
    assert set(starts(place.folder).values()) == {1}  # what a killed sweep left training was found and waited for
    cut = [rows_of(place.folder, part) for part in PARTS]
    place.folder, place.runs = tmp_path / "undisturbed", tmp_path / "undisturbed" / "runs" / "study"
    place.folder.mkdir()
    assert finished(place(TWO)).returncode == 0
    assert cut == [rows_of(place.folder, part) for part in PARTS]
    assert [len(part) for part in cut] == [6, 18, 12, 6]  # means of six measures, of two conditions


def test_a_run_that_is_killed_with_its_sweep_goes_on_where_it_was_saved(place):
    place.hold("low_seed0", epoch=2)
    sweep = place(TWO)
    metrics = place.runs / "low_seed0" / "metrics.jsonl"
    wait_until(lambda: ended(sweep) or (metrics.exists() and metrics.read_text().count("\n") == 2), "two epochs")
    sweep.kill()
    sweep.wait()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(place.runs / "low_seed0") in process.cmdline():
                process.kill()
                wait_until(lambda gone=process: not gone.is_running() or gone.status() == "zombie", "its end")
    place.release("low_seed0")
    assert finished(place(TWO)).returncode == 0
    assert starts(place.folder).pop("low_seed0") == 2 and metrics.read_text().count("\n") == 3
    assert len(rows_of(place.folder)) == 6 and len(rows_of(place.folder, "_epochs")) == 18


def test_told_to_stop_it_saves_what_trains_and_goes_on_there(place):
    text = "settings: {epochs: 40, lr: 0.05}\nconditions: {only: {}}\n"
    place.hold("only_seed0", epoch=2)
    sweep = place(text)
    metrics = place.runs / "only_seed0" / "metrics.jsonl"
    wait_until(lambda: ended(sweep) or (metrics.exists() and metrics.read_text().count("\n") == 2), "two epochs")
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait() == 3
    assert metrics.read_text().count("\n") == 2 and not (place.folder / "results" / "study.csv").exists()
    place.release("only_seed0")
    done = finished(place(text))
    assert done.returncode == 0 and starts(place.folder) == {"only_seed0": 2}
    assert metrics.read_text().count("\n") == 40 and len(rows_of(place.folder)) == 1


class Interrupted:
    """Starts runs, in the midst of whose start the sweep is told to stop."""

    at_once = 1

    def find(self, runs):
        return {}

    def start(self, run):
        os.kill(os.getpid(), signal.SIGTERM)
        self.asked, self.polls = [], 0
        return self

    def poll(self):
        self.polls += 1
        assert self.polls < 10, "it was not told to stop"
        return 3 if self.asked else None

    def stop(self):
        self.asked.append(True)


def test_a_run_that_was_being_started_when_the_signal_came_is_told_too(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0)
    (tmp_path / "study.yaml").write_text(TWO)
    study = read_study(str(tmp_path / "study.yaml"), str(tmp_path / "runs"), FLAGS)
    launcher = Interrupted()
    assert runner.Runner(study, Results(study, str(tmp_path)), launcher, {"low": 24, "high": 24}).run() == 3
    assert launcher.asked == [True]  # once


def test_a_time_budget_stops_it_with_status_3(place):
    place.hold("only_seed0", epoch=0)
    sweep = place("settings: {lr: 0.05}\nconditions: {only: {}}\n", "--time-budget", "1s")
    assert sweep.wait() == 3
    assert not (place.folder / "results" / "study.csv").exists()


def test_a_run_that_fails_is_named_and_leaves_the_others_right(place):
    text = "settings: {epochs: 2}\nconditions: {bad: {lr: 13}, killed: {lr: 14}, good: {lr: 0.05}}\nseeds: [0, 1]\n"
    done = finished(place(text))
    assert done.returncode == 1
    assert "bad, seed 0: failed, no folder of images at all" in done.stdout
    assert "killed, seed 1: failed, killed by signal SIGKILL, as when memory runs out" in done.stdout
    assert [(row["condition"], row["top1"]) for row in rows_of(place.folder)] == [("good", "50"), ("good", "51")]
    again = finished(place(text.replace("lr: 13", "lr: 0.06").replace("lr: 14", "lr: 0.07")))
    assert again.returncode == 0  # what failed is tried again, what has a row is not
    assert starts(place.folder)["good_seed0"] == 1 and len(rows_of(place.folder)) == 6


def test_several_runs_at_once_share_the_cores(place):
    done = finished(place(TWO, "--parallel", "3"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.returncode == 0
    assert {(row["at_once"], row["threads"]) for row in rows_of(place.folder)} == {("3", str(max(1, cores // 3)))}
    assert set(starts(place.folder).values()) == {1} and len(rows_of(place.folder)) == 6


def test_a_run_waits_for_the_weights_it_starts_from_and_trains_them_again_where_they_are_gone(place):
    text = "settings: {epochs: 2}\nconditions:\n  transfer: {lr: 0.05, weights: {of: source}}\n  source: {lr: 0.07}\n"
    assert finished(place(text, "--parallel", "2")).returncode == 0
    (transfer,) = [row for row in rows_of(place.folder) if row["condition"] == "transfer"]
    assert transfer["weights"] == "of source"
    for file in (place.folder / "runs" / "study" / "transfer_seed0", place.folder / "runs" / "study" / "source_seed0"):
        shutil.rmtree(file)
    rows = [row for row in read_rows(str(place.folder / "results" / "study.csv")) if row["condition"] == "source"]
    write_rows(str(place.folder / "results" / "study.csv"), rows)  # as a clone elsewhere has it, half way
    assert finished(place(text)).returncode == 0
    assert len(rows_of(place.folder)) == 2 and starts(place.folder) == {"transfer_seed0": 1, "source_seed0": 1}


def test_a_source_that_fails_takes_those_that_need_it_along(place):
    text = "settings: {epochs: 2}\nconditions: {transfer: {lr: 0.05, weights: {of: source}}, source: {lr: 13}}\n"
    done = finished(place(text))
    assert done.returncode == 1 and "transfer, seed 0: failed, needs the weights of source, seed 0" in done.stdout


def test_the_plan_tells_how_long_the_rest_takes_by_the_rows_there_are(place):
    finished(place(TWO))
    done = finished(place(TWO.replace("[0, 1, 2]", "[0, 1, 2, 3]"), "--plan"))
    # six runs of 6 seconds each are finished, two of the same cost are left
    assert (
        "8 runs, 6 of them finished; cost 8.00 of one low run; as fast as those, the others train 0:12" in done.stdout
    )


def test_workers_and_threads_are_a_share_of_the_cores_unless_said_otherwise(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(
        launch, "OwnProcess", lambda run, flags, machine: started.append((flags[-2:], machine["threads"]))
    )
    monkeypatch.setattr(launch, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "study.yaml").write_text("conditions: {a: {model: efficientnet_v2_tiny}}")

    def start(at_once, *flags):
        launch.Local(at_once).start(read_study(str(tmp_path / "study.yaml"), "r", flags).runs[0])
        return started.pop()

    assert start(4) == (["--workers", "2"], 2)  # 16 by default
    assert start(1) == (["--output-dir", "r/a_seed0"], 8)
    assert start(4, "--workers", "5") == (["--output-dir", "r/a_seed0"], 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (run,) = read_study(str(tmp_path / "study.yaml"), "r").runs
    assert start(4)[1] == 3 and launch.Local(4).machine(run) == {"threads": 3, "at_once": 4}


def test_the_plan_names_runs_and_cost_and_starts_nothing(place):
    text = "settings: {epochs: 4}\nconditions: {short: {epochs: 2}, long: {}}\nseeds: [0, 1]\ncontrol: long\n"
    done = finished(place(text, "--plan"))
    assert done.returncode == 0
    # 24 training images; half of the epochs is half of the cost
    assert re.search(r"short +2 +32 +2 +48 +0\.500", done.stdout) and re.search(
        r"long +2 +32 +4 +96 +1\.000", done.stdout
    )
    assert "4 runs, 0 of them finished; cost 3.00 of one long run" in done.stdout
    assert not (place.folder / "runs").exists() and not (place.folder / "results").exists()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("conditions: {a: {lr: -1}}", [], "condition a: lr must be in (0, inf), got -1"),
        (TWO, ["--parallel", "0"], "--parallel must be 1 or more, got 0"),
        (TWO, ["--paralel", "2"], "unrecognized arguments: --paralel 2"),
        (TWO, ["--time-budget", "soon"], "time_budget must be a time such as 90s, 25m or 1.5h, got 'soon'"),
        (TWO + "base: nowhere.yaml", [], "nowhere.yaml: No such file"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_status_2_before_anything_starts(place, text, options, said):
    done = finished(place(text, *options))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (place.folder / "runs" / "study").exists()


def test_data_that_are_not_there_are_told_before_the_first_run(place):
    done = finished(place(TWO, flags=["--train-split", "nowhere"]))
    assert done.returncode == 2 and "condition low: no folder" in done.stderr
    assert not (place.folder / "runs" / "study").exists()


def test_a_second_sweep_of_the_same_study_is_refused(place):
    place.hold("only_seed0", epoch=0)
    first = place("settings: {lr: 0.05}\nconditions: {only: {}}\n")
    wait_until(lambda: ended(first) or (place.runs / "only_seed0" / "starts").exists(), "the first run")
    second = finished(place("settings: {lr: 0.05}\nconditions: {only: {}}\n"))
    assert second.returncode == 2 and "another sweep works in" in second.stderr
    first.send_signal(signal.SIGINT)
    assert first.wait() == 3


# ---- rows ----


def test_rows_of_other_settings_are_refused_and_left_as_they_are(place):
    finished(place(TWO))
    before = (place.folder / "results" / "study.csv").read_bytes()
    done = finished(place(TWO.replace("epochs: 3", "epochs: 4")))
    assert done.returncode == 2 and "has low, seed 0 with other settings" in done.stderr
    assert (place.folder / "results" / "study.csv").read_bytes() == before


def test_rows_survive_writing_and_reading(tmp_path):
    rows = [
        {
            "condition": "0.1 → 0.3",
            "seed": 1,
            "dropout": "[0.1, 0.3]",
            "top1": 71.25,
            "top1_ema": None,
            "commit": "0123",
        },
        {"condition": 'a "b", c', "seed": 2, "dropout": 0.5, "top1": 1234.5678, "top1_ema": 70.0, "commit": "1e5"},
    ]
    path = str(tmp_path / "rows.csv")
    write_rows(path, rows)
    assert read_rows(path) == [rows[0], rows[1] | {"top1": 1234.57}]
    assert read_rows(str(tmp_path / "none.csv")) == []


def test_a_damaged_file_of_rows_is_named(tmp_path):
    (tmp_path / "study.csv").write_bytes(b'condition,seed\na,"1\n')
    study = tmp_path / "study.yaml"
    study.write_text("conditions: {a: {}}")
    with pytest.raises(ConfigError, match=r"study.csv cannot be read as rows of a study"):
        Results(read_study(str(study), "r", FLAGS), str(tmp_path))


# ---- whole ----


def test_a_whole_sweep_trains_and_a_damaged_image_fails_its_run_alone(tmp_path):
    """sweep.py and train.py as a user starts them."""
    make_tree(tmp_path / "images", splits=(("train", 4), ("val", 3)))
    (tmp_path / "images" / "train" / "ant" / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "good.txt").write_text("ant/0.png\nant/1.png\nbee/3.png\n")
    (tmp_path / "bad.txt").write_text("ant/0.png\nant/bad.png\nbee/3.png\n")
    (tmp_path / "real.yaml").write_text(
        "settings: {model: mobilenet_v3_small, epochs: 2, lr: 0.01, batch_size: 3, train_list: good.txt}\nconditions:\n"
        "  damaged: {train_list: bad.txt, train_crop_size: 32}\n  grows: {stages: 2, train_crop_size: [32, 64]}\n"
    )
    flags = "--device cpu --workers 0 --val-crop-size 64 --val-resize-size 64 --clearml off".split()
    where = ["--output-dir", "runs", "--results", "results", "--parallel", "2"]
    command = [tmp_path / "real.yaml", *where, "--", *flags, "--data-path", "images"]
    done = finished(Process(str(ROOT / "sweep.py"), command, environment(), cwd=tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"damaged, seed 0: failed, .*bad.png", done.stdout), done.stdout
    rows = {row["condition"]: row for row in read_rows(str(tmp_path / "results" / "real.csv"))}
    assert set(rows) == {"grows"}
    row = rows["grows"]
    assert 0 <= row["top1"] <= 100 and row["images"] == 6 and row["cpu_seconds"] > 0 and row["device"]
    assert (tmp_path / "runs" / "real" / "grows_seed0" / "report.html").exists()
    epochs = read_rows(str(tmp_path / "results" / "real_epochs.csv"))
    assert [(row["condition"], row["epoch"], row["image_size"]) for row in epochs] == [
        ("grows", 0, 32),
        ("grows", 1, 64),
    ]
