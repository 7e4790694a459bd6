"""ClearML: a run as a task on a server, or offline in OUTPUT_DIR/clearml/ until `upload` takes it there.

    python -m tracking upload OUTPUT_DIR

The only file that imports ClearML, and only where a run is tracked. Training never waits for the server:
scalars and plots go into the SDK's queue; beginning and ending are watched. What is in the run's folder is
the truth; reporting an epoch again replaces it, so a resumed or uploaded run is reported whole.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import numpy as np
import yaml
from torch import Tensor

from reporting import page as graphs
from reporting.log import Dashboard, RunLog
from settings import resolve as settings
from settings.resolve import CLEARML, Config, ConfigError, as_text, from_text
from stages import plan_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECTION = "Hyperparameters"  # of the task's settings
NOT_SETTINGS = ("config", "plan", *CLEARML)  # how this very process was started
ARTIFACTS = ("summary.json", "metrics.jsonl", "report.html")
SHORTEST_NAME = 3  # characters, that a server takes
MAX_CLASSES = 50  # of a whole confusion matrix; one of 1,000 classes is an event of 6 MB
PROBE_SECONDS = 3.0
START_SECONDS = 60.0  # for a task to be made
ABORT_SECONDS = 600.0  # for the step in progress and a checkpoint, after someone pressed Abort
CLOSE_SECONDS = 900.0  # for the uploads of a run, as long as the server answers
PATIENCE = 3.0  # seconds of waiting before the server is asked whether it is still there

# A key of metrics.jsonl: the graph and the line it is drawn in.
SCALARS = {
    "loss": ("loss", "train"),
    "val_loss": ("loss", "val"),
    "top1": ("top1", "val"),
    "top1_ema": ("top1", "val_ema"),
    "top5": ("top5", "val"),
    "lr": ("lr", "lr"),
    "images_per_second": ("images_per_second", "train"),
    "epoch_seconds": ("epoch_seconds", "train"),
    "data_wait_fraction": ("data_wait_fraction", "train"),
    "gpu_memory_gib": ("gpu_memory_gib", "peak"),
}
STAGE_SCALARS = (
    "image_size", "ra_magnitude", "mixup_alpha", "cutmix_alpha", "dropout", "stochastic_depth_prob", "random_erase",
    "batch_size",
)  # fmt: skip
SINGLE_VALUES = (
    "best_top1", "best_epoch", "top1", "top1_ema", "train_hours", "images_per_second", "speedup_over_fixed_size",
    "relative_cost", "parameters",
)  # fmt: skip

# ---- which task, if any ----


def on_agent() -> bool:
    """Whether this process runs a task that exists already: started by a clearml-agent, or by an optimizer."""
    return bool(os.environ.get("CLEARML_TASK_ID"))


def load_sdk() -> Any:
    """The module `clearml`, with the settings that make it close at once."""
    os.environ.setdefault("CLEARML_CONFIG_PATH", os.path.join(ROOT, "configs", "clearml"))
    import clearml

    return clearml


def find_task(task_id: str) -> Any:
    """A task of the server by its id, None if it has none."""
    try:
        return load_sdk().Task.get_task(task_id=task_id)
    except ValueError:
        return None


def resolve(argv: Sequence[str]) -> Config:
    """`config.resolve`; a task on an agent takes the settings it was cloned with, and what was changed in it.

    Raises:
        ConfigError: as there. The task fails with the same line.
    """
    if not on_agent() or any(word.startswith("--plan") for word in argv):
        return settings.resolve(argv)
    reason = why_no_server()
    if reason is not None:
        raise ConfigError(f"clearml: the settings of CLEARML_TASK_ID cannot be read: {reason}")
    task = find_task(os.environ["CLEARML_TASK_ID"])
    if task is None:
        raise ConfigError(
            f"clearml: the server does not know task {os.environ['CLEARML_TASK_ID']}; unset CLEARML_TASK_ID to start a new one"
        )
    try:
        base, changed = settings_of(task)
        return settings.resolve(argv, changed, base)
    except ConfigError as error:
        fail(task, str(error))
        raise


def settings_of(task: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The settings that a task was made with, None if it was not made by a run; and those of its fields that say
    something else."""
    record = task.get_configuration_object("config")
    base: dict[str, Any] | None = None
    if record:
        head, _, body = record.partition("\n")
        if hashlib.sha1(body.encode()).hexdigest() not in head:
            raise ConfigError(
                f"clearml: the configuration object `config` is a record and was changed; change {SECTION} instead"
            )
        base = yaml.safe_load(body)
    changed = {}
    for name, text in ((task.get_parameters_as_dict() or {}).get(SECTION) or {}).items():
        known = base is not None and name in base
        if name not in settings.SETTINGS or name in NOT_SETTINGS:
            changed[name] = text  # `settings.resolve` says what is wrong with it
        elif not known or text != as_text(base[name]):
            changed[name] = from_text(name, str(text))
            if known and changed[name] == base[name]:  # the same in other words
                del changed[name]
    return base, changed


