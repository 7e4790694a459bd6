"""Whole runs of train.py on small images: what they leave, and the reference's ways to start one."""

import json
import multiprocessing
from html.parser import HTMLParser

import pytest
import torch
import torchvision
import yaml
from PIL import Image
from runs import STAGED, STRONG, assert_same_bits, checkpoint, make_tree, metrics, start

from reporting.folder import RunFolder
from reporting.page import report_page
from train import run

# ---- what a run leaves ----


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A finished run of two stages, four epochs, on a model of torchvision's."""
    folder = tmp_path_factory.mktemp("two")
    tree = make_tree(folder / "images")
    flags = (
        "--model mobilenet_v3_small --stages 2 --epochs 4 --train-crop-size 32 64 --val-resize-size 96 "
        "--val-crop-size 80 --dropout 0.1 0.4 --model-ema --model-ema-steps 1 --model-ema-decay 0.7"
    ).split()
    assert start(tree, folder / "run", *flags) == 0
    return folder / "run", tree, flags


def test_metrics_has_a_line_per_epoch_with_the_stage_s_settings(two_stages):
    records = metrics(two_stages[0])
    assert [(r["epoch"], r["stage"], r["image_size"], r["dropout"]) for r in records] == [
        (0, 0, 32, 0.1), (1, 0, 32, 0.1), (2, 1, 64, 0.4), (3, 1, 64, 0.4),
    ]  # fmt: skip
    for record in records:
        assert {
            "epoch", "stage", "image_size", "lr", "loss", "top1", "top5", "top1_ema", "images_per_second", "epoch_seconds",
            "data_wait_fraction", "gpu_memory_gib", "ra_magnitude", "mixup_alpha", "cutmix_alpha", "dropout",
            "stochastic_depth_prob", "random_erase", "batch_size",
        } <= record.keys()  # fmt: skip
        assert record["loss"] > 0 and 0 <= record["data_wait_fraction"] <= 1
        assert record["top5"] == 100  # of two classes
        assert record["gpu_memory_gib"] is None
        # 24 images in so many seconds
        assert record["images_per_second"] * record["epoch_seconds"] == pytest.approx(24)


def test_summary_has_accuracy_at_three_sizes(two_stages):
    folder = two_stages[0]
    summary, records = json.loads((folder / "summary.json").read_text()), metrics(folder)
    assert summary["top1"] == records[-1]["top1"] and summary["top1_ema"] == records[-1]["top1_ema"]
    assert summary["best_top1"] == max(max(r["top1"], r["top1_ema"]) for r in records)
    for moment in ("final", "best"):
        assert summary[moment]["test_size"]["image_size"] == 80
        assert summary[moment]["last_training_size"]["image_size"] == 64
    assert summary["final"]["stage_size"]["image_size"] == 64
    assert summary["best"]["stage_size"]["image_size"] == records[summary["best_epoch"]]["image_size"]
    assert summary["best"]["test_size"]["top1"] == summary["best_top1"]
    assert [stage["image_size"] for stage in summary["stages"]] == [32, 64]
    assert summary["train_seconds"] == pytest.approx(sum(r["epoch_seconds"] for r in records))
    assert summary["parameters"] == 1_519_906  # 2,542,856 at 1000 classes, less 998 outputs of 1024 + 1
    assert summary["versions"]["torch"] == torch.__version__ and summary["seed"] == 0


def test_summary_says_what_the_best_weights_are_worth(two_stages):
    folder = two_stages[0]
    summary, counts = json.loads((folder / "summary.json").read_text()), RunFolder(str(folder)).confusion("best")[1]
    ant, bee = counts.diagonal() / 5  # five images of each class
    best = summary["best"]
    assert best["balanced_accuracy"] == pytest.approx(50 * (ant + bee)) == pytest.approx(summary["best_top1"])
    assert (best["specificity"], best["sensitivity"]) == (pytest.approx(100 * ant), pytest.approx(100 * bee))
    assert 0 <= best["auc"] <= 1 and [row["support"] for row in summary["per_class"]] == [5, 5]
    assert summary["calibration"]["temperature"] == 1 and summary["calibration"]["measured_on"] == 5  # few images
    assert summary["final"]["balanced_accuracy"] == pytest.approx(summary["top1"])  # as many of both
    assert summary["inference"][0]["batch_size"] == 1 and summary["inference"][0]["images_per_second"] > 0


