"""Runs sent to a server afterwards, whole or the rest of them: the real SDK against a double of ClearML's API."""

import copy
import json
import math
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from clearml_server import ClearMLServer, Refused
from programs import LIMIT, RUN, nowhere, popen, program, upload, upload_popen  # fmt: skip
from runs import metrics
from small_models import checkpoint_of

from learning.state import RunState
from reporting.folder import RunFolder
from tracking.__main__ import main
from tracking.events import Points, read_events, session_points
from tracking.report import TaskReport
from tracking.server import Ending
from tracking.session import Session

# ---- offline, then sent ----


def session_times(out):
    """When the losses in a run's offline session were reported, by epoch."""
    lines = read_events(os.path.join(Session(RunFolder(str(out))).offline_folder, "metrics.jsonl"))
    losses = [event for events in lines for event in events if (event["metric"], event["variant"]) == ("loss", "train")]
    return {event["iter"]: event["timestamp"] for event in losses}


@pytest.mark.double
def test_killed_offline_resumed_and_uploaded_has_every_epoch_once(images, tmp_path, server):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    # Fewer epochs would be over before the kill
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


@pytest.mark.double
def test_a_killed_session_is_uploaded_without_a_resume(images, tmp_path, server):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000", "--clearml", "offline"]
    process = popen(*flags, env=env)
    process.wait_for_epochs(out, 3)
    process.kill()
    process.wait()
    session = Path(Session(RunFolder(str(out))).offline_folder)
    with open(session / "log.jsonl", "a") as file:
        file.write('[{"msg": "half a li')
    (session / "task.json").write_text('{"id": "offl')  # the SDK writes it in place
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0
    task = server.only_task()
    assert list(task.scalars["loss", "train"]) == [record["epoch"] for record in metrics(out)]
    assert task.status == "stopped" and set(task.output_models) == {"run best", "run last"}


def test_a_session_that_was_killed_at_once_is_told(tmp_path, server):
    session = tmp_path / "clearml" / "offline" / "offline-1"
    session.mkdir(parents=True)
    (tmp_path / "clearml" / "task.json").write_text('{"online": null, "offline": "offline-1"}')
    (session / "task.json").write_text("")
    told = upload(tmp_path, server.env(tmp_path / "cache"))
    assert told.returncode == 2 and "the run was killed before its session was whole; `python train.py" in told.stderr
    assert not server.tasks


@pytest.mark.double
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


