"""The plan of the stages, against Table 6 of arXiv:2104.00298 and numbers worked out by hand."""

import json

import pytest

import stages
from learning import cost
from learning.cost import gflops_per_image
from learning.models import build_on_meta
from learning.rules import equal_compute, released_image_size, stage_value
from settings.errors import ConfigError
from settings.resolve import resolve
from stages import Plan, make_plan, plan_stages
from train import run


def plan(*argv):
    return plan_stages(resolve(argv))


@pytest.mark.parametrize(
    ("config", "sizes", "magnitudes", "dropouts", "mixups"),
    [
        ("imagenet_s", [128, 185, 242, 300], [5, 8.33, 11.67, 15], [0.1, 0.1667, 0.2333, 0.3], [0, 0, 0, 0]),
        ("imagenet_m", [128, 212, 296, 380], [5, 10, 15, 20], [0.1, 0.2, 0.3, 0.4], [0, 0.0667, 0.1333, 0.2]),
        (
            "imagenet_l",
            [128, 212, 296, 380],
            [5, 11.67, 18.33, 25],
            [0.1, 0.2333, 0.3667, 0.5],
            [0, 0.1667, 0.3333, 0.5],
        ),
    ],
)
def test_stages_are_table_6(config, sizes, magnitudes, dropouts, mixups):
    stages = plan("--config", f"configs/{config}.yaml")
    assert [s.image_size for s in stages] == sizes
    assert [round(s.ra_magnitude, 2) for s in stages] == magnitudes
    assert [round(s.dropout, 4) for s in stages] == dropouts
    assert [round(s.mixup_alpha, 4) for s in stages] == mixups
    assert [s.epochs for s in stages] == [range(0, 87), range(87, 175), range(175, 262), range(262, 350)]


def test_imagenette_s_has_four_stages_of_87_epochs():
    stages = plan("--config", "configs/imagenette_s.yaml")
    assert [s.image_size for s in stages] == [128, 185, 242, 300]
    assert [s.epochs for s in stages] == [range(0, 87), range(87, 174), range(174, 261), range(261, 348)]


def test_fixed_control_differs_in_what_is_scheduled_and_nothing_else():
    grown = resolve(["--config", "configs/imagenette_s.yaml"]).as_dict()
    fixed = resolve(["--config", "configs/imagenette_s_fixed.yaml"]).as_dict()
    differing = {name for name in grown if grown[name] != fixed[name]} - {"config", "output_dir"}
    assert differing == {"train_crop_size", "ra_magnitude", "dropout", "stages"} - (
        {"stages"} if grown["stages"] == fixed["stages"] else set()
    )
    assert {s.image_size for s in plan("--config", "configs/imagenette_s_fixed.yaml")} == {300}


def test_size_only_grows_size_at_constant_strength():
    stages = plan("--config", "configs/imagenette_s_size_only.yaml")
    assert [s.image_size for s in stages] == [128, 185, 242, 300]
    assert len({s.ra_magnitude for s in stages}) == len({s.dropout for s in stages}) == 1


def test_released_rule_is_a_step_ahead_in_size_alone():
    stages = plan("--config", "configs/imagenette_s_released.yaml")
    assert [s.image_size for s in stages] == [171, 214, 257, 300]
    assert stages[0].ra_magnitude == 5


def test_stage_value_of_the_paper():
    assert stage_value(128, 300, 1, 4) == pytest.approx(185.3333, abs=1e-4)
    assert stage_value(128, 300, 3, 4) == 300
    assert stage_value(0.3, 0.1, 1, 3) == pytest.approx(0.2)  # it may also fall
    assert released_image_size(128, 300, 0, 4) == 171


