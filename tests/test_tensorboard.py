"""What TensorBoard is told, read back with its own reader."""

import importlib.util
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from programs import ROOT
from runs import metrics, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from learning.learner import Learner
from reporting.folder import RunFolder
from reporting.log import Dashboard
from tracking.dashboard import Dashboards
from tracking.report import RunReport
from tracking.tensorboard import Events

STAGED = "--stages 2 --epochs 4 --train-crop-size 32 48 --dropout 0.1 0.4 --model-ema --model-ema-steps 1".split()


def read(folder):
    everything = dict.fromkeys(("scalars", "images", "tensors", "compressedHistograms"), 0)
    return EventAccumulator(str(folder / "tensorboard"), everything).Reload()


def points(events):
    """Values by tag and step; none stands there twice."""
    found = {}
    for tag in events.Tags()["scalars"]:
        for point in events.Scalars(tag):
            assert (tag, point.step) not in found
            found[tag, point.step] = point.value
    return found


def text(events, tag):
    (told,) = events.Tensors(f"{tag}/text_summary")
    return told.tensor_proto.string_val[0].decode()


@pytest.fixture(scope="module")
def shown(images, tmp_path_factory):
    """A run of two stages and four epochs: its folder, and its events."""
    folder = tmp_path_factory.mktemp("shown")
    assert start(images, folder / "run", *STAGED, "--tensorboard") == 0
    return folder / "run", read(folder / "run")


def test_scalars_follow_the_epoch(shown):
    folder, events = shown
    found, records = points(events), metrics(folder)
    lines = {
        "loss/train": "loss", "loss/val": "val_loss", "top1/val": "top1", "top1/val_ema": "top1_ema", "top5/val": "top5",
        "lr/lr": "lr", "epoch_seconds/train": "epoch_seconds", "images_per_second/train": "images_per_second",
    }  # fmt: skip
    for tag, key in lines.items():
        assert [found[tag, epoch] for epoch in range(4)] == pytest.approx([record[key] for record in records]), tag
    assert [found["stage/image_size", epoch] for epoch in range(4)] == [32, 32, 48, 48]
    assert [found["stage/dropout", epoch] for epoch in range(4)] == pytest.approx([0.1, 0.1, 0.4, 0.4])
    assert not any(tag.startswith(("gpu_memory", "non_finite")) for tag, _ in found)


def test_each_stage_s_picture_at_its_beginning(shown):
    folder, events = shown
    for stage, tag, step in ((0, "training_images/stage_0_32_px", 0), (1, "training_images/stage_1_48_px", 2)):
        (picture,) = events.Images(tag)
        assert picture.step == step
        kept = np.asarray(Image.open(folder / "report" / f"stage_{stage}.png"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), kept)


def test_the_worst_mistakes_are_pictures_and_the_curves_too(shown, tmp_path):
    folder, events = shown
    assert {"ROC/best", "reliability/best"} <= set(events.Tags()["images"])
    copied = RunFolder(str(shutil.copytree(folder, tmp_path / "run")))
    mistake = {"index": 3, "true": "ant", "predicted": "bee", "probability": 0.987, "path": None}
    copied.write_assessment({"mistakes": [mistake]})
    copied.write_mistake(0, Image.new("RGB", (20, 10), "red"))
    told = Events(copied.at("again/tensorboard"), {})
    report = RunReport(copied, told)
    report.mistakes()
    report.mistakes()
    told.writer.close()
    (picture,) = read(tmp_path / "run" / "again").Images("worst_mistakes/1_ant_taken_for_bee_98.7")
    assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (20, 10)
    assert picture.step == copied.summary()["best_epoch"]


def test_plan_settings_and_accuracy_per_class_are_text(shown):
    _, events = shown
    heads, _, *rows = text(events, "plan/stages").splitlines()
    column = [cell.strip() for cell in heads.split("|")].index("image size")
    assert [row.split("|")[column].strip() for row in rows] == ["32", "48"]
    assert "| dropout | [0.1, 0.4] |" in text(events, "settings/settings")
    assert "| ant | 5 |" in text(events, "accuracy_per_class/last")


def test_confusions_of_the_best_and_the_last_weights(shown):
    folder, events = shown
    best = json.loads((folder / "summary.json").read_text())["best_epoch"]
    assert best in [picture.step for picture in events.Images("confusion_matrix/best")]
    (last,) = events.Images("confusion_matrix/last")
    assert last.step == 3 and last.width == last.height > 200


