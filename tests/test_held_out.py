"""What best weights come to on images that chose nothing."""

import json

import numpy as np
import pytest
import torch
from runs import make_tree, start

from images.hub import HubImages
from settings.errors import ConfigError
from settings.resolve import resolve
from studies.held_out import count_shared, load_held_out, main, scores
from utils import Runtime


def test_scores_of_two_classes_by_hand():
    sick = np.array([0.1, 0.6, 0.4, 0.9, 0.8])  # probability of the second class
    found = scores(np.stack([1 - sick, sick], 1), np.array([0, 0, 1, 1, 1]))
    assert found["held_out_images"] == 5
    assert found["held_out_top1"] == pytest.approx(60)  # right are the 1st, 4th, 5th
    assert found["auc"] == pytest.approx(
        5 / 6
    )  # of six pairs of sick and well, 0.4 against 0.6 alone is the wrong way round
    assert found["held_out_balanced_accuracy"] == pytest.approx((200 / 3 + 50) / 2)
    assert found["sensitivity"] == pytest.approx(200 / 3) and found["specificity"] == pytest.approx(50)


def test_more_classes_have_accuracy_alone():
    """Of class 1 one of two is right; class 2 has no image, and no part in the balanced accuracy."""
    assert scores(np.eye(3), np.array([0, 1, 1])) == {
        "held_out_top1": pytest.approx(200 / 3), "held_out_balanced_accuracy": pytest.approx(75), "held_out_images": 3,
    }  # fmt: skip


def test_best_weights_are_evaluated_on_the_folder_given_and_not_on_what_chose_them(tmp_path):
    tree = make_tree(tmp_path / "images", splits=(("train", 8), ("val", 2), ("test", 3)))
    (tmp_path / "list.txt").write_text("ant/0.png\nbee/1.png\n")
    assert start(tree, tmp_path / "run", "--epochs", "1", "--val-list", tmp_path / "list.txt") == 0
    assert main([str(tmp_path / "run"), "test"]) == 0
    found = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert found["held_out_images"] == 6 and set(found) == {"held_out", "held_out_images", "held_out_top1", "held_out_balanced_accuracy", "auc", "sensitivity", "specificity"}  # fmt: skip
    assert found["held_out_top1"] == pytest.approx((found["sensitivity"] + found["specificity"]) / 2)  # three of each
    assert found["held_out"] == "test"
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        main([str(tmp_path / "run"), "nowhere"])
    with pytest.raises(ConfigError, match=r"held_out val: 2 of its 4 images are validation images"):
        main([str(tmp_path / "run"), "val"])


def test_what_the_run_began_with_need_not_be_there_any_more(tmp_path):
    tree = make_tree(tmp_path / "images", splits=(("train", 8), ("val", 2), ("test", 3)))
    assert start(tree, tmp_path / "first", "--epochs", "1") == 0
    began = tmp_path / "first" / "checkpoint.pth"
    assert start(tree, tmp_path / "run", "--epochs", "2", "--resume", began) == 0
    began.unlink()
    assert main([str(tmp_path / "run"), "test"]) == 0


def test_splits_of_the_hub_share_all_images_or_none():
    val, same, test = (HubImages.__new__(HubImages) for _ in range(3))
    for images, root in ((val, "/hub/a/b/test"), (same, "/hub/a/b/test"), (test, "/hub/a/b/train")):
        images.root, images.targets = root, np.zeros(3)
    assert (count_shared(same, val), count_shared(test, val)) == (3, 0)


def test_a_data_set_whose_splits_cannot_be_chosen_has_no_held_out_images():
    with pytest.raises(
        ConfigError, match="held_out test has no effect with dataset digits; set dataset to imagefolder or hub"
    ):
        load_held_out(resolve(["--dataset", "digits"]), "test", Runtime(device=torch.device("cpu")))


def test_without_a_finished_run_it_is_told_so(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished run"):
        main([str(tmp_path), "test"])
    with pytest.raises(ConfigError, match="usage: python -m"):
        main([])
