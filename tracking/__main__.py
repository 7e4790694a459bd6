"""`python -m tracking upload OUTPUT_DIR`: send a run to a ClearML server."""

import shlex
import sys
from collections.abc import Sequence

from reporting.folder import SUMMARY, RunFolder
from settings.errors import ConfigError
from tracking.deadline import abandon, exit_now, watched
from tracking.report import TaskReport
from tracking.run import CLOSE_SECONDS, upload_uri
from tracking.server import find_task, why_no_files, why_no_server
from tracking.session import Session, import_session


def upload(folder: str) -> None:
    """Send what a server does not have yet of the run in `folder`.

    That is an offline session, or the rest of a task whose server went away. Sending it twice changes nothing.

    Raises:
        ConfigError: no tracked run there, one that still runs, no server, or a task that it does not know.
    """
    run = RunFolder(folder)
    session = Session(run)
    if session.online is None and session.offline is None:
        raise ConfigError(
            f"upload: no ClearML session in {session.root}; give the output_dir of a run that was tracked"
        )
    reason = why_no_server() or why_no_files()
    if reason is not None:
        raise ConfigError(f"upload: {reason}; set it up with clearml-init")
    if not session.hold():
        raise ConfigError(f"upload: a run or another upload uses {session.root}; wait for its end")
    task_id = import_session(session) if session.offline else session.online
    task = find_task(task_id or "")
    if task is None:
        raise ConfigError(
            f"upload: the server does not know task {task_id}; `python train.py --resume auto --output-dir "
            f"{shlex.quote(folder)}` makes a new one of the run"
        )
    task.mark_started(force=True)
    task.output_uri = upload_uri()
    report = TaskReport(task, run, no_files=None)
    report.so_far()
    report.outcome()
    report.artifacts()
    report.models()
    task.flush(wait_for_uploads=True)
    if run.has(SUMMARY):
        task.mark_completed(force=True)
    else:
        task.mark_stopped(force=True, status_message="stopped early")
    print(f"ClearML: task {task_id}, {task.get_output_log_web_page()}")


def main(argv: Sequence[str]) -> int:
    """Carry out the command line; return the exit status: 0 sent, 1 failed, 2 what the user can mend."""
    if len(argv) != 2 or argv[0] != "upload":
        print("usage: python -m tracking upload OUTPUT_DIR", file=sys.stderr)
        return 2
    failed: list[Exception] = []

    def work() -> None:
        try:
            upload(argv[1])
        except Exception as error:  # of the SDK, the network, the server: anything
            failed.append(error)

    if not watched(work, CLOSE_SECONDS, lambda: why_no_server() or why_no_files()):
        abandon("ClearML: the server stopped answering; the same command sends the rest")
        return 1
    for error in failed:
        line = " ".join(str(error).split())
        known = isinstance(error, ConfigError)
        print(f"error: {line if known else f'upload: {type(error).__name__}: {line[:200]}'}", file=sys.stderr)
        return 2 if known else 1
    return 0


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
