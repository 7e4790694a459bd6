"""Runs as ClearML sees them: the real SDK and agent against a double of the server's API (clearml_server.py).

It shows what is sent, not what a dashboard draws.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from clearml_server import ClearMLServer, Refused
from conftest import ROOT, assert_same_bits, checkpoint, make_tree, metrics, program

from reporting.folder import RunFolder
from settings.errors import ConfigError
from settings.table import SETTINGS
from settings.values import convert, from_text
from tracking.__main__ import main
from tracking.report import TaskReport
from tracking.session import Session

RUN = ["--model", "mobilenet_v3_small", "--device", "cpu", "--workers", "0", "--lr", "0.01", "--batch-size", "8", "--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32", "--print-freq", "100"]  # fmt: skip
STAGES = ["--stages", "2", "--epochs", "4", "--train-crop-size", "32", "64", "--dropout", "0.1", "0.4", "--stochastic-depth-prob", "0", "0.2", "--auto-augment", "ra", "--ra-magnitude", "5", "15", "--mixup-alpha", "0", "0.2", "--model-ema", "--model-ema-steps", "1", "--model-ema-decay", "0.7"]  # fmt: skip
STAGED = [*RUN, "--model", "efficientnet_v2_b0", *STAGES]


@pytest.fixture
def server():
    with ClearMLServer() as double:
        yield double
        double.check()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tracked") / "images")


def nowhere(cache_dir):
    """An environment in which no ClearML server is configured, whatever this machine's user has."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    (cache_dir / "empty.conf").touch()
    keys = ("API_HOST", "WEB_HOST", "FILES_HOST", "API_ACCESS_KEY", "API_SECRET_KEY", "TASK_ID")
    return {f"CLEARML_{key}": "" for key in keys} | {"CLEARML_CONFIG_FILE": str(cache_dir / "empty.conf")}


def only_task(server):
    (task,) = server.tasks.values()
    return task


def models_of(task):
    return {model["name"]: model for model in task.models["output"].values()}


def popen(*flags, env):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


def wait_for_epochs(folder, count, process):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- what the dashboard shows ----


@pytest.fixture(scope="module")
def online(images, tmp_path_factory):
    """A run of two stages and four epochs through the command line: the server, its task, the run's folder, its output."""
    folder = tmp_path_factory.mktemp("online")
    file = folder / "recipe.yaml"
    file.write_text("# a recipe\nhflip_prob: 0.25\n")
    with ClearMLServer() as server:
        flags = [
            *STAGED,
            "--config",
            file,
            "--data-path",
            images,
            "--output-dir",
            folder / "run",
            "--clearml-tags",
            "staged",
            "small",
        ]
        done = program(*flags, env=server.env(folder / "cache"))
        assert done.returncode == 0, done.stdout + done.stderr
        server.check()
        yield server, only_task(server), folder / "run", done.stdout


def test_a_run_is_one_completed_task(online):
    server, task, *_ = online
    assert task.status == "completed" and task.name == "run" and sorted(task.tags) == ["small", "staged"]
    assert server.projects[task.fields["project"]]["name"] == "progressive-learning"
    assert task.script["entry_point"] == "train.py"
    assert not server.refused
    names = {line.split("==")[0].strip() for line in task.script["requirements"]["pip"].splitlines() if "==" in line}
    assert {"torch", "torchvision", "numpy", "tqdm", "matplotlib", "clearml"} <= {name.lower() for name in names}


def test_hyperparameters_are_the_resolved_settings_by_the_names_of_the_flags(online):
    values = online[1].hyperparams["Hyperparameters"]
    assert values["lr"] == "0.01" and values["hflip_prob"] == "0.25"
    assert values["train_crop_size"] == "[32, 64]" and values["dropout"] == "[0.1, 0.4]"
    assert values["model_ema"] == "true" and values["weights"] == ""
    apart = {"config", "plan", "clearml", "clearml_project", "clearml_task", "clearml_tags"}
    assert set(values) == set(SETTINGS) - apart
    assert set(online[1].hyperparams) <= {"Hyperparameters", "Args"} and not online[1].hyperparams.get("Args")


