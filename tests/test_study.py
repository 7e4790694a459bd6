"""Study files: what they may say, and the runs they come to."""

from pathlib import Path

import pytest
from programs import ROOT

from settings.errors import ConfigError
from studies.study import read_study, slug

BASE = "model: efficientnet_v2_tiny\nepochs: 4\ntrain_crop_size: 32\nval_crop_size: 32\nval_resize_size: 32\n"


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)

    def write(text):
        file = tmp_path / "study.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_conditions_and_seeds_make_runs_seed_by_seed(write, tmp_path):
    path = write(
        "title: Sizes\nbase: base.yaml\nsettings: {stages: 2}\nseeds: [3, 1]\nmetric: top1_ema\ncontrol: fixed\n"
        "conditions:\n  grows: {train_crop_size: [32, 48]}\n  fixed: {train_crop_size: 48, channels_last: true}\n"
    )
    study = read_study(path, "runs/x", ["--workers", "0"])
    assert (study.name, study.title, study.control) == ("study", "Sizes", "fixed")
    assert study.metrics == {"grows": "top1_ema", "fixed": "top1_ema"}
    assert study.controls == {"grows": "fixed", "fixed": "fixed"}
    assert [(run.condition, run.seed) for run in study.runs] == [("grows", 3), ("fixed", 3), ("grows", 1), ("fixed", 1)]
    first = study.runs[0]
    assert first.folder == first.config.output_dir == "runs/x/grows_seed3"
    assert first.flags == (
        "--config", str(tmp_path / "base.yaml"), "--stages", "2", "--train-crop-size", "32", "48", "--seed", "3",
        "--workers", "0", "--output-dir", "runs/x/grows_seed3",
    )  # fmt: skip
    assert "--channels-last" in study.runs[1].flags
    assert [stage.image_size for stage in first.plan.stages] == [32, 48]
    assert study.varying == ["train_crop_size", "channels_last"]


def test_a_grid_is_every_combination(write):
    study = read_study(
        write("base: base.yaml\ngrid: {lr: [0.1, 0.2], dropout: [0.0, [0.1, 0.3]]}\nsettings: {stages: 2}"), "r"
    )
    assert study.conditions == ["lr 0.1, dropout 0.0", "lr 0.1, dropout 0.1 → 0.3", "lr 0.2, dropout 0.0", "lr 0.2, dropout 0.1 → 0.3"]  # fmt: skip
    assert [run.seed for run in study.runs] == [0, 0, 0, 0]
    assert study.control == "lr 0.1, dropout 0.0"
    assert [run.config.dropout for run in study.runs] == [(0.0,), (0.1, 0.3)] * 2


def test_a_condition_may_start_from_the_weights_of_another_with_the_same_seed(write):
    text = "base: base.yaml\nseeds: [0, 1]\nconditions:\n  transfer: {weights: {of: first}}\n  first: {lr: 0.2}\n"
    study = read_study(write(text), "r")
    assert [run.name for run in study.runs] == [
        "first, seed 0",
        "transfer, seed 0",
        "first, seed 1",
        "transfer, seed 1",
    ]
    assert study.runs[3].source is study.runs[2]
    assert study.runs[3].flags[-2:] == ("--weights", "r/first_seed1/model_best.pth")


def test_a_condition_may_be_judged_by_a_metric_and_a_control_of_its_own(write):
    text = (
        "base: base.yaml\ncontrol: a\nconditions:\n  a: {}\n  b: {lr: 0.2}\n  c: {lr: 0.3, metric: auc, control: b}\n"
    )
    study = read_study(write(text), "r")
    assert study.metrics == {"a": "top1", "b": "top1", "c": "auc"} and study.controls == {"a": "a", "b": "a", "c": "b"}