@pytest.mark.parametrize(("index", "num_stages"), [(0, 1), (-1, 4), (4, 4)])
def test_stage_value_refuses_what_is_no_stage(index, num_stages):
    with pytest.raises(ValueError):
        stage_value(1, 2, index, num_stages)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--train-crop-size", "128", "300", "--image-size-multiple", "32"], [128, 160, 224, 288]),
        (["--train-crop-size", "96", "96", "160", "192"], [96, 96, 160, 192]),
        (["--train-crop-size", "64"], [64, 64, 64, 64]),
        (["--train-crop-size", "300", "128"], [300, 242, 185, 128]),
    ],
)
def test_sizes_from_one_two_or_four_values(flags, sizes):
    assert [s.image_size for s in plan("--stages", "4", "--epochs", "4", *flags)] == sizes


def test_batch_sizes_round_down_to_whole_images():
    assert [s.batch_size for s in plan("--stages", "4", "--epochs", "8", "-b", "100", "30")] == [100, 76, 53, 30]


@pytest.mark.parametrize(
    ("flags", "lengths"),
    [
        (["--epochs", "10", "--stages", "4"], [2, 3, 2, 3]),
        (["--epochs", "4", "--stages", "4"], [1, 1, 1, 1]),
        (["--stages", "3", "--stage-epochs", "1", "2", "7"], [1, 2, 7]),
        (["--epochs", "5"], [5]),
    ],
)
def test_every_epoch_belongs_to_one_stage(flags, lengths):
    stages = plan(*flags)
    assert [len(s.epochs) for s in stages] == lengths
    assert [e for s in stages for e in s.epochs] == list(range(sum(lengths)))


EFFICIENTTRAIN = [96, 96, 160, 160, 160, 160, 224, 224, 224, 224]


def test_equal_compute_is_the_recipe_of_efficienttrain():
    """20 passes at 224 px are 108.9 at 96 px and 39.2 at 160 px."""
    config = resolve(["--config", "configs/imagenet_r50_efficienttrain.yaml"])
    stages = plan_stages(config)
    assert [stage.image_size for stage in stages] == EFFICIENTTRAIN
    assert [len(stage.epochs) for stage in stages] == [109, 109, 39, 39, 39, 39, 20, 20, 20, 20]
    assert config.epochs == 200 and [stage.ra_magnitude for stage in stages] == list(range(10))
    plan = make_plan(config)
    assert plan.num_epochs == 454 and plan.relative_cost == pytest.approx(1.0, abs=0.03)
    told = str(plan).splitlines()
    assert "of 200 epochs at 224 px throughout, in multiply-adds (0.998 by area)" in told[-1]
    assert told[1].split()[-2] == "20.02" and told[3].split()[-2] == "19.9"  # 109 * (96 / 224)^2, 39 * (160 / 224)^2
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))).relative_cost == plan.relative_cost


@pytest.mark.parametrize(
    ("epochs", "sizes", "passes"),
    [
        (12, [64, 96, 128], [16, 7, 4]),  # 16, 7.1, 4
        (10, [64, 64, 64, 64], [3, 3, 2, 2]),  # 2.5 each, and 10 together, as by the other rules
        (14, [64, 64, 64, 64], [3, 3, 4, 4]),  # 3.5 each
        (4, [64, 128], [8, 2]),
        (2, [128, 64], [1, 1]),  # a quarter of a pass is one
        (7, [64, 64, 96, 128], [7, 7, 3, 2]),  # 7, 7, 3.1, 1.75: together 7.2
        (6, [64, 64, 96, 128], [6, 6, 3, 1]),  # 6, 6, 2.7, 1.5: with 2 in the last they would be 6.7
    ],
)
def test_passes_of_equal_compute_by_hand(epochs, sizes, passes):
    assert equal_compute(epochs, sizes) == passes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stages 2 --stage-rule compute --stage-epochs 3 4", "leave one of them out"),
        ("--stage-rule compute", "stage_rule compute has no effect with stages 1"),
        ("--lr-clock compute", "lr_clock compute has no effect with stages 1"),
        ("--stages 4 --epochs 3 --stage-rule compute", "4 stages need at least 4 epochs"),
    ],
)
def test_equal_compute_refuses_what_cannot_be(flags, message):
    with pytest.raises(ConfigError, match=message):
        resolve(flags.split())


