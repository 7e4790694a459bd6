"""Models: published sizes and costs, weights from files, drop rates set in place."""

import argparse
import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model
from torchvision.ops import StochasticDepth

from learning.checkpoint import Checkpoint
from learning.cost import gflops_per_image
from learning.learner import build_model_of
from learning.models import (
    Classifier,
    as_trained,
    available,
    build_model,
    check_name,
    set_dropout,
    set_stochastic_depth,
)
from learning.weights import fetch, find_weights, preset_doubt, read_weights
from settings.errors import ConfigError
from settings.resolve import resolve
from stages import make_plan
from utils import Runtime

SMALL = "shufflenet_v2_x0_5"  # 0.34 million weights below its head of 1024 columns


def on_meta(name, num_classes=1000, **kwargs):
    """The model without memory: shapes and settings only."""
    with torch.device("meta"):
        return build_model(name, num_classes, **kwargs)[0]


def modules_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def depth_probabilities(model):
    return [layer.p for layer in modules_of(model, StochasticDepth)]


def saved(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return str(path)


class Stranger:
    """A Python object that a weights file has no business to hold."""


# ---- names and sizes ----

EXTRA = [
    ("efficientnet_v2_b0", 7.1), ("efficientnet_v2_b1", 8.1), ("efficientnet_v2_b2", 10.1), ("efficientnet_v2_b3", 14.4),
    ("efficientnet_v2_xl", 208.1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), [*EXTRA, ("efficientnet_v2_s", 21.5), ("resnet18", 11.7)])
def test_millions_of_weights_are_the_published_ones(name, millions):
    weights = sum(parameter.numel() for parameter in on_meta(name).parameters())
    assert round(weights / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "dropout", "channels"), [
    ("efficientnet_v2_b0", 0.2, 1280), ("efficientnet_v2_b1", 0.2, 1280), ("efficientnet_v2_b2", 0.3, 1408),
    ("efficientnet_v2_b3", 0.3, 1536), ("efficientnet_v2_xl", 0.4, 1280),
])  # fmt: skip
def test_extra_sizes_are_in_torchvision_s_registry_with_their_own_dropout(name, dropout, channels):
    with torch.device("meta"):
        model = get_model(name, weights=None, num_classes=7)
        other = get_model(name, num_classes=7, dropout=0.5)
    assert [layer.p for layer in modules_of(model, nn.Dropout)] == [dropout]
    assert [layer.p for layer in modules_of(other, nn.Dropout)] == [0.5]
    assert model.classifier[-1].weight.shape == (7, channels)
    assert {norm.eps for norm in modules_of(model, nn.BatchNorm2d)} == {1e-3}
    assert name in available() and name in torchvision.models.list_models()


def test_b0_trains_on_images_of_any_size():
    model, told = build_model("efficientnet_v2_b0", 5)
    assert told == "efficientnet_v2_b0: random weights"
    for size in (32, 45):
        logits = model(torch.rand(2, 3, size, size))
        assert logits.shape == (2, 5)
        logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "gflops"), [("efficientnet_v2_s", 384, 8.37), ("resnet18", 224, 1.81), ("vit_b_16", 224, 17.56)]
)
def test_arithmetic_is_what_torchvision_publishes(name, size, gflops):
    assert gflops_per_image(on_meta(name), [size]) == pytest.approx([gflops], abs=0.01)


def test_arithmetic_of_several_sizes_comes_in_their_order():
    large, small, again = gflops_per_image(on_meta("resnet18"), [256, 128, 256])
    assert large == again
    assert small == pytest.approx(large / 4, rel=0.02)  # a quarter of the pixels; the head stays


def test_a_size_the_model_cannot_take_is_named():
    with pytest.raises(ConfigError, match="VisionTransformer cannot take images of 128 px"):
        gflops_per_image(on_meta("vit_b_16"), [224, 128])


