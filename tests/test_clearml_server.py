"""The double of ClearML's API: what the real SDK, agent and optimizer send arrives."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from clearml_server import Image

AGENT = Path(sys.executable).with_name("clearml-agent")
HAS_SDK = importlib.util.find_spec("clearml") is not None
needs_sdk = pytest.mark.skipif(not HAS_SDK, reason="needs clearml: pip install -r requirements-dev.txt")
needs_agent = pytest.mark.skipif(not (HAS_SDK and AGENT.exists() and shutil.which("git")), reason="needs clearml, clearml-agent (pip install -r requirements-dev.txt) and git")  # fmt: skip

# How scripts here begin: nothing recorded by itself, and no random seed set.
INIT = """
    import sys
    import time
    from clearml import OutputModel, Task
    Task.set_random_seed(None)
    quiet = dict(auto_connect_frameworks=False, auto_resource_monitoring=False, output_uri=True)
"""


@pytest.fixture
def environment(server, tmp_path):
    """Of a process that reports to the double, from threads: the SDK's reporting process makes `close` slow."""
    settings = tmp_path / "settings" / "default" / "sdk.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text("{ development { report_use_subprocess: false, worker { report_period_sec: 1 } } }")
    return {**os.environ, **server.env(tmp_path / "cache"), "CLEARML_CONFIG_PATH": str(tmp_path / "settings")}


@pytest.fixture
def python(environment, tmp_path):
    """Run a script in a process of its own; its exit code and output."""

    def run(code, *args, check=True, **env):
        (tmp_path / "script.py").write_text(textwrap.dedent(INIT) + textwrap.dedent(code))
        command = [sys.executable, "script.py", *args]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**environment, **env}, cwd=tmp_path
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.double
@needs_sdk
def test_everything_a_run_reports_arrives(server, python):
    python("""
        task = Task.init("images/flowers", "a run", tags=["small"], reuse_last_task_id=False, **quiet)
        task.connect({"lr": 0.1, "aug": {"mixup": 0.2}, "sizes": [32, 64]}, name="Hyperparameters")
        open("config.yaml", "w").write("lr: 0.1")
        task.connect_configuration("config.yaml", name="config")
        task.set_model_label_enumeration({"ant": 0, "bee": 1})
        log = task.get_logger()
        for epoch in range(3):
            log.report_scalar("loss", "train", 2.5 - epoch, epoch)
        log.report_single_value("best_acc1", 0.5)
        log.report_confusion_matrix("confusion", "val", matrix=[[3, 1], [0, 4]], xlabels=["ant", "bee"], iteration=2)
        import numpy
        log.report_image("samples", "stage 1", iteration=0, image=numpy.zeros((8, 6, 3), "uint8"))
        open("best.pth", "wb").write(bytes(range(256)) * 400 + b"\\r\\n--\\r\\n")
        model = OutputModel(task=task, name="best", framework="PyTorch", label_enumeration={"ant": 0, "bee": 1})
        model.update_weights("best.pth", iteration=2, auto_delete_file=False)
        model.set_metadata("epoch", "2", "int")
        open("summary.json", "w").write("{}")
        task.upload_artifact("summary", "summary.json")
        print("epoch 2 done")
        task.flush(wait_for_uploads=True)
        task.close()
    """)
    (task,) = server.tasks.values()
    assert (task.name, task.status, task.tags, task.last_iteration) == ("a run", "completed", ["small"], 2)
    assert server.projects[task.fields["project"]]["name"] == "images/flowers"
    assert task.scalars == {("loss", "train"): {0: 2.5, 1: 1.5, 2: 0.5}}
    assert task.single_values == {"best_acc1": 0.5}
    assert task.hyperparams["Hyperparameters"] == {"lr": "0.1", "aug/mixup": "0.2", "sizes": "[32, 64]"}
    assert task.configuration == {"config": "lr: 0.1"}
    assert task.plots["confusion", "val"][2]["data"][0]["z"] == [[3, 1], [0, 4]]
    (image,) = task.images
    assert image == Image("samples", "stage 1", 0, image.url)
    assert server.file(image.url).startswith(b"\xff\xd8")  # JPEG
    assert task.artifacts["summary"]["type"] == "custom"
    assert server.file(task.artifacts["summary"]["uri"]) == b"{}"
    model = task.models["output"]["best"]
    assert (model["name"], model["framework"], model["labels"]) == ("best", "PyTorch", {"ant": 0, "bee": 1})
    assert model["metadata"]["epoch"]["value"] == "2"
    assert server.file(model["uri"]) == bytes(range(256)) * 400 + b"\r\n--\r\n"
    assert "epoch 2 done" in task.console
    assert not server.refused


