"""sweep.py --on clearml, against the double of ClearML's server."""

import csv
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
from programs import LARGER, Process, environment, finished, nowhere, run_agent, wait_until
from test_agents import needs_agent, repository  # noqa: F401, a fixture

from settings.errors import ConfigError, RunError
from studies.study import read_study
from tracking import queue

# As `python sweep.py`, but it asks about its tasks more often than every 15 s
SWEEP = "import runpy, sys; sys.path.insert(0, '.'); import tracking.queue as q; q.ASK_SECONDS = 0.3; sys.argv = sys.argv[1:]; runpy.run_path('sweep.py', run_name='__main__')"  # fmt: skip
STUDY = "settings: {epochs: 1}\nconditions: {done: {lr: 0.01}, aborted: {lr: 0.02}}\n"
FLAGS = [
    *LARGER, *"--device cpu --workers 0 --batch-size 8 --train-crop-size 32 --val-crop-size 32 --val-resize-size 32".split()
]  # fmt: skip


@pytest.mark.double
@needs_agent
def test_runs_are_sent_once_carried_out_by_agents_and_come_back_as_rows(images, tmp_path, server, repository):  # noqa: F811
    (tmp_path / "study.yaml").write_text(STUDY)
    env = server.env(tmp_path / "cache")
    where = [
        "--output-dir",
        tmp_path / "runs",
        "--results",
        tmp_path / "results",
        "--on",
        "clearml",
        "--queue",
        "default",
    ]
    command = [SWEEP, "sweep.py", tmp_path / "study.yaml", *where, "--", *FLAGS, "--data-path", images]

    def sweep():
        return Process("-c", command, environment(env), cwd=repository)

    def queued():
        return [task for task in server.tasks.values() if task.status == "queued"]

    killed = sweep()
    wait_until(lambda: len(queued()) == 2 or killed.poll() is not None, "two tasks in the queue")
    killed.kill()
    killed.wait()
    tasks = {task.hyperparams["Hyperparameters"]["lr"]: task for task in queued()}
    assert set(tasks) == {"0.01", "0.02"}, killed.printed()

    again = sweep()
    wait_until(
        lambda: "aborted, seed 0: training" in again.printed()[0] or again.poll() is not None, "its finding them"
    )
    server.user_abort(tasks["0.02"].id)
    agent = run_agent(tasks["0.01"].id, env, tmp_path)
    assert tasks["0.01"].status == "completed", agent.stdout + agent.stderr
    done = finished(again)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"aborted, seed 0: failed, task {tasks['0.02'].id} was aborted" in done.stdout
    assert "done, seed 0: done, top1" in done.stdout
    with open(tmp_path / "results" / "study.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["condition"], row["seed"], row["lr"], row["images"]) == ("done", "0", "0.01", "24")
    assert 0 <= float(row["top1"]) <= 100 and float(row["train_seconds"]) > 0
    assert len(server.tasks) == 2  # found again by the second sweep, not sent twice


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("conditions: {a: {}, b: {weights: {of: a}}}", "b starts from another's weights, which lie on one machine"),
        ("conditions: {a: {held_out: test}}", "a evaluates held-out images, which lie on one machine"),
        ("conditions: {a: {}}", "no ClearML server is configured here"),
    ],
)
def test_what_agents_could_not_do_is_told_before_anything_is_sent(text, said, tmp_path, monkeypatch):
    for name, value in nowhere(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "study.yaml").write_text(f"settings: {{model: efficientnet_v2_tiny}}\n{text}")
    with pytest.raises(ConfigError, match=said):
        queue.Queue("default", read_study(str(tmp_path / "study.yaml"), "r").runs)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with a commit, this code's as the queue sees it; its git."""
    monkeypatch.setattr(queue, "ROOT", str(tmp_path / "clone"))
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)

    def git(*words):
        done = subprocess.run(["git", "-C", tmp_path / "clone", *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "clone").mkdir()
    git("init", "--quiet", "-b", "main")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "all")
    return git


def test_the_remote_that_has_the_commit_is_the_one_agents_fetch_from(clone):
    commit = clone("rev-parse", "HEAD")
    with pytest.raises(ConfigError, match="is no git clone with a remote"):
        queue.pushed_code()
    clone("remote", "add", "a", "https://first.example/r.git")
    clone("remote", "add", "b", "https://second.example/r.git")
    with pytest.raises(ConfigError, match=f"commit {commit[:12]} is not pushed to a or b; push it"):
        queue.pushed_code()
    clone("update-ref", "refs/remotes/b/main", commit)  # as a push leaves it
    assert queue.pushed_code() == ("https://second.example/r.git", commit)


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("https://user:ghp_SECRET@host.example/r.git", "https://host.example/r.git"),
        ("https://ghp_SECRET@host.example:8443/a/r.git", "https://host.example:8443/a/r.git"),
        ("HTTP://user:p@ss@host.example/r.git", "HTTP://host.example/r.git"),
        ("https://host.example/@scope/r.git", "https://host.example/@scope/r.git"),
        ("git@host.example:a/r.git", "git@host.example:a/r.git"),
        ("ssh://git@host.example/r.git", "ssh://git@host.example/r.git"),
    ],
)
def test_no_password_of_an_address_goes_to_the_server(clone, address, sent):
    clone("remote", "add", "origin", address)
    clone("update-ref", "refs/remotes/origin/main", "HEAD")
    assert queue.pushed_code()[0] == sent


