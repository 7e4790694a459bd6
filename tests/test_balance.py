"""Weights of classes in the training loss."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
import yaml
from runs import make_tree, metrics, start
from small_models import CPU

from images.datasets import Data
from learning.balance import WeightedLoss, find_class_weights, tell_class_weights
from learning.learner import build_learner
from settings.errors import ConfigError
from settings.resolve import resolve
from settings.values import as_text, convert, from_text


@dataclass
class Counted:
    """Images of which only the classes are known."""

    counts: tuple

    @property
    def classes(self):
        return [f"c{i}" for i in range(len(self.counts))]

    @property
    def targets(self):
        return [number for number, count in enumerate(self.counts) for _ in range(count)]


def weights_of(counts, *given):
    images = Counted(counts)
    return find_class_weights(resolve(["--class-weights", *map(str, given)]), Data(train=images, val=images))


# ---- what they come to ----


def test_the_effective_number_of_samples_by_hand():
    """390 images: 1 - 0.999 ** 390 is 0.323075; 1,110: 0.670624. The mean of an image's weight is 1."""
    found = weights_of((390, 1110), "auto")
    assert found[0] / found[1] == pytest.approx(0.670624 / 0.323075, rel=1e-5)
    assert (390 * found[0] + 1110 * found[1]) / 1500 == pytest.approx(1)
    assert found == pytest.approx([1.62207, 0.78144], abs=1e-5)


def test_few_images_count_by_their_number_and_many_alike():
    few, many = weights_of((1, 2, 4), "auto"), weights_of((20_000, 40_000), "auto")
    assert few == pytest.approx([7 / 3, 7 / 6, 7 / 12], rel=2e-3)  # one over the number, but for a thousandth
    assert many == pytest.approx([1, 1], abs=1e-6)
    assert weights_of((5, 5, 5), "auto") == pytest.approx([1, 1, 1])


def test_numbers_by_class_are_scaled_to_a_mean_of_one_over_the_images():
    assert weights_of((1, 3), 2, 1) == pytest.approx([1.6, 0.8])  # (2 + 3) / 4 is 1.25
    assert weights_of((1, 3), 20, 10) == pytest.approx([1.6, 0.8])
    assert weights_of((1, 3), "none") is None


@pytest.mark.parametrize(("given", "counts"), [((1, 2, 3), (4, 4)), ((1,), (4, 4, 4, 4, 4, 4, 4))])
def test_another_count_of_numbers_is_told_with_the_classes(given, counts):
    with pytest.raises(ConfigError) as told:
        weights_of(counts, *given)
    names = ", ".join(f"c{i}" for i in range(min(6, len(counts)))) + (", …" if len(counts) > 6 else "")
    assert f"class_weights has {len(given)} numbers, the data has {len(counts)} classes ({names}); give one per" in str(told.value)  # fmt: skip


def test_the_line_that_tells_them():
    assert tell_class_weights([1.6, 0.8], ["ant", "bee"]) == "class weights: ant 1.6, bee 0.8"
    many = tell_class_weights([1.0, 3.0, 0.25, 1, 1, 1, 1], list("abcdefg"))
    assert many == "class weights: c 0.25 to b 3"


# ---- the setting ----


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("AUTO", "auto"), ("none", None), ("[2, 1]", (2.0, 1.0)), ("3.5", (3.5,)), ("null", None)],
)
def test_the_setting_in_yaml_and_in_a_dashboard(text, value):
    found = convert("class_weights", yaml.safe_load(text))
    assert found == value
    assert convert("class_weights", from_text("class_weights", as_text(found))) == value


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("balanced", "class_weights must be auto, or a number or a list of numbers, got 'balanced'"),
        ("auto 1", "class_weights must be auto, or a number or a list of numbers, got 'auto'"),
        ("1 0", r"class_weights must be in \(0, inf\), got 0"),
        ("1 -2", r"class_weights must be in \(0, inf\), got -2"),
    ],
)
def test_what_it_cannot_be(words, told):
    with pytest.raises(ConfigError, match=told):
        resolve(["--class-weights", *words.split()])


# ---- the loss ----


