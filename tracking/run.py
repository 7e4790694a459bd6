"""ClearML as a run's dashboard: a task on a server, or a session in OUTPUT_DIR/clearml/.

Which thread does what: the main thread trains, and hands scalars and plots to the SDK, whose own threads send them
from a queue; it never waits for the server. Making the task and ending it need answers, so each happens in a thread of
ours, while the main thread waits and asks every few seconds whether the server is still there (`deadline.watched`). If
it is not, that thread is abandoned, and the program's last line is `deadline.exit_now`, which does not wait for it.
An Abort in the dashboard calls `abort` in a thread of the SDK's, which blocks it until training has saved.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor

from reporting.folder import BEST, CHECKPOINT, CLEARML, RunFolder
from reporting.log import Dashboard
from settings.errors import ConfigError, process_rank
from settings.table import Config
from stages import Stage
from tracking.deadline import abandon, brief, never_fatal, watched
from tracking.report import TaskReport
from tracking.server import ROOT, Ending, fail, find_task, load_sdk, on_agent, why_no_files, why_no_server
from tracking.session import Session, import_session
from tracking.settings import project_name, send_settings, task_name

START_SECONDS = 60.0  # for a task to be made
ABORT_SECONDS = 600.0  # for the step in progress and a checkpoint, after someone pressed Abort
CLOSE_SECONDS = 900.0  # for the uploads of a run but its weights, as long as the server answers
SLOWEST = 250e3  # bytes a second of their upload


def find_clearml(config: Config) -> Dashboard:
    """Choose how the run reports to ClearML, by `clearml`: auto, online, offline or off.

    Raises:
        ConfigError: a name that no server takes, the package is missing, or `online` finds no server that answers.
    """
    if config.clearml == "off" or config.test_only or process_rank(config.world_size):
        return Dashboard()
    project_name(config), task_name(config)  # that they can be
    if importlib.util.find_spec("clearml") is None:
        if config.clearml == "auto":
            return Dashboard()
        raise ConfigError(f"clearml {config.clearml} needs the package: pip install clearml, or --clearml off")
    asked = config.clearml == "offline" or os.environ.get("CLEARML_OFFLINE_MODE", "0").lower() in ("1", "true")
    reason = "as asked" if asked else why_no_server()
    if reason is not None and (config.clearml == "online" or on_agent()):
        raise ConfigError(f"clearml online: {reason}; set it up with clearml-init, or use --clearml offline")
    return ClearML(config, offline_because=reason)


# ---- a run that is tracked ----


class ClearML(Dashboard):
    """The task of a run, online or offline.

    offline_because: why it does not go to a server now, None if it does
    """

    def __init__(self, config: Config, offline_because: str | None):
        self.folder = RunFolder(config.output_dir)
        self.offline_because = offline_because
        self.session = Session(self.folder)
        self.report: TaskReport | None = None  # none before the start, and where that failed
        self.finished = self.aborted = False
        self.closed = threading.Event()
        self.showing: threading.Thread | None = None

    def start(self, config: Config) -> None:
        """Make or continue the task; where that fails, print why, and the run goes on unreported.

        Raises:
            ConfigError: it fails where `clearml` is online, or on an agent, whose task would not say what becomes of it.
        """
        result: list[TaskReport | str] = []  # or why there is none

        def begin() -> None:
            try:
                result.append(self.begin(config))
            except Exception as error:  # of the SDK, the network, the server: anything
                result.append(brief(error))

        if not self.in_time(begin, START_SECONDS):
            abandon()
            result = ["the server stopped answering"]
        if isinstance(result[0], str):
            if config.clearml == "online" or on_agent():
                raise ConfigError(f"clearml online: {result[0]}; --clearml auto trains all the same")
            print(f"ClearML: this run is not reported: {result[0]}", flush=True)
            return
        self.report = result[0]
        if self.offline_because is not None:
            lies = f"the session lies in {self.folder.at(CLEARML)}, `{self.upload_command}` sends it to a server"
            print(f"ClearML: offline, {self.offline_because}; {lies}", flush=True)

    @property
    def upload_command(self) -> str:
        return f"python -m tracking upload {shlex.quote(self.folder.path)}"

    def begin(self, config: Config) -> TaskReport:
        """Make or continue the task, and report all there is.

        Not in the main thread: only that one can set handlers of signals, and the SDK's would swallow SIGTERM and
        spin on a segmentation fault.
        """
        session = self.session
        if not session.hold():
            raise RuntimeError(f"another run or upload uses {session.root}")
        if config.resume == "":  # neither auto nor, in a folder that has no task or has saved nothing yet, a file
            session.forget()
        session.begin()
        no_files = None
        if self.offline_because is None:
            Task = load_sdk().Task
            no_files = why_no_files()
            if no_files is not None:
                self.say_no_files(no_files)
            session.leave_published()
            continued = import_session(session) if session.offline else session.online
        else:
            os.environ["CLEARML_CACHE_DIR"] = session.root
            Task = load_sdk().Task
            Task.set_offline(True)
            continued = session.offline
        Task.set_random_seed(None)  # or the SDK seeds Python, numpy and torch
        for package, version in requirements():
            Task.add_requirements(package, version)  # the SDK looks no further than train.py's own imports
        task = Task.init(
            project_name=project_name(config),
            task_name=task_name(config),
            tags=list(config.clearml_tags or ()),
            reuse_last_task_id=continued or False,
            # A number, or iterations would be shifted behind those there are
            continue_last_task=0 if continued or on_agent() else False,
            output_uri=upload_uri(),
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,  # its hook would upload every checkpoint
            # Every 5 s, not twice a second: on a small machine its thread takes 7 % of a core from those that train
            auto_resource_monitoring={"sample_frequency_per_sec": 0.2},
        )
        if continued and task.id != continued:
            print(f"ClearML: task {continued} cannot be continued; a new one, {task.id}, has the whole run", flush=True)
        session.note(task.id)
        send_settings(task, config)
        if self.offline_because is not None:
            session.keep_description()
        report = TaskReport(task, self.folder, no_files)
        report.so_far()
        # Not `connect`: on an agent it would read them from the task, and fail where no run has made it
        task.set_model_label_enumeration({name: i for i, name in enumerate(report.classes)})
        if self.offline_because is None:
            task.register_abort_callback(self.abort, callback_execution_timeout=ABORT_SECONDS)
        return report

    def begin_stage(self, stage: Stage) -> None:
        """Report the picture of a stage that begins, in a thread: it asks whether the server takes files now."""
        report = self.report
        if report is None:
            return

        def show() -> None:
            with never_fatal("a picture is not sent"):
                if self.offline_because is None:
                    report.no_files = why_no_files()
                report.picture(stage.index)

        self.showing = threading.Thread(target=show, daemon=True)
        self.showing.start()

    def epoch(self, record: dict[str, Any]) -> None:
        if self.report is not None:
            with never_fatal("an epoch is not reported"):
                self.report.epoch(record)

    def best(self, epoch: int, confusion: Tensor) -> None:
        if self.report is not None:
            with never_fatal("confusions are not reported"):
                self.report.best(epoch, confusion.numpy())

    def finish(self) -> None:
        self.finished = True

    def abort(self) -> None:
        """Ask training to stop, because someone pressed Abort, and wait for the end of the run.

        The SDK kills the process when this returns.
        """
        self.aborted = True
        self.ask_to_stop("aborted in ClearML")
        self.closed.wait(ABORT_SECONDS)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        message = " ".join(str(error).split()) if error is not None else ""
        report = self.report
        left = f"all of the run is in {self.folder.path}, `{self.upload_command}` sends the rest"
        try:
            if report is None:
                if error is not None and on_agent() and not self.in_time(lambda: fail_agent(message), START_SECONDS):
                    abandon()
            else:
                ended = None if self.finished else ending(error, message)
                if ended is not None:
                    with never_fatal("an upload will not know how the run ended"):
                        self.session.end(ended)
                if not self.in_time(lambda: self.close(report, error, ended), self.closing_seconds()):
                    abandon(f"ClearML: the server stopped answering; {left}")
        except KeyboardInterrupt:  # who does not want to wait; what the run came to stands
            abandon(f"ClearML: interrupted; {left}")
        finally:
            self.closed.set()

    def closing_seconds(self) -> float:
        """Find how long the end of the task may take: its weights are hundreds of megabytes of a large model."""
        sizes = [os.path.getsize(self.folder.at(name)) for name in (CHECKPOINT, BEST) if self.folder.has(name)]
        return CLOSE_SECONDS + sum(sizes) / SLOWEST

    def close(self, report: TaskReport, error: BaseException | None, ended: Ending | None) -> None:
        """Send what is left and end the task: as `ended` says, completed if that is None."""
        online = self.offline_because is None
        if self.showing is not None:
            self.showing.join()
        parts = [report.outcome]
        if not (self.aborted and not on_agent()):  # a task that is stopped takes no files
            report.no_files = why_no_files() if online else None
            if report.no_files is None:
                parts += [report.pictures, report.artifacts]
                if online:  # offline the SDK cannot register a model; `upload` does
                    parts.append(report.models)
            else:
                self.say_no_files(report.no_files)
        for part in parts:
            with never_fatal(f"{part.__name__} not sent, `{self.upload_command}` does it later"):
                part()
        with never_fatal("the task is not closed"):
            if type(error).__name__ == "NonFiniteLoss":
                report.task.add_tags(["diverged"])
            report.task.flush(wait_for_uploads=online)
            report.task.close()
            if online and ended is not None:
                ended.tell(find_task(report.task.id))

    def in_time(self, work: Callable[[], None], limit: float) -> bool:
        """Do `work` in a thread; return False if it took over `limit` seconds or the server went away.

        The thread is then left behind.
        """
        if self.offline_because is not None:
            return watched(work, limit, lambda: None)
        report = self.report
        return watched(
            work, limit, lambda: why_no_server() or (report is not None and report.no_files is None and why_no_files())
        )

    def say_no_files(self, why: str) -> None:
        line = f"pictures, artifacts and weights are not sent, {why}"
        print(f"ClearML: {line}; `{self.upload_command}` sends them later", flush=True)


def ending(error: BaseException | None, message: str) -> Ending:
    """Say how a run has ended that has not finished."""
    if error is None or isinstance(error, KeyboardInterrupt):
        return Ending("stopped", "", "stopped early; --resume auto continues it")
    return Ending("failed", type(error).__name__, message)


def fail_agent(message: str) -> None:
    """Mark the task that an agent runs here as failed."""
    with never_fatal("the task does not say why it failed"):
        fail(find_task(os.environ["CLEARML_TASK_ID"]), message)


def requirements() -> Iterator[tuple[str, str]]:
    """Yield the packages of requirements.txt with their versions here: what an agent installs."""
    with open(os.path.join(ROOT, "requirements.txt"), encoding="utf-8") as file:
        for line in file:
            name = re.match(r"[\w-]+", line)
            if name:
                with suppress(importlib.metadata.PackageNotFoundError):  # another way to have it
                    yield name[0], importlib.metadata.version(name[0])


def upload_uri() -> str | bool:
    """Find where models go: to the place that the user has configured, else to the server's own files.

    The environment variable CLEARML_DEFAULT_OUTPUT_URI comes before clearml.conf.
    """
    from clearml.config import config_obj

    configured = config_obj.get("sdk.development.default_output_uri", None)
    return os.environ.get("CLEARML_DEFAULT_OUTPUT_URI") or configured or True