@pytest.mark.parametrize(
    "name", ["regnet_y_400mf", "swin_t", "maxvit_t", "googlenet", "mnasnet0_5", "densenet121", "vgg11"]
)
def test_every_family_can_be_planned(name):
    config = resolve(["--model", name, "--epochs", "1"])
    (row,) = make_plan(config).as_dict()["stages"]
    assert row["image_size"] == 224 and row["gflops_per_image"] > 0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet81", "resnet18"), ("efficientnet_v2_b4", "efficientnet_v2_b"), ("convnext_tinny", "convnext_tiny")],
)
def test_an_unknown_model_brings_up_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"unknown model '{name}'; nearest: .*{nearest}"):
        check_name(name)


def test_a_name_like_no_model_says_what_is_accepted():
    with pytest.raises(ConfigError, match="any torchvision classification model is accepted"):
        check_name("???")


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "fasterrcnn_resnet50_fpn", "raft_small", "r3d_18", "quantized_resnet18"]
)
def test_models_of_other_tasks_are_not_offered(name):
    with pytest.raises(ConfigError, match="unknown model"):
        check_name(name)


# ---- heads ----


@pytest.mark.parametrize(("name", "dropouts"), [
    ("efficientnet_v2_s", [0.2]), ("efficientnet_v2_m", [0.3]), ("efficientnet_v2_l", [0.4]), ("efficientnet_b0", [0.2]),
    ("mobilenet_v3_small", [0.2]), ("googlenet", [0.2]), ("alexnet", [0.5, 0.5]), ("resnet18", []),
])  # fmt: skip
def test_a_head_for_ten_classes_keeps_its_dropout(name, dropouts):
    model = on_meta(name, 10)
    assert [layer.p for layer in modules_of(model, nn.Dropout)] == dropouts
    assert model.eval()(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 10)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_training_sees_one_output_of_models_with_auxiliary_heads(name):
    output = on_meta(name, 4).train()(torch.empty(2, 3, 299, 299, device="meta"))
    assert isinstance(output, torch.Tensor) and output.shape == (2, 4)


def test_an_efficientnet_s_head_for_few_classes_starts_as_small_as_one_for_a_thousand():
    model, _ = build_model("efficientnet_v2_b0", 10)
    weights = model.classifier[-1].weight.detach()
    assert weights.shape == (10, 1280)
    assert 0.03 < float(weights.abs().max()) <= 0.03163  # 1 / sqrt(1000) = 0.031623
    assert float(weights.std()) == pytest.approx(0.01826, rel=0.05)  # that over sqrt(3)
    assert abs(float(weights.mean())) < 0.001


def test_batch_norm_momentum_is_set_on_every_batch_norm():
    model = on_meta("efficientnet_v2_s", bn_momentum=0.01)
    assert {norm.momentum for norm in modules_of(model, nn.BatchNorm2d)} == {0.01}
    assert {norm.momentum for norm in modules_of(on_meta("efficientnet_v2_s"), nn.BatchNorm2d)} == {0.1}


def test_batch_norm_momentum_of_a_model_without_batch_norm_is_refused():
    with pytest.raises(ConfigError, match="bn_momentum has no effect: vit_b_16 has no batch norm"):
        on_meta("vit_b_16", bn_momentum=0.01)


# ---- drop rates ----


def test_dropout_is_set_on_every_layer_and_takes_effect():
    model = on_meta("alexnet", 2)
    set_dropout(model, 0.35)
    assert [layer.p for layer in modules_of(model, nn.Dropout)] == [0.35, 0.35]
    layer = modules_of(model, nn.Dropout)[0].train()
    assert float((layer(torch.ones(100_000)) == 0).float().mean()) == pytest.approx(0.35, abs=0.01)


def test_dropout_of_a_model_without_any_is_refused():
    with pytest.raises(ConfigError, match=r"dropout 0\.2 has no effect: ResNet has no Dropout layer"):
        set_dropout(on_meta("resnet18"), 0.2)


def test_stochastic_depth_of_a_model_without_any_is_refused():
    with pytest.raises(ConfigError, match=r"stochastic_depth_prob 0\.2 has no effect: ResNet has no stochastic depth"):
        set_stochastic_depth(on_meta("resnet18"), 0.2)