def test_a_run_may_start_within_the_epochs_of_equal_compute_and_not_beyond():
    flags = "--model efficientnet_v2_tiny --stages 2 --epochs 4 --stage-rule compute --train-crop-size 32 64".split()
    assert make_plan(resolve([*flags, "--start-epoch", "9"])).num_epochs == 10
    with pytest.raises(ConfigError, match="start_epoch 10 is not below the 10 epochs"):
        make_plan(resolve([*flags, "--start-epoch", "10"]))


def test_drop_rates_and_randaugment_are_absent_unless_asked_for():
    (stage,) = plan()
    assert (stage.dropout, stage.stochastic_depth_prob, stage.ra_magnitude) == (None, None, None)


def test_plan_needs_neither_data_nor_gpu_and_tells_its_cost(capsys, monkeypatch, tmp_path):
    config = "configs/imagenette_s.yaml"
    assert run(["--config", config, "--plan", "json", "--data-path", str(tmp_path / "nothing")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["image_size"] for row in told["stages"]] == [128, 185, 242, 300]
    assert [(row["first_epoch"], row["last_epoch"]) for row in told["stages"]] == [
        (0, 87),
        (87, 174),
        (174, 261),
        (261, 348),
    ]
    assert told["relative_cost"] == pytest.approx(0.553, abs=0.01)  # by areas; layers round odd sizes up
    assert set(told["stages"][0]) == {
        "index", "first_epoch", "last_epoch", "image_size", "ra_magnitude", "mixup_alpha", "cutmix_alpha", "dropout",
        "stochastic_depth_prob", "random_erase", "batch_size", "gflops_per_image", "finetune",
    }  # fmt: skip
    assert run(["--config", config, "--plan"]) == 0
    assert "185" in capsys.readouterr().out
    assert not (tmp_path / "nothing").exists()


def test_a_thousand_sizes_cost_what_each_of_them_costs(monkeypatch):
    """Few of them are counted; a model whose layers are no halves of the image is counted whole."""
    counted = []
    count = cost.count
    monkeypatch.setattr(stages, "COUNTED", {})
    monkeypatch.setattr(cost, "count", lambda model, size: counted.append(size) or count(model, size))
    flags = "--stages 1000 --epochs 1000 --train-crop-size 128 1127 --mixup-alpha 0 0.2".split()
    many = make_plan(resolve(["--model", "efficientnet_v2_tiny", *flags]))
    assert [stage.image_size for stage in many.stages] == list(range(128, 1128)) and len(counted) == 30
    counted.clear()
    assert make_plan(resolve(["--model", "efficientnet_v2_tiny", *flags])) == many and not counted  # a second time
    alone = gflops_per_image(build_on_meta("efficientnet_v2_tiny"), [159, 160, 161, 1001])
    assert [many.gflops_per_image[size - 128] for size in (159, 160, 161, 1001)] == pytest.approx(alone, rel=1e-9)
    assert [stage.mixup_alpha for stage in many.stages[:49]] == [0.0] * 49  # up to 48 / 999 * 0.2 = 0.0096
    assert many.stages[50].mixup_alpha == pytest.approx(0.01001, abs=1e-5)
    counted.clear()
    assert len(gflops_per_image(build_on_meta("alexnet"), range(100, 200))) == len(counted) == 100


def test_released_rule_costs_what_the_facts_say():
    config = resolve(["--config", "configs/imagenette_s_released.yaml"])
    assert make_plan(config).relative_cost == pytest.approx(0.642, abs=0.02)  # by areas; layers round odd sizes up


def test_a_model_bound_to_one_size_says_so():
    config = resolve(["--model", "vit_b_16", "--stages", "2", "--train-crop-size", "128", "224"])
    with pytest.raises(ConfigError, match="128 px"):
        make_plan(config)
