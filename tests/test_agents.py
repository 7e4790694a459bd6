"""Tracked runs that others start or end: several processes, the dashboard's Abort, a real clearml-agent."""

import importlib.util
import os
import shutil
import subprocess

import pytest
import yaml
from programs import LARGER, ROOT, RUN, honest_program, popen, program, run_agent, torchrun  # fmt: skip
from runs import checkpoint, metrics


@pytest.mark.double
def test_two_processes_are_one_task(images, tmp_path, server):
    out = tmp_path / "run"
    flags = [*RUN, *LARGER, "--data-path", images, "--output-dir", out, "--epochs", "3", "--batch-size", "4"]
    done = torchrun(*flags, env=server.env(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    task = server.only_task()
    assert list(task.scalars["loss", "train"]) == [0, 1, 2] and task.status == "completed"
    sent = [event for call in server.calls if call.endpoint == "events.add_batch" for event in call.body]
    assert sum(event.get("metric") == "loss" and event["variant"] == "train" for event in sent) == 3  # no rank twice
    # what an agent starts is the launcher, so that it starts all processes
    assert task.script["entry_point"].startswith("-m torch.distributed.run --standalone --nproc-per-node 2 train.py")


def test_abort_in_the_dashboard_saves_first(images, tmp_path, server):
    out = tmp_path / "run"
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000"]
    process = popen(*flags, env=server.env(tmp_path / "cache"))
    process.wait_for_epochs(out, 1)
    server.user_abort(server.only_task().id)
    printed, _ = process.communicate()  # the SDK asks every 15 s
    assert "stopped: aborted in ClearML; saved" in printed and process.returncode == 3
    assert checkpoint(out)["state"]["epoch"] >= len(metrics(out)) - 1
    task = server.only_task()
    # It takes no files any more. Once, on a busy machine, a call came without the task's id, of whom was not found out.
    assert task.status == "stopped" and not [said for said in server.refused if "Invalid task id: id=None" not in said]


def test_names_that_a_server_would_refuse(images, tmp_path):
    told = program(*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--clearml-task", "ab")
    assert told.returncode == 2 and told.stderr.startswith("error: clearml_task 'ab' is too short for ClearML")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A clone of this code with a remote, as a user's: what an agent can fetch."""
    folder = tmp_path_factory.mktemp("repository")
    origin, clone = folder / "origin.git", folder / "clone"
    quiet = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def git(*words, cwd=clone):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *map(str, words)], cwd=cwd, env=quiet, check=True, capture_output=True)  # fmt: skip

    git("init", "--quiet", "--bare", "-b", "main", origin, cwd=folder)
    git("clone", "--quiet", f"file://{origin}", clone, cwd=folder)
    kept = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True)
    for name in kept.stdout.splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    git("push", "--quiet", "origin", "HEAD:main")
    return clone


needs_agent = pytest.mark.skipif(
    importlib.util.find_spec("clearml_agent") is None or shutil.which("git") is None,
    reason="needs clearml-agent (requirements-dev.txt) and git",
)


AGENT = needs_agent, pytest.mark.double


@pytest.mark.parametrize("by", ["as an agent does", pytest.param("a real agent", marks=AGENT)])
def test_a_clone_runs_with_changed_settings_and_fails_clearly_on_wrong_ones(images, tmp_path, server, repository, by):
    env, real = server.env(tmp_path / "cache"), by == "a real agent"
    flags = [*RUN, *(LARGER if real else []), "--data-path", images, "--output-dir", tmp_path / "run"]
    more = "--epochs 2 --dropout 0.2 --auto-augment ra --ra-magnitude 7".split()
    first = honest_program(*flags, *more, env=env, cwd=repository) if real else program(*flags, *more, env=env)
    assert first.returncode == 0, first.stdout + first.stderr
    original = server.only_task()

    def carry_out(task):
        """What it said: to an agent, into the task's console."""
        if real:
            return run_agent(task.id, env, tmp_path).stderr + task.console
        return program(*flags, *more, env={**env, "CLEARML_TASK_ID": task.id}).stderr

    out = tmp_path / "cloned"
    changes = {"lr": "0.005", "dropout": "[0.1, 0.4]", "stages": "2", "train_crop_size": "32, 48", "output_dir": str(out), "auto_augment": "ta_wide"}  # fmt: skip
    cloned = server.user_clone(original.id, {f"Hyperparameters/{name}": value for name, value in changes.items()})
    said = carry_out(cloned)
    assert cloned.status == ("completed" if real else "in_progress"), said  # it is the agent that ends a task
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["lr"] == 0.005 and settings["dropout"] == [0.1, 0.4] and settings["stages"] == 2
    assert settings["ra_magnitude"] == 9  # switched off with RandAugment, so it claims nothing
    assert [(r["stage"], r["image_size"], r["dropout"]) for r in metrics(out)] == [(0, 32, 0.1), (1, 48, 0.4)]
    assert metrics(out)[0]["lr"] == 0.005
    assert list(cloned.scalars["stage", "image_size"].values()) == [32, 48]
    assert cloned.hyperparams["Hyperparameters"]["ra_magnitude"] == "9"

    misspelt = server.user_clone(original.id, {"Hyperparameters/dropuot": "0.3"})
    assert "unknown setting dropuot; did you mean dropout?" in carry_out(misspelt)
    assert misspelt.status == "failed"
    # a real agent's own line takes the reason's place, which is in the console alone then
    assert misspelt.status_message.startswith("Changed by clearml-agent" if real else "unknown setting dropuot")

    edited = server.user_clone(original.id)
    server.edit_configuration(edited.id, "config", original.configuration["config"].replace("lr: 0.01", "lr: 0.1"))
    assert "was changed; change Hyperparameters instead" in carry_out(edited) and edited.status == "failed"
