"""Fine-tuning to the test size: what it plans, what it changes and what it leaves, alone, resumed and in two processes."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pictures import photo
from PIL import Image
from programs import RUN, ranks
from runs import STRONG, assert_same_bits, checkpoint, cut, make_tree, metrics, start
from small_models import CPU
from torch import nn

from images.store_place import store_side
from learning.ema import EMA
from learning.learner import Learner, build_learner
from learning.models import Classifier, build_model, build_on_meta, tuned_layers
from learning.optim import LearningRate
from learning.rehearse import rehearse
from learning.state import RunState
from presets import eval_preset, finetune_preset, resize_for
from settings.errors import ConfigError
from settings.resolve import doubts, resolve
from stages import make_plan, plan_stages
from utils import Runtime

STAGED = "--stages 2 --epochs 3 --train-crop-size 32 40 --dropout 0.1 0.3 --stochastic-depth-prob 0.2".split()
TUNED = "--finetune-epochs 2 --val-crop-size 48 --val-resize-size 56".split()
HEAD = {"classifier.1.weight", "classifier.1.bias"}
NORM = {"features.4.1.running_mean", "features.4.1.running_var", "features.4.1.num_batches_tracked"}

# ---- the plan ----


def test_it_is_a_stage_of_its_own_after_the_others():
    flags = "--model efficientnet_v2_b0 --stages 2 --epochs 5 --train-crop-size 64 96 --dropout 0.1 0.3 -b 16 8".split()
    flags += "--mixup-alpha 0.2 --auto-augment ra --random-erase 0.1".split()
    without = make_plan(resolve(flags))
    plan = make_plan(resolve([*flags, "--finetune-epochs", "4", "--val-crop-size", "112"]))
    assert plan.stages[:2] == without.stages and plan.relative_cost == without.relative_cost
    last = plan.stages[2]
    assert (last.index, last.epochs, last.image_size, last.batch_size) == (2, range(5, 9), 112, 8)
    assert last.settings() == {
        "image_size": 112, "ra_magnitude": None, "mixup_alpha": 0, "cutmix_alpha": 0, "dropout": 0,
        "stochastic_depth_prob": 0, "random_erase": 0, "batch_size": 8,
    }  # fmt: skip
    assert [stage.finetune for stage in plan.stages] == [False, False, True] and plan.last.index == 1
    assert type(plan).from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    assert "2 finetune     6-9         112" in str(plan)
    assert "of 5 epochs at 96 px throughout, in multiply-adds; without 4 epochs of fine-tuning" in str(plan)


def test_its_size_is_the_test_size_unless_another_is_given():
    flags = "--finetune-epochs 1 --val-crop-size 112 --image-size-multiple 32".split()
    assert plan_stages(resolve(flags))[-1].image_size == 112
    other = resolve([*flags, "--finetune-size", "100"])
    assert plan_stages(other)[-1].image_size == 100
    (told,) = doubts(other, 90, several=False)
    assert (
        told
        == "finetune_size 100 with val_crop_size 112: the classifier is fitted to another size than it is evaluated at"
    )
    assert doubts(resolve([*flags, "--finetune-size", "112"]), 90, several=False) == []


def test_the_learning_rate_is_the_schedule_s_and_then_a_twentieth_or_as_given():
    flags = "--epochs 2 --finetune-epochs 3 --lr 0.4 --lr-scheduler exponentiallr --lr-gamma 0.5".split()

    def schedule(flags):
        return LearningRate(resolve(flags), plan_stages(resolve(flags)))

    rate = schedule(flags)
    assert [rate(epoch) for epoch in range(5)] == pytest.approx([0.4, 0.2, 0.02, 0.02, 0.02])
    assert schedule([*flags, "--finetune-lr", "0.003"])(2.5) == 0.003


def test_the_store_serves_its_size():
    flags = "--train-crop-size 32 --val-crop-size 40 --val-resize-size 50 --finetune-epochs 1".split()
    assert store_side(resolve(flags)) == 64
    assert store_side(resolve([*flags, "--finetune-size", "80"])) == 100


WRONG = [
    ("--finetune-size 64", "finetune_size 64 has no effect with finetune_epochs 0; set finetune_epochs to 1 or more"),
    ("--finetune-lr 0.1", "finetune_lr 0.1 has no effect with finetune_epochs 0"),
    ("--finetune-epochs 2 --model squeezenet1_1", "finetune_epochs has no effect: SqueezeNet ends in no linear layer"),
    ("--finetune-epochs 2 --model vit_b_16 --finetune-size 256", "VisionTransformer cannot take images of 256 px"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[flags for flags, _ in WRONG])
def test_what_cannot_be(flags, message):
    with pytest.raises(ConfigError) as caught:
        make_plan(resolve(flags.split()))
    assert message in str(caught.value)


# ---- what is trained ----


@pytest.mark.parametrize(
    ("name", "head", "norm"),
    [
        ("resnet18", "fc", "layer4.1.bn2"), ("resnet50", "fc", "layer4.2.bn3"), ("densenet121", "classifier", "features.norm5"),
        ("efficientnet_v2_s", "classifier.1", "features.7.1"), ("mobilenet_v3_small", "classifier.3", "features.12.1"),
        ("convnext_tiny", "classifier.2", None),
    ],
)  # fmt: skip
def test_the_classifier_and_the_batch_norm_before_the_pooling(name, head, norm):
    model = build_on_meta(name)
    found = tuned_layers(model)
    assert found[0] is model.get_submodule(head) and isinstance(found[0], Classifier)
    assert found[1] is (None if norm is None else model.get_submodule(norm))


def learner_of(runtime=CPU, *, average=False):
    model, _ = build_model("efficientnet_v2_tiny", 2)
    config = resolve(["--model-ema"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    return Learner(model, optimizer, nn.CrossEntropyLoss(), runtime, ema=EMA(model, config) if average else None)


def test_nothing_else_is_in_training_mode_and_all_is_again_afterwards():
    learner = learner_of()
    everything = list(learner.parameters)
    learner.finetune(True)
    learner.train()
    training = {name for name, module in learner.model.named_modules() if module.training}
    assert training == {"features.4.1"}
    names = {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    assert names == HEAD and len(learner.parameters) == 2
    learner.finetune(False)
    learner.train()
    assert all(module.training for module in learner.model.modules())
    assert all(one is other for one, other in zip(learner.parameters, everything, strict=True))


def test_both_copies_start_from_the_one_named():
    for name in ("ema", "model"):
        learner = learner_of(average=True)
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.add_(1)
        wanted = {key: value.clone() for key, value in learner.copies[name].state_dict().items()}
        learner.unify(name)
        for copy in learner.copies.values():
            assert_same_bits(dict(copy.state_dict()), wanted)
    alone = learner_of()
    alone.unify("ema")  # of a run that went on without its average


def test_several_processes_wait_for_the_gradients_of_the_classifier_alone(tmp_path):
    """DistributedDataParallel waits for every parameter that wanted a gradient when it was made."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        learner = learner_of(Runtime(device=torch.device("cpu"), world_size=2))
        for on, count in ((True, 2), (False, len(list(learner.model.parameters()))), (True, 2)):
            learner.finetune(on)
            for _ in range(2):
                learner.step_on_noise(32, 4)
            assert sum(parameter.grad is not None for parameter in learner.model.parameters()) == count
    finally:
        dist.destroy_process_group()