def test_the_configuration_object_is_the_resolved_yaml(online):
    text = online[1].configuration["config"]
    settings = yaml.safe_load(text)
    assert settings["hflip_prob"] == 0.25 and settings["dropout"] == [0.1, 0.4] and settings["stages"] == 2
    assert "recipe.yaml" in text.splitlines()[0]


def test_the_plan_is_a_table(online):
    cells = online[1].plots["plan", "stages"][0]["data"][0]
    heads, columns = [str(head).strip() for head in cells["header"]["values"]], cells["cells"]["values"]
    column = dict(zip(heads, columns))
    assert column["epochs"] == ["1-2", "3-4"]
    assert column["image size"] == ["32", "64"] and column["RandAugment"] == ["5", "15"]
    assert column["mixup"] == ["off", "0.2"] and column["dropout"] == ["0.1", "0.4"]


@pytest.mark.parametrize(
    "title, series, key",
    [
        ("loss", "train", "loss"), ("loss", "val", "val_loss"), ("top1", "val", "top1"), ("top1", "val_ema", "top1_ema"),
        ("top5", "val", "top5"), ("lr", "lr", "lr"), ("images_per_second", "train", "images_per_second"),
        ("data_wait_fraction", "train", "data_wait_fraction"), ("epoch_seconds", "train", "epoch_seconds"),
    ],
)  # fmt: skip
def test_scalars_follow_the_global_epoch(online, title, series, key):
    sent, records = online[1].scalars[title, series], metrics(online[2])
    assert list(sent) == [0, 1, 2, 3]
    assert list(sent.values()) == pytest.approx([record[key] for record in records])


@pytest.mark.parametrize(
    "name, values",
    [
        ("image_size", [32, 32, 64, 64]), ("ra_magnitude", [5, 5, 15, 15]), ("mixup_alpha", [0, 0, 0.2, 0.2]),
        ("dropout", [0.1, 0.1, 0.4, 0.4]), ("stochastic_depth_prob", [0, 0, 0.2, 0.2]), ("batch_size", [8, 8, 8, 8]),
    ],
)  # fmt: skip
def test_one_graph_shows_what_grows(online, name, values):
    assert online[1].scalars["stage", name] == pytest.approx(dict(enumerate(values)))


def test_what_is_not_there_is_not_sent(online):
    titles = {title for title, _ in online[1].scalars}
    assert "gpu_memory_gib" not in titles and "non_finite" not in titles  # on a CPU, and all went well


def test_a_picture_of_training_images_for_each_stage(online):
    server, task, folder, _ = online
    pictures = {(image.title, image.series, image.iteration): server.file(image.url) for image in task.images}
    assert pictures == {
        ("training images", "stage 0, 32 px", 0): (folder / "report" / "stage_0.png").read_bytes(),
        ("training images", "stage 1, 64 px", 2): (folder / "report" / "stage_1.png").read_bytes(),
    }


def test_confusions_and_accuracy_per_class_at_the_best_epoch_and_the_last(online):
    _, task, folder, _ = online
    summary = json.loads((folder / "summary.json").read_text())
    for series, epoch, file in (("best", summary["best_epoch"], "best"), ("last", 3, "last")):
        kept = json.loads((folder / "report" / f"confusion_{file}.json").read_text())["confusion"]
        figure = task.plots["confusion matrix", series][epoch]
        rows = dict(zip(figure["data"][0]["y"], figure["data"][0]["z"]))
        assert rows["ant"] == kept[0] and rows["bee"] == kept[1] and figure["data"][0]["x"] == ["ant", "bee"]
        table = task.plots["accuracy per class", series][epoch]["data"][0]["cells"]["values"]
        # five images of each class; ten per correct one in two hundred
        assert [list(column) for column in table[:2]] == [["ant", "bee"], [5, 5]]
        assert [float(share) for share in table[2]] == [20 * kept[0][0], 20 * kept[1][1]]


def test_best_and_last_model_with_epoch_and_labels(online):
    server, task, folder, _ = online
    summary = json.loads((folder / "summary.json").read_text())
    models = models_of(task)
    assert set(models) == {"run best", "run last"}
    for name, file, epoch in (("run best", "model_best.pth", summary["best_epoch"]), ("run last", "checkpoint.pth", 3)):
        model = models[name]
        assert server.file(model["uri"]) == (folder / file).read_bytes()
        assert model["labels"] == {"ant": 0, "bee": 1} and model["framework"] == "PyTorch"
        assert f"epoch {epoch}:" in model["comment"]