@pytest.mark.double
@needs_sdk
def test_a_resumed_run_replaces_what_it_repeats(server, python):
    python("""
        task = Task.init("images", "a run", reuse_last_task_id=False, **quiet)
        for epoch in range(3):
            task.get_logger().report_scalar("loss", "train", 1.0 * epoch, epoch)
        task.get_logger().flush(wait=True)
        raise MemoryError("epoch 3")
    """, check=False)  # fmt: skip
    (task,) = server.tasks.values()
    assert task.status == "failed"
    python("""
        task = Task.init("images", "a run", reuse_last_task_id=sys.argv[1], continue_last_task=0, **quiet)
        for epoch in (2, 3):
            task.get_logger().report_scalar("loss", "train", 10.0 * epoch, epoch)
        task.close()
    """, task.id)  # fmt: skip
    assert list(server.tasks.values()) == [task]
    assert task.scalars == {("loss", "train"): {0: 0.0, 1: 1.0, 2: 20.0, 3: 30.0}}
    assert (task.status, task.last_iteration) == ("completed", 3)


@pytest.mark.double
@needs_sdk
def test_abort_ends_a_run(server, python, environment, tmp_path):
    (tmp_path / "sleep.py").write_text(textwrap.dedent(INIT) + textwrap.dedent("""
        task = Task.init("images", "a run", reuse_last_task_id=False, **quiet)
        task.register_abort_callback(lambda: print("checkpoint saved"), callback_execution_timeout=10)
        time.sleep(60)
    """))  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "sleep.py"], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as run:
        server.wait_for(lambda: server.count("tasks.edit") and any(t.fields["runtime"].get("_abort_callback_timeout") for t in server.tasks.values()))  # fmt: skip
        (task,) = server.tasks.values()
        server.user_abort(task.id)
        assert run.wait(30) != 0
    assert task.status == "stopped"
    assert "checkpoint saved" in task.console


@pytest.mark.double
@needs_sdk
def test_wrong_keys_end_the_sdk(server, python):
    done = python("Task.init('images', 'a run')", check=False, CLEARML_API_SECRET_KEY="wrong")
    assert done.returncode == 1
    assert "LoginError" in done.stderr and "error 401" in done.stderr
    assert not server.tasks


@pytest.fixture
def checkout(tmp_path, python):
    """A clone of a local repository whose script reports twice its learning rate, then sleeps, in a task."""

    def git(*command, cwd=tmp_path):
        user = ["-c", "user.name=tester", "-c", "user.email=tester@example.com"]
        subprocess.run(["git", *user, *command], cwd=cwd, check=True, capture_output=True)

    git("init", "-q", "--bare", "origin")
    git("clone", "-q", (tmp_path / "origin").as_uri(), "checkout")
    (tmp_path / "checkout" / "train.py").write_text(textwrap.dedent(INIT) + textwrap.dedent("""
        task = Task.init("images", "a run", reuse_last_task_id=False, **quiet)
        settings = task.connect({"lr": 0.1, "sleep": 0}, name="Hyperparameters")
        task.get_logger().report_scalar("lr", "double", 2 * float(settings["lr"]), 1)
        task.flush()
        time.sleep(int(settings["sleep"]))
        task.close()
    """))  # fmt: skip
    git("add", "train.py", cwd=tmp_path / "checkout")
    git("commit", "-q", "-m", "train", cwd=tmp_path / "checkout")
    git("push", "-q", "origin", "HEAD", cwd=tmp_path / "checkout")
    return tmp_path / "checkout"


@pytest.fixture
def recorded(server, environment, checkout, tmp_path):
    """The task of a first run of that script, to be cloned for an agent."""
    (tmp_path / "home").mkdir()
    # Without the second, the agent changes pip in the environment that the tests run in.
    environment.update(HOME=str(tmp_path / "home"), CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL="1")
    subprocess.run([sys.executable, "train.py"], env=environment, cwd=checkout, check=True, timeout=60)
    (task,) = server.tasks.values()
    assert task.scalars == {("lr", "double"): {1: 0.2}}
    assert task.script["repository"] == (tmp_path / "origin").as_uri()
    assert (task.script["entry_point"], task.script["diff"]) == ("train.py", "")
    return task