def test_batch_norms_count_over_all_processes_if_asked(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        runtime = Runtime(device=torch.device("cpu"), world_size=2)
        build_learner(resolve(["--model", "efficientnet_v2_tiny"]), 2, None, runtime)
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):  # that they are there
            build_learner(resolve(["--model", "efficientnet_v2_tiny", "--sync-bn"]), 2, None, runtime)
    finally:
        dist.destroy_process_group()


def test_the_rehearsal_covers_it_and_leaves_all_to_be_trained():
    learner = learner_of()
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    seen, step = [], learner.step

    def noting(images, *rest):
        seen.append((images.shape[-1], len(learner.parameters)))
        return step(images, *rest)

    learner.step = noting
    rehearse(plan_stages(resolve([*STAGED, *TUNED, "--batch-size", "4"])), learner, 100, 48, 4)
    everything = len(list(learner.model.parameters()))
    assert seen == [(32, everything), (40, everything), (48, 2)] and len(learner.parameters) == everything
    assert_same_bits(dict(learner.model.state_dict()), before)


# ---- what it sees ----


@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_images_are_those_of_evaluation(backend):
    config = resolve(f"--val-crop-size 32 --val-resize-size 40 --hflip-prob 0 --backend {backend}".split())
    image = Image.fromarray(photo(60, 81).numpy())
    seen = finetune_preset(config, 24, on_device=False)(image)
    assert resize_for(config, 24) == 30
    assert torch.equal(seen, eval_preset(crop_size=24, resize_size=30, backend=backend)(image))