def fail(task: Any, message: str) -> None:
    """The task ends as failed, for the reason that the terminal says too."""
    task.mark_failed(force=True, status_reason="wrong settings", status_message=message)


def find_dashboard(config: Config) -> Dashboard:
    """What the run reports to, by `clearml`: auto, online, offline or off.

    Raises:
        ConfigError: `online`, and no server that answers.
    """
    if config.clearml == "off" or config.test_only or os.environ.get("RANK", "0") != "0":
        return Dashboard()
    for name, value in (("clearml_project", config.clearml_project), ("clearml_task", config.clearml_task)):
        if value is not None and len(value.strip()) < SHORTEST_NAME:
            raise ConfigError(f"{name} {value!r} is too short for ClearML; give {SHORTEST_NAME} or more characters")
    if importlib.util.find_spec("clearml") is None:
        if config.clearml == "auto":
            return Dashboard()
        raise ConfigError(f"clearml {config.clearml} needs the package: pip install clearml, or --clearml off")
    asked = config.clearml == "offline" or os.environ.get("CLEARML_OFFLINE_MODE", "0").lower() in ("1", "true")
    reason = "as asked" if asked else why_no_server()
    if reason is not None and (config.clearml == "online" or on_agent()):
        raise ConfigError(f"clearml online: {reason}; set it up with clearml-init, or use --clearml offline")
    return ClearML(config, offline_because=reason)


def why_no_server(timeout: float = PROBE_SECONDS) -> str | None:
    """None if the configured server answers in time and takes the keys; else what is wrong, in a few words."""
    load_sdk()
    from clearml.backend_api import Session
    from clearml.backend_api.session.defs import ENV_ACCESS_KEY, ENV_AUTH_TOKEN, ENV_SECRET_KEY
    from clearml.config import config_obj

    key = ENV_ACCESS_KEY.get(default=config_obj.get("api.credentials.access_key", None))
    secret = ENV_SECRET_KEY.get(default=config_obj.get("api.credentials.secret_key", None))
    token = ENV_AUTH_TOKEN.get()
    if not token and not (key and secret):
        return "no ClearML server is configured here"
    host = Session.get_api_server_host()
    address = (f"{host}/debug.ping", None) if token else (f"{host}/auth.login", (key, secret))
    status = ask(*address, timeout)
    if status == 200:
        return None
    if isinstance(status, str):
        return f"{host} {status}"
    return f"{host} refuses the keys" if status in (401, 403) else f"{host} says {status}"


def why_no_files(timeout: float = PROBE_SECONDS) -> str | None:
    """None if the server's store of files answers, whatever it says; else what is wrong with it."""
    load_sdk()
    from clearml.backend_api import Session

    host = Session.get_files_server_host()
    status = ask(host, None, timeout)
    return f"{host} {status}" if isinstance(status, str) else None


def ask(address: str, keys: tuple[str, str] | None, timeout: float) -> int | str:
    """The HTTP status that `address` answers with in time, or why there is none."""
    from clearml.config import config_obj

    answer: list[int | str] = [f"did not answer within {timeout:g} s"]
    verify = config_obj.get("api.verify_certificate", True)

    def request() -> None:
        import requests

        try:
            answer[0] = requests.get(address, auth=keys, timeout=timeout, verify=verify).status_code
        except requests.Timeout:
            pass
        except requests.ConnectionError as error:
            unknown = any(word in str(error) for word in ("resolve", "getaddrinfo", "Name or service"))
            answer[0] = "is no known host" if unknown else "cannot be reached"
        except (requests.RequestException, ValueError) as error:
            answer[0] = f"cannot be asked ({type(error).__name__})"

    # In a thread of its own: looking up a host's name heeds no timeout.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0]