def test_best_weights_load_into_plain_torchvision_and_score_what_was_said(two_stages, capsys):
    folder, tree, flags = two_stages
    model = torchvision.models.mobilenet_v3_small(num_classes=2)
    model.load_state_dict(torch.load(folder / "model_best.pth", weights_only=True))
    sizes = flags[flags.index("--val-resize-size") : flags.index("--dropout")]
    weights = ["--model", "mobilenet_v3_small", "--weights", folder / "model_best.pth", "--test-only", *sizes]
    capsys.readouterr()
    assert start(tree, folder.parent / "other", *weights) == 0
    best = json.loads((folder / "summary.json").read_text())["best_top1"]
    assert f"top1 {best:.3f}" in capsys.readouterr().out
    assert not (folder.parent / "other").exists()  # it writes nothing


def test_config_yaml_repeats_the_run(two_stages, tmp_path):
    folder = two_stages[0]
    assert run(["--config", str(folder / "config.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    assert_same_bits(checkpoint(folder)["model"], checkpoint(tmp_path / "again")["model"])
    assert_same_bits(checkpoint(folder)["model_ema"], checkpoint(tmp_path / "again")["model_ema"])
    assert "resume" not in yaml.safe_load((folder / "config.yaml").read_text())


def test_report_is_one_page_that_needs_nothing_else(two_stages):
    folder = two_stages[0]
    page = (folder / "report.html").read_text()

    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

    Reader().feed(page)
    tags = [tag for tag, _ in seen]
    mistakes = RunFolder(str(folder)).assessment()["mistakes"]
    assert tags.count("img") == 2 + len(mistakes)  # a grid of images per stage
    # accuracy, loss, size, drop rates, learning rate, speed, ROC, reliability, confusions
    assert tags.count("svg") == 9
    sources = [attributes for tag, attributes in seen if tag in ("img", "script", "link")]
    links = [attributes.get("src") or attributes.get("href") for attributes in sources]
    assert all(link.startswith("data:") for link in links)
    top1 = json.loads((folder / "summary.json").read_text())["top1"]
    for words in ("ant", "bee", "dropout", "32 px", "64 px", "Settings", f"{top1:.2f} %"):
        assert words in page
    assert report_page(RunFolder(str(folder))) == page  # drawn again from the folder alone


def test_a_folder_with_a_run_is_neither_overwritten_nor_continued_unasked(two_stages, tmp_path, capsys):
    folder, tree, flags = two_stages
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert start(tree, folder, *flags) == 2
    told = capsys.readouterr().err
    assert "--resume auto" in told and "--overwrite" in told and told.count("\n") == 1
    assert start(tree, folder, *flags, "--resume", "auto", "--lr", "0.5") == 2
    assert "lr 0.01 -> 0.5" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_overwrite_replaces_the_run_and_leaves_other_files(tree, tmp_path):
    out = tmp_path / "run"
    assert start(tree, out, "--epochs", "2") == 0
    (out / "notes.txt").write_text("mine")
    assert start(tree, out, "--epochs", "1", "--overwrite") == 0
    assert len(metrics(out)) == 1 and (out / "notes.txt").read_text() == "mine"
    assert not (out / "checkpoint_previous.pth").exists()


def test_a_mistake_costs_an_overwritten_run_nothing(tree, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert start(tree, out, "--epochs", "1") == 0
    assert start(tree, out, "--epochs", "1", "--overwrite", "--model", "inception_v3") == 2  # 32 px are too few for it
    assert (out / "summary.json").exists() and len(metrics(out)) == 1


def test_an_image_that_cannot_be_read_is_named_and_costs_an_overwritten_run_nothing(tree, tmp_path, capsys):
    out = tmp_path / "run"
    assert start(tree, out, "--epochs", "1") == 0
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    capsys.readouterr()
    assert start(tree, out, "--epochs", "1", "--overwrite", "--workers", "2") == 2
    told = capsys.readouterr().err
    assert ".png cannot be read as an image" in told and told.count("\n") == 1
    assert (out / "summary.json").exists() and len(metrics(out)) == 1


def test_an_unreadable_image_of_validation_is_named_in_one_line_from_a_worker_too(tree, tmp_path, capsys):
    (tree / "val" / "bee" / "4.png").write_bytes(b"no image")
    assert start(tree, tmp_path / "run", "--epochs", "1", "--workers", "1") == 2
    told = capsys.readouterr().err
    assert "bee/4.png cannot be read as an image" in told and told.count("\n") == 1
    assert multiprocessing.active_children() == []


def test_a_run_can_be_evaluated_in_its_own_folder(two_stages, capsys):
    folder, tree, flags = two_stages
    sizes = flags[flags.index("--val-resize-size") : flags.index("--dropout")]
    test = ["--model", "mobilenet_v3_small", "--test-only", *sizes]
    assert start(tree, folder, *test, "--weights", folder / "model_best.pth") == 0
    capsys.readouterr()
    assert start(tree, folder, *test, "--resume", "auto") == 0
    assert f"top1 {metrics(folder)[-1]['top1']:.3f}" in capsys.readouterr().out
    assert start(tree, folder.parent / "nothing", *test, "--resume", "auto") == 2
    assert "to evaluate" in capsys.readouterr().err


def test_evaluation_every_third_epoch_and_after_the_last(tree, tmp_path):
    assert start(tree, tmp_path / "run", "--epochs", "4", "--eval-every", "3") == 0
    assert [record["top1"] is not None for record in metrics(tmp_path / "run")] == [False, False, True, True]


# ---- the reference's ways ----


def test_the_reference_s_command_line_trains(tree, tmp_path):
    flags = (
        "--model mobilenet_v3_small --batch-size 128 --lr 0.5 --lr-scheduler cosineannealinglr --lr-warmup-epochs 1 "
        "--lr-warmup-method linear --auto-augment ta_wide --epochs 2 --random-erase 0.1 --label-smoothing 0.1 --mixup-alpha 0.2 "
        "--cutmix-alpha 1.0 --weight-decay 0.00002 --norm-weight-decay 0.0 --train-crop-size 64 --model-ema --val-crop-size 64 "
        "--val-resize-size 64 --ra-sampler --ra-reps 4 --workers 0 --device cpu --clearml off"
    )
    assert run([*flags.split(), "--data-path", str(tree), "--output-dir", str(tmp_path / "run")]) == 0
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("flags", "computed"),
    [
        ("--amp --channels-last", torch.bfloat16), ("--amp --amp-dtype float16", torch.float16),
        ("--backend tensor --use-v2", torch.float32),
    ],
)  # fmt: skip
def test_precision_memory_format_and_backends_train(tree, tmp_path, flags, computed):
    seen = {True: set(), False: set()}  # in training, in evaluation

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            seen[module.training].add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        assert start(tree, tmp_path / "run", "--epochs", "2", "--auto-augment", "ra", *flags.split()) == 0
    finally:
        handle.remove()
    assert seen == {True: {computed}, False: {computed}}
    assert metrics(tmp_path / "run")[-1]["loss"] < 2


def test_grey_images_with_folders_of_other_names(tmp_path):
    tree = make_tree(tmp_path / "images", splits=(("training", 6), ("validation", 3)))
    for path in tree.glob("training/ant/*.png"):
        Image.open(path).convert("L").save(path)
    assert start(tree, tmp_path / "run", "--epochs", "1", "--train-split", "training", "--val-split", "validation") == 0


# ---- a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "flags",
    [
        "--amp --channels-last", "--amp --amp-dtype float16 --opt sgd", "--compile", "--augment-on worker --opt adamw",
        "--decode-cache off --workers 2", "--amp --channels-last --finetune-epochs 2 --model-ema",
    ],
)  # fmt: skip
def test_stages_on_a_gpu(tree, tmp_path, flags):
    assert start(tree, tmp_path / "run", "--device", "cuda", *STAGED, *STRONG, *flags.split()) == 0
