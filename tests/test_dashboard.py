"""What the dashboard of ClearML is sent, and what is read from it: one run by the real SDK, against a double of the
server's API (clearml_server.py). It shows what is sent, not what a dashboard draws."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from clearml_server import ClearMLServer
from programs import RUN, program
from runs import metrics

from reporting.folder import RunFolder
from settings.errors import ConfigError
from settings.table import SETTINGS, Config
from settings.values import convert, from_text
from stages import make_plan
from tracking.report import TaskReport

STAGED = (
    "--model efficientnet_v2_b0 --stages 2 --epochs 4 --train-crop-size 32 64 --dropout 0.1 0.4 "
    "--stochastic-depth-prob 0 0.2 --auto-augment ra --ra-magnitude 5 15 --mixup-alpha 0 0.2 --model-ema "
    "--model-ema-steps 1 --model-ema-decay 0.7"
).split()


@pytest.fixture(scope="module")
def online(images, tmp_path_factory):
    """A run of two stages and four epochs through the command line: the server, its task, the run's folder, its output."""
    folder = tmp_path_factory.mktemp("online")
    file = folder / "recipe.yaml"
    file.write_text("# a recipe\nhflip_prob: 0.25\n")
    with ClearMLServer() as server:
        where = ["--config", file, "--data-path", images, "--output-dir", folder / "run"]
        done = program(*RUN, *STAGED, *where, "--clearml-tags", "staged", "small", env=server.env(folder / "cache"))
        assert done.returncode == 0, done.stdout + done.stderr
        server.check()
        yield server, server.only_task(), folder / "run", done.stdout


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
    pictures = {
        (image.title, image.series, image.iteration): server.file(image.url)
        for image in task.images
        if image.title == "training images"
    }
    assert pictures == {
        ("training images", "stage 0, 32 px", 0): (folder / "report" / "stage_0.png").read_bytes(),
        ("training images", "stage 1, 64 px", 2): (folder / "report" / "stage_1.png").read_bytes(),
    }


def test_a_picture_comes_when_its_stage_begins(online):
    server, *_ = online
    batches = [call.body for call in server.calls if call.endpoint == "events.add_batch"]

    def arrival(metric, iteration):
        """The number of the batch with the first such event."""
        return next(
            number
            for number, batch in enumerate(batches)
            if any((event.get("metric"), event.get("iter")) == (metric, iteration) for event in batch)
        )

    assert arrival("training images", 0) <= arrival("loss", 0)
    assert arrival("loss", 1) <= arrival("training images", 2) <= arrival("loss", 2)


@pytest.mark.parametrize("epochs, shown", [(0, []), (1, [0]), (2, [0]), (3, [0, 1]), (4, [0, 1])])
def test_stages_yet_to_begin_are_not_shown(tmp_path, epochs, shown):
    folder = RunFolder(str(tmp_path))
    folder.write_plan(make_plan(Config(stages=2, epochs=4, train_crop_size=(32, 64))), ["ant", "bee"])
    for stage in (0, 1):
        folder.write_picture(stage, torch.zeros(3, 2, 2, dtype=torch.uint8))
    folder.write_metrics([{"epoch": epoch, "loss": 0.5} for epoch in range(epochs)])
    sent = []

    class Task:
        def get_logger(self):
            return self

        def is_offline(self):
            return False

        def get_reported_scalars(self):
            return {"loss": {"train": {"x": [0, 1], "y": [0.5, 0.25]}}}

        def report_table(self, *words, **more):
            pass

        def report_scalar(self, title, series, value, iteration):
            sent.append((title, iteration))

        def report_image(self, title, series, iteration, local_path):
            sent.append((series, iteration))

    report = TaskReport(Task(), folder, None)
    report.so_far()
    begun = [("stage 0, 32 px", 0), ("stage 1, 64 px", 2)]
    # of the losses it has one, and another of epoch 1
    assert sent == [("loss", epoch) for epoch in range(1, epochs)] + [begun[index] for index in shown]
    report.picture(0)
    report.picture(1)
    assert [item for item in sent if item in begun] == begun  # none twice


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