# ---- what is said of a run ----


class TaskReport:
    """A run, told to a ClearML task from what its folder holds. Telling it again changes nothing.

    folder: the run's
    no_files: why the server takes no files now, None if it does
    """

    def __init__(self, task: Any, folder: str, no_files: str | None):
        self.task = task
        self.folder = folder
        self.no_files = no_files
        self.logger = task.get_logger()
        self.plan = graphs.read_json(self.path("report/plan.json"))
        self.classes = self.plan["classes"]

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def so_far(self) -> None:
        """The stages, what augmentation does in them, and the epochs there are."""
        heads, rows = plan_table(self.plan)
        self.logger.report_table("plan", "stages", iteration=0, table_plot=[heads, *rows])
        for stage in self.plan["stages"]:
            picture = self.path(f"report/stage_{stage['index']}.png")
            if os.path.exists(picture) and self.no_files is None:  # the SDK would hold up all else
                series = f"stage {stage['index']}, {stage['image_size']} px"
                self.logger.report_image("training images", series, stage["first_epoch"], local_path=picture)
        for record in graphs.read_metrics(self.folder):
            self.epoch(record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; the epoch, counted from 0, is the iteration."""
        graph_of = SCALARS | {name: ("stage", name) for name in STAGE_SCALARS}
        for name, (title, series) in graph_of.items():
            value = record.get(name)
            if value is not None and math.isfinite(value):  # the SDK would send 0 for what is not finite
                self.logger.report_scalar(title, series, value, record["epoch"])
        for name in record.get("non_finite", ()):
            self.logger.report_scalar("non_finite", name, 1, record["epoch"])

    def confusion(self, series: str, epoch: int, matrix: np.ndarray) -> None:
        """matrix: (K, K) images, rows true, columns predicted. Of many classes those least often right."""
        right, all_of = matrix.diagonal(), matrix.sum(axis=1)
        accuracy = 100 * right / np.maximum(all_of, 1)
        rows = [[name, int(n), f"{share:.2f}"] for name, n, share in zip(self.classes, all_of, accuracy)]
        table = [["class", "images", "top1"], *rows]
        self.logger.report_table("accuracy per class", series, iteration=epoch, table_plot=table)
        shown = np.arange(len(self.classes))
        if len(shown) > MAX_CLASSES:
            shown = np.sort(np.argsort(accuracy, kind="stable")[:MAX_CLASSES])
            rows = [["true", "predicted", "images"], *map(list, graphs.worst_confusions(matrix, self.classes))]
            self.logger.report_table("commonest confusions", series, iteration=epoch, table_plot=rows)
        labels = [self.classes[i] for i in shown]
        self.logger.report_confusion_matrix(
            "confusion matrix", series, matrix[np.ix_(shown, shown)], epoch,
            xaxis="predicted", yaxis="true", xlabels=labels, ylabels=labels, yaxis_reversed=True,
        )  # fmt: skip

    def outcome(self) -> None:
        """What the best and the last weights confuse, and a finished run's figures."""
        for series in ("best", "last"):
            found = graphs.read_json(self.path(f"report/confusion_{series}.json"))
            if found is not None:
                self.confusion(series, found["epoch"], np.array(found["confusion"]))
        summary = graphs.read_json(self.path("summary.json"))
        if summary is not None:
            figures = summary | {"train_hours": summary["train_seconds"] / 3600}
            for name in SINGLE_VALUES:
                if figures[name] is not None:
                    self.logger.report_single_value(name, figures[name])

    def artifacts(self) -> None:
        for name in ARTIFACTS:
            if os.path.exists(self.path(name)):
                self.task.upload_artifact(name, artifact_object=self.path(name), wait_on_upload=True)

    def models(self) -> None:
        """Upload the best and the last weights, and register them. Waits for it; a server is needed."""
        records = graphs.read_metrics(self.folder)
        best = graphs.read_json(self.path("report/confusion_best.json"))
        if best is not None:
            self.model("best", "model_best.pth", best["epoch"], "weights under torchvision's names")
        if records:
            self.model("last", "checkpoint.pth", records[-1]["epoch"], "everything that --resume continues from")

    def model(self, name: str, file: str, epoch: int, comment: str) -> None:
        if not os.path.exists(self.path(file)):
            return
        title = f"{self.task.name} {name}"
        known = {model.name: model.id for model in self.task.models["output"]}
        labels = {label: number for number, label in enumerate(self.classes)}
        model = load_sdk().OutputModel(
            task=self.task, name=title, framework="PyTorch", label_enumeration=labels, base_model_id=known.get(title),
            comment=f"epoch {epoch}: {comment}",
        )  # fmt: skip
        model.update_weights(
            weights_filename=self.path(file), iteration=epoch, auto_delete_file=False, async_enable=False
        )


# ---- a run that is tracked ----


class ClearML(Dashboard):
    """The task of a run, online or offline.

    offline_because: why it does not go to a server now, None if it does
    """

    def __init__(self, config: Config, offline_because: str | None):
        self.folder = config.output_dir
        self.offline_because = offline_because
        self.session = Session(self.folder)
        self.report: TaskReport | None = None  # none before the start, and where that failed
        self.finished = self.aborted = False
        self.closed = threading.Event()
        self.best_due = 0.0

    def start(self, log: RunLog, config: Config) -> None:
        made: list[TaskReport] = []

        def begin() -> None:
            with on_its_own_account("this run is not reported"):
                made.append(self.begin(config))

        if not self.in_time(begin, START_SECONDS):
            give_up("ClearML: the server stopped answering; this run is not reported")
        elif made:
            self.report = made[0]
            if self.offline_because is not None:
                print(
                    f"ClearML: offline, {self.offline_because}; the session lies in {os.path.join(self.folder, 'clearml')}, "
                    f"`{upload_command(self.folder)}` sends it to a server",
                    flush=True,
                )

    def begin(self, config: Config) -> TaskReport:
        """Make or continue the task, and tell it all there is. Not in the main thread: only that one can set handlers
        of signals, and the SDK's would swallow SIGTERM and spin on a segmentation fault."""
        session = self.session
        if not session.hold():
            raise RuntimeError(f"another run or upload uses {session.root}")
        if config.resume != "auto":
            session.forget()
        no_files = None
        if self.offline_because is None:
            Task = load_sdk().Task
            no_files = why_no_files()
            if no_files is not None:
                line = f"pictures, artifacts and weights are not sent, {no_files}"
                print(f"ClearML: {line}; `{upload_command(self.folder)}` sends them later", flush=True)
            continued = import_session(session) if session.offline else session.online
        else:
            os.environ["CLEARML_CACHE_DIR"] = session.root
            Task = load_sdk().Task
            Task.set_offline(True)
            continued = session.offline
        name = config.clearml_task or os.path.basename(os.path.abspath(self.folder))
        if len(name) < SHORTEST_NAME:
            name = f"{config.model} {name}"
        Task.set_random_seed(None)  # or the SDK seeds Python, numpy and torch
        for package, version in requirements():
            Task.add_requirements(package, version)  # the SDK looks no further than train.py's own imports
        task = Task.init(
            project_name=config.clearml_project,
            task_name=name,
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
        report = TaskReport(task, self.folder, no_files)
        report.so_far()
        task.connect_label_enumeration({name: i for i, name in enumerate(report.classes)})
        if self.offline_because is None:
            task.register_abort_callback(self.abort, callback_execution_timeout=ABORT_SECONDS)
        return report

    def epoch(self, record: dict[str, Any]) -> None:
        if self.report is not None:
            with on_its_own_account("an epoch is not reported"):
                self.report.epoch(record)

    def best(self, epoch: int, confusion: Tensor) -> None:
        # Early on every epoch is the best; the end sends the one that stays.
        if self.report is not None and time.monotonic() >= self.best_due:
            self.best_due = time.monotonic() + 60
            with on_its_own_account("confusions are not reported"):
                self.report.confusion("best", epoch, confusion.numpy())

    def finish(self, summary: Mapping[str, Any], confusion: Tensor) -> None:
        self.finished = True

    def abort(self) -> None:
        """Someone pressed Abort. The SDK kills the process when this returns, so it waits for the end of the run."""
        self.aborted = True
        self.ask_to_stop("aborted in ClearML")
        self.closed.wait(ABORT_SECONDS)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        message = " ".join(str(error).split()) if error is not None else ""
        report = self.report
        left = f"all of the run is in {self.folder}, `{upload_command(self.folder)}` sends the rest"
        try:
            if report is None:
                if error is not None and on_agent():
                    with on_its_own_account("the task does not say why it failed"):
                        fail(find_task(os.environ["CLEARML_TASK_ID"]), message)
            elif not self.in_time(lambda: self.close(report, error, message), CLOSE_SECONDS):
                give_up(f"ClearML: the server stopped answering; {left}")
        except KeyboardInterrupt:  # who does not want to wait; what the run came to stands
            give_up(f"ClearML: interrupted; {left}")
        finally:
            self.closed.set()

    def close(self, report: TaskReport, error: BaseException | None, message: str) -> None:
        """Send what is left and end the task: completed, stopped or failed."""
        online = self.offline_because is None
        parts = [report.outcome]
        if online and report.no_files is None:
            report.no_files = why_no_files()
        if report.no_files is None and not (self.aborted and not on_agent()):  # a task that is stopped takes no files
            parts.append(report.artifacts)
            if online:  # offline the SDK cannot register a model; `upload` does
                parts.append(report.models)
        for part in parts:
            with on_its_own_account(f"{part.__name__} not sent, `{upload_command(self.folder)}` does it later"):
                part()
        with on_its_own_account("the task is not closed"):
            if type(error).__name__ == "NonFiniteLoss":
                report.task.add_tags(["diverged"])
            report.task.flush(wait_for_uploads=online)
            report.task.close()
            if online and not self.finished:
                ended = find_task(report.task.id)
                if error is None or isinstance(error, KeyboardInterrupt):
                    ended.mark_stopped(force=True, status_message="stopped early; --resume auto continues it")
                else:
                    ended.mark_failed(force=True, status_reason=type(error).__name__, status_message=message)

    def in_time(self, work: Callable[[], None], limit: float) -> bool:
        """Do `work` in a thread; False if the server went away meanwhile, and the thread is left behind."""
        if self.offline_because is not None:
            return watched(work, limit, lambda: None)
        takes_files = self.report is None or self.report.no_files is None
        return watched(work, limit, lambda: why_no_server() or (takes_files and why_no_files()))


def watched(work: Callable[[], None], limit: float, trouble: Callable[[], Any]) -> bool:
    """Do `work` in a thread; False if it takes longer than `limit` seconds, or there is `trouble` twice in a row."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline, silent = time.monotonic() + limit, 0
    while time.monotonic() < deadline and silent < 2:
        thread.join(PATIENCE)
        if not thread.is_alive():
            return True
        silent = silent + 1 if trouble() else 0
    return not thread.is_alive()


def send_settings(task: Any, config: Config) -> None:
    values = {name: value for name, value in config.as_dict().items() if name not in NOT_SETTINGS}
    body = yaml.safe_dump(values, sort_keys=False)
    source = config.config or "the command line"
    head = (
        f"# {source}, resolved. A record: a clone is changed in {SECTION} ({hashlib.sha1(body.encode()).hexdigest()})"
    )
    task.set_configuration_object("config", f"{head}\n{body}", config_type="YAML")
    task.update_parameters({f"{SECTION}/{name}": as_text(value) for name, value in values.items()})


def upload_command(folder: str) -> str:
    return f"python -m tracking upload {shlex.quote(folder)}"


@contextmanager
def on_its_own_account(consequence: str) -> Iterator[None]:
    """A failure within is told in a line, and is no failure of the run."""
    try:
        yield
    except Exception as error:  # of the SDK, the network, the server: anything
        reason = " ".join(str(error).split())[:200]
        print(f"ClearML: {consequence}: {type(error).__name__}: {reason}", flush=True)


def requirements() -> Iterator[tuple[str, str]]:
    """The packages of requirements.txt, and their versions here: what an agent installs."""
    with open(os.path.join(ROOT, "requirements.txt"), encoding="utf-8") as file:
        for line in file:
            name = re.match(r"[\w-]*", line)[0]
            if name:
                with suppress(importlib.metadata.PackageNotFoundError):  # another way to have it
                    yield name, importlib.metadata.version(name)


def upload_uri() -> str | bool:
    """Where the user's clearml.conf wants models to go; else the server's own files."""
    from clearml.config import config_obj

    configured = config_obj.get("sdk.development.default_output_uri", None)
    return os.environ.get("CLEARML_DEFAULT_OUTPUT_URI") or configured or True


left_behind = False  # a thread that waits for a server


def give_up(line: str) -> None:
    global left_behind
    left_behind = True
    print(line, flush=True)


def leave(code: int) -> NoReturn:
    """sys.exit; but not even Python's own end of threads waits for a server that is gone."""
    if left_behind:
        for stream in (sys.__stdout__, sys.__stderr__):
            stream.flush()
        os._exit(code)
    sys.exit(code)


# ---- sessions and their upload ----


class Session:
    """Which tasks a run's folder has: on a server, and offline, not sent yet. Kept in clearml/task.json.

    online, offline: ids, or None
    """

    def __init__(self, folder: str):
        self.root = os.path.join(os.path.abspath(folder), "clearml")
        self.file = os.path.join(self.root, "task.json")
        try:
            known = graphs.read_json(self.file)
        except (OSError, ValueError):
            known = None  # damaged: a new task gets the whole run
        known = known if isinstance(known, dict) else {}
        self.online: str | None = known.get("online")
        self.offline: str | None = known.get("offline")
        if self.offline is not None and not os.path.isdir(self.offline_folder):
            self.offline = None
        self.lock: Any = None

    @property
    def offline_folder(self) -> str:
        return os.path.join(self.root, "offline", str(self.offline))

    def hold(self) -> bool:
        """Whether no other process of this machine has the session; then it is this one's until it ends."""
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

    def note(self, task_id: str) -> None:
        if task_id.startswith("offline"):
            self.offline = task_id
        else:
            self.online = task_id
        self.write()

    def write(self) -> None:
        with open(self.file + ".tmp", "w", encoding="utf-8") as file:
            json.dump({"online": self.online, "offline": self.offline}, file)
        os.replace(self.file + ".tmp", self.file)

    def drop_offline(self) -> None:
        shutil.rmtree(os.path.join(self.root, "offline"), ignore_errors=True)
        self.offline = None
        self.write()

    def forget(self) -> None:
        """Of a run that starts anew in this folder."""
        self.online = None
        self.drop_offline()


def import_session(session: Session) -> str:
    """Send an offline session to the server and remove it; the id of its task there. Sent again after a failure, it
    goes into the same task."""
    Task = load_sdk().Task
    for name in ("metrics.jsonl", "log.jsonl"):
        drop_half_line(os.path.join(session.offline_folder, name))

    class Importer(Task):
        @classmethod
        def import_task(cls, *args: Any, **kwargs: Any) -> Any:
            task = find_task(session.online) if session.online else None
            if task is None:
                task = super().import_task(*args, **kwargs)
                session.note(task.id)  # at once: what fails from here on goes on in this task
            return task

    Importer.import_offline_session(session.offline_folder)
    session.drop_offline()
    assert session.online is not None
    return session.online


def drop_half_line(path: str) -> None:
    """A process that was killed may leave its last line cut short; the SDK cannot read that."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    whole = []
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            continue
        whole.append(line if line.endswith("\n") else line + "\n")
    if whole != lines:
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(whole)
        os.replace(path + ".tmp", path)


def upload(folder: str) -> None:
    """Send what a server does not have yet of the run in `folder`: an offline session, or the rest of a task
    whose server went away. Sending it twice changes nothing.

    Raises:
        ConfigError: no tracked run there, one that still runs, no server, or a task that it does not know.
    """
    session = Session(folder)
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
    task = find_task(task_id)
    if task is None:
        raise ConfigError(
            f"upload: the server does not know task {task_id}; `python train.py --resume auto --output-dir "
            f"{shlex.quote(folder)}` makes a new one of the run"
        )
    task.mark_started(force=True)
    task.output_uri = upload_uri()
    report = TaskReport(task, folder, no_files=None)
    report.so_far()
    report.outcome()
    report.artifacts()
    report.models()
    task.flush(wait_for_uploads=True)
    if os.path.exists(os.path.join(folder, "summary.json")):
        task.mark_completed(force=True)
    else:
        task.mark_stopped(force=True, status_message="stopped early")
    print(f"ClearML: task {task_id}, {task.get_output_log_web_page()}")


def main(argv: Sequence[str]) -> int:
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
        give_up("ClearML: the server stopped answering; the same command sends the rest")
        return 1
    for error in failed:
        line = " ".join(str(error).split())
        known = isinstance(error, ConfigError)
        print(f"error: {line if known else f'upload: {type(error).__name__}: {line[:200]}'}", file=sys.stderr)
        return 2 if known else 1
    return 0
