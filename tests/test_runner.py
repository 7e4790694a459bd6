"""What becomes of the runs of a study, their folders and rows, in this process."""

import errno
import json
import os
import signal
from types import SimpleNamespace

import fake_train
import pytest
from filelock import FileLock
from programs import ROOT
from test_rows import ONE, row
from test_sweep import FLAGS, TWO

import sweep
from settings.errors import ConfigError, RunError
from studies import launch, rows, runner
from studies.rows import Results, read_rows, write_rows
from studies.study import read_study

IMAGES = dict.fromkeys(("only", "low", "high", "source", "transfer"), 24)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Reads a study, whose runs are not waited for; their folders lie below `runs`."""
    monkeypatch.setattr(runner, "POLL_SECONDS", 0)

    def study(text, *flags):
        (tmp_path / "study.yaml").write_text(text)
        return read_study(str(tmp_path / "study.yaml"), str(tmp_path / "runs"), [*FLAGS, *flags])

    return study


def train(run):
    """Leave in the folder of a run what it leaves there when it has finished."""
    before = signal.getsignal(signal.SIGTERM)
    assert fake_train.main(run.config) == 0
    signal.signal(signal.SIGTERM, before)


class Here:
    """Has trained a run when it is started, unless `failing` names it."""

    def __init__(self, at_once=1, failing=(), stop_at_once=False):
        self.at_once, self.failing, self.stop_at_once, self.started = at_once, failing, stop_at_once, []

    def find(self, runs):
        return {}

    def start(self, run):
        self.started.append(run.name)
        if self.stop_at_once:
            os.kill(os.getpid(), signal.SIGTERM)
        if run.name in self.failing:
            raise OSError(errno.ENOSPC, "No space left on device", run.folder)
        train(run)
        return SimpleNamespace(poll=lambda: 0, stop=lambda: None)

    def machine(self, run):
        return {}


# ---- what lies in the folder of a run ----


def test_a_finished_run_without_a_row_is_not_trained_again_and_one_of_other_settings_stays(
    study, tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "PROGRAM", str(ROOT / "tests" / "fake_train.py"))

    def sweep_to(results, at_once, text=ONE):
        now = study(text)
        return runner.Runner(now, Results(now, str(tmp_path / results)), launch.Local(at_once), IMAGES).run()

    run = tmp_path / "runs" / "only_seed0"
    assert sweep_to("first", 1) == 0
    assert sweep_to("other", 2) == 0
    first, other = (read_rows(str(tmp_path / name / "study.csv")) for name in ("first", "other"))
    assert first == other and first[0]["at_once"] == 1  # at a time when it was trained
    assert (run / "starts").read_text() == "x"
    with pytest.raises(ConfigError, match=r"not of the settings now, lie in .*only_seed0; remove"):
        sweep_to("more", 1, ONE.replace("epochs: 3", "epochs: 4"))
    (run / launch.NOTE).unlink()  # of a sweep that noted nothing
    with pytest.raises(ConfigError, match="not of the settings now"):
        sweep_to("more", 1)
    assert (run / "summary.json").exists() and (run / "metrics.jsonl").read_text().count("\n") == 3


def test_a_cut_run_of_other_settings_is_not_continued(study):
    """Without a file of settings train.py would take those that the run has."""
    (run,) = study(ONE, "--weight-decay", "0.5").runs
    train(run)
    for name in ("summary.json", "checkpoint_previous.pth"):
        os.remove(os.path.join(run.folder, name))
    (run,) = study(ONE).runs
    launch.check_folders([run])  # noted by no sweep: it is train.py that looks
    with open(os.path.join(run.folder, launch.NOTE), "w") as file:
        json.dump({"settings": "0123456789ab"}, file)
    with pytest.raises(ConfigError, match="not of the settings now"):
        launch.Local(1).find([run])
    with pytest.raises(ConfigError, match="not of the settings now"):
        launch.Local(1).start(run)


def test_best_weights_of_a_run_that_was_cut_are_not_those_that_another_starts_from(study, tmp_path):
    text = "settings: {epochs: 2}\nconditions: {transfer: {weights: {of: source}}, source: {lr: 0.07}}\n"
    source, _ = study(text).runs
    write_rows(str(tmp_path / "study.csv"), [row(source)])
    train(source)

    def state():
        now = study(text)
        return runner.Runner(now, Results(now, str(tmp_path)), Here(), IMAGES).progress[now.runs[0]].state

    assert state() == "done"
    os.remove(os.path.join(source.folder, "summary.json"))
    assert state() == "waiting" and os.path.exists(os.path.join(source.folder, "model_best.pth"))


def test_epochs_of_stages_that_a_run_has_no_more_are_no_error(study):
    run, *_ = study(TWO).runs
    os.makedirs(run.folder)
    with open(os.path.join(run.folder, "metrics.jsonl"), "w") as file:
        for stage in range(3):
            file.write(json.dumps({"epoch": stage, "stage": stage, "epoch_seconds": 2.0}) + "\n")
    now = study(TWO)
    sweeping = runner.Runner(now, SimpleNamespace(row=lambda run: None), Here(), IMAGES)
    sweeping.measure(now.runs[0])
    found = sweeping.progress[now.runs[0]]
    assert (found.epoch, found.seconds) == (3, 6.0) and found.work == pytest.approx(now.runs[0].gflops / 3 * 24)


# ---- runs that are told to stop, and errors ----


@pytest.mark.parametrize(("asked", "status", "expected"), [(True, 1, 3), (True, -15, 3), (True, 2, 2), (False, 1, 1)])
def test_a_run_that_was_told_to_stop_and_had_saved_nothing_has_not_failed(asked, status, expected, study, monkeypatch):
    """train.py answers SIGTERM with 1 before it has anything to go on from."""
    process = SimpleNamespace(poll=lambda: status, terminate=lambda: None, returncode=status)
    monkeypatch.setattr(launch.OwnProcess, "begin", lambda self, command: process)
    attempt = launch.Local(1).start(study(ONE).runs[0])
    if asked:
        attempt.stop()
    assert attempt.poll() == expected


def test_how_a_left_run_ended_is_found_out_by_starting_it_again(study, monkeypatch):
    """By the summary alone it might be of other settings."""
    (run,) = study(ONE).runs
    train(run)
    monkeypatch.setattr(launch, "processes_left", lambda runs: {run: SimpleNamespace(is_running=lambda: False)})
    assert launch.Local(1).find([run])[run].poll() == launch.STOPPED


def test_a_signal_while_a_run_is_started_starts_no_other(study, tmp_path):
    now, launcher = study(TWO), Here(at_once=6, stop_at_once=True)
    assert runner.Runner(now, Results(now, str(tmp_path)), launcher, IMAGES).run() == 3
    assert launcher.started == ["low, seed 0"]


def test_a_run_that_cannot_be_started_fails_alone(study, tmp_path):
    now = study(TWO)
    sweeping = runner.Runner(now, Results(now, str(tmp_path)), Here(failing=["low, seed 1"]), IMAGES)
    assert sweeping.run() == 1
    failed = {run.name: progress.note for run, progress in sweeping.progress.items() if progress.state != "done"}
    assert failed == {"low, seed 1": f"{now.runs[2].folder}: No space left on device; free some space there"}
    assert len(read_rows(str(tmp_path / "study.csv"))) == 5


def test_a_row_that_cannot_be_written_fails_its_run_alone(study, tmp_path, monkeypatch):
    now, results = study(TWO), tmp_path / "results"
    write, tries = rows.write_rows, []

    def refusing_first(path, content):
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.EROFS, "Read-only file system", path)
        write(path, content)

    monkeypatch.setattr(rows, "write_rows", refusing_first)
    sweeping = runner.Runner(now, Results(now, str(results)), Here(), IMAGES)
    assert sweeping.run() == 1
    first = sweeping.progress[now.runs[0]]
    assert first.state == "failed" and first.note.endswith(
        "study_epochs.csv: Read-only file system; make it writable again"
    )
    assert [progress.state for progress in sweeping.progress.values()].count("done") == 5
    assert os.path.exists(os.path.join(now.runs[0].folder, "checkpoint.pth"))  # to be gone on with


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("no such thing"), 2, "error: no such thing"),
        (RunError("no disk; --resume auto continues"), 1, "error: no disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs"), 1, "error: /runs: Permission denied; make it writable again"),
        (ConnectionError("gone"), 1, "error: ConnectionError: gone"),
        (KeyboardInterrupt(), 3, "stopped; the same command goes on"),
    ],
)  # fmt: skip
def test_what_ends_a_sweep_is_one_line(error, status, said, monkeypatch, capsys):
    def main(options, flags):
        raise error

    monkeypatch.setattr(sweep, "main", main)
    assert sweep.run(["study.yaml"]) == status
    assert capsys.readouterr().err == said + "\n"


# ---- sweeps beside each other, and data ----


def test_two_sweeps_never_write_one_file_of_rows(study, tmp_path, monkeypatch, capsys):
    study(ONE)
    monkeypatch.setattr(sweep, "count_images", lambda study: IMAGES)
    (tmp_path / "results").mkdir()
    with FileLock(tmp_path / "results" / ".study.lock"):
        where = ["--output-dir", str(tmp_path / "elsewhere"), "--results", str(tmp_path / "results")]
        assert sweep.run([str(tmp_path / "study.yaml"), *where, "--", *FLAGS]) == 2
    assert "another sweep writes" in capsys.readouterr().err


def test_a_disk_that_knows_no_locks_has_none(tmp_path, monkeypatch):
    def acquire(self, timeout):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with sweep.alone(str(tmp_path / "new" / ".lock"), "works"):
        assert (tmp_path / "new").is_dir()


def test_rows_that_another_sweep_has_just_written_are_seen(study, tmp_path, monkeypatch):
    now = study(ONE)

    def count_images(study):
        write_rows(str(tmp_path / "study.csv"), [row(now.runs[0], train_seconds=6.0)])
        return IMAGES

    monkeypatch.setattr(sweep, "count_images", count_images)
    monkeypatch.setattr(sweep, "Local", lambda at_once: Here(failing=["only, seed 0"]))
    where = ["--output-dir", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert sweep.run([str(tmp_path / "study.yaml"), *where, "--", *FLAGS]) == 0


def test_images_are_counted_for_each_way_to_choose_them(study, monkeypatch):
    monkeypatch.setattr(
        sweep, "load_data", lambda config, runtime: SimpleNamespace(train=range(len(config.on_bad_image)))
    )
    text = "conditions: {low: {lr: 0.1}, high: {lr: 0.2, on_bad_image: skip}}\n"
    assert sweep.count_images(study(text)) == {"low": len("error"), "high": len("skip")}


def test_held_out_images_that_chose_the_weights_are_refused_before_the_first_run(study, images):
    with pytest.raises(ConfigError, match="condition only: held_out val: 10 of its 10 images are validation images"):
        sweep.count_images(study(ONE.replace("only: {}", "only: {held_out: val}"), "--data-path", str(images)))