def test_they_are_flipped_as_in_training():
    image = Image.fromarray(photo(40, 40).numpy())
    plain, turned = (
        finetune_preset(resolve(["--hflip-prob", share]), 24, on_device=False)(image) for share in ("0", "1")
    )
    assert torch.equal(turned, plain.flip(2)) and not torch.equal(turned, plain)
    preset = finetune_preset(resolve(["--hflip-prob", "0.25"]), 24, on_device=True)
    assert preset.hflip_prob == 0.25


def test_batches_are_cropped_at_the_centre():
    preset = finetune_preset(resolve("--val-crop-size 32 --val-resize-size 40".split()), 24, on_device=True)
    boxes = preset.boxes(np.zeros((3, 1)), np.array([60, 50, 7]), np.array([40, 50, 1]))
    # top, left, height, width: four fifths of 40, of 50 and of 1
    assert boxes.tolist() == [[14, 4, 32, 32], [5, 5, 40, 40], [3, 0, 1, 1]]
    assert preset.level is None and preset.random_erase == 0


# ---- runs ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with fine-tuning, the same without, and their images."""
    folder = tmp_path_factory.mktemp("tuned")
    tree = make_tree(folder / "images")
    assert start(tree, folder / "run", *STAGED, *STRONG, *TUNED) == 0
    assert start(tree, folder / "plain", *STAGED, *STRONG, *TUNED, "--finetune-epochs", "0") == 0
    return folder / "run", folder / "plain", tree


def test_it_changes_the_classifier_and_the_last_batch_norm_s_statistics_and_nothing_else(whole):
    """The run without it is where it began: its stages are the same to the bit."""
    tuned, plain = map(checkpoint, whole[:2])
    last = metrics(whole[1])[-1]  # of the two copies as they are, not of the best that there ever was
    better = "model_ema" if last["top1_ema"] > last["top1"] else "model"
    for copy in ("model", "model_ema"):
        changed = {name for name, value in tuned[copy].items() if not torch.equal(value, plain[better][name])}
        assert changed == HEAD | NORM
    counted = "features.4.1.num_batches_tracked"
    assert int(tuned["model"][counted] - plain[better][counted]) == 2 * 3  # epochs, steps
    ours, theirs = (part["optimizer"]["state"] for part in (tuned, plain))
    moved = {number for number in ours if not torch.equal(ours[number]["square_avg"], theirs[number]["square_avg"])}
    assert ours.keys() == theirs.keys() and len(moved) == 2
    assert all(
        torch.equal(ours[number]["momentum_buffer"], theirs[number]["momentum_buffer"])
        for number in ours.keys() - moved
    )


def test_metrics_summary_and_report_have_it_as_a_stage(whole):
    folder = whole[0]
    records = metrics(folder)
    assert [(record["epoch"], record["stage"], record["image_size"]) for record in records] == [
        (0, 0, 32), (1, 1, 40), (2, 1, 40), (3, 2, 48), (4, 2, 48),
    ]  # fmt: skip
    assert [record["lr"] for record in records[2:]] == pytest.approx([0.01, 0.0005, 0.0005])
    assert records[3]["dropout"] == records[3]["mixup_alpha"] == 0 and records[3]["ra_magnitude"] is None
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["epochs"] == 5 and summary["final"]["last_training_size"]["image_size"] == 48
    last = records[2]["images_per_second"], records[1]["images_per_second"]
    at_last = 48 / sum(24 / speed for speed in last)  # images a second of stage 1
    seconds = sum(record["epoch_seconds"] for record in records[:3])
    assert summary["speedup_over_fixed_size"] == pytest.approx(72 / at_last / seconds)
    page = (folder / "report.html").read_text()
    assert "2 finetune" in page and "5 of 5 epochs" in page and "of 3 epochs at 40 px throughout" in page
    assert (folder / "report" / "stage_2.png").exists()