def test_points_of_a_session_that_a_server_has_not(tmp_path):
    def event(iteration, value, kind="training_stats_scalar", series="train"):
        return {"type": kind, "metric": "loss", "variant": series, "iter": iteration, "value": value}

    lines = [[event(0, 0.5), event(1, 0.25)], [event(1, 0.75), event(0, 0, "plot", "val"), event(-(2**31), 7.0)]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n[{"type": "tr')
    sent, held = session_points(str(tmp_path)), Points()
    assert sent.values == {("loss", "train"): {0: 0.5, 1: 0.75, -(2**31): 7.0}}  # the last is what a server keeps
    assert not held.have(sent) and held.have(Points())
    held.values["loss", "train"] = {0: 0.5, 1: 0.25}
    assert not held.have(sent)
    held.values["loss", "train"][1] = 0.75
    assert held.have(sent)
    many = Points()
    many.values["loss", "train"] = {iteration: 1.0 for iteration in range(6000)}  # told in means
    assert held.have(many)


@pytest.mark.double
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


@pytest.mark.double
def test_an_import_that_fails_goes_on_in_the_same_task(images, tmp_path, server):
    out = tmp_path / "my run"
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "2"]
    done = program(*flags, env={**nowhere(tmp_path / "cache"), "PYTHONFAULTHANDLER": "1"})
    assert done.returncode == 0 and f"`python -m tracking upload '{out}'`" in done.stdout
    refuse = server.api.events_add_batch
    server.api.events_add_batch = lambda events: (_ for _ in ()).throw(Refused(100, "no room"))
    first = upload(out, server.env(tmp_path / "cache"))
    assert first.returncode == 1 and "the server has not taken all of the session" in first.stderr
    assert Session(RunFolder(str(out))).offline is not None and server.only_task().status == "stopped"
    assert server.only_task().status_message == "the upload failed half way; the same command sends the rest"
    server.api.events_add_batch = refuse
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0, first.stderr
    task = server.only_task()  # no second one
    assert task.status == "completed" and list(task.scalars["loss", "train"]) == [0, 1]


@pytest.mark.double
def test_a_run_that_failed_offline_has_failed_on_the_server_for_its_reason(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, *"--epochs 3 --print-freq 1 --lr".split()]
    failed = program(*flags, "1e30", env=nowhere(tmp_path / "elsewhere"))
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 1 and "the loss is not finite" in line
    assert upload(out, env).returncode == 0
    task = server.only_task()
    assert (task.status, task.status_reason) == ("failed", "NonFiniteLoss")
    assert task.status_message == line.removeprefix("error: ")
    Session(RunFolder(str(out))).begin()  # it goes on, and is killed
    task.fields.update(status="in_progress")
    assert upload(out, env).returncode == 0
    assert (task.status, task.status_message) == ("stopped", "stopped early")


def test_a_task_that_has_failed_fails_again_for_its_own_reason(sent, tmp_path):
    """An agent's, say, though the run itself has noted another."""
    _, task, folder, env = sent
    own = shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    Session(RunFolder(str(own))).end(Ending("failed", "RunError", "the disk is full"))
    task.fields.update(status="failed", status_reason="worker", status_message="exit code 1")
    assert upload(own, env).returncode == 0
    assert (task.status, task.status_reason, task.status_message) == ("failed", "worker", "exit code 1")
    (own / "clearml" / "task.json").write_text('{"online": "a", "offline": null, "ended": ["failed"]}')
    assert Session(RunFolder(str(own))).ended is None  # damaged


def test_a_run_that_goes_on_is_not_uploaded_under_its_feet(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    process = popen(*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000", env=env)
    process.wait_for_epochs(out, 1)
    refused = upload(out, env)
    assert refused.returncode == 2 and "a run or another upload uses" in refused.stderr
    assert server.only_task().status == "in_progress" and process.poll() is None
    process.kill()
    process.wait()


# ---- a task that was published, or would be half sent ----


def kept(server, task):
    """All that the server has of a task."""
    files = {path: content for path, content in server.files.items() if task.id in path}
    models = [server.models[item["model"]] for item in task.fields["models"]["output"]]
    return copy.deepcopy((task.fields, task.events, task.log, models, files))


@pytest.mark.double
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


@pytest.mark.double
def test_a_session_of_a_published_task_becomes_a_new_one(images, tmp_path, server):
    """A run whose task was published goes on without a server; what it left is sent."""
    out = tmp_path / "run"
    flags = ["--data-path", images, "--output-dir", out, "--epochs", "1"]
    assert program(*RUN, *flags, env=nowhere(tmp_path / "elsewhere")).returncode == 0
    made = server.api.tasks_create({"name": "run", "type": "training"})["id"]
    task = server.tasks[made]
    task.fields["status"] = "published"
    Session(RunFolder(str(out))).note(task.id)
    before = kept(server, task)
    done = upload(out, server.env(tmp_path / "cache"))
    assert done.returncode == 0 and "a new one has the whole run" in done.stdout, done.stdout + done.stderr
    (new,) = (other for other in server.tasks.values() if other is not task)
    assert new.status == "completed" and list(new.scalars["loss", "train"]) == [0]
    assert kept(server, task) == before


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


def test_a_renamed_task_is_the_same_with_its_files_filed_anew(sent):
    server, task, folder, env = sent

    def times():
        return {series: at for series, at in task.times.items() if series[0] != "Summary"}

    server.user_rename(task.id, "renamed")
    before = times()
    assert upload(folder, env).returncode == 0
    assert server.only_task() is task and task.name == "renamed" and times() == before
    images = [(image.series, image.iteration) for image in task.images]
    assert images.count(("stage 0, 32 px", 0)) == 2
    mistakes = [image for image in images if image != ("stage 0, 32 px", 0)]
    assert mistakes and all(mistakes.count(image) == 2 for image in mistakes)
    assert set(task.output_models) == {"renamed best", "renamed last"}
    # with the rest of the project
    assert {model["name"] for model in server.models.values()} >= {"run best", "run last"}
    server.user_rename(task.id, "run")


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
    _, task, folder, env = sent
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


def test_an_upload_takes_its_time_and_one_that_is_given_up_gives_the_status_back(tmp_path, monkeypatch, capsys):
    calls, put_back = [], []

    class Fake:
        def __init__(self, folder):
            self.send, self.put_back = (lambda: None), (lambda: put_back.append(folder))

    def watched(work, limit, trouble):
        calls.append(limit)
        work()
        return len(calls) > 1  # the server goes away before the upload is over

    monkeypatch.setattr("tracking.__main__.Upload", Fake)
    monkeypatch.setattr("tracking.__main__.watched", watched)
    assert main(["upload", str(tmp_path)]) == 1
    assert calls == [math.inf, 10.0] and put_back == [str(tmp_path)]
    assert "the same command sends the rest" in capsys.readouterr().out


def test_the_last_model_has_the_epoch_of_its_checkpoint(tmp_path):
    """Not that of the last record: a run that is killed may have trained epochs since."""
    folder, seen = RunFolder(str(tmp_path)), []
    folder.write_metrics([{"epoch": epoch} for epoch in range(9)])
    report = SimpleNamespace(folder=folder, model=lambda name, file, epoch, comment: seen.append((name, file, epoch)))
    report.saved_epoch = lambda name: TaskReport.saved_epoch(report, name)
    for state in (RunState(epoch=6), RunState(epoch=6, step=2), RunState()):  # the last has trained nothing
        replace(checkpoint_of(6), state=state).save(folder.checkpoint)
        TaskReport.models(report)
    assert seen == [("last", "checkpoint.pth", 5), ("last", "checkpoint.pth", 6)]
    Path(folder.checkpoint).write_bytes(b"damaged")  # it is sent all the same, or nothing would ever be
    TaskReport.models(report)
    assert seen[2:] == [("last", "checkpoint.pth", 8)]
