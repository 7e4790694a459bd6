"""ClearML: a run as a task on a server, or offline in OUTPUT_DIR/clearml/ until `upload` takes it there.

    python tracking.py upload OUTPUT_DIR

The only file that imports ClearML, and only where a run is tracked. Training never waits for the server:
scalars and plots go into the SDK's queue, and closing is watched. What is in the run's folder is the
truth; reporting an epoch again replaces it, so a resumed or uploaded run is reported whole.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from torch import Tensor

import config as settings
import graphs
from config import CLEARML, Config, ConfigError, as_text, from_text
from runlog import Dashboard, RunLog
from stages import plan_table

SECTION = "Hyperparameters"  # of the task's settings
NOT_SETTINGS = ("config", "plan", *CLEARML)  # how this very process was started
ARTIFACTS = ("summary.json", "metrics.jsonl", "report.html")
SHORTEST_NAME = 3  # characters, that a server takes
MAX_CLASSES = 50  # of a whole confusion matrix; one of 1,000 classes is an event of 6 MB
PROBE_SECONDS = 3.0
ABORT_SECONDS = 600.0  # for the step in progress and a checkpoint, after someone pressed Abort
CLOSE_SECONDS = 900.0  # for the uploads of a run, as long as the server answers
PATIENCE = 3.0  # seconds of closing before the server is asked whether it is still there

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
    return bool(os.environ.get("CLEARML_TASK_ID") or os.environ.get("TRAINS_TASK_ID"))


def load_sdk() -> Any:
    """The module `clearml`, with the settings that make it close at once."""
    here = os.path.dirname(os.path.abspath(__file__))
    os.environ.setdefault("CLEARML_CONFIG_PATH", os.path.join(here, "configs", "clearml"))
    import clearml

    return clearml


def resolve(argv: Sequence[str]) -> Config:
    """`config.resolve`; a task on an agent takes the settings it was cloned with, and what was changed in it.

    Raises:
        ConfigError: as there. The task fails with the same line.
    """
    if not on_agent():
        return settings.resolve(argv)
    base, changed = settings_of_task()
    try:
        return settings.resolve(argv, changed, base)
    except ConfigError as error:
        fail_task(str(error))
        raise


def settings_of_task() -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that the task on this agent was made with, and those of its fields that say something else."""
    reason = why_no_server()
    if reason is not None:
        raise ConfigError(f"clearml: the task's settings cannot be read: {reason}")
    task = load_sdk().Task.get_task(task_id=os.environ.get("CLEARML_TASK_ID") or os.environ["TRAINS_TASK_ID"])
    fields = (task.get_parameters_as_dict() or {}).get(SECTION, {})
    text = task.get_configuration_object("config") or ""
    head, _, body = text.partition("\n")
    if not text:
        base = {}  # a task of another script, or one made by hand
    elif hashlib.sha1(body.encode()).hexdigest() not in head:
        message = f"the configuration object `config` is a record and was changed; change {SECTION} instead"
        fail_task(message)
        raise ConfigError(f"clearml: {message}")
    else:
        base = yaml.safe_load(body)
    changed = {}
    for name, text in fields.items():
        if name not in settings.SETTINGS or name in NOT_SETTINGS:
            changed[name] = text  # unknown, `resolve` says so
        elif name not in base or text != as_text(base[name]):
            value = from_text(name, str(text))
            if name not in base or value != base[name]:
                changed[name] = value
    return base, changed


def fail_task(message: str) -> None:
    """The task on this agent ends as failed, for the reason that the terminal says too."""
    task = load_sdk().Task.get_task(task_id=os.environ.get("CLEARML_TASK_ID") or os.environ["TRAINS_TASK_ID"])
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
    reason = "as asked" if config.clearml == "offline" else why_no_server()
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
    verify = config_obj.get("api.verify_certificate", True)
    answer = [f"{host} did not answer within {timeout:g} s"]

    def ask() -> None:
        import requests

        try:
            if token:
                reply = requests.get(f"{host}/debug.ping", timeout=timeout, verify=verify)
            else:
                reply = requests.get(f"{host}/auth.login", auth=(key, secret), timeout=timeout, verify=verify)
            refused = reply.status_code in (401, 403)
            answer[0] = (
                "" if reply.ok else f"{host} " + ("refuses the keys" if refused else f"says {reply.status_code}")
            )
        except requests.ConnectTimeout:
            pass
        except requests.ConnectionError as error:
            unknown = any(word in str(error) for word in ("resolve", "getaddrinfo", "Name or service"))
            answer[0] = f"{host} " + ("is no known host" if unknown else "cannot be reached")
        except (requests.RequestException, ValueError) as error:
            if not isinstance(error, requests.Timeout):
                answer[0] = f"{host}: {type(error).__name__}"

    # In a thread of its own: looking up a host's name heeds no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0] or None