def test_stochastic_depth_of_efficientnet_v2_s_grows_from_block_to_block():
    """40 blocks: block k of them is dropped with k / 40 of p, so the last with 39 / 40."""
    model = on_meta("efficientnet_v2_s")
    before = depth_probabilities(model)
    assert len(before) == 40
    set_stochastic_depth(model, 0.2)
    assert before == pytest.approx([0.005 * k for k in range(40)])
    assert depth_probabilities(model) == pytest.approx(before)
    assert depth_probabilities(model)[-1] == pytest.approx(0.195)
    set_stochastic_depth(model, 0.4)
    assert depth_probabilities(model)[20] == pytest.approx(0.2) and depth_probabilities(model)[-1] == pytest.approx(
        0.39
    )
    set_stochastic_depth(model, 0.0)
    assert set(depth_probabilities(model)) == {0.0}
    set_stochastic_depth(model, 0.2)
    assert depth_probabilities(model) == pytest.approx(before)


@pytest.mark.parametrize(("name", "steps"), [("convnext_tiny", 17), ("swin_t", 11)])
def test_stochastic_depth_of_other_families_ends_at_p(name, steps):
    model = on_meta(name, 10)
    for p in (0.3, 0.0, 0.15):
        set_stochastic_depth(model, p)
        assert depth_probabilities(model) == pytest.approx([p / steps * k for k in range(steps + 1)])
    assert depth_probabilities(model)[-1] == pytest.approx(0.15)


def test_stochastic_depth_of_maxvit_ends_at_p():
    model = on_meta("maxvit_t", 10)
    set_stochastic_depth(model, 0.3)
    probabilities = depth_probabilities(model)
    assert (probabilities[0], probabilities[-1]) == pytest.approx((0.0, 0.3))
    assert probabilities == sorted(probabilities) and len(set(probabilities)) > 5


def test_drop_rates_change_no_weight():
    model, _ = build_model("efficientnet_v2_b0", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_dropout(model, 0.5)
    set_stochastic_depth(model, 0.5)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---- weights ----


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"model": state, "epoch": 3}, lambda state: {"model": {"no": "weights"}, "model_ema": state},
], ids=["bare", "checkpoint", "ema first"])  # fmt: skip
def test_own_weights_come_back(tmp_path, wrap):
    source, _ = build_model(SMALL, 3)
    model, told = build_model(SMALL, 3, read_weights(SMALL, saved(tmp_path, wrap(source.state_dict()))))
    for name, value in source.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    total = len(source.state_dict())
    assert told == f"{SMALL}: {total} of {total} tensors loaded"


@pytest.mark.parametrize("average", [False, True])
def test_a_checkpoint_of_torchvision_s_reference_gives_its_weights(tmp_path, average):
    """It holds its settings as an argparse.Namespace, and an AveragedModel whole."""
    source, _ = build_model(SMALL, 3)
    content = {
        "model": source.state_dict(),
        "optimizer": {},
        "epoch": 7,
        "args": argparse.Namespace(lr=0.5, model=SMALL),
    }
    if average:
        content["model"] = build_model(SMALL, 3)[0].state_dict()
        content["model_ema"] = torch.optim.swa_utils.AveragedModel(source, use_buffers=True).state_dict()
    path = saved(tmp_path, content)
    read = read_weights(SMALL, path)
    assert read.keys() == source.state_dict().keys()
    assert all(torch.equal(value, read[name]) for name, value in source.state_dict().items())
    with pytest.raises(ConfigError, match="not a checkpoint of this script; to start from its weights use --weights"):
        Checkpoint.load(path)


def test_a_head_that_nobody_would_train_is_refused():
    state = build_model(SMALL, 7)[0].state_dict()
    with pytest.raises(
        ConfigError, match="weights have 7 outputs, the data 3 classes; a new head would be evaluated unt"
    ):
        build_model(SMALL, 3, state, new_head=False)
    assert build_model(SMALL, 7, state, new_head=False)[1].endswith("tensors loaded")


