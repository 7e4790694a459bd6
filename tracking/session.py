"""Which tasks a run's folder has: on a server, and offline, not sent yet."""

import json
import os
import shutil
import time
from typing import Any

from reporting.folder import CLEARML, TASK, RunFolder
from tracking.events import SCALAR, SESSION_LOG, SESSION_METRICS, Points, points_of, rewrite_events, session_points
from tracking.server import Ending, find_task, is_published, load_sdk

DESCRIPTION = "task.json"  # of an offline session's task


class Session:
    """Which tasks a run's folder has: on a server, and offline, not sent yet. Kept in clearml/task.json.

    online, offline: ids, or None
    ended: how the run ended; None while it goes on, after a kill, and once it has finished
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.root = os.path.abspath(folder.at(CLEARML))
        try:
            known = folder.read_json(TASK)
        except (OSError, ValueError):
            known = None  # damaged: a new task gets the whole run
        known = known if isinstance(known, dict) else {}
        self.online: str | None = known.get("online")
        self.offline: str | None = known.get("offline")
        ended = known.get("ended")
        self.ended = Ending(*map(str, ended)) if isinstance(ended, list) and len(ended) == 3 else None
        if self.offline is not None and not os.path.isdir(self.offline_folder):
            self.offline = None
        self.lock: Any = None

    @property
    def offline_folder(self) -> str:
        return os.path.join(self.root, "offline", str(self.offline))

    def hold(self) -> bool:
        """Take the session for this process, and mend it; return False if another one of this machine has it.

        It is this process's until that ends.
        """
        if not self.lock_root():
            return False
        if self.offline is not None and self.description() is None:
            if os.path.exists(self.copy):
                shutil.copyfile(self.copy, os.path.join(self.offline_folder, DESCRIPTION))
            else:
                self.offline = None  # the kill came at once: a new task gets the whole run
        return True

    @property
    def copy(self) -> str:
        return os.path.join(self.root, f"{self.offline}.json")

    def description(self) -> bytes | None:
        """Read what the offline session says of its task; None if that is cut short, as a kill may leave it.

        The SDK writes it in place.
        """
        try:
            with open(os.path.join(self.offline_folder, DESCRIPTION), "rb") as file:
                content = file.read()
            json.loads(content)
        except (OSError, ValueError):
            return None
        return content

    def keep_description(self) -> None:
        """Keep a copy of the description, for after a kill."""
        for _ in range(20):  # the SDK may be writing it
            content = self.description()
            if content is not None:
                with open(self.copy + ".tmp", "wb") as file:
                    file.write(content)
                os.replace(self.copy + ".tmp", self.copy)
                return
            time.sleep(0.1)

    def lock_root(self) -> bool:
        """Lock the session; return False if another process of this machine has it."""
        os.makedirs(self.root, exist_ok=True)
        self.lock = open(os.path.join(self.root, "lock"), "w")  # noqa: SIM115, closed with the process
        try:
            import fcntl

            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would hold it too
        except (BlockingIOError, PermissionError):  # which of them, systems differ
            return False
        except (ImportError, OSError):  # Windows, some network disks
            pass
        return True

    def begin(self) -> None:
        """Forget how an earlier part of the run has ended."""
        self.ended = None
        self.write()

    def end(self, ended: Ending) -> None:
        """Write down how the run has ended, for an upload."""
        self.ended = ended
        self.write()

    def note(self, task_id: str) -> None:
        """Write down the id of the task that the run now has, online or offline."""
        if task_id.startswith("offline"):
            self.offline = task_id
        else:
            self.online = task_id
        self.write()

    def write(self) -> None:
        self.folder.write(TASK, json.dumps({"online": self.online, "offline": self.offline, "ended": self.ended}))

    def drop_offline(self) -> None:
        """Remove the offline session."""
        shutil.rmtree(os.path.join(self.root, "offline"), ignore_errors=True)
        if os.path.exists(self.copy):
            os.remove(self.copy)
        self.offline = None
        self.write()

    def leave_published(self) -> None:
        """Leave the run's task on the server alone if it was published; a new one gets the whole run."""
        task = find_task(self.online) if self.online else None
        if task is not None and is_published(task):
            print(
                f"ClearML: task {self.online} is published and stays as it is; a new one has the whole run", flush=True
            )
            self.online = None
            self.write()

    def forget(self) -> None:
        """Forget the tasks of an earlier run, where a run starts anew in this folder."""
        self.online = None
        self.drop_offline()


def import_session(session: Session) -> str:
    """Send an offline session to the server and remove it; return the id of its task there.

    It goes into the task that the run has there, as after an attempt that failed, and of the points those that this
    task has not.

    Raises:
        RuntimeError: the server has not taken every point, of which the SDK makes a warning; the session stays.
    """
    Task = load_sdk().Task
    earlier = find_task(session.online) if session.online else None
    known = points_of(earlier) if earlier is not None else Points()

    def is_new(event: dict[str, Any]) -> bool:
        return event.get("type") != SCALAR or not known.has(
            event["metric"], event["variant"], event["value"], event["iter"]
        )

    rewrite_events(os.path.join(session.offline_folder, SESSION_METRICS), is_new)
    rewrite_events(os.path.join(session.offline_folder, SESSION_LOG))

    class Importer(Task):  # type: ignore[misc, valid-type]
        @classmethod
        def import_task(cls, *args: Any, **kwargs: Any) -> Any:
            """Import the session into the task that the run has, else into a new one."""
            if earlier is not None:
                return earlier
            task = super().import_task(*args, **kwargs)
            session.note(task.id)  # at once: what fails from here on goes on in this task
            return task

    Importer.import_offline_session(session.offline_folder)
    assert session.online is not None
    if not points_of(find_task(session.online)).have(session_points(session.offline_folder)):
        raise RuntimeError("the server has not taken all of the session")
    session.drop_offline()
    return session.online