# ---- what is said of a run ----


class TaskReport:
    """A run, told to a ClearML task from what its folder holds. Telling it again changes nothing.

    folder: the run's
    """

    def __init__(self, task: Any, folder: str):
        self.task = task
        self.folder = folder
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
            if os.path.exists(picture):
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
        self.task: Any = None
        self.report: TaskReport | None = None
        self.finished = self.aborted = False
        self.closed = threading.Event()
        self.best_due = 0.0

    def start(self, log: RunLog, config: Config) -> None:
        with on_its_own_account("this run is not reported"):
            session = Session(self.folder)
            if config.resume != "auto":
                session.forget()
            self.task = self.init(config, session)
            session.note(self.task.id)
            self.send_settings(config)
            self.report = TaskReport(self.task, self.folder)
            self.report.so_far()
            self.task.connect_label_enumeration({name: i for i, name in enumerate(self.report.classes)})
            if self.offline_because is None:
                self.task.register_abort_callback(self.abort, callback_execution_timeout=ABORT_SECONDS)
        if self.offline_because is not None:
            print(
                f"ClearML: offline, {self.offline_because}; the session lies in {os.path.join(self.folder, 'clearml')}, "
                f"`python tracking.py upload {self.folder}` sends it to a server",
                flush=True,
            )

    def init(self, config: Config, session: "Session") -> Any:
        if self.offline_because is None:
            Task = load_sdk().Task
            continued = session.online or (import_session(session) if session.offline else None)
        else:
            os.environ["CLEARML_CACHE_DIR"] = os.path.join(os.path.abspath(self.folder), "clearml")
            Task = load_sdk().Task
            Task.set_offline(True)
            continued = session.offline
        name = config.clearml_task or os.path.basename(os.path.abspath(self.folder))
        if len(name) < SHORTEST_NAME:
            name = f"{config.model} {name}"
        with untouched():
            Task.set_random_seed(None)
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
            )
        if continued and task.id != continued:
            print(f"ClearML: task {continued} cannot be continued; a new one, {task.id}, has the whole run", flush=True)
        return task

    def send_settings(self, config: Config) -> None:
        values = {name: value for name, value in config.as_dict().items() if name not in NOT_SETTINGS}
        body = yaml.safe_dump(values, sort_keys=False)
        source = config.config or "the command line"
        head = f"# {source}, resolved. A record: a clone is changed in {SECTION} ({hashlib.sha1(body.encode()).hexdigest()})"
        self.task.set_configuration_object("config", f"{head}\n{body}", config_type="YAML")
        self.task.update_parameters({f"{SECTION}/{name}": as_text(value) for name, value in values.items()})

    def epoch(self, record: dict[str, Any]) -> None:
        if self.report is not None:
            with on_its_own_account("an epoch is not reported to ClearML"):
                self.report.epoch(record)

    def best(self, epoch: int, confusion: Tensor) -> None:
        # Early on every epoch is the best; `finish` sends the one that stays.
        if self.report is not None and time.monotonic() >= self.best_due:
            self.best_due = time.monotonic() + 60
            with on_its_own_account("confusions are not reported to ClearML"):
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
        if self.task is None:
            if error is not None and on_agent():
                fail_task(message)
        elif not self.in_time(lambda: self.close(error, message)):
            give_up(
                f"ClearML: the server stopped answering; all of the run is in {self.folder}, "
                f"`python tracking.py upload {self.folder}` sends the rest"
            )
        self.closed.set()

    def close(self, error: BaseException | None, message: str) -> None:
        """Send what is left and end the task: completed, stopped or failed."""
        with on_its_own_account("the end of the run is not reported to ClearML"):
            task = self.task
            ended_already = self.aborted and not on_agent()  # a task that is stopped takes no more files
            if self.report is not None and not ended_already:
                if type(error).__name__ == "NonFiniteLoss":
                    task.add_tags(["diverged"])
                self.report.outcome()
                self.report.artifacts()
                if self.offline_because is None:  # offline the SDK cannot register a model; `upload` does
                    self.report.models()
                    task.flush(wait_for_uploads=True)
            task.close()
            if self.offline_because is None and not self.finished:
                ended = load_sdk().Task.get_task(task_id=task.id)
                if error is None or isinstance(error, KeyboardInterrupt):
                    ended.mark_stopped(force=True, status_message="stopped early; --resume auto continues it")
                else:
                    ended.mark_failed(force=True, status_reason=type(error).__name__, status_message=message)

    def in_time(self, work: Callable[[], None]) -> bool:
        """Do `work` in a thread; False if the server went away meanwhile, and the thread is left behind."""
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        deadline, silent = time.monotonic() + CLOSE_SECONDS, 0
        while time.monotonic() < deadline and silent < 2:
            thread.join(PATIENCE)
            if not thread.is_alive():
                return True
            if self.offline_because is None:
                silent = silent + 1 if why_no_server() else 0
        return not thread.is_alive()