def test_artifacts_are_the_files_of_the_run(online):
    server, task, folder, _ = online
    assert set(task.artifacts) == {"summary.json", "metrics.jsonl", "report.html"}
    for name, artifact in task.artifacts.items():
        assert server.file(artifact["uri"]) == (folder / name).read_bytes()


def test_single_values_are_the_outcome(online):
    _, task, folder, _ = online
    summary, sent = json.loads((folder / "summary.json").read_text()), task.single_values
    for name in ("best_top1", "top1", "images_per_second", "speedup_over_fixed_size", "parameters", "best_epoch"):
        assert sent[name] == pytest.approx(summary[name])
    assert sent["train_hours"] == pytest.approx(summary["train_seconds"] / 3600)
    assert (
        sent["parameters"] == 5_858_704 + 1280 * 2 + 2
    )  # EfficientNetV2-B0 without a head, as Keras counts it; two classes
    fast = metrics(folder)[2:]
    at_last_size = 48 / sum(record["epoch_seconds"] for record in fast)  # two epochs of 24 images
    assert sent["speedup_over_fixed_size"] == pytest.approx(96 / at_last_size / summary["train_seconds"])


def test_the_console_is_kept(online):
    _, task, _, printed = online
    assert "stage 1, 64 px, epoch 4/4" in task.console and "GFLOPs/image" in task.console
    assert f"tasks/{task.id}/output/log" in printed


def test_many_classes_are_the_worst_and_a_table_of_confusions(tmp_path):
    # 60 classes of 10 images: class i has i % 10 right, the rest taken for its successor
    import numpy as np

    matrix = np.zeros((60, 60), dtype=int)
    for i in range(60):
        matrix[i, i], matrix[i, (i + 1) % 60] = i % 10, 10 - i % 10
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "plan.json").write_text(json.dumps({"stages": [], "classes": [f"c{i}" for i in range(60)]}))
    told = {}

    class Logger:
        def report_table(self, title, series, iteration, table_plot):
            told[title] = table_plot

        def report_confusion_matrix(self, title, series, matrix, iteration, **labels):
            told[title] = matrix, labels["xlabels"]

    class Task:
        def get_logger(self):
            return Logger()

    TaskReport(Task(), RunFolder(str(tmp_path)), None).confusion("best", 0, matrix)
    shown, labels = told["confusion matrix"]
    # of the six classes of each kind (0, 1, ... 9 right) the worst 50: all up to 7 right, two of those with 8
    assert shown.shape == (50, 50) and "c0" in labels and "c9" not in labels and "c59" not in labels
    assert len(told["accuracy per class"]) == 61 and told["accuracy per class"][8] == ["c7", 10, "70.00"]
    confusions = told["commonest confusions"]
    assert confusions[0] == ["true", "predicted", "images"] and len(confusions) == 21
    assert {tuple(row) for row in confusions[1:7]} == {(f"c{i}", f"c{i + 1}", 10) for i in range(0, 60, 10)}


def test_what_is_not_finite_is_flagged_and_never_sent_as_zero(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "plan.json").write_text(json.dumps({"stages": [], "classes": ["ant", "bee"]}))
    sent = []

    class Task:
        def get_logger(self):
            return self

        def report_scalar(self, title, series, value, iteration):
            sent.append((title, series, value, iteration))

    record = {"epoch": 3, "loss": 0.5, "val_loss": None, "top5": float("nan"), "non_finite": ["val_loss"]}
    TaskReport(Task(), RunFolder(str(tmp_path)), None).epoch(record)
    assert sent == [("loss", "train", 0.5, 3), ("non_finite", "val_loss", 1, 3)]


# ---- it does no harm ----