def test_the_outcome_and_the_hyperparameters_it_is_compared_by(shown):
    folder, events = shown
    summary, found = json.loads((folder / "summary.json").read_text()), points(events)
    for name in ("best_top1", "top1", "best_epoch", "parameters", "relative_cost"):
        assert found[f"final/{name}", 3] == pytest.approx(summary[name])
    told = events.summary_metadata
    start = metadata.parse_session_start_info_plugin_data(told[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    assert start.hparams["lr"].number_value == 0.01 and start.hparams["dropout"].string_value == "[0.1, 0.4]"
    assert start.hparams["model"].string_value == "efficientnet_v2_tiny"
    assert start.hparams["model_ema"].string_value == "true"
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert set(start.hparams) == set(kept)
    compared = metadata.parse_experiment_plugin_data(told[metadata.EXPERIMENT_TAG].plugin_data.content).metric_infos
    assert "final/top1" in {metric.name.tag for metric in compared}
    assert metadata.SESSION_END_INFO_TAG in told


def test_it_takes_all_that_a_report_tells(shown):
    """ClearML's logger has more methods than are called."""
    called = set(re.findall(r"self\.logger\.(\w+)", (ROOT / "tracking" / "report.py").read_text()))
    assert len(called) >= 6 and all(hasattr(Events, name) for name in called)
    folder, events = shown
    tags = events.Tags()["images"]
    mistakes = json.loads((folder / "report" / "best.json").read_text())["mistakes"]
    assert sum(tag.startswith("worst_mistakes/") for tag in tags) == len(mistakes)
    assert "ROC/best" in tags and all(re.fullmatch(r"[-/\w.]+", tag) for tag in tags)


def test_a_resumed_run_tells_nothing_twice(shown, images, tmp_path, monkeypatch):
    """It crashed in epoch 3, and its checkpoint is of the end of stage 0: epoch 2 is trained, and told, again."""
    out, steps, step = tmp_path / "run", [0], Learner.step

    def failing(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == 2 + 10:  # two rehearsals, then three steps in each epoch
            raise MemoryError("the machine went away")
        return step(self, *args, **kwargs)

    flags = [*STAGED, "--tensorboard", "--checkpoint-every", "100e"]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", failing)
        assert start(images, out, *flags) == 1
    before = {point.step: point.wall_time for point in read(out).Scalars("loss/train")}
    assert list(before) == [0, 1, 2]  # flushed, though the run had no end
    assert start(images, out, *flags, "--resume", "auto") == 0
    events, whole = read(out), shown[1]
    assert len(RunFolder(str(out)).events()) == 1
    timing = ("_per_second/", "_seconds/", "_wait_", "final/images", "final/train", "final/speedup")
    same = {key: value for key, value in points(whole).items() if not any(word in key[0] for word in timing)}
    assert points(events).keys() == points(whole).keys() and same.items() <= points(events).items()
    assert [picture.step for picture in events.Images("training_images/stage_1_48_px")] == [2]
    after = {point.step: point.wall_time for point in events.Scalars("loss/train")}
    assert [after[epoch] == before[epoch] for epoch in range(3)] == [True, True, False]


def test_it_may_be_taken_up_later_and_goes_with_the_run_that_is_overwritten(images, tmp_path):
    out = tmp_path / "run"
    assert start(images, out, "--epochs", "2") == 0 and not (out / "tensorboard").exists()
    assert start(images, out, "--epochs", "2", "--resume", "auto", "--tensorboard") == 0
    assert [point.step for point in read(out).Scalars("loss/train")] == [0, 1]
    (out / "tensorboard" / "notes.txt").write_text("mine")
    assert start(images, out, "--epochs", "1", "--overwrite") == 0
    assert [path.name for path in (out / "tensorboard").iterdir()] == ["notes.txt"]
    assert start(images, out, "--epochs", "1", "--overwrite", "--tensorboard") == 0
    assert [point.step for point in read(out).Scalars("loss/train")] == [0]


def test_damaged_events_cost_their_times_alone(images, tmp_path, capsys):
    out, flags = tmp_path / "run", ["--epochs", "2", "--tensorboard"]
    assert start(images, out, *flags) == 0
    (name,) = RunFolder(str(out)).events()
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[: len(whole) // 2] + b"\xff" * 64 + whole[len(whole) // 2 + 64 :])
    assert start(images, out, *flags, "--resume", "auto") == 0
    assert [point.step for point in read(out).Scalars("loss/train")] == [0, 1]


def test_without_the_package_one_line_before_data_is_looked_at(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find(name))
    assert start(tmp_path / "nowhere", tmp_path / "run", "--tensorboard") == 2
    assert (
        capsys.readouterr().err
        == "error: tensorboard needs the package: pip install tensorboard, or --no-tensorboard\n"
    )
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what a broken package comes to
    assert start(tmp_path / "nowhere", tmp_path / "run", "--tensorboard") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: tensorboard: the package cannot be used here") and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_fails_in_it_is_no_failure_of_the_run(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tracking.tensorboard.Events.report_scalar", lambda *words: 1 / 0)
    assert start(images, tmp_path / "run", "--epochs", "1", "--tensorboard") == 0
    assert "TensorBoard: an epoch is not shown: ZeroDivisionError" in capsys.readouterr().out


def test_rank_0_alone_writes(tmp_path, monkeypatch):
    from settings.table import Config
    from tracking.tensorboard import TensorBoard, find_tensorboard

    config = Config(tensorboard=True, output_dir=str(tmp_path / "run"))
    assert type(find_tensorboard(config)) is TensorBoard
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if name == "RANK" else "2")
    assert type(find_tensorboard(config)) is Dashboard


def test_dashboards_are_all_told_and_all_ended():
    told = []

    class Noting(Dashboard):
        def __init__(self, name):
            self.name = name

        def epoch(self, record):
            told.append((self.name, record["epoch"]))

        def __exit__(self, kind, error, trace):
            told.append((self.name, kind))
            if self.name == "b":
                raise OSError("gone")

    one, other = Noting("a"), Noting("b")
    with pytest.raises(OSError, match="gone"), Dashboards(one, other) as both:
        both.ask_to_stop = told.append
        both.epoch({"epoch": 5})
        other.ask_to_stop("enough")
        raise KeyError
    assert told == [("a", 5), ("b", 5), "enough", ("b", KeyError), ("a", KeyError)]
