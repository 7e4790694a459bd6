"""The runs of a study as tasks of ClearML, which agents carry out: the way past one machine."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from reporting.folder import METRICS, SUMMARY, RunFolder
from settings.errors import ConfigError, RunError
from studies.launch import STOPPED, Attempt
from studies.study import Run
from tracking.deadline import brief
from tracking.run import requirements, upload_uri
from tracking.server import ROOT, find_task, load_sdk, why_no_server
from tracking.settings import project_name, send_settings

QUEUED = "queued.json"  # in a run's folder: the task it is, and the digest of its settings
ASK_SECONDS = 15.0  # between two questions about a task
DELETED_AFTER = 20  # times: five minutes, for a server that answers before its data base does
ENDED_BADLY = {
    "failed": "failed on its agent", "stopped": "was aborted", "closed": "was closed without an outcome",
    "deleted": "was deleted on the server",
}  # fmt: skip


class Queue:
    """Sends runs to a queue of ClearML; all at once, agents take them as they come.

    Raises:
        ConfigError: no server answers, it has no such queue, or agents could not fetch this code.
        RunError: the server answers with an error.
    """

    def __init__(self, name: str, runs: list[Run]):
        self.name, self.at_once = name, len(runs)
        for run in runs:
            if run.source is not None or run.held_out is not None:
                what = "starts from another's weights" if run.source is not None else "evaluates held-out images"
                raise ConfigError(f"--on clearml: {run.condition} {what}, which lie on one machine; leave --on out")
        if shutil.which("git") is None:
            raise ConfigError("--on clearml needs git, by which agents fetch this code")
        reason = why_no_server()
        if reason is not None:
            raise ConfigError(f"--on clearml: {reason}; set it up with clearml-init")
        from clearml.backend_api.session.client import APIClient

        with told_in_a_line():
            queues = {queue.name for queue in APIClient().queues.get_all()}
        if name not in queues:
            raise ConfigError(
                f"--queue {name}: the server has none of this name; it has {', '.join(sorted(queues)) or 'none'}"
            )
        self.code = pushed_code()

    def find(self, runs: Sequence[Run]) -> dict[Run, Attempt]:
        """Find those of `runs` that an earlier sweep has sent with their settings, and that have not ended badly since.

        Raises:
            RunError: the server cannot be asked; what it was sent would be sent twice.
        """
        found: dict[Run, Attempt] = {}
        for run in runs:
            sent = RunFolder(run.folder).read_json(QUEUED) or {}
            if sent.get("settings") != run.settings_digest:
                continue
            with told_in_a_line():
                task = find_task(sent["id"])
                if task is not None and task.get_status() not in ENDED_BADLY:
                    if task.get_status() == "created":  # that sweep was killed before it could queue it
                        load_sdk().Task.enqueue(task, queue_name=self.name)
                    found[run] = QueuedRun(run, task)
        return found

    def start(self, run: Run) -> Attempt:
        """Make the task of a run, and queue it.

        Raises:
            RunError: the server does not take it.
        """
        with told_in_a_line():
            task = self.make(run)
            sent = {"id": task.id, "settings": run.settings_digest}
            RunFolder(run.folder).write(QUEUED, json.dumps(sent))
            load_sdk().Task.enqueue(task, queue_name=self.name)
        return QueuedRun(run, task)

    def make(self, run: Run) -> Any:
        """Make a task with the settings of a run, as if train.py had made it."""
        Task = load_sdk().Task
        study, name = os.path.normpath(run.folder).split(os.sep)[-2:]
        task = Task.create(
            project_name=project_name(run.config),
            task_name=f"{study} {name}",  # part of its files' addresses
            task_type="training",
            packages=[f"{package}=={version}" for package, version in requirements()],
            add_task_init_call=False,
        )
        repository, commit = self.code
        task.set_script(
            repository=repository, commit=commit, branch="", diff="", working_dir=".", entry_point="train.py"
        )
        task.output_uri = upload_uri()  # an agent leaves it as it is
        task.add_tags([study, run.condition])
        # What an earlier task has left in a folder that outlives it is continued, if it has these settings
        send_settings(task, replace(run.config, resume="auto"))
        return task

    def machine(self, run: Run) -> dict[str, Any]:
        return {}


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Have an error of the SDK, the network or the server, which may be of any type, become a RunError."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        raise RunError(f"--on clearml: {brief(error)}; the same command goes on") from error


class QueuedRun:
    """A run that lies in a queue or is carried out by an agent."""

    def __init__(self, run: Run, task: Any):
        self.run, self.task = run, task
        self.left, self.due, self.status = False, 0.0, ""
        self.missed = 0  # times in a row that the server answered and had no such task

    def poll(self) -> int | None:
        """Return 0 with the run's files fetched, 1 if it failed, STOPPED where the sweep leaves it to the agents."""
        if self.left:
            return STOPPED
        if time.monotonic() < self.due:
            return None
        self.due = time.monotonic() + ASK_SECONDS
        try:
            answer, self.missed = self.ask(), 0
            return answer
        except RunError as error:  # of the disk that the run's files were to be written to
            self.status = str(error)
            return 1
        except Exception:  # of many kinds; a server that is away for a while does not end the sweep
            with suppress(Exception):
                missing = why_no_server() is None and find_task(self.task.id) is None
                self.missed = self.missed + 1 if missing else 0
            if self.missed < DELETED_AFTER:
                return None
            self.status = "deleted"
            return 1

    def ask(self) -> int | None:
        """Ask the server how the run is; fetch its files if it is finished."""
        self.status = str(self.task.get_status())
        self.task.reload()  # after it: what a task holds that has ended is all there
        if self.status in ("completed", "published"):
            folder = RunFolder(self.run.folder)
            for name in (METRICS, SUMMARY):  # the summary last: with it the run is complete
                artifact = self.task.artifacts.get(name)
                local = artifact and artifact.get_local_copy(extract_archive=False)
                if not local:
                    self.status = f"completed without {name}"
                    return 1
                with open(local, encoding="utf-8") as file:
                    folder.write(name, file.read())
            return 0
        return 1 if self.status in ENDED_BADLY else None

    def stop(self) -> None:
        """Leave the run to the agents; the next sweep finds it by its task."""
        self.left = True

    def reason(self) -> str:
        said = " ".join((getattr(self.task.data, "status_message", "") or "").split())
        return f"task {self.task.id} {ENDED_BADLY.get(self.status, self.status)}{': ' if said else ''}{said}"


def pushed_code() -> tuple[str, str]:
    """Find where agents fetch this code: the address of a remote that has the commit, and the commit.

    Raises:
        ConfigError: no repository, no remote, changes that are in no commit, or a commit that no remote branch has.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    remotes, commit = git("remote").split(), git("rev-parse", "HEAD")
    if not remotes or not commit:
        raise ConfigError("--on clearml: this folder is no git clone with a remote, from which agents fetch the code")
    if git("status", "--porcelain", "--untracked-files=no"):
        raise ConfigError("--on clearml: agents fetch a commit, and files have changed since; commit and push them")
    for remote in remotes:
        if git("for-each-ref", "--contains", commit, f"refs/remotes/{remote}/"):
            return without_keys(git("remote", "get-url", remote)), commit
    raise ConfigError(f"--on clearml: commit {commit[:12]} is not pushed to {' or '.join(remotes)}; push it")


def without_keys(address: str) -> str:
    """Remove user and password from the address of a repository, which anyone on the server can read.

    Of ssh the user stays: it is no secret, and part of the address. Agents have keys of their own.
    """
    return re.sub(r"^(https?://)[^/]*@", r"\1", address, flags=re.IGNORECASE)
