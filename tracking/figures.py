"""`python -m tracking.figures [FOLDER]`: show the figures of `Graphs/` in ClearML, as a task of their own.

They are of many runs, so that no run's task is theirs. Sent again, they take the place of those there are, but for those
of a task that was published: that stays as it is, and a new one has them.
"""

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from settings.errors import ConfigError, tell
from settings.table import DEFAULTS
from tracking.deadline import abandon, exit_now, watched
from tracking.server import ROOT, load_sdk, why_no_files, why_no_server

NAME = "figures"  # of the task
OPEN = [
    "created",
    "in_progress",
    "stopped",
    "closed",
    "failed",
    "completed",
]  # starting a published one un-publishes it
SECONDS = 300.0  # for all of it, as long as the server answers


def send(folder: str) -> None:
    """Send the interactive pages of a folder, each with all that it needs in one file.

    Raises:
        ConfigError: no pages there, or no server that takes them.
    """
    pages = sorted(name for name in os.listdir(folder) if name.endswith(".html")) if os.path.isdir(folder) else []
    if not pages:
        raise ConfigError(f"figures: {folder} holds no pages; `make graphs` draws them into Graphs")
    reason = why_no_server() or why_no_files()
    if reason is not None:
        raise ConfigError(f"figures: {reason}; set it up with clearml-init")
    Task = load_sdk().Task
    place = {"project_name": DEFAULTS["clearml_project"], "task_name": NAME}
    task = None
    with suppress(ValueError):  # no such project yet
        task = Task.get_task(**place, task_filter={"status": OPEN})
    task = task or Task.create(**place)
    task.mark_started(force=True)
    try:
        with tempfile.TemporaryDirectory() as whole:
            for name in pages:
                path = os.path.join(whole, name)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(in_one_file(folder, name))
                task.get_logger().report_media(NAME, os.path.splitext(name)[0], iteration=0, local_path=path)
            task.flush(wait_for_uploads=True)
    except Exception:
        with suppress(Exception):  # the first error is the one that tells
            task.mark_failed(force=True)
        raise
    task.mark_completed(force=True)
    print(f"ClearML: task {task.id}, {task.get_output_log_web_page()}")


def in_one_file(folder: str, name: str) -> str:
    """Read a page, and put the scripts and styles that lie beside it into it."""

    def read(name: str) -> str:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()

    page = re.sub(
        r'<link rel="stylesheet" href="([\w.-]+)">', lambda found: f"<style>{read(found[1])}</style>", read(name)
    )
    return re.sub(r'<script src="([\w.-]+)"></script>', lambda found: f"<script>{read(found[1])}</script>", page)


def main(argv: Sequence[str]) -> int:
    """Carry out the command line; return the exit status: 0 sent, 1 failed, 2 what the user can mend."""
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        print("usage: python -m tracking.figures [FOLDER]", file=sys.stderr)
        return 2
    failed: list[Exception] = []

    def work() -> None:
        try:
            send(argv[0] if argv else os.path.join(ROOT, "Graphs"))
        except Exception as error:  # of the SDK, the network, the server: anything
            failed.append(error)

    try:
        in_time = watched(work, SECONDS, lambda: why_no_server() or why_no_files())
        stopped = None if in_time else "the server stopped answering"
    except KeyboardInterrupt:
        stopped = "interrupted"
    if stopped:
        abandon(f"ClearML: {stopped}; the same command sends the figures anew")
        return 1
    for error in failed:
        if isinstance(error, ConfigError):
            tell(error)
            return 2
        print(f"error: figures: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
