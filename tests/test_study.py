"""Study files: what they may say, and the runs they come to."""

import re
from collections import Counter

import pytest
from programs import ROOT

import sweep
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
        "title: Sizes\nbase: base.yaml\nsettings: {stages: 2, model_ema: true}\nseeds: [3, 1]\nmetric: top1_ema\ncontrol: fixed\n"
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
        "--config", str(tmp_path / "base.yaml"), "--stages", "2", "--model-ema", "--train-crop-size", "32", "48", "--seed", "3",
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


def test_all_conditions_but_one_may_start_from_its_weights(write):
    text = (
        "base: base.yaml\nsettings: {weights: {of: a}}\nconditions: {b: {lr: 0.2}, a: {weights: null}, c: {lr: 0.3}}\n"
    )
    runs = {run.condition: run for run in read_study(write(text), "r").runs}
    assert runs["a"].source is None and runs["b"].source is runs["c"].source is runs["a"]


def test_a_condition_may_be_judged_by_a_metric_and_a_control_of_its_own(write):
    text = (
        "base: base.yaml\ncontrol: a\nconditions:\n  a: {}\n  b: {lr: 0.2}\n"
        "  c: {lr: 0.3, metric: auc, control: b, held_out: test}\n"
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
    # Of {"epochs": 4, "lr": 0.2, "model": ..., "train_crop_size": 32, "val_crop_size": 32, "val_resize_size": 32} and no
    # setting more, so that those still to come leave the rows there are what they are.
    assert digests[1] == "d08ba32895a4"


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
        ("conditions: {a: {}}\nsettings: 3", "", r"settings must map names to values, got 3"),
        ("conditions: {a: {held_out: [x]}}", "", r"condition a: held_out must name a folder, got \['x'\]"),
        ("conditions: {a: {control: z}}", "", r"control 'z' is none of the conditions: a"),
        ("conditions: {a: {}}\nseeds: 3", "", r"seeds must be a list of whole numbers, got 3"),
        ("conditions: {a: {}}\nseeds: [1, 1]", "", r"a seed stands twice in \[1, 1\]"),
        ("conditions: {a: {}}\nmetric: f1", "", r"metric must be one of top1, top1_ema, best_top1, balanced_accuracy, macro_f1, held_out_top1, held_out_balanced_accuracy, auc, got 'f1'"),
        ("conditions: {a: {}}\ncontrol: b", "", r"control 'b' is none of the conditions: a"),
        ("conditions: {a: {weights: {of: b}}}", "", r"weights of 'b', which is none of the conditions"),
        ("conditions: {a: {weights: {of: b}}, b: {weights: {of: a}}}", "", r"start from each other's weights"),
        ("conditions: {a: {weights: {of: b}}, b: {model: resnet18}}", "", r"weights of b are of resnet18, the model is eff"),
        ("conditions: {a: {}, b: {}}\nsettings: {weights: {of: a}}", "", r"condition a starts from its own weights"),
        ("conditions: {a: {metric: auc}}", "", r"condition a: metric auc needs held_out"),
        ("conditions: {a: {}}\nmetric: held_out_top1", "", r"condition a: metric held_out_top1 needs held_out"),
        ("conditions: {a: {}}\nmetric: top1_ema", "", r"condition a: metric top1_ema needs model_ema"),
        ("conditions: {a: {held_out: test, dataset: imagenette}}", "", r"condition a: held_out test has no effect with dataset imagenette; set dataset to imagefolder or hub"),
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


# ---- the studies of this repository ----

STUDIES = {  # conditions, seeds; the original study's limits and the controls it lacked
    "reproduce": (["progressive", "released rule", "size only", "fixed", "fixed, same time"], 5),
    "epochs": (["4 x 20", "4 x 40", "4 x 60", "4 x 87"], 3),
    "dropout": (["0.1 → 0.3", "0.1 → 0.5", "0.1 → 0.7", "0.2 → 0.3", "0.2 → 0.5", "0.2 → 0.7", "constant 0.2", "none"], 3),
    "image_size": (["128 → 300", "128 → 200", "200 → 300", "128 → 400", "200 → 400", "300 → 400", "300 throughout"], 3),
    "ra_magnitude": (9, 3),
    "transfer": (28, 3),
    "reproduce_small": (["progressive", "released rule", "size only", "fixed", "fixed, same time"], 5),
    "epochs_small": (["4 x 2", "4 x 4", "4 x 6", "4 x 9"], 3),
    "dropout_small": (["0.1 → 0.3", "0.1 → 0.5", "0.1 → 0.7", "0.2 → 0.3", "0.2 → 0.5", "0.2 → 0.7", "constant 0.2", "none"], 3),
    "image_size_small": (["64 → 128", "64 → 96", "96 → 128", "64 → 160", "96 → 160", "128 → 160", "128 throughout"], 5),
    "ra_magnitude_small": (9, 3),
    "transfer_small": (25, 3),
    "schedules": (["fixed", "EfficientNetV2", "released rule", "EfficientTrain++", "equal compute, growing strengths"], 5),
    "schedules_small": (["fixed", "EfficientNetV2", "released rule", "EfficientTrain++", "equal compute, growing strengths"], 5),
    "strengths": (["growing", "weakest", "middle", "strongest", "shrinking", "one size, growing", "one size, weakest", "one size, strongest"], 5),
    "strengths_small": (["growing", "weakest", "middle", "strongest", "shrinking", "one size, growing", "one size, weakest", "one size, strongest"], 5),
    "staged_192px": (["progressive", "fixed", "fixed, same time"], 3),
    "class_weights": (["none", "effective number", "inverse frequency"], 5),
    "class_weights_small": (["none", "effective number"], 4),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_of_the_repository_plans_what_it_should(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    without_rows = ["--results", str(tmp_path)]
    options = [f"configs/studies/{name}.yaml", "--plan", *without_rows, "--", "--data-path", "nowhere"]
    assert sweep.main(*sweep.read_options(options)) == 0  # without data
    conditions, seeds = STUDIES[name]
    printed = capsys.readouterr().out
    found = re.findall(rf"^(.*\S) +{seeds}  +[\d-]+ +\d+ +[\d.]+$", printed, re.MULTILINE)
    assert (found if isinstance(conditions, list) else len(found)) == conditions
    assert f"\n{len(found) * seeds} runs, 0 of them finished; cost " in printed and "images not counted" in printed


def test_a_plan_names_the_size_of_each_stage(monkeypatch, tmp_path, capsys):
    """64, 74.7, 85.3 and 96 px are 64, 64, 64 and 96 in multiples of 32; one size throughout is named once."""
    monkeypatch.chdir(ROOT)
    options = [
        "configs/studies/image_size_small.yaml",
        "--plan",
        "--results",
        str(tmp_path),
        "--",
        "--data-path",
        "nowhere",
    ]
    assert sweep.main(*sweep.read_options(options)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^64 → 96 +5 +64-64-64-96 +12 ", printed, re.M)
    assert re.search(r"^128 throughout +5 +128 +12 ", printed, re.M)


def test_no_study_is_left_out_above():
    assert {file.stem for file in (ROOT / "configs" / "studies").glob("*.yaml")} == set(STUDIES)


def test_the_controls_of_reproduce_cost_what_they_should(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study("configs/studies/reproduce.yaml", "runs")
    first = {run.condition: run for run in study.runs if run.seed == 0}
    sizes = {name: [stage.image_size for stage in run.plan.stages] for name, run in first.items()}
    assert sizes["progressive"] == sizes["size only"] == [128, 185, 242, 300]
    assert sizes["released rule"] == [171, 214, 257, 300] and sizes["fixed"] == [300] * 4
    assert {stage.ra_magnitude for stage in first["size only"].plan.stages} == {15}
    assert first["progressive"].gflops / first["fixed"].gflops == pytest.approx(0.558, abs=5e-4)
    # An H200's step of 6,885 images a second at 128 px and 1,660 at 300, and a line through the multiply-adds between.
    plan = first["progressive"].plan
    a_gflop = (1 / 1660 - 1 / 6885) / (5.308 - 0.934)
    seconds = [1 / 6885 + (gflops - 0.934) * a_gflop for gflops in plan.gflops_per_image]
    trained = sum(len(stage.epochs) * of_image for stage, of_image in zip(plan.stages, seconds))
    assert trained == pytest.approx(first["fixed, same time"].config.epochs / 1660, rel=0.005)


def names_in(file):
    text = (ROOT / "configs" / "splits" / file).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_no_patient_is_both_trained_on_and_chosen_by():
    """`person1_bacteria_1.jpeg`, `IM-0115-0001.jpeg`, `NORMAL2-IM-0927-0001.jpeg`: up to the first number is the patient."""
    patients = [
        {re.match(r"(?:NORMAL2-)?\D*\d+", name.split("/")[1])[0] for name in names_in(f"pneumonia_{part}.txt")}
        for part in ("train", "val")
    ]
    assert patients[0] and patients[1] and not patients[0] & patients[1]
    assert len(names_in("pneumonia_train.txt")) == 4478 and len(names_in("pneumonia_val.txt")) == 738
    assert set(names_in("pneumonia_train_1500.txt")) <= set(names_in("pneumonia_train.txt"))
    assert len(set(names_in("pneumonia_train_1500.txt"))) == 1500


@pytest.mark.parametrize("images", [1200, 3000])
def test_the_subsets_of_imagenette_have_as_many_images_of_each_class(images):
    names = names_in(f"imagenette_{images}.txt")
    of_class = Counter(name.split("/")[0] for name in names)
    assert len(set(names)) == len(names) == images and len(of_class) == 10 and len(set(of_class.values())) == 1