def test_how_published_weights_want_their_images_is_told():
    def doubt(*flags):
        return preset_doubt(resolve(["--test-only", *flags]))

    assert doubt("--model", "resnet18", "--weights", "DEFAULT") is None  # 256, 224 px, bilinear: the defaults
    assert doubt("--model", "resnet18", "--weights", "README.md") is None
    small = ["--model", "efficientnet_v2_s", "--weights", "DEFAULT"]
    told = "--val-resize-size 384 --val-crop-size 384 evaluates them as they were published"
    assert doubt(*small) == f"weights EfficientNet_V2_S_Weights.IMAGENET1K_V1: {told}"
    assert doubt(*small, "--val-resize-size", "384", "--val-crop-size", "384") is None
    large = doubt("--model", "efficientnet_v2_l", "--weights", "DEFAULT")
    assert "--val-resize-size 480 --val-crop-size 480 --interpolation bicubic evaluates" in large
    assert large.endswith("but for images normalised by mean 0.5 and deviation 0.5, which no setting does")


def test_weights_of_a_googlenet_of_one_s_own_that_began_at_random(tmp_path):
    """It saw images as they are; published weights expect them normalised anew inside."""
    state = build_model("googlenet", 2)[0].state_dict()
    torch.save(state, tmp_path / "model_best.pth")
    config = resolve(["--model", "googlenet", "--weights", str(tmp_path / "model_best.pth")])
    cpu = Runtime(device=torch.device("cpu"))
    assert build_model_of(config, 2, state, cpu)[0].transform_input  # a file from elsewhere
    for began, seen in (("null", False), ("DEFAULT", True)):
        (tmp_path / "config.yaml").write_text(f"model: googlenet\nweights: {began}\n")
        tested = build_model_of(replace(config, test_only=True), 2, state, cpu)[0]
        assert tested.transform_input is seen
        if not seen:
            with pytest.raises(ConfigError, match="go on from its checkpoint with --resume instead"):
                build_model_of(config, 2, state, cpu)
    assert as_trained(tested, published=False).transform_input is False and tested.transform_input is False
    assert not hasattr(as_trained(nn.Identity(), published=True), "transform_input")


@pytest.mark.parametrize(("name", "head"), [
    (SMALL, ["fc.bias", "fc.weight"]), ("efficientnet_v2_b0", ["classifier.1.bias", "classifier.1.weight"]),
    ("squeezenet1_1", ["classifier.1.bias", "classifier.1.weight"]),
])  # fmt: skip
def test_another_class_count_keeps_the_body_and_names_the_new_head(name, head):
    source, _ = build_model(name, 7)
    model, told = build_model(name, 3, source.state_dict())
    theirs, ours = source.state_dict(), model.state_dict()
    for key in ours:
        if key in head:
            assert ours[key].shape[0] == 3 and theirs[key].shape[0] == 7
        else:
            assert torch.equal(ours[key], theirs[key]), key
    total = len(ours)
    assert told == f"{name}: {total - 2} of {total} tensors loaded; new head for 3 classes ({', '.join(head)})"


def test_auxiliary_heads_of_published_weights_may_stay_out():
    whole = get_model("googlenet", num_classes=3, init_weights=False, aux_logits=True)
    model, told = build_model("googlenet", 3, whole.state_dict())
    assert torch.equal(model.inception3a.branch1.conv.weight, whole.inception3a.branch1.conv.weight)
    assert model.aux1 is None and "new head" not in told
    assert model.transform_input  # those weights expect images normalised another way


@pytest.mark.parametrize("other", ["mobilenet_v3_small", "shufflenet_v2_x1_0"])
def test_weights_of_another_architecture_are_refused(other):
    with pytest.raises(
        ConfigError,
        match=rf"weights are not of {SMALL}: \d+ tensors are missing, unknown or of another shape, first \S+",
    ):
        build_model(SMALL, 1000, get_model(other).state_dict())


@pytest.mark.parametrize("change", [
    lambda state: state.pop("conv5.0.weight"), lambda state: state.update(extra=torch.zeros(1)), lambda state: state.pop("fc.weight"),
], ids=["a weight missing", "a weight too many", "no head"])  # fmt: skip
def test_weights_that_nearly_fit_are_refused_too(change):
    state = build_model(SMALL, 3)[0].state_dict()
    change(state)
    with pytest.raises(ConfigError, match="1 tensors are missing"):
        build_model(SMALL, 3, state)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_unless_they_stay_out(number):
    state = build_model(SMALL, 3)[0].state_dict()
    state["fc.weight"][1, 2] = number
    with pytest.raises(ConfigError, match=r"1 tensors hold NaN or infinity, first fc\.weight; they are of no use"):
        build_model(SMALL, 3, state)
    build_model(SMALL, 4, state)  # a head of another class count is not loaded


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02N."], ids=["empty", "text", "pickle"])
def test_a_stray_file_is_no_file_of_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"weights\.pth (is not a file of weights|holds no state dict)") as caught:
        read_weights(SMALL, str(path))
    assert "\n" not in str(caught.value)


