"""Tracked runs in good times and bad: the real SDK and agent against a double of ClearML's API (clearml_server.py)."""

import copy
import os
import signal
import threading

import pytest
from clearml_server import ClearMLServer, Refused
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
    upload_popen,
)  # fmt: skip
from runs import assert_same_bits, checkpoint, metrics

from reporting.folder import RunFolder
from settings.table import Config
from tracking.__main__ import main
from tracking.events import Points, read_events
from tracking.session import Session
from tracking.settings import project_name, task_name
from train import run

# ---- it does no harm ----


def test_all_modes_train_to_the_same_bits(images, tmp_path, server):
    flags = [*RUN, "--data-path", images, "--epochs", "2", "--auto-augment", "ta_wide", "--workers", "1"]
    for mode in ("off", "offline", "auto"):  # auto is online here
        env = server.env(tmp_path / "cache") if mode == "auto" else nowhere(tmp_path / "cache")
        done = program(*flags, "--output-dir", tmp_path / mode, "--clearml", mode, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    for mode in ("offline", "auto"):
        for part in ("model", "optimizer"):
            assert_same_bits(checkpoint(tmp_path / "off")[part], checkpoint(tmp_path / mode)[part])
    assert len(server.tasks) == 1
    assert not (tmp_path / "off" / "clearml").exists() and (tmp_path / "offline" / "clearml" / "offline").is_dir()


def test_off_never_imports_clearml(images, tmp_path):
    code = (
        "import sys, tiny, train; code = train.run(sys.argv[1:]); "
        "sys.exit(code or 40 * any(name.split('.')[0] == 'clearml' for name in sys.modules))"
    )
    flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1", "--clearml", "off"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = finished(Process("-c", [code, *flags], environment({"PYTHONPATH": paths})))
    assert done.returncode == 0, done.stderr


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


# ---- offline, and the upload ----


def session_times(out):
    """When the losses in a run's offline session were reported, by epoch."""
    lines = read_events(os.path.join(Session(RunFolder(str(out))).offline_folder, "metrics.jsonl"))
    losses = [event for events in lines for event in events if (event["metric"], event["variant"]) == ("loss", "train")]
    return {event["iter"]: event["timestamp"] for event in losses}


def test_killed_offline_resumed_and_uploaded_has_every_epoch_once(images, tmp_path, server):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100", "--clearml", "offline"]
    process = popen(*flags, env=env)
    process.wait_for_epochs(out, 4)
    process.kill()
    process.wait()
    session = Session(RunFolder(str(out)))
    with open(os.path.join(session.offline_folder, "metrics.jsonl"), "a") as file:
        file.write('[{"metric": "loss", "varia')  # cut short, as a kill may leave it
    done = program("--resume", "auto", "--output-dir", out, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Session(RunFolder(str(out))).offline == session.offline
    for _ in range(2):  # the second time changes nothing
        sent = upload(out, server.env(tmp_path / "cache"))
        assert sent.returncode == 0, sent.stdout + sent.stderr
        task = server.only_task()
        assert list(task.scalars["loss", "train"]) == list(range(100))
        assert list(task.scalars["loss", "train"].values()) == pytest.approx([r["loss"] for r in metrics(out)])
        assert task.summary_of("loss", "train")["count"] == 100
        assert task.status == "completed" and "epoch 100/100" in task.console
        for name, file in (("run best", "model_best.pth"), ("run last", "checkpoint.pth")):
            assert server.file(task.output_models[name]["uri"]) == (out / file).read_bytes()
        assert set(task.artifacts) == {"summary.json", "metrics.jsonl", "report.html"}
        assert task.hyperparams["Hyperparameters"]["epochs"] == "100" and len(task.images) == 1


def test_a_killed_session_is_uploaded_without_a_resume(images, tmp_path, server):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000", "--clearml", "offline"]
    process = popen(*flags, env=env)
    process.wait_for_epochs(out, 3)
    process.kill()
    process.wait()
    with open(os.path.join(Session(RunFolder(str(out))).offline_folder, "log.jsonl"), "a") as file:
        file.write('[{"msg": "half a li')
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0
    task = server.only_task()
    assert list(task.scalars["loss", "train"]) == [record["epoch"] for record in metrics(out)]
    assert task.status == "stopped" and set(task.output_models) == {"run best", "run last"}


def test_upload_says_what_it_needs(tmp_path, server, capsys):
    assert main(["send"]) == 2
    assert capsys.readouterr().err == "usage: python -m tracking upload OUTPUT_DIR\n"
    assert main(["upload", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no ClearML session" in told and told.count("\n") == 1
    (tmp_path / "clearml").mkdir()
    (tmp_path / "clearml" / "task.json").write_text('{"online": "f" , "offline": null}')
    unset = upload(tmp_path, nowhere(tmp_path / "cache"), honest=True)
    assert unset.returncode == 2 and "no ClearML server is configured" in unset.stderr
    unknown = upload(tmp_path, server.env(tmp_path / "cache"))
    assert unknown.returncode == 2 and "does not know task f" in unknown.stderr


def test_points_are_compared_in_the_precision_of_the_server():
    points = Points()
    points.values["loss", "train"] = {3: 0.10000000149011612}  # 0.1 in 32 bits
    assert points.has("loss", "train", 0.1, 3) and not points.has("loss", "train", 0.1000001, 3)
    assert not points.has("loss", "train", 0.1, 4) and not points.has("loss", "val", 0.1, 3)


# ---- names ----


def test_a_project_is_the_same_however_it_is_typed(images, tmp_path, server):
    env = server.env(tmp_path / "cache")
    for typed in ("abc / def", "abc//def/", "abc / def"):
        flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1", "--overwrite"]
        done = program(*flags, "--clearml", "online", "--clearml-project", typed, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.tasks) == 3 and not server.refused
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


# ---- a task that was published, or would be half sent ----


def kept(server, task):
    """All that the server has of a task."""
    files = {path: content for path, content in server.files.items() if task.id in path}
    models = [server.models[item["model"]] for item in task.fields["models"]["output"]]
    return copy.deepcopy((task.fields, task.events, task.log, models, files))


def test_a_published_task_stays_as_it_is(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "2"]
    assert program(*flags, env=env).returncode == 0
    task = server.only_task()
    server.user_publish(task.id)
    before = kept(server, task)

    refused = upload(out, env)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"task {task.id} is published and takes nothing more; `python train.py --resume auto" in refused.stderr
    assert task.status == "published" and kept(server, task) == before

    resumed = program("--resume", "auto", "--output-dir", out, env=env)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"task {task.id} is published and stays as it is; a new one has the whole run" in resumed.stdout
    assert task.status == "published" and kept(server, task) == before and not server.refused
    (new,) = (other for other in server.tasks.values() if other is not task)
    assert new.status == "completed" and list(new.scalars["loss", "train"]) == [0, 1]
    assert {model["ready"] for model in new.output_models.values()} == {False}
    assert Session(RunFolder(str(out))).online == new.id


def test_a_published_model_stays_as_it_is(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "1"]
    assert program(*flags, env=env).returncode == 0
    task = server.only_task()
    before = task.output_models
    server.user_publish_model("run best")
    published = dict(before["run best"])
    assert upload(out, env).returncode == 0
    assert task.status == "completed" and server.models[published["id"]] == published
    after = task.output_models
    assert after["run best"]["id"] != published["id"] and not after["run best"]["ready"]
    assert after["run last"]["id"] == before["run last"]["id"]


@pytest.fixture(scope="module")
def sent(images, tmp_path_factory):
    """A run whose task says that it has failed, for a reason; to be uploaded again: server, task, folder, environment."""
    folder = tmp_path_factory.mktemp("sent")
    with ClearMLServer() as server:
        env = server.env(folder / "cache")
        flags = [*RUN, "--data-path", images, "--output-dir", folder / "run", "--epochs", "2"]
        assert program(*flags, env=env).returncode == 0
        task = server.only_task()
        yield server, task, folder / "run", env
        server.check()


HALF_WAY = {
    "tasks.started": "completed", "events.add_batch": "completed", "POST": "failed", "models.edit": "stopped",
    "tasks.add_or_update_artifacts": "failed", "tasks.add_or_update_model": "completed", "tasks.completed": "stopped",
}  # fmt: skip


@pytest.mark.parametrize("endpoint, status", HALF_WAY.items())
def test_an_upload_that_fails_half_way_gives_the_status_back(sent, endpoint, status):
    server, task, folder, env = sent
    reason = {"completed": "completed", "failed": "because", "stopped": ""}[status]
    task.fields.update(status=status, status_reason=reason, status_message="as it was")
    task.events.clear()  # so that there is something to be sent
    task.fields["execution"]["artifacts"] = []
    server.failing[endpoint], calls = 0, len(server.calls)
    failed = upload(folder, env)
    server.failing.clear()
    assert any(call.endpoint == endpoint and call.status == 500 for call in server.calls[calls:])
    assert failed.returncode == 1, failed.stdout + failed.stderr
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: upload: ")
    assert (task.status, task.status_reason, task.status_message) == (status, reason, "as it was")


def test_a_task_in_a_queue_is_left_to_its_agent(sent):
    server, task, folder, env = sent
    task.fields.update(status="queued")
    refused = upload(folder, env)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "lies in a queue" in refused.stderr
    assert task.status == "queued"


def test_an_upload_that_is_stopped_half_way_gives_the_status_back(sent):
    server, task, folder, env = sent
    task.fields.update(status="failed", status_reason="because", status_message="as it was")
    process = ended = None

    def stop(call, message):
        if call.endpoint == "tasks.add_or_update_artifacts" and not ended.is_set():
            process.send_signal(signal.SIGTERM)
            ended.wait(LIMIT)  # it gets no answer, and must not wait for one

    ended = threading.Event()
    server.on_call = stop
    process = upload_popen(folder, env)
    printed, errors = process.communicate()
    ended.set()
    server.on_call = None
    assert process.returncode == 1 and not errors, errors
    assert "ClearML: interrupted; the same command sends the rest" in printed
    assert (task.status, task.status_reason, task.status_message) == ("failed", "because", "as it was")
    assert upload(folder, env).returncode == 0 and task.status == "completed"


# ---- at a bad moment ----


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


def test_a_run_that_goes_on_is_not_uploaded_under_its_feet(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    process = popen(*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000", env=env)
    process.wait_for_epochs(out, 1)
    refused = upload(out, env)
    assert refused.returncode == 2 and "a run or another upload uses" in refused.stderr
    assert server.only_task().status == "in_progress" and process.poll() is None
    process.kill()
    process.wait()


def test_what_a_session_has_is_not_imported_over_what_the_task_has(images, tmp_path, server):
    """Online, then twice without a server, then sent: each epoch keeps the time of its first report."""
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000"]
    process = popen(*flags, env=env)
    process.wait_for_epochs(out, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    task = server.only_task()
    times = dict(task.times["loss", "train"])
    for _ in range(2):
        before = len(metrics(out))
        process = popen(*flags, "--resume", "auto", env=nowhere(tmp_path / "elsewhere"))
        process.wait_for_epochs(out, before + 2)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        times = session_times(out) | times
    assert upload(out, env).returncode == 0
    assert server.only_task() is task and task.status == "stopped"
    epochs = [record["epoch"] for record in metrics(out)]
    assert list(task.scalars["loss", "train"]) == epochs == sorted(times) and len(epochs) >= 7
    assert times.items() <= task.times["loss", "train"].items()
    assert task.summary_of("loss", "train")["count"] == len(epochs)


def test_an_import_that_fails_goes_on_in_the_same_task(images, tmp_path, server):
    out = tmp_path / "my run"
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "2"]
    done = program(*flags, env={**nowhere(tmp_path / "cache"), "PYTHONFAULTHANDLER": "1"})
    assert done.returncode == 0 and f"`python -m tracking upload '{out}'`" in done.stdout
    refuse = server.api.events_add_batch
    server.api.events_add_batch = lambda events: (_ for _ in ()).throw(Refused(100, "no room"))
    first = upload(out, server.env(tmp_path / "cache"))
    assert first.returncode == 1 and server.only_task().status == "stopped"
    assert server.only_task().status_message == "the upload failed half way; the same command sends the rest"
    server.api.events_add_batch = refuse
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0, first.stderr
    task = server.only_task()  # no second one
    assert task.status == "completed" and list(task.scalars["loss", "train"]) == [0, 1]


def test_overwriting_forgets_the_older_run(images, tmp_path):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "1"]
    assert program(*flags, "--clearml", "offline", env=env).returncode == 0
    assert program(*flags, "--clearml", "off", "--overwrite", "--time-budget", "0.01", env=env).returncode in (0, 3)
    session = Session(RunFolder(str(out)))
    assert session.offline is None and session.online is None
    (out / "clearml" / "task.json").write_text("{half")
    assert Session(RunFolder(str(out))).online is None  # damaged: as if there were none