class Server:
    """What the queue uses of the SDK; it keeps the tasks' settings."""

    def __init__(self):
        self.tasks, self.queued, self.Task = {}, [], self

    def create(self, **description):
        task = SimpleNamespace(id=f"task{len(self.tasks)}", settings={}, get_status=lambda: "queued")
        task.set_script = lambda **script: None
        task.add_tags = task.set_configuration_object = lambda *args, **kwargs: None
        task.update_parameters = task.settings.update
        self.tasks[task.id] = task
        return task

    def enqueue(self, task, queue_name):
        if queue_name != "default":
            raise TypeError("what is this?")
        self.queued.append(task.id)


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """A queue without a server, and the run of a study with a learning rate."""
    server, sent = Server(), SimpleNamespace()
    monkeypatch.setattr(queue, "load_sdk", lambda: server)
    monkeypatch.setattr(queue, "find_task", server.tasks.get)
    monkeypatch.setattr(queue, "upload_uri", lambda: True)
    sent.server, sent.queue = server, queue.Queue.__new__(queue.Queue)
    sent.queue.name, sent.queue.code = "default", ("address", "0" * 40)

    def run(lr):
        (tmp_path / "study.yaml").write_text(
            f"settings: {{model: efficientnet_v2_tiny, lr: {lr}}}\nconditions: {{a: {{}}}}"
        )
        return read_study(str(tmp_path / "study.yaml"), str(tmp_path / "runs")).runs[0]

    sent.run = run
    return sent


def test_a_task_of_other_settings_is_not_the_run_s(sent):
    run = sent.run(0.1)
    sent.queue.start(run)
    assert sent.queue.find([run])[run].task.id == "task0"
    other = sent.run(0.2)
    assert other.folder == run.folder and sent.queue.find([other]) == {}
    sent.queue.start(other)
    assert sent.queue.find([other])[other].task.id == "task1" and sent.server.queued == ["task0", "task1"]


def test_a_task_goes_on_with_what_an_earlier_one_has_left(sent):
    """In a folder that outlives tasks; elsewhere there is nothing, and it begins."""
    sent.queue.start(sent.run(0.1))
    assert sent.server.tasks["task0"].settings["Hyperparameters/resume"] == "auto"


def test_what_the_server_says_no_to_is_one_line_and_is_not_sent_twice(sent, monkeypatch):
    run = sent.run(0.1)
    sent.queue.name = "none"
    with pytest.raises(RunError, match=r"--on clearml: TypeError: what is this\?; the same command goes on"):
        sent.queue.start(run)
    with open(f"{run.folder}/{queue.QUEUED}") as file:
        assert json.load(file)["id"] == "task0"
    monkeypatch.setattr(queue, "find_task", lambda task_id: 1 / 0)
    with pytest.raises(RunError, match="ZeroDivisionError"):
        sent.queue.find([run])


def test_a_task_that_is_deleted_has_failed(monkeypatch):
    """The SDK then raises what a server that is away for a while may raise, too."""

    def gone():
        raise IndexError("list index out of range")

    task = SimpleNamespace(id="abc", get_status=gone, data=SimpleNamespace(status_message=""))
    run = queue.QueuedRun(None, task)
    monkeypatch.setattr(queue, "DELETED_AFTER", 2)  # a server may answer before its data base does
    away, missing, there = ("no answer", None), (None, None), (None, task)
    asked = [
        (away, gone),
        (missing, gone),
        (there, gone),
        (missing, gone),
        (None, lambda: "in_progress"),
        (missing, gone),
    ]
    task.reload = lambda: None
    for state, status, answer in [*((*step, None) for step in asked), (missing, gone, 1)]:
        task.get_status = status
        reason, found = state or missing
        monkeypatch.setattr(queue, "why_no_server", lambda reason=reason: reason)
        monkeypatch.setattr(queue, "find_task", lambda number, found=found: found)
        run.due = 0.0
        assert run.poll() == answer
    assert run.reason() == "task abc was deleted on the server"


def test_files_that_cannot_be_written_fail_the_run_and_are_told(monkeypatch):
    task = SimpleNamespace(id="abc", data=SimpleNamespace(status_message=""))
    run = queue.QueuedRun(None, task)

    def full():
        raise RunError("runs/x/metrics.jsonl: No space left on device; free some space there")

    monkeypatch.setattr(run, "ask", full)
    assert run.poll() == 1
    assert run.reason() == "task abc runs/x/metrics.jsonl: No space left on device; free some space there"