def test_a_pickled_python_object_is_refused_unread(tmp_path):
    path = saved(tmp_path, {"model": {"weight": torch.zeros(1)}, "args": Stranger()})
    with pytest.raises(ConfigError, match="is not a file of weights that loads safely"):
        read_weights(SMALL, path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        torch.zeros(3),
        {"weight": 1},
        {"model": {}},
        {"model": {"lr": 0.1}},
        {1: torch.zeros(1)},
        {"weight": torch.zeros(1, dtype=torch.complex64)},
        {"weight": torch.zeros(2, 2).to_sparse()},
    ],
    ids=str,
)
def test_a_safe_file_without_a_state_dict_is_refused(tmp_path, content):
    with pytest.raises(ConfigError, match="holds no state dict"):
        read_weights(SMALL, saved(tmp_path, content))


@pytest.mark.parametrize("text", ["IMAGENET1K_V1", "EfficientNet_V2_S_Weights.IMAGENET1K_V1", "DEFAULT"])
def test_torchvision_s_names_of_weights(text):
    member = find_weights("efficientnet_v2_s", text)
    assert member is torchvision.models.EfficientNet_V2_S_Weights.IMAGENET1K_V1


@pytest.mark.parametrize(
    ("name", "weights", "known"),
    [
        ("resnet18", "nowhere.pth", "DEFAULT, ResNet18_Weights.IMAGENET1K_V1"),
        ("resnet18", "ResNet50_Weights.IMAGENET1K_V1", "DEFAULT, ResNet18_Weights.IMAGENET1K_V1"),
        ("efficientnet_v2_b0", "DEFAULT", "none"),
    ],
)
def test_what_is_neither_a_file_nor_weights_of_the_model_is_told_with_what_there_is(name, weights, known):
    with pytest.raises(ConfigError) as caught:
        read_weights(name, weights)
    assert str(caught.value) == f"weights '{weights}' is neither a file nor weights of {name} (it has {known})"


def test_weights_that_cannot_be_fetched_end_in_one_line(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConfigError, match="cannot be fetched: no route to host; give a file instead"):
        read_weights("resnet18", "DEFAULT")


def test_fetched_weights_are_compared_with_the_hash_in_their_name_each_time(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "made.pth")
    whole = (tmp_path / "made.pth").read_bytes()
    path = tmp_path / "checkpoints" / f"linear-{hashlib.sha256(whole).hexdigest()[:8]}.pth"

    def fetched(url, target, start, progress):
        assert start == path.stem[-8:] and target == str(path)
        path.write_bytes(whole)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetched)
    member = SimpleNamespace(url=f"https://nowhere/{path.name}")
    assert fetch(member) == fetch(member) == str(path)
    path.write_bytes(whole[:-1] + b"?")
    with pytest.raises(ConfigError, match="is damaged; remove it, and it is fetched again"):
        fetch(member)


@pytest.mark.parametrize("name", ["efficientnet_v2_b0", "resnet18", "swin_t"])
def test_the_classifier_is_evaluated_in_float32_under_autocast(name):
    model = build_model(name, 10)[0].eval()
    heads = [module for module in model.modules() if isinstance(module, Classifier)]
    assert len(heads) == 1
    inputs = []
    heads[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0].float()))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(2, 3, 64, 64))
    assert output.dtype == torch.float32
    expected = inputs[0] @ heads[0].weight.T.detach() + heads[0].bias.detach()
    assert torch.allclose(output, expected, atol=1e-5)  # bfloat16 is off by 1e-3
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 3, 64, 64)).dtype == torch.bfloat16
