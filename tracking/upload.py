"""A run's folder to a server: what the server has not."""

import shlex
from typing import Any

from reporting.folder import SUMMARY, RunFolder
from settings.errors import ConfigError
from tracking.report import TaskReport
from tracking.run import upload_uri
from tracking.server import Ending, find_task, is_published, why_no_files, why_no_server
from tracking.session import Session, import_session

FAILED = "the upload failed half way; the same command sends the rest"


class Upload:
    """Sends what a server does not have yet of a run: an offline session, or the rest of a task that lost its server.

    Sending it twice changes nothing but the console, to which a session only adds.

    before: how the task was before it was started for the upload; None where it was not

    Raises:
        ConfigError: no tracked run there, one that still runs, no server, or a task that takes nothing.
    """

    def __init__(self, folder: str):
        self.run = RunFolder(folder)
        self.session = Session(self.run)
        self.before: Ending | None = None
        if self.session.online is None and self.session.offline is None:
            raise ConfigError(
                f"upload: no ClearML session in {self.session.root}; give the output_dir of a run that was tracked"
            )
        reason = why_no_server() or why_no_files()
        if reason is not None:
            raise ConfigError(f"upload: {reason}; set it up with clearml-init")
        if not self.session.hold():
            raise ConfigError(f"upload: a run or another upload uses {self.session.root}; wait for its end")
        if self.session.online is None and self.session.offline is None:
            raise ConfigError(f"upload: the run was killed before its session was whole; {self.anew}")

    @property
    def anew(self) -> str:
        folder = shlex.quote(self.run.path)
        return f"`python train.py --resume auto --output-dir {folder}` makes a new task of the run"

    def find(self) -> Any:
        """Find the task that the run has on the server, if an offline session need not make one.

        Raises:
            ConfigError: there is none, or it is published or queued.
        """
        session = self.session
        if session.offline is not None:
            session.leave_published()
        task = find_task(session.online) if session.online else None
        if task is None:
            if session.offline is None:
                raise ConfigError(f"upload: the server does not know task {session.online}; {self.anew}")
            return None
        if is_published(task):
            raise ConfigError(f"upload: task {session.online} is published and takes nothing more; {self.anew}")
        if task.get_status() == "queued":
            raise ConfigError(f"upload: task {session.online} lies in a queue, for an agent to run; take it out first")
        return task

    def send(self) -> None:
        """Send all there is; a task on which that fails half way gets its status back.

        Raises:
            ConfigError: as `find`.
        """
        task = self.find()
        data = task and task.data
        self.before = (
            Ending("stopped", "", FAILED)  # of a task that is made now
            if task is None
            else Ending(str(data.status), data.status_reason or "", data.status_message or "")
        )
        # What a session that is yet to be sent has noted is later than what the task says
        said = self.before if self.before.status == "failed" and self.session.offline is None else self.session.ended
        sent = False
        try:
            if self.session.offline is not None:
                import_session(self.session)
            self.report(find_task(self.session.online or ""), said or Ending("stopped", "", "stopped early"))
            sent = True
        finally:
            if not sent:
                self.put_back()

    def report(self, task: Any, ended: Ending) -> None:
        """Report to the task what the run's folder holds, and end it as the run has ended.

        ended: how, if it has not finished

        Raises:
            RuntimeError: the server has not taken every point.
        """
        task.started(ignore_errors=False, force=True)
        task.reload()  # or the SDK takes it for one that is over
        task.output_uri = upload_uri()
        report = TaskReport(task, self.run, no_files=None)
        report.so_far()
        report.outcome()
        report.artifacts()
        report.models()
        task.flush(wait_for_uploads=True)
        missing = report.missing()
        if missing:
            raise RuntimeError(f"{missing} points did not arrive")
        if self.run.has(SUMMARY):
            task.mark_completed(ignore_errors=False, force=True)
        else:
            ended.tell(task)
        print(f"ClearML: task {task.id}, {task.get_output_log_web_page()}")

    def put_back(self) -> None:
        """Give the task the status it had, with its reason and message."""
        task = find_task(self.session.online) if self.session.online else None
        if task is None or self.before is None:
            return
        status, reason, message = self.before
        if status == "in_progress":  # the run was killed
            return
        if status == "completed":
            task.mark_completed(force=True, status_message=message)
        elif status == "failed":
            task.mark_failed(force=True, status_reason=reason, status_message=message)
        else:
            task.mark_stopped(force=True, status_message=message if status == "stopped" else FAILED)
