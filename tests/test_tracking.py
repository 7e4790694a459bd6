"""Tracked runs in good times and bad: the real SDK and agent against a double of ClearML's API (clearml_server.py)."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from clearml_server import ClearMLServer
from programs import (
    LARGER,
    LIMIT,
    ROOT,
    RUN,
    Process,
    environment,
    finished,
    nowhere,
    popen,
    program,
    upload,
)  # fmt: skip
from runs import assert_same_bits, checkpoint, metrics

from reporting.folder import RunFolder
from settings.resolve import resolve
from settings.table import Config
from tracking.run import ClearML
from tracking.server import load_sdk
from tracking.session import Session
from tracking.settings import project_name, task_name
from train import run


def test_two_threads_read_the_sdk_s_configuration_once(monkeypatch):
    """Its parser switches what counts as white space for all threads, and would refuse a file half-way."""
    load_sdk()
    from clearml import config

    readings = []

    def read(place):
        readings.append(place)
        time.sleep(0.05)
        return SimpleNamespace(initialize_logging=lambda: None, get=lambda *args: None)

    monkeypatch.setattr(config.ConfigWrapper, "_config", None)
    monkeypatch.setattr(config, "load_config", read)
    threads = [threading.Thread(target=load_sdk) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(readings) == 1


# ---- it does no harm ----


@pytest.mark.double
def test_all_modes_train_to_the_same_bits(images, tmp_path, server):
    flags = [*RUN, "--data-path", images, "--epochs", "2", "--auto-augment", "ta_wide", "--workers", "1"]
    for mode in ("off", "offline", "auto"):  # auto is online here
        env = server.env(tmp_path / "cache") if mode == "auto" else nowhere(tmp_path / "cache")
        more = ["--tensorboard"] if mode == "offline" else []  # both at once
        done = program(*flags, "--output-dir", tmp_path / mode, "--clearml", mode, *more, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    for mode in ("offline", "auto"):
        for part in ("model", "optimizer"):
            assert_same_bits(checkpoint(tmp_path / "off")[part], checkpoint(tmp_path / mode)[part])
    assert len(server.tasks) == 1
    assert not (tmp_path / "off" / "clearml").exists() and (tmp_path / "offline" / "clearml" / "offline").is_dir()
    assert len(RunFolder(str(tmp_path / "offline")).events()) == 1


def test_what_is_not_asked_for_is_not_imported(images, tmp_path):
    code = (
        "import sys, tiny, train; code = train.run(sys.argv[1:]); "
        "sys.exit(code or 40 * any(name.split('.')[0] in ('clearml', 'tensorboard') for name in sys.modules))"
    )
    flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1", "--clearml", "off"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = finished(Process("-c", [code, *flags], environment({"PYTHONPATH": paths})))
    assert done.returncode == 0, done.stderr


@pytest.mark.double
def test_sigterm_saves_and_the_same_task_goes_on(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000"]
    times = {}
    for more in ([], ["--resume", "auto"]):
        before = len(metrics(out)) if more else 0
        process = popen(*flags, *more, env=env)
        process.wait_for_epochs(out, before + 3)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate()
        assert process.returncode == 3, printed
        task = server.only_task()
        assert task.status == "stopped" and "run last" in task.output_models
        epochs = [record["epoch"] for record in metrics(out)]
        assert epochs == list(range(len(epochs))) == list(task.scalars["loss", "train"])
        # what was there has kept its time, and is counted once
        assert times.items() <= task.times["loss", "train"].items()
        times = dict(task.times["loss", "train"])
        assert (
            task.summary_of("loss", "train")["count"] == task.summary_of("stage", "image_size")["count"] == len(epochs)
        )
    budget = program("--resume", "auto", "--output-dir", out, "--time-budget", "0.01", env=env)
    assert budget.returncode == 3 and "time budget" in budget.stdout, budget.stdout + budget.stderr
    assert server.only_task() is task and task.status == "stopped"
    assert list(task.scalars["loss", "train"]) == [record["epoch"] for record in metrics(out)]
    assert len(task.fields["models"]["output"]) == 2


def test_a_run_that_diverges_fails_with_its_own_code(images, tmp_path, server):
    flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run"]
    done = program(*flags, *"--epochs 3 --lr 1e30 --print-freq 1".split(), env=server.env(tmp_path / "cache"))
    assert done.returncode == 1 and "the loss is not finite" in done.stderr
    task = server.only_task()
    assert task.status == "failed" and "the loss is not finite" in task.status_message and "diverged" in task.tags


def test_a_mistake_makes_no_task(images, tmp_path, server):
    flags = [*RUN, "--data-path", tmp_path / "none", "--output-dir", tmp_path / "run"]
    done = program(*flags, env=server.env(tmp_path / "cache"))
    assert done.returncode == 2 and not server.tasks and not (tmp_path / "run").exists()


# ---- no server, or not for long ----


@pytest.mark.parametrize("why", ["not configured", "refused", "silent", "wrong keys", "unknown host"])
def test_without_a_server_auto_is_offline_and_says_why(images, tmp_path, server, refusing_address, why):
    env = server.env(tmp_path / "cache")
    if why == "not configured":
        env, said = nowhere(tmp_path / "cache"), "no ClearML server is configured here"
    elif why == "refused":
        env["CLEARML_API_HOST"], said = refusing_address, "cannot be reached"
    elif why == "silent":
        server.hang()
        said = "did not answer within 3 s"
    elif why == "wrong keys":
        env["CLEARML_API_SECRET_KEY"], said = "wrong", "refuses the keys"
    else:
        env["CLEARML_API_HOST"], said = "http://no-such-host.invalid", "http://no-such-host.invalid"
    out = tmp_path / "run"
    flags = [*RUN, "--data-path", images, "--epochs", "1", "--output-dir", out]
    done = program(*flags, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ClearML: offline")]
    assert said in line and str(out / "clearml") in line and f"python -m tracking upload {out}" in line
    assert (out / "summary.json").exists()
    if why in ("refused", "wrong keys"):
        asked = program(*flags, "--overwrite", "--clearml", "online", env=env)
        assert asked.returncode == 2 and asked.stderr.count("\n") == 1 and said in asked.stderr
        assert (out / "summary.json").exists()  # nothing lost
    assert not server.tasks
    server.resume()


@pytest.mark.double
@pytest.mark.parametrize("how", ["stop", "hang"])
def test_a_server_lost_in_mid_run_costs_nothing(images, tmp_path, server, how):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    process = popen(*RUN, *LARGER, "--data-path", images, "--output-dir", out, "--epochs", "8", env=env)
    process.wait_for_epochs(out, 1)
    getattr(server, how)()
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert [record["epoch"] for record in metrics(out)] == list(range(8)) and (out / "summary.json").exists()
    (line,) = [line for line in printed.splitlines() if line.startswith("ClearML: the server stopped answering")]
    assert f"python -m tracking upload {out}" in line
    # it comes back, and gets the rest
    server.start() if how == "stop" else server.resume()
    assert upload(out, env).returncode == 0
    task = server.only_task()
    assert list(task.scalars["loss", "train"]) == list(range(8)) and task.status == "completed"
    assert set(task.output_models) == {"run best", "run last"} and len(task.artifacts) == 3


# ---- names ----


def test_a_project_is_the_same_however_it_is_typed(images, tmp_path, server):
    env = server.env(tmp_path / "cache")
    for typed in ("abc//def/", "abc / def"):
        flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1", "--overwrite"]
        done = program(*flags, "--clearml", "online", "--clearml-project", typed, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.tasks) == 2 and not server.refused
    assert {server.projects[task.fields["project"]]["name"] for task in server.tasks.values()} == {"abc/def"}


@pytest.mark.parametrize(
    "typed, said",
    [
        ("ab/cde", "has a part that is too short for ClearML; give 3 or more characters between slashes"),
        ("abc/d e/ f ", "too short"),
        (" / ", "too short"),
        ("/".join(["abc"] * 11), "has 11 parts between slashes; ClearML takes up to 10"),
    ],
)
def test_names_of_projects_that_a_server_would_refuse(images, tmp_path, capsys, typed, said):
    out = tmp_path / "run"
    assert run([*RUN, "--data-path", str(images), "--output-dir", str(out), "--clearml-project", typed]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith(f"error: clearml_project {typed!r}") and said in told
    assert not out.exists()


def test_ten_parts_are_a_name(tmp_path):
    typed = "/".join(["abc"] * 10)
    assert project_name(Config(clearml_project=f" {typed}/ ")) == typed
    assert task_name(Config(clearml_task=" a run ")) == "a run"
    assert task_name(Config(output_dir=str(tmp_path / "ab "))) == "resnet18 ab"


@pytest.mark.parametrize("mode, status", [("online", 2), ("auto", 0)])
def test_online_that_cannot_report_is_an_error(images, tmp_path, server, mode, status):
    server.failing["tasks.create"] = 0
    flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1", "--clearml", mode]
    done = program(*flags, env=server.env(tmp_path / "cache"))
    assert done.returncode == status, done.stdout + done.stderr
    if mode == "online":
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: clearml online: ") and line.endswith("; --clearml auto trains all the same")
    else:
        assert "ClearML: this run is not reported: " in done.stdout and (tmp_path / "run" / "summary.json").exists()


# ---- at a bad moment ----


@pytest.mark.double
def test_a_server_that_falls_silent_while_a_task_is_made(images, tmp_path):
    def fall_silent(call, message):
        if call.endpoint == "tasks.create":
            double.hang()

    with ClearMLServer(on_call=fall_silent) as double:
        flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1"]
        done = program(*flags, env=double.env(tmp_path / "cache"))
        double.resume()
    assert done.returncode == 0 and "ClearML: this run is not reported: the server stopped answering" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()


def test_ctrl_c_ends_the_wait_for_a_server_and_keeps_the_outcome(images, tmp_path):
    def fall_silent(call, message):
        if call.endpoint == "tasks.add_or_update_artifacts":  # at the end of the run
            double.hang()

    with ClearMLServer(on_call=fall_silent) as double:
        flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1"]
        process = popen(*flags, env=double.env(tmp_path / "cache"))
        double.wait_for(
            lambda: process.poll() is not None or any(call.status == 0 for call in list(double.calls)), LIMIT
        )
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate()
        double.resume()
    assert process.returncode == 0 and "ClearML: interrupted; all of the run is in" in printed
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_dead_store_of_files_costs_files_only(images, tmp_path, server, refusing_address):
    out, env = tmp_path / "run", server.env(tmp_path / "cache") | {"CLEARML_FILES_HOST": refusing_address}
    process = popen(*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000", env=env)
    process.wait_for_epochs(out, 3)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 3 and "pictures, artifacts and weights are not sent" in printed
    task = server.only_task()
    assert task.status == "stopped" and list(task.scalars["loss", "train"]) == list(range(len(metrics(out))))
    assert not task.images and not task.artifacts and not task.models["output"]
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0
    assert len(task.images) == 1 and "metrics.jsonl" in task.artifacts
    assert set(task.output_models) == {"run best", "run last"}


def test_overwriting_forgets_the_older_run(images, tmp_path):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "1"]
    assert program(*flags, "--clearml", "offline", env=env).returncode == 0
    assert program(*flags, "--clearml", "off", "--overwrite", "--time-budget", "0.01", env=env).returncode in (0, 3)
    session = Session(RunFolder(str(out)))
    assert session.offline is None and session.online is None
    (out / "clearml" / "task.json").write_text("{half")
    assert Session(RunFolder(str(out))).online is None  # damaged: as if there were none


def test_at_its_start_a_run_waits_for_no_store_of_files_and_at_its_end_as_long_as_its_weights_take(
    tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr("tracking.run.why_no_server", lambda: asked.append("server"))
    monkeypatch.setattr("tracking.run.why_no_files", lambda: asked.append("files") or "no files")
    monkeypatch.setattr("tracking.run.watched", lambda work, limit, trouble: trouble())
    clearml = ClearML(resolve(["--output-dir", str(tmp_path)]), offline_because=None)
    assert not clearml.in_time(lambda: None, 1.0) and asked == ["server"]
    clearml.report = SimpleNamespace(no_files=None)
    assert clearml.in_time(lambda: None, 1.0) == "no files"
    assert clearml.closing_seconds() == 900
    with open(tmp_path / "checkpoint.pth", "wb") as file:
        file.truncate(1_500_000_000)  # of EfficientNetV2-L, say
    assert clearml.closing_seconds() == 900 + 6000
