"""What a run leaves to be looked at: its folder, the page, and evaluations that are not made twice."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from programs import SMALL
from runs import make_tree, metrics

import train
from images.evaluation import EvalImages
from reporting import figures
from reporting.folder import RunFolder
from reporting.page import class_table, inference_table, report_page
from settings.resolve import resolve
from stages import Plan, Stage, plan_stages
from train import run

STAGES = ["--stages", "2", "--epochs", "2", "--train-crop-size", "32", "48", "--model-ema", "--model-ema-steps", "1"]


def start(tree, out, *flags):
    return run([*SMALL, *STAGES, "--data-path", str(tree), "--output-dir", str(out), *map(str, flags)])


# ---- the page ----


@pytest.fixture
def folder(tmp_path):
    """The folder of a run of two stages, one epoch each, that has not finished."""
    kept = RunFolder(str(tmp_path / "run"))
    config = resolve([*SMALL, *STAGES, "--dropout", "0.1", "0.4"])
    stages = plan_stages(config)
    kept.write_settings(config.as_dict() | {"data_path": "photos/<b>mine</b>"})
    kept.write_plan(Plan(stages, [0.25, 0.75]), ["<script>alert(1)</b>", "bee & co"])
    kept.write_metrics([
        {"epoch": i, "stage": i, "lr": 0.1, "loss": 1.0, "val_loss": None, "top1": 50.0, "top1_ema": None,
         "images_per_second": 10.0, "epoch_seconds": 2.0} | stages[i].settings()
        for i in range(2)
    ])  # fmt: skip
    return kept


def test_other_people_s_text_is_text(folder):
    page = report_page(folder)
    assert "photos/&lt;b&gt;mine" in page and "<b>mine" not in page
    folder.write_summary(json.loads(SUMMARY))
    folder.write_confusion("best", 1, torch.tensor([[3, 1], [0, 4]]))
    page = report_page(folder)
    assert "alert(1)" in page and "<script" not in page and "bee &amp; co" in page


def test_what_is_off_throughout_has_no_graph(folder):
    page = report_page(folder)
    # accuracy, loss, size, the probabilities, the learning rate, speed
    assert page.count("<svg") == 6
    assert (
        "probability, alpha" in page
        and "RandAugment magnitude" not in page
        and ">erase<" not in page.split("What grows")[1]
    )


def test_a_graph_is_a_drawing_of_its_own_that_a_telephone_can_show(folder):
    """Two in one of 720 points were shrunk to half on a page of 354 pixels (266 points)."""
    page = report_page(folder)
    widths = [float(width) for width in re.findall(r'<div><svg [^>]*width="([\d.]+)pt"', page)]
    assert len(widths) == page.count("<svg") == 6 and max(widths) < 350


def test_the_title_is_the_name_of_the_folder_of_images_however_that_was_given(folder, tmp_path, monkeypatch):
    (tmp_path / "photos" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos")
    for given in (".", "train/..", str(tmp_path / "photos") + "/"):
        folder.write_settings(folder.settings() | {"data_path": given})
        assert "<title>efficientnet_v2_tiny on photos</title>" in report_page(folder)


def test_a_row_of_the_stages_has_the_plan_and_what_came_of_it(folder):
    table = report_page(folder).split("</table>")[0]
    cells = [row.split("</td>") for row in table.split("<tr>")[2:]]
    texts = [[cell.rpartition(">")[2] for cell in row[:-1]] for row in cells]
    # stage, epochs, size, RandAugment, mixup, cutmix, dropout, depth, erase, batch, GFLOPs, seconds, images/s, top-1, EMA
    assert " ".join(texts[1]) == "1 2-2 48 off off off 0.4 model&#39;s off 8 0.75 2 10 50 –"
    assert "0.667" in report_page(folder)  # of the arithmetic: (0.25 + 0.75) / (2 * 0.75)


def test_closing_evaluations_at_one_size_are_one_row(folder):
    folder.write_summary(json.loads(SUMMARY))
    page = report_page(folder)
    assert "48 px: its stage&#39;s size, last training size</td>" in page and "64 px: test size</td>" in page


def test_a_run_of_an_older_version_has_no_such_parts(folder):
    folder.write_summary(json.loads(SUMMARY))
    page = report_page(folder)
    assert not any(head in page for head in ("the worst first", "Probabilities", "Worst mistakes", "Inference"))


def row_of(name, f1, support=10):
    return {"class": name, "precision": 50.0, "recall": 60.0, "f1": f1, "support": support}


def test_classes_without_images_come_last_and_have_no_figures():
    rows = [row_of("none", 0.0, 0), row_of("poor", 20.0), row_of("good", 90.0)]
    (_, lines) = class_table({"per_class": rows})
    assert lines == [["poor", "50.00", "60.00", "20.00", 10], ["good", "50.00", "60.00", "90.00", 10], ["none", "", "", "", 0]]  # fmt: skip


@pytest.fixture
def assessed(folder):
    """The folder of a run that has finished, with all that is said of its weights."""
    summary = json.loads(SUMMARY) | {"epochs": 2, "per_class": [row_of("<ant>", 70.0), row_of("bee", 30.0)]}
    summary["best"] |= {"epoch": 0, "balanced_accuracy": 61.5, "macro_f1": 50.25, "auc": 0.875, "sensitivity": 80.0, "specificity": 43.0}  # fmt: skip
    summary["final"] |= {"balanced_accuracy": 62.5, "macro_f1": 51.25}
    summary["calibration"] = {"temperature": 1.5, "ece_before": 0.125, "ece_after": 0.01, "fitted_on": 60, "measured_on": 61, "bins": 15}  # fmt: skip
    summary["inference"] = [{"batch_size": 8, "images_per_second": 160.0, "milliseconds": 50.0}]
    folder.write_summary(summary)
    curve = {"counts": [0] * 14 + [61], "confidence": [0.0] * 14 + [0.97], "accuracy": [0.0] * 14 + [0.75]}
    mistakes = [{"index": 4, "true": "<ant>", "predicted": "bee", "probability": 0.987, "path": "val/<b>.png"}]
    folder.write_assessment({
        "reliability": {"before": curve, "after": curve}, "mistakes": mistakes,
        "roc": {"false_positive_rate": [0.0, 0.5, 1.0], "true_positive_rate": [0.0, 1.0, 1.0]},
    })  # fmt: skip
    folder.write_mistake(0, Image.new("RGB", (20, 10), "red"))
    return folder


def test_classes_come_worst_first_with_the_figures_of_all(assessed):
    page = report_page(assessed)
    part = page.split("Classes, the worst first")[1].split("</table>")[0]
    assert part.index("<td>bee</td>") < part.index("<td>&lt;ant&gt;</td>") and "50.00" in part and "weight" not in part.split("<tr>")[1]  # fmt: skip
    assert (
        "Balanced accuracy 61.50 %, macro-F1 50.25 %, sensitivity 80.00 %, specificity 43.00 %, area under the ROC curve "
        "0.8750. The last weights: balanced accuracy 62.50 %, macro-F1 51.25 %." in part
    )


def test_probabilities_mistakes_and_speed_are_shown(assessed):
    page = report_page(assessed)
    assert page.count("<svg") == 9  # six of training, ROC, reliability before and after
    assert "as trained: ECE 12.50 %" in page and "temperature 1.5: ECE 1.00 %" in page and "area 0.8750" in page
    assert "Temperature fitted on 60 validation images, both sides measured on the other 61." in page
    assert "bee (98.7 %), it is &lt;ant&gt;</b>val/&lt;b&gt;.png" in page and page.count("data:image/jpeg;base64,") == 1
    assert "<td>8</td><td>160</td><td>50</td>" in page
    summary = assessed.summary()
    summary["calibration"] |= {"fitted_on": 0, "temperature": 1.0}
    assessed.write_summary(summary)
    page = report_page(assessed)
    assert "too few others, or none of them wrong" in page and "temperature 1:" not in page


def test_speeds_are_numbers_without_powers_of_ten():
    rows = [
        {"batch_size": 1, "images_per_second": 0.8765, "milliseconds": 1140.9},
        {"batch_size": 8, "images_per_second": 99.96, "milliseconds": 80.03},
        {"batch_size": 512, "images_per_second": 43711.6, "milliseconds": 11.713},
    ]
    assert inference_table({"inference": rows})[1] == [
        [1, "0.876", "1,141"], [8, "100", "80"], [512, "43,712", "11.7"]
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "length"), [(2, 40), (10, 80), (3, 24)])
def test_long_names_of_classes_are_whole_within_the_confusions(count, length):
    names = [f"{i}{'m' * (length - 2)}{i}" for i in range(count)]
    shown = [name if length == 24 else f"{name[0]}{'m' * 11}…{'m' * 10}{name[0]}" for name in names]
    drawn = figures.confusion_figure(np.eye(count, dtype=int), names)
    drawn.canvas.draw()
    (axis,) = drawn.axes
    labels = [*axis.get_xticklabels(), *axis.get_yticklabels()]
    assert [label.get_text() for label in labels] == 2 * shown
    for label in labels:
        box = label.get_window_extent()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1
    figures.plt.close(drawn)


def test_many_classes_scroll_within_the_page(assessed):
    summary = assessed.summary()
    assert 'class="wide tall"' not in report_page(assessed)
    summary["per_class"] = [row_of(f"class {i}", float(i % 90), i) for i in range(1000)]
    assessed.write_summary(summary)
    page = report_page(assessed)
    rows = page.split("Classes, the worst first")[1].split("</table>")[0].split("<tr>")[2:]
    assert 'class="wide tall"' in page and len(rows) == 1000 and len(page) < 1_500_000
    assert "<td>class 990</td>" in rows[0]  # of those with an F1 of 0 the one with the most images


SUMMARY = json.dumps({
    "best_top1": 75.0, "top1": 70.0, "train_seconds": 4.0, "parameters": 1000, "device": "cpu", "commit": None, "seed": 0,
    "versions": {"torch": "2"}, "best": {"weights": "model"} | {place: {"image_size": size, "top1": 1.0, "top5": 2.0} for place, size in (("stage_size", 48), ("last_training_size", 48), ("test_size", 64))},
    "final": {place: {"image_size": size, "top1": 1.0, "top5": 2.0} for place, size in (("stage_size", 48), ("last_training_size", 48), ("test_size", 64))},
})  # fmt: skip


# ---- the folder ----


def test_a_plan_of_an_older_version_reads_what_it_knows():
    stage = Stage(index=0, epochs=range(3), image_size=32, ra_magnitude=None, mixup_alpha=0.0, cutmix_alpha=0.0, dropout=None, stochastic_depth_prob=None, random_erase=0.0, batch_size=8)  # fmt: skip
    content = Plan([stage], [0.5]).as_dict()
    assert Plan.from_dict(json.loads(json.dumps(content))) == Plan([stage], [0.5])
    del content["stages"][0]["cutmix_alpha"]
    assert Plan.from_dict(content).stages[0].cutmix_alpha is None


def test_counts_and_lines_read_back(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    assert folder.metrics() == [] and folder.summary() is None and folder.confusion("best") is None
    folder.write_confusion("last", 7, torch.tensor([[3, 1], [0, 4]]))
    epoch, counts = folder.confusion("last")
    assert epoch == 7 and np.array_equal(counts, [[3, 1], [0, 4]])
    folder.write_metrics([{"epoch": 0}])
    folder.add_metrics({"epoch": 1})
    with open(folder.at("metrics.jsonl"), "a") as file:
        file.write('{"epoch": 2, "lo')  # cut short by a crash
    assert folder.metrics() == [{"epoch": 0}, {"epoch": 1}]
    assert folder.held() == ["metrics.jsonl", "report/confusion_last.json"]
    folder.clear()
    assert folder.held() == []


# ---- nothing is evaluated twice ----


@pytest.fixture
def evaluated(monkeypatch):
    """Sizes of the validation images that were loaded, one entry an image."""
    sizes, get = [], EvalImages.__getitem__

    def counting(self, index):
        image, target = get(self, index)
        sizes.append(image.shape[-1])
        return image, target

    monkeypatch.setattr(EvalImages, "__getitem__", counting)
    return sizes


def test_model_and_average_share_a_pass_and_the_last_epoch_s_scores_stay(tmp_path, evaluated):
    tree = make_tree(tmp_path / "images")  # ten images of validation
    assert start(tree, tmp_path / "run", "--train-crop-size", "32") == 0
    assert evaluated == 2 * 10 * [32]  # after each of two epochs, at the one size there is
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = metrics(tmp_path / "run")[-1]
    assert (summary["top1"], summary["top1_ema"]) == (last["top1"], last["top1_ema"])
    assert summary["best"]["test_size"]["top1"] == summary["best_top1"]


def test_other_sizes_are_evaluated_once_each(tmp_path, evaluated):
    tree = make_tree(tmp_path / "images")
    flags = ["--val-resize-size", "24", "--val-crop-size", "24"]
    assert start(tree, tmp_path / "run", *flags) == 0
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["stage_size"]["image_size"]
    assert evaluated[:20] == 20 * [24]
    assert sorted(evaluated[20:]) == (10 * [32] if best == 32 else []) + 10 * [48]  # final and best weights in a pass


def test_a_run_that_died_before_its_closing_evaluations_ends_the_same(tmp_path, monkeypatch, evaluated):
    tree = make_tree(tmp_path / "images")
    assert start(tree, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:

        def die(*args):
            raise MemoryError

        patch.setattr(train, "evaluate_outcome", die)
        assert start(tree, tmp_path / "cut") == 1
    del evaluated[:]
    assert start(tree, tmp_path / "cut", "--resume", "auto") == 0
    assert len(evaluated) >= 10  # nothing was known any more
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("cut", "whole"))
    for part in ("final", "best", "top1", "top1_ema", "best_epoch", "per_class", "calibration"):
        assert ours[part] == theirs[part]
    both = [RunFolder(str(tmp_path / name)).assessment() for name in ("cut", "whole")]
    assert both[0] == both[1] and both[0]["reliability"]