def test_rows_are_known_by_what_shapes_a_run_and_not_by_place_or_seed(write):
    text = "base: base.yaml\nseeds: [0, 1]\nconditions: {a: {lr: 0.1}, b: {lr: 0.2}}"
    one, other = read_study(write(text), "r"), read_study(write(text), "elsewhere", ["--workers", "3"])
    digests = [run.settings_digest for run in one.runs]
    assert digests[0] == digests[2] != digests[1]
    assert digests == [run.settings_digest for run in other.runs]
    assert read_study(write(text), "r", ["--epochs", "5"]).runs[0].settings_digest != digests[0]


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("seeds: [0]", "", r"study.yaml: give either conditions or grid"),
        ("conditions: {a: {}}\ngrid: {lr: [1]}", "", r"give either conditions or grid"),
        ("conditions: [1]", "", r"conditions must map names to settings, it is list"),
        ("grid: {lr: 0.1}", "", r"grid: lr must be a list of values, got 0.1"),
        ("conditions: {a: {}}\nseed: [0]", "", r"unknown key seed; did you mean seeds\?"),
        ("conditions: {a: {lrr: 1}}", "", r"condition a: unknown setting lrr; did you mean lr\?"),
        ("conditions: {a: {lr: -1}}", "", r"condition a: lr must be in \(0, inf\), got -1"),
        ("conditions: {a: {seed: 1}}", "", r"condition a: seed is what the sweep says itself"),
        ("conditions: {a: {model: resnet99}}", "", r"condition a: .*resnet99"),
        ("conditions: {a: 3}", "", r"condition a must hold settings, got 3"),
        ("conditions: {a: {}}\nseeds: 3", "", r"seeds must be a list of whole numbers, got 3"),
        ("conditions: {a: {}}\nseeds: [1, 1]", "", r"a seed stands twice in \[1, 1\]"),
        ("conditions: {a: {}}\nmetric: f1", "", r"metric must be one of top1, top1_ema, best_top1, held_out_top1, auc, got 'f1'"),
        ("conditions: {a: {}}\ncontrol: b", "", r"control 'b' is none of the conditions: a"),
        ("conditions: {a: {weights: {of: b}}}", "", r"weights of 'b', which is none of the conditions"),
        ("conditions: {a: {weights: {of: b}}, b: {weights: {of: a}}}", "", r"start from each other's weights"),
        ("conditions: {a: {weights: {of: b}}, b: {model: resnet18}}", "", r"weights of b are of resnet18, the model is eff"),
        ("conditions: {a b: {}, a_b: {}}", "", r"same folder name"),
        ("conditions: {a: {lr: 0.1}}", "--lr 3", r"--lr after -- is what the study says itself"),
        ("conditions: {a: {}}", "--resume auto", r"--resume after -- is what the sweep says itself"),
        ("conditions: {a: {}}", "--lrr 3", r"unknown setting --lrr"),
        ("- 1", "", r"must hold title, base"),
        ("a: [", "", r"is not plain YAML in line"),
        ("a: 1\na: 2", "", r"is not plain YAML.*stands there twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(write, text, flags, said):
    head = "" if text.startswith(("-", "a:")) else "base: base.yaml\n"
    with pytest.raises(ConfigError, match=said) as caught:
        read_study(write(head + text), "r", flags.split())
    assert "\n" not in str(caught.value)


def test_a_missing_study_is_named():
    with pytest.raises(ConfigError, match=r"cannot read the study nowhere.yaml: No such file"):
        read_study("nowhere.yaml", "r")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("0.1 → 0.3", "0.1_to_0.3"), ("fixed, same time", "fixed_same_time"), ("plain", "plain")],
)  # fmt: skip
def test_folders_are_called_like_their_conditions(name, expected):
    assert slug(name) == expected


def test_names_that_differ_in_odd_characters_get_folders_that_differ():
    assert len({slug("a/b"), slug("a:b"), slug("a b"), slug("é"), slug("è")}) == 5


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_of_the_repository_resolves(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(str(Path("configs/studies") / file.name), "runs")
    least = 5 if file.stem.startswith(("reproduce", "schedules")) else 3
    assert all(len({run.seed for run in study.runs if run.condition == name}) >= least for name in study.conditions)