def test_all_modes_train_to_the_same_bits(images, tmp_path, server):
    flags = [*RUN, "--data-path", images, "--epochs", "2", "--auto-augment", "ta_wide", "--workers", "1"]
    for mode in ("off", "offline", "auto"):  # auto is online here
        env = server.env(tmp_path / "cache") if mode == "auto" else nowhere(tmp_path / "cache")
        done = program(*flags, "--output-dir", tmp_path / mode, "--clearml", mode, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    for mode in ("offline", "auto"):
        for part in ("model", "optimizer"):
            assert_same_bits(checkpoint(tmp_path / "off")[part], checkpoint(tmp_path / mode)[part])
    assert len(server.tasks) == 1
    assert not (tmp_path / "off" / "clearml").exists() and (tmp_path / "offline" / "clearml" / "offline").is_dir()


def test_off_never_imports_clearml(images, tmp_path):
    code = (
        "import sys, train; code = train.run(sys.argv[1:]); "
        "sys.exit(code or 40 * any(name.split('.')[0] == 'clearml' for name in sys.modules))"
    )
    flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1", "--clearml", "off"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sigterm_saves_and_the_same_task_goes_on(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "200"]
    process = popen(*flags, env=env)
    wait_for_epochs(out, 3, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 3, printed
    task, before = only_task(server), len(metrics(out))
    assert task.status == "stopped" and "run last" in models_of(task)
    budget = program("--resume", "auto", "--output-dir", out, "--time-budget", "3", env=env)
    assert budget.returncode == 3, budget.stdout + budget.stderr
    assert only_task(server) is task and task.status == "stopped"
    epochs = [record["epoch"] for record in metrics(out)]
    assert len(epochs) > before and epochs == list(range(len(epochs)))
    assert list(task.scalars["loss", "train"]) == epochs
    assert len(task.fields["models"]["output"]) == 2


def test_a_run_that_diverges_fails_with_its_own_code(images, tmp_path, server):
    flags = [
        *RUN,
        "--data-path",
        images,
        "--output-dir",
        tmp_path / "run",
        "--epochs",
        "3",
        "--lr",
        "1e30",
        "--print-freq",
        "1",
    ]
    done = program(*flags, env=server.env(tmp_path / "cache"))
    assert done.returncode == 1 and "the loss is not finite" in done.stderr
    task = only_task(server)
    assert task.status == "failed" and "the loss is not finite" in task.status_message and "diverged" in task.tags


def test_a_mistake_makes_no_task(images, tmp_path, server):
    flags = [*RUN, "--data-path", tmp_path / "none", "--output-dir", tmp_path / "run"]
    done = program(*flags, env=server.env(tmp_path / "cache"))
    assert done.returncode == 2 and not server.tasks and not (tmp_path / "run").exists()


# ---- no server, or not for long ----


def closed_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("why", ["not configured", "refused", "silent", "wrong keys", "unknown host"])
def test_without_a_server_auto_is_offline_and_says_why(images, tmp_path, server, why):
    env = server.env(tmp_path / "cache")
    if why == "not configured":
        env, said = nowhere(tmp_path / "cache"), "no ClearML server is configured here"
    elif why == "refused":
        env["CLEARML_API_HOST"], said = f"http://127.0.0.1:{closed_port()}", "cannot be reached"
    elif why == "silent":
        server.hang()
        said = "did not answer within 3 s"
    elif why == "wrong keys":
        env["CLEARML_API_SECRET_KEY"], said = "wrong", "refuses the keys"
    else:
        env["CLEARML_API_HOST"], said = "http://no-such-host.invalid", "http://no-such-host.invalid"
    out = tmp_path / "run"
    flags = [*RUN, "--data-path", images, "--epochs", "1", "--output-dir", out]
    done = program(*flags, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ClearML: offline")]
    assert said in line and str(out / "clearml") in line and f"python -m tracking upload {out}" in line
    assert (out / "summary.json").exists()
    if why in ("refused", "wrong keys"):
        asked = program(*flags, "--overwrite", "--clearml", "online", env=env)
        assert asked.returncode == 2 and asked.stderr.count("\n") == 1 and said in asked.stderr
        assert (out / "summary.json").exists()  # nothing lost
    assert not server.tasks
    server.resume()


@pytest.mark.parametrize("how", ["stop", "hang"])
def test_a_server_lost_in_mid_run_costs_nothing(images, tmp_path, server, how):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    process = popen(*RUN, "--data-path", images, "--output-dir", out, "--epochs", "8", env=env)
    wait_for_epochs(out, 1, process)
    getattr(server, how)()
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0, printed
    assert [record["epoch"] for record in metrics(out)] == list(range(8)) and (out / "summary.json").exists()
    (line,) = [line for line in printed.splitlines() if line.startswith("ClearML: the server stopped answering")]
    assert f"python -m tracking upload {out}" in line
    # it comes back, and gets the rest
    server.start() if how == "stop" else server.resume()
    assert upload(out, env).returncode == 0
    task = only_task(server)
    assert list(task.scalars["loss", "train"]) == list(range(8)) and task.status == "completed"
    assert set(models_of(task)) == {"run best", "run last"} and len(task.artifacts) == 3


# ---- offline, and the upload ----


def upload(folder, env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-m", "tracking", "upload", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)


def test_killed_offline_resumed_and_uploaded_has_every_epoch_once(images, tmp_path, server):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "40", "--clearml", "offline"]
    process = popen(*flags, env=env)
    wait_for_epochs(out, 4, process)
    process.kill()
    process.communicate()
    session = Session(RunFolder(str(out)))
    with open(os.path.join(session.offline_folder, "metrics.jsonl"), "a") as file:
        file.write('[{"metric": "loss", "varia')  # cut short, as a kill may leave it
    done = program("--resume", "auto", "--output-dir", out, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Session(RunFolder(str(out))).offline == session.offline
    for _ in range(2):  # the second time changes nothing
        sent = upload(out, server.env(tmp_path / "cache"))
        assert sent.returncode == 0, sent.stdout + sent.stderr
        task = only_task(server)
        assert list(task.scalars["loss", "train"]) == list(range(40))
        assert list(task.scalars["loss", "train"].values()) == pytest.approx([r["loss"] for r in metrics(out)])
        assert task.status == "completed" and "epoch 40/40" in task.console
        for name, file in (("run best", "model_best.pth"), ("run last", "checkpoint.pth")):
            assert server.file(models_of(task)[name]["uri"]) == (out / file).read_bytes()
        assert set(task.artifacts) == {"summary.json", "metrics.jsonl", "report.html"}
        assert task.hyperparams["Hyperparameters"]["epochs"] == "40" and len(task.images) == 1


def test_a_killed_session_is_uploaded_without_a_resume(images, tmp_path, server):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    process = popen(
        *RUN, "--data-path", images, "--output-dir", out, "--epochs", "400", "--clearml", "offline", env=env
    )
    wait_for_epochs(out, 3, process)
    process.kill()
    process.communicate()
    with open(os.path.join(Session(RunFolder(str(out))).offline_folder, "log.jsonl"), "a") as file:
        file.write('[{"msg": "half a li')
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0
    task = only_task(server)
    assert list(task.scalars["loss", "train"]) == [record["epoch"] for record in metrics(out)]
    assert task.status == "stopped" and set(models_of(task)) == {"run best", "run last"}


def test_upload_says_what_it_needs(tmp_path, server, capsys):
    assert main(["send"]) == 2
    assert capsys.readouterr().err == "usage: python -m tracking upload OUTPUT_DIR\n"
    assert main(["upload", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no ClearML session" in told and told.count("\n") == 1
    (tmp_path / "clearml").mkdir()
    (tmp_path / "clearml" / "task.json").write_text('{"online": "f" , "offline": null}')
    unset = upload(tmp_path, nowhere(tmp_path / "cache"))
    assert unset.returncode == 2 and "no ClearML server is configured" in unset.stderr
    unknown = upload(tmp_path, server.env(tmp_path / "cache"))
    assert unknown.returncode == 2 and "does not know task f" in unknown.stderr


# ---- other processes, other machines ----


def test_two_processes_are_one_task(images, tmp_path, server):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    command += [*RUN, "--data-path", str(images), "--output-dir", str(out), "--epochs", "3", "--batch-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **server.env(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    task = only_task(server)
    assert list(task.scalars["loss", "train"]) == [0, 1, 2] and task.status == "completed"
    sent = [event for call in server.calls if call.endpoint == "events.add_batch" for event in call.body]
    assert sum(event.get("metric") == "loss" and event["variant"] == "train" for event in sent) == 3  # no rank twice
    # what an agent starts is the launcher, so that it starts all processes
    assert task.script["entry_point"].startswith("-m torch.distributed.run --standalone --nproc-per-node 2 train.py")


def test_abort_in_the_dashboard_saves_first(images, tmp_path, server):
    out = tmp_path / "run"
    process = popen(
        *RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000", env=server.env(tmp_path / "cache")
    )
    wait_for_epochs(out, 1, process)
    server.user_abort(only_task(server).id)
    printed, _ = process.communicate(timeout=100)  # the SDK asks every 15 s
    assert "stopped: aborted in ClearML; saved" in printed and process.returncode == 3
    assert checkpoint(out)["state"]["epoch"] >= len(metrics(out)) - 1
    task = only_task(server)
    assert task.status == "stopped" and not server.refused  # it takes no files any more


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


def run_agent(task_id, env, home):
    """A real clearml-agent runs one task, with the Python of these tests."""
    apart = {"CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL": "1", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clearml_agent", "execute", "--id", task_id]
    return subprocess.run(command, env={**os.environ, **env, **apart}, capture_output=True, text=True, timeout=300)


needs_agent = pytest.mark.skipif(
    importlib.util.find_spec("clearml_agent") is None or shutil.which("git") is None,
    reason="needs clearml-agent (requirements-dev.txt) and git",
)


@needs_agent
def test_a_clone_runs_with_changed_settings_and_fails_clearly_on_wrong_ones(images, tmp_path, server, repository):
    env = server.env(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "2", "--dropout", "0.2", "--auto-augment", "ra"]  # fmt: skip
    command = [sys.executable, "train.py", *map(str, [*flags, "--ra-magnitude", "7"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    first = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, timeout=200)
    assert first.returncode == 0, first.stdout + first.stderr
    original = only_task(server)

    out = tmp_path / "cloned"
    changes = {"lr": "0.005", "dropout": "[0.1, 0.4]", "stages": "2", "train_crop_size": "32, 48", "output_dir": str(out), "auto_augment": "ta_wide"}  # fmt: skip
    cloned = server.user_clone(original.id, {f"Hyperparameters/{name}": value for name, value in changes.items()})
    agent = run_agent(cloned.id, env, tmp_path)
    assert cloned.status == "completed", agent.stdout + agent.stderr
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["lr"] == 0.005 and settings["dropout"] == [0.1, 0.4] and settings["stages"] == 2
    assert settings["ra_magnitude"] == 9  # switched off with RandAugment, so it claims nothing
    assert [(r["stage"], r["image_size"], r["dropout"]) for r in metrics(out)] == [(0, 32, 0.1), (1, 48, 0.4)]
    assert metrics(out)[0]["lr"] == 0.005
    assert list(cloned.scalars["stage", "image_size"].values()) == [32, 48]
    assert cloned.hyperparams["Hyperparameters"]["ra_magnitude"] == "9"

    misspelt = server.user_clone(original.id, {"Hyperparameters/dropuot": "0.3"})
    run_agent(misspelt.id, env, tmp_path)
    assert misspelt.status == "failed" and "unknown setting dropuot; did you mean dropout?" in misspelt.console

    edited = server.user_clone(original.id)
    server.edit_configuration(edited.id, "config", original.configuration["config"].replace("lr: 0.01", "lr: 0.1"))
    run_agent(edited.id, env, tmp_path)
    assert edited.status == "failed" and "was changed; change Hyperparameters instead" in edited.console


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("lr", "1e-05", 0.00001), ("dropout", "[0.1, 0.3]", (0.1, 0.3)), ("dropout", "0.1 0.3", (0.1, 0.3)),
        ("dropout", "", None), ("stages", " 4 ", 4), ("model_ema", "True", True), ("amp", "false", False),
        ("resume", "", ""), ("opt", "adamw", "adamw"), ("stage_epochs", "(20, 30)", (20, 30)), ("epochs", "12.0", 12),
    ],
)  # fmt: skip
def test_what_a_field_of_the_dashboard_means(name, text, value):
    assert convert(name, from_text(name, text)) == value


@pytest.mark.parametrize(
    "name, text", [("lr", "fast"), ("lr", ""), ("stages", "2.5"), ("model_ema", "1"), ("dropout", "[0.1, x]")]
)
def test_what_a_field_of_the_dashboard_cannot_mean(name, text):
    with pytest.raises(ConfigError, match=name):
        convert(name, from_text(name, text))


# ---- at a bad moment ----


def test_a_server_that_falls_silent_while_a_task_is_made(images, tmp_path):
    def fall_silent(call, message):
        if call.endpoint == "tasks.create":
            double.hang()

    with ClearMLServer(on_call=fall_silent) as double:
        flags = [*RUN, "--data-path", images, "--output-dir", tmp_path / "run", "--epochs", "1"]
        done = program(*flags, env=double.env(tmp_path / "cache"))
        double.resume()
    assert done.returncode == 0 and "ClearML: the server stopped answering; this run is not reported" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()


def test_ctrl_c_ends_the_wait_for_a_server_and_keeps_the_outcome(images, tmp_path, server):
    out = tmp_path / "run"
    process = popen(*RUN, "--data-path", images, "--output-dir", out, "--epochs", "4", env=server.env(tmp_path / "c"))
    wait_for_epochs(out, 1, process)
    server.hang()
    deadline = time.monotonic() + 60
    while not (out / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "ClearML: interrupted; all of the run is in" in printed
    server.resume()


def test_a_dead_store_of_files_costs_files_only(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    env["CLEARML_FILES_HOST"] = f"http://127.0.0.1:{closed_port()}"
    done = program(*RUN, "--data-path", images, "--output-dir", out, "--epochs", "200", "--time-budget", "8", env=env)
    assert done.returncode == 3 and "pictures, artifacts and weights are not sent" in done.stdout
    task = only_task(server)
    assert task.status == "stopped" and list(task.scalars["loss", "train"]) == list(range(len(metrics(out))))
    assert not task.images and not task.artifacts and not task.models["output"]
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0
    assert (
        len(task.images) == 1 and "metrics.jsonl" in task.artifacts and set(models_of(task)) == {"run best", "run last"}
    )


def test_a_run_that_goes_on_is_not_uploaded_under_its_feet(images, tmp_path, server):
    out, env = tmp_path / "run", server.env(tmp_path / "cache")
    process = popen(*RUN, "--data-path", images, "--output-dir", out, "--epochs", "100000", env=env)
    wait_for_epochs(out, 1, process)
    refused = upload(out, env)
    assert refused.returncode == 2 and "a run or another upload uses" in refused.stderr
    assert only_task(server).status == "in_progress" and process.poll() is None
    process.kill()
    process.communicate()


def test_an_import_that_fails_goes_on_in_the_same_task(images, tmp_path, server):
    out = tmp_path / "my run"
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "2"]
    done = program(*flags, env={**nowhere(tmp_path / "cache"), "PYTHONFAULTHANDLER": "1"})
    assert done.returncode == 0 and f"`python -m tracking upload '{out}'`" in done.stdout
    refuse = server.api.events_add_batch
    server.api.events_add_batch = lambda events: (_ for _ in ()).throw(Refused(100, "no room"))
    first = upload(out, server.env(tmp_path / "cache"))
    server.api.events_add_batch = refuse
    assert upload(out, server.env(tmp_path / "cache")).returncode == 0, first.stderr
    task = only_task(server)  # no second one
    assert task.status == "completed" and list(task.scalars["loss", "train"]) == [0, 1]


def test_overwriting_forgets_the_older_run(images, tmp_path):
    out, env = tmp_path / "run", nowhere(tmp_path / "cache")
    flags = [*RUN, "--data-path", images, "--output-dir", out, "--epochs", "1"]
    assert program(*flags, "--clearml", "offline", env=env).returncode == 0
    assert program(*flags, "--clearml", "off", "--overwrite", "--time-budget", "0.01", env=env).returncode in (0, 3)
    session = Session(RunFolder(str(out)))
    assert session.offline is None and session.online is None
    (out / "clearml" / "task.json").write_text("{half")
    assert Session(RunFolder(str(out))).online is None  # damaged: as if there were none