@pytest.mark.double
@needs_agent
def test_agent_runs_a_clone_with_its_changes(server, environment, recorded, tmp_path):
    clone = server.user_clone(recorded.id, {"Hyperparameters/lr": "0.4"}, name="a clone")
    assert (clone.name, clone.status, clone.parent, clone.scalars) == ("a clone", "created", recorded.id, {})
    command = [AGENT, "execute", "--id", clone.id]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    assert clone.scalars["lr", "double"] == {1: 0.8}
    assert (clone.status, recorded.hyperparams["Hyperparameters"]["lr"]) == ("completed", "0.1")


@pytest.mark.double
@needs_agent
def test_agent_takes_from_the_queue_and_aborts(server, environment, recorded, tmp_path):
    slow = server.user_clone(recorded.id, {"Hyperparameters/sleep": "60"})
    server.user_enqueue(slow.id)
    assert slow.status == "queued"
    command = [AGENT, "daemon", "--foreground", "--queue", "default"]
    poll = {"CLEARML_AGENT_QUEUE_POLL_FREQ_SEC": "0.5"}
    with open(tmp_path / "agent.log", "w") as log:
        agent = subprocess.Popen(command, env={**environment, **poll}, cwd=tmp_path, stdout=log, stderr=log)
    try:
        server.wait_for(lambda: slow.scalars)
        server.user_abort(slow.id)
        assert (slow.status, slow.status_message) == ("in_progress", "stopping")  # the agent's to end
        server.wait_for(lambda: slow.status == "stopped")
    finally:
        agent.terminate()
        agent.wait(30)
    assert "aborted by user" in slow.console


@pytest.mark.double
@needs_sdk
def test_optimizer_runs_a_grid(server, python, tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(INIT) + textwrap.dedent("""
        task = Task.init("images", "a run", reuse_last_task_id=False, **quiet)
        settings = task.connect({"lr": 0.1}, name="Hyperparameters")
        task.get_logger().report_scalar("acc1", "val", 2 * float(settings["lr"]), 1)
        task.close()
    """))  # fmt: skip
    python("import runpy; sys.argv = ['train.py']; runpy.run_path('train.py')")
    (base,) = server.tasks.values()
    base.script.update(entry_point="train.py", working_dir=".")
    done = python("""
        from clearml.automation import DiscreteParameterRange, GridSearch, HyperParameterOptimizer
        task = Task.init("images", "search", task_type="optimizer", reuse_last_task_id=False, **quiet)
        search = HyperParameterOptimizer(
            base_task_id=sys.argv[1], hyper_parameters=[DiscreteParameterRange("Hyperparameters/lr", [0.2, 0.4])],
            objective_metric_title="acc1", objective_metric_series="val", objective_metric_sign="max_global",
            optimizer_class=GridSearch, max_number_of_concurrent_tasks=2, pool_period_min=0.01, total_max_jobs=2)
        search.start_locally()
        while len(Task.get_tasks(task_filter={"parent": task.id, "status": ["completed"]})) < 2:
            time.sleep(0.2)
        print("best", [t.get_parameter("Hyperparameters/lr") for t in search.get_top_experiments(1)])
        search.stop(wait_for_reporter=False)
        task.close()
    """, base.id)  # fmt: skip
    jobs = [task for task in server.tasks.values() if task.hyperparams.get("Hyperparameters") and task is not base]
    assert sorted(job.scalars["acc1", "val"][1] for job in jobs) == [0.4, 0.8]
    assert "best ['0.4']" in done.stdout


@pytest.mark.double
@needs_sdk
def test_by_hand(python, tmp_path):
    script = Path(__file__).with_name("clearml_server.py")
    command = [sys.executable, str(script), "--port", "0", "--cache-dir", str(tmp_path / "mine"), "--keep", str(tmp_path / "calls")]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as by_hand:
        exports = {}
        while (line := by_hand.stdout.readline()).startswith("export "):
            name, _, value = line.removeprefix("export ").strip().partition("=")
            exports[name] = value.strip("'")
        python("""
            task = Task.init("images", "a run", reuse_last_task_id=False, **quiet)
            task.get_logger().report_scalar("loss", "train", 1.5, 0)
            task.close()
        """, **exports)  # fmt: skip
        by_hand.send_signal(signal.SIGINT)
        rest, _ = by_hand.communicate(timeout=10)
    assert by_hand.returncode == 0
    assert 'tasks.create name="a run"' in rest and "loss/train[0]=1.5" in rest
    assert "a run: completed, 1 scalar series (1 points)" in rest
    kept = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert {"auth.login", "tasks.create", "events.add_batch", "tasks.completed"} <= {call["endpoint"] for call in kept}