@contextmanager
def untouched() -> Iterator[None]:
    """Random generators and signal handlers are afterwards as before. The SDK seeds the former, and its handlers
    swallow SIGTERM and spin on a segmentation fault."""
    draws = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE]
    numbers += [signal.SIGQUIT] if hasattr(signal, "SIGQUIT") else []
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        random.setstate(draws[0])
        np.random.set_state(draws[1])
        torch.set_rng_state(draws[2])


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
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "requirements.txt"), encoding="utf-8") as file:
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
    """Which tasks a run's folder has: on a server, offline. Kept in clearml/task.json.

    online, offline: ids, or None
    """

    def __init__(self, folder: str):
        self.root = os.path.join(os.path.abspath(folder), "clearml")
        self.file = os.path.join(self.root, "task.json")
        known = graphs.read_json(self.file) or {}
        self.online: str | None = known.get("online")
        self.offline: str | None = known.get("offline")

    @property
    def offline_folder(self) -> str:
        return os.path.join(self.root, "offline", str(self.offline))

    def note(self, task_id: str) -> None:
        if task_id.startswith("offline"):
            self.offline = task_id
        else:
            self.online = task_id
        os.makedirs(self.root, exist_ok=True)
        with open(self.file + ".tmp", "w", encoding="utf-8") as file:
            json.dump({"online": self.online, "offline": self.offline}, file)
        os.replace(self.file + ".tmp", self.file)

    def forget(self) -> None:
        """Of a run that starts anew in this folder."""
        if os.path.exists(self.file):
            shutil.rmtree(os.path.join(self.root, "offline"), ignore_errors=True)
            os.remove(self.file)
        self.online = self.offline = None


def import_session(session: Session) -> str:
    """Send an offline session to the server; the id of its task there."""
    for name in ("metrics.jsonl", "log.jsonl"):
        drop_half_line(os.path.join(session.offline_folder, name))
    task_id = load_sdk().Task.import_offline_session(session.offline_folder)
    session.note(task_id)
    return task_id


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
        ConfigError: no tracked run there, no server, or a task that it does not know.
    """
    session = Session(folder)
    if session.online is None and (session.offline is None or not os.path.isdir(session.offline_folder)):
        raise ConfigError(
            f"upload: no ClearML session in {session.root}; give the output_dir of a run that was tracked"
        )
    reason = why_no_server()
    if reason is not None:
        raise ConfigError(f"upload: {reason}; set it up with clearml-init")
    task_id = session.online or import_session(session)
    try:
        task = load_sdk().Task.get_task(task_id=task_id)
    except ValueError as error:
        raise ConfigError(
            f"upload: the server does not know task {task_id}; remove {session.file} to send it anew"
        ) from error
    task.mark_started(force=True)
    report = TaskReport(task, folder)
    task.output_uri = upload_uri()
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
        print("usage: python tracking.py upload OUTPUT_DIR", file=sys.stderr)
        return 2
    try:
        upload(argv[1])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