def test_the_loss_is_a_mean_over_images_whatever_their_weights():
    """Of logits that are all 0 every image has a loss of log 2, before it is weighted."""
    loss, logits = WeightedLoss([1.6, 0.8], 0.0), torch.zeros(4, 2)
    assert loss(logits, torch.tensor([0, 1, 1, 1])).item() == pytest.approx(math.log(2))
    assert loss(logits, torch.tensor([0, 0, 0, 0])).item() == pytest.approx(1.6 * math.log(2))
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75]])
    # 1.6, 0.8, 1.2 and 1.0
    assert loss(logits, mixed).item() == pytest.approx(1.15 * math.log(2))


def test_class_numbers_and_soft_targets_that_say_the_same_cost_the_same():
    logits, targets = torch.randn(16, 5), torch.randint(5, (16,))
    for smoothing in (0.0, 0.1):
        loss = WeightedLoss([0.2, 0.5, 1.0, 2.0, 4.0], smoothing)
        assert loss(logits, targets).item() == pytest.approx(loss(logits, torch.eye(5)[targets]).item(), rel=1e-5)


def test_label_smoothing_spreads_a_target_over_classes_of_their_own_weights():
    loss = WeightedLoss([1.6, 0.8], 0.1)  # 0.95 of class 0 and 0.05 of class 1
    found = loss(torch.zeros(1, 2), torch.tensor([0])).item()
    assert found == pytest.approx((0.95 * 1.6 + 0.05 * 0.8) * math.log(2))


def test_weights_that_are_all_one_are_the_plain_loss():
    logits, targets = torch.randn(16, 5), torch.randint(5, (16,))
    plain = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    assert WeightedLoss([1.0] * 5, 0.1)(logits, targets).item() == pytest.approx(plain(logits, targets).item())


def test_without_weights_what_is_trained_on_is_the_loss_that_there_was():
    config = resolve(["--model", "efficientnet_v2_tiny", "--device", "cpu"])
    learner, _ = build_learner(config, 2, None, CPU)
    assert learner.training_loss is learner.criterion and type(learner.criterion) is torch.nn.CrossEntropyLoss
    weighted, _ = build_learner(config, 2, None, CPU, [1.6, 0.8])
    assert weighted.criterion.weight is None and weighted.training_loss.weight.tolist() == pytest.approx([1.6, 0.8])


# ---- in a run ----


@pytest.fixture
def uneven(tmp_path):
    """12 ants and 4 bees to train on, five of each for validation."""
    tree = make_tree(tmp_path / "images")
    for number in range(4, 12):
        (tree / "train" / "bee" / f"{number}.png").unlink()
    return tree


def test_a_run_tells_its_weights_trains_on_them_and_validates_without(uneven, tmp_path, capsys):
    still = ["--epochs", "1", "--lr", "1e-20", "--momentum", "0", "--weight-decay", "0"]
    mixing = ["--mixup-alpha", "0.4", "--label-smoothing", "0.1"]
    for name, flags in (("plain", []), ("weighted", ["--class-weights", "3", "1"])):
        assert start(uneven, tmp_path / name, *still, *mixing, *flags) == 0
    assert capsys.readouterr().out.count("class weights: ant 1.2, bee 0.4\n") == 1  # (12 x 3 + 4) / 16 is 2.5
    plain, weighted = (metrics(tmp_path / name)[0] for name in ("plain", "weighted"))
    assert weighted["val_loss"] == plain["val_loss"] and weighted["loss"] != pytest.approx(plain["loss"], rel=1e-3)
    summary = json.loads((tmp_path / "weighted" / "summary.json").read_text())
    assert [row["weight"] for row in summary["per_class"]] == pytest.approx([1.2, 0.4])
    page = (tmp_path / "weighted" / "report.html").read_text()
    assert "weight in the loss" in page and "weight in the loss" not in (tmp_path / "plain" / "report.html").read_text()
    # The same run goes on with the same weights only
    assert start(uneven, tmp_path / "weighted", *still, *mixing, "--resume", "auto", "--class-weights", "auto") == 2
    assert "class_weights [3, 1] -> auto" in capsys.readouterr().err


def test_a_wrong_count_is_one_line_before_anything_is_made(uneven, tmp_path, capsys):
    assert start(uneven, tmp_path / "run", "--epochs", "1", "--class-weights", "1", "2", "3") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "3 numbers, the data has 2 classes (ant, bee)" in told
    assert not (tmp_path / "run").exists()
