"""What is said of a model's outputs: of each class, of two classes, of its worst mistakes; how fast it answers."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_tree
from small_models import CPU
from torch import nn

from images.datasets import ImageTree
from learning.learner import Learner
from learning.scores import Outputs, Score
from learning.throughput import inference_speed
from reporting.assessment import assess, class_table, path_of, receiver_operating, scores_of, thumbnail, worst_mistakes


def test_precision_recall_and_f1_by_hand():
    """Ten ants, of which two are called bees; five bees, of which one is called ant; no wasp."""
    table = class_table(np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]]), ["ant", "bee", "wasp"])
    assert table[0] == {
        "class": "ant", "precision": pytest.approx(800 / 9), "recall": pytest.approx(80), "f1": pytest.approx(1600 / 19), "support": 10,
    }  # fmt: skip
    assert table[1] == {
        "class": "bee", "precision": pytest.approx(400 / 6), "recall": pytest.approx(80), "f1": pytest.approx(800 / 11), "support": 5,
    }  # fmt: skip
    assert table[2] == {"class": "wasp", "precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_classes_count_alike_in_balanced_accuracy_and_macro_f1():
    """Nine tenths of the images are of one class, which is always named."""
    found = scores_of(np.array([[90, 0], [10, 0]]))
    assert found["balanced_accuracy"] == pytest.approx(50)
    assert found["macro_f1"] == pytest.approx(100 * (180 / 190) / 2)  # precision 0.9, recall 1; and 0
    assert found["sensitivity"] == 0 and found["specificity"] == 100


def test_a_class_without_images_has_no_part_in_the_means_though_it_was_named():
    absent, named = np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]]), np.array([[8, 1, 1], [1, 4, 0], [0, 0, 0]])
    assert scores_of(absent) == {
        "balanced_accuracy": pytest.approx(80),
        "macro_f1": pytest.approx(100 * (16 / 19 + 8 / 11) / 2),
    }
    assert scores_of(named) == {
        "balanced_accuracy": pytest.approx(80),
        "macro_f1": pytest.approx(100 * (16 / 19 + 0.8) / 2),
    }
    # All are of the first of two: precision 1, recall 0.8, which makes 1.6 / 1.8
    assert scores_of(np.array([[8, 2], [0, 0]])) == {
        "balanced_accuracy": pytest.approx(80),
        "macro_f1": pytest.approx(800 / 9),
        "sensitivity": None,
        "specificity": pytest.approx(80),
    }


def test_of_two_classes_the_second_is_the_positive_one():
    found = scores_of(np.array([[3, 1], [2, 4]]))
    assert found["sensitivity"] == pytest.approx(400 / 6) and found["specificity"] == pytest.approx(75)
    assert scores_of(np.array([[3, 1], [0, 0]]))["sensitivity"] is None


def test_the_roc_curve_by_hand():
    """From the most to the least suspect: sick, well, sick, well. Of four pairs one is the wrong way round."""
    margin = np.array([3.0, 2.0, 1.0, -1.0])
    area, (false, true) = receiver_operating(np.stack([-margin / 2, margin / 2], 1), np.array([1, 0, 1, 0]))
    assert area == pytest.approx(0.75)
    assert list(zip(false, true)) == [(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)]
    assert receiver_operating(np.zeros((3, 2)), np.ones(3, int)) is None


def test_what_float32_calls_certain_is_still_told_apart():
    logits = np.array([[0, 40], [0, 50]], dtype=np.float32)  # both probabilities are 1 to the last bit
    assert receiver_operating(logits, np.array([0, 1]))[0] == 1


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    draw = np.random.default_rng(0)
    area, (false, true) = receiver_operating(draw.normal(size=(5000, 2)), draw.integers(0, 2, 5000))
    assert 100 < len(false) <= 200 and (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert 0.45 < area < 0.55


def outputs_of(logits, targets):
    logits = torch.tensor(logits)
    return Outputs(logits, torch.tensor(targets), logits.argmax(1))


def test_the_worst_mistakes_are_the_most_certain_ones():
    logits = [[2.0, 0.0], [0.0, 5.0], [3.0, 0.0], [9.0, 0.0], *(20 * [[1.0, 0.0]])]
    found = worst_mistakes(outputs_of(logits, [1, 0, 0, 1, *(20 * [1])]), 2.0)
    assert [mistake["index"] for mistake in found] == [3, 1, 0, *range(4, 13)]  # twelve; equal ones in their order
    assert found[1] == {"index": 1, "true": 0, "predicted": 1, "probability": pytest.approx(0.924142)}  # odds exp(2.5)
    assert worst_mistakes(outputs_of([[2.0, 0.0]], [0]), 1.0) == []


@pytest.fixture
def images(tmp_path):
    return ImageTree(str(make_tree(tmp_path / "images", size=(400, 320)) / "val"))


def score_of(images, logits):
    score = Score(CPU)
    score.add(logits, torch.from_numpy(images.targets), torch.tensor(1.0))
    return score.gather()


def test_all_of_it_as_the_summary_and_the_page_take_it(images):
    logits = torch.tensor(5 * [[1.0, 0.0]] + 5 * [[0.0, 1.0]])
    logits[7] = torch.tensor([3.0, 0.0])  # a bee that is called an ant
    found = assess(score_of(images, logits), images.classes, images, 0)
    assert found.scores["auc"] == pytest.approx(20 / 25)  # it stands before all ants
    assert found.scores["balanced_accuracy"] == pytest.approx(90) and found.classes[1]["recall"] == pytest.approx(80)
    assert found.calibration_figures() == {
        "temperature": 1.0, "ece_before": found.calibration.before.error, "ece_after": found.calibration.before.error,
        "fitted_on": 0, "measured_on": 5, "bins": 15,
    }  # fmt: skip
    (mistake,) = found.mistakes
    assert mistake["path"].endswith("val/bee/2.png") and (mistake["true"], mistake["predicted"]) == ("bee", "ant")
    shown = json.loads(json.dumps(found.shown()))
    assert sum(shown["reliability"]["after"]["counts"]) == 5 and shown["roc"]["true_positive_rate"][-1] == 1
    assert shown["mistakes"] == [mistake]


def test_without_outputs_there_is_what_the_confusions_tell(images):
    logits = torch.zeros(10, 2)
    logits[:, 0] = torch.nan
    diverged = score_of(images, logits)
    assert diverged.outputs is not None
    nothing_kept = score_of(images, torch.zeros(10, 2))
    nothing_kept.outputs = None
    for score in (diverged, nothing_kept):
        found = assess(score, images.classes, images, 0)
        assert found.calibration is None and found.roc is None and found.mistakes == [] and "auc" not in found.scores
        assert found.scores["balanced_accuracy"] == pytest.approx(50) and found.calibration_figures() is None
        json.dumps(found.shown(), allow_nan=False)


def test_of_one_image_the_mistake_is_told_and_no_calibration(tmp_path):
    images = ImageTree(str(make_tree(tmp_path / "images", splits=(("val", 1),)) / "val"))
    images.targets = images.targets[:1]  # the ant
    found = assess(score_of(images, torch.tensor([[0.0, math.log(4)]])), images.classes, images, 0)
    assert found.calibration is None and found.calibration_figures() is None and found.shown()["reliability"] is None
    (mistake,) = found.mistakes
    assert (mistake["true"], mistake["predicted"]) == ("ant", "bee") and mistake["probability"] == pytest.approx(0.8)


def test_a_mistake_is_shown_small_and_named_by_its_file(images):
    picture = thumbnail(images, 3)
    assert picture.size == (160, 128) and images[3][0].size == (400, 320)
    assert path_of(images, 3).endswith("val/ant/3.png")

    class Drawn:
        def __getitem__(self, index):
            return Image.new("RGB", (8, 8)), 0

    assert path_of(Drawn(), 3) is None and thumbnail(Drawn(), 3).size == (8, 8)


# ---- how fast it answers ----


class Watched(nn.Module):
    """Notes the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(tuple(images.shape))
        return self.scale * images.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("largest", "train_seconds", "sizes"), [(20, 1e6, [1, 8, 20]), (8, 1e6, [1, 8]), (1, 1e6, [1]), (512, 0.0, [1])]
)
def test_speed_by_batch_size_within_the_time_there_is(largest, train_seconds, sizes):
    model = Watched()
    learner = Learner(model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), CPU)
    rows = inference_speed(learner, 16, largest, train_seconds)
    assert [row["batch_size"] for row in rows] == sizes
    assert [shape[1:] for shape in model.seen] == len(model.seen) * [(3, 16, 16)]
    for row in rows:
        assert row["images_per_second"] * row["milliseconds"] == pytest.approx(1000 * row["batch_size"])
    assert len(model.seen) <= 51 * len(sizes)
    if not train_seconds:
        assert len(model.seen) == 2