# Calls: three steps and an end per epoch. 12: the end of training; 14: the first epoch of fine-tuning, its second step;
# 17: the first step of its second.
@pytest.mark.parametrize(("at_call", "left"), [(12, (3, 0)), (14, (3, 2)), (17, (4, 1))])
def test_a_run_cut_and_resumed_ends_with_the_same_bits(whole, tmp_path, monkeypatch, at_call, left):
    folder, _, tree = whole
    with monkeypatch.context() as patch:
        cut(patch, at_call)
        assert start(tree, tmp_path / "cut", *STAGED, *STRONG, *TUNED) == 3
    state = checkpoint(tmp_path / "cut")["state"]
    assert (state["epoch"], state["step"]) == left
    assert start(tree, tmp_path / "cut", *STAGED, *STRONG, *TUNED, "--resume", "auto", "--workers", "1") == 0
    ours, theirs = checkpoint(tmp_path / "cut"), checkpoint(folder)
    for part in ("model", "model_ema", "optimizer", "ema_updates"):
        assert_same_bits(ours[part], theirs[part])


def test_in_batches_it_is_resumed_to_the_same_bits_too(whole, tmp_path, monkeypatch):
    flags = ["--epochs", "1", "--train-crop-size", "32", "--augment-on", "device", *TUNED]
    assert start(whole[2], tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        cut(patch, 6)
        assert start(whole[2], tmp_path / "cut", *flags) == 3
    assert start(whole[2], tmp_path / "cut", *flags, "--resume", "auto") == 0
    assert_same_bits(checkpoint(tmp_path / "cut")["model"], checkpoint(tmp_path / "whole")["model"])


def test_a_finished_run_may_be_fine_tuned_as_another(whole, tmp_path):
    """With the weights that the run itself would have come to."""
    tuned, plain, tree = whole
    more = ["--resume", plain / "checkpoint.pth"]
    assert start(tree, tmp_path / "more", *STAGED, *STRONG, *TUNED, *more) == 0
    assert [record["stage"] for record in metrics(tmp_path / "more")] == [2, 2]
    for part in ("model", "model_ema"):
        assert_same_bits(checkpoint(tmp_path / "more")[part], checkpoint(tuned)[part])


def test_the_end_of_training_is_evaluated_too(whole, tmp_path):
    flags = "--epochs 3 --eval-every 2 --train-crop-size 32".split()
    assert start(whole[2], tmp_path / "run", *flags, *TUNED) == 0
    assert [record["top1"] is not None for record in metrics(tmp_path / "run")] == [False, True, True, True, True]


def test_two_processes_tune_the_same(whole, tmp_path):
    flags = [*RUN, "--clearml", "off", "--data-path", whole[2], "--epochs", "1", *TUNED, "--batch-size", "4"]
    done = ranks(2, tmp_path, *flags, "--output-dir", tmp_path / "run")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert [record["stage"] for record in metrics(tmp_path / "run")] == [0, 1, 1]
    assert "epoch 3/3" in done[0].stdout and os.listdir(tmp_path / "run" / "report")


def test_what_is_fine_tuned_is_the_better_of_the_latest_evaluation():
    """The best ever was the model, 91 in the second; at the end its average is ahead by 8."""
    state = RunState()
    for model, average, better in ((60, 20, "model"), (91, 50, "model"), (84, 88, "ema"), (82, 90, "ema"), (85, 85, "model")):  # fmt: skip
        state.note_best({"model": SimpleNamespace(top1=model), "ema": SimpleNamespace(top1=average)})
        assert (state.best_weights, state.better) == ("model", better)