def test_what_the_best_weights_are_worth(online):
    server, task, folder, _ = online
    summary, shown = (json.loads((folder / name).read_text()) for name in ("summary.json", "report/best.json"))
    epoch = summary["best_epoch"]
    columns = task.plots["classes, worst first", "best"][epoch]["data"][0]["cells"]["values"]
    assert sorted(columns[0]) == ["ant", "bee"] and [int(count) for count in columns[4]] == [5, 5]
    assert task.plots["inference", "best"][epoch]["data"][0]["cells"]["values"][0][0] in (1, "1")
    roc = task.plots["ROC", "best"][epoch]["data"]
    assert roc[0]["x"] == shown["roc"]["false_positive_rate"] and roc[0]["y"] == shown["roc"]["true_positive_rate"]
    lines = {line["name"]: line for line in task.plots["reliability", "best"][epoch]["data"]}
    counts = [count for count in shown["reliability"]["before"]["counts"] if count]
    title = f"as trained: ECE {100 * summary['calibration']['ece_before']:.2f} %"
    assert set(lines) == {title, ""} and lines[title]["text"] == [f"{count} images" for count in counts]
    assert sum(counts) == summary["calibration"]["measured_on"] == 5  # half of ten
    pictures = {image.series: server.file(image.url) for image in task.images if image.title == "worst mistakes"}
    assert len(pictures) == len(shown["mistakes"]) == 10 - round(summary["best_top1"] / 10)
    for place, mistake in enumerate(shown["mistakes"]):
        share = f"{100 * mistake['probability']:.1f} %"
        said = f"{place + 1}: {mistake['true']}, taken for {mistake['predicted']}, {share}"
        assert pictures[said] == (folder / "report" / f"mistake_{place}.jpg").read_bytes()


def test_best_and_last_model_with_epoch_and_labels(online):
    server, task, folder, _ = online
    summary = json.loads((folder / "summary.json").read_text())
    models = task.output_models
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
    for name in ("balanced_accuracy", "macro_f1", "auc", "sensitivity", "specificity"):
        assert sent[name] == pytest.approx(summary["best"][name])
    for name in ("temperature", "ece_before", "ece_after"):
        assert sent[name] == pytest.approx(summary["calibration"][name])
    assert sent["train_hours"] == pytest.approx(summary["train_seconds"] / 3600)
    # EfficientNetV2-B0 without a head, as Keras counts it; two classes
    assert sent["parameters"] == 5_858_704 + 1280 * 2 + 2
    fast = metrics(folder)[2:]
    at_last_size = 48 / sum(record["epoch_seconds"] for record in fast)  # two epochs of 24 images
    assert sent["speedup_over_fixed_size"] == pytest.approx(96 / at_last_size / summary["train_seconds"])


def test_the_console_is_kept(online):
    _, task, _, printed = online
    assert "stage 1, 64 px, epoch 4/4" in task.console and "GFLOPs/image" in task.console
    assert f"tasks/{task.id}/output/log" in printed


def test_many_classes_are_the_worst_and_a_table_of_confusions(tmp_path):
    # 60 classes of 10 images: class i has i % 10 right, the rest taken for its successor
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


# ---- what is read from it ----


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


def test_classes_without_images_are_not_the_worst(tmp_path):
    """120 classes, of which every other has two images, one of them right."""
    matrix = np.zeros((120, 120), dtype=int)
    for i in range(0, 120, 2):
        matrix[i, i] = matrix[i, (i + 2) % 120] = 1
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "plan.json").write_text(json.dumps({"stages": [], "classes": [f"c{i}" for i in range(120)]}))
    told = {}
    logger = SimpleNamespace(
        report_table=lambda title, series, iteration, table_plot: told.update({title: table_plot}),
        report_confusion_matrix=lambda title, series, matrix, iteration, **labels: told.update(
            {title: labels["xlabels"]}
        ),
    )
    TaskReport(SimpleNamespace(get_logger=lambda: logger), RunFolder(str(tmp_path)), None).confusion("best", 0, matrix)
    assert told["confusion matrix"] == [f"c{i}" for i in range(0, 100, 2)]
    assert told["accuracy per class"][1:3] == [["c0", 2, "50.00"], ["c1", 0, ""]]
