"""Losses and correct answers, counted."""

import math

import pytest
import torch
from small_models import CPU

from learning import scores
from learning.scores import NonFiniteLoss, Score, TrainingLoss, keep_outputs
from learning.state import RunState
from utils import Runtime


def test_top1_top5_loss_and_confusions_by_hand():
    """Six classes. The true one comes first, second, fifth and sixth."""
    ranked = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])  # class 0 first, class 5 last
    score = Score(CPU)
    score.add(ranked.repeat(3, 1), torch.tensor([0, 1, 4]), torch.tensor(2.0))
    score.add(ranked.repeat(1, 1), torch.tensor([5]), torch.tensor(6.0))
    score.gather()
    assert (score.top1, score.top5, score.num_images) == (25.0, 75.0, 4)
    assert score.loss == pytest.approx(3.0)  # (3 * 2 + 6) / 4
    expected = torch.zeros(6, 6, dtype=torch.long)
    expected[[0, 1, 4, 5], 0] = 1  # rows true, columns predicted
    assert torch.equal(score.confusion, expected)
    assert str(score) == "top1 25.000, top5 75.000, loss 3.0000 on 4 images"


def test_confusions_of_repeated_pairs_add_up():
    logits = torch.tensor([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]])
    score = Score(CPU)
    for _ in range(3):
        score.add(logits, torch.tensor([0, 0, 0, 1]), torch.tensor(1.0))
    score.gather()
    assert score.confusion.tolist() == [[3, 6], [0, 3]]
    assert score.top1 == 50.0


@pytest.mark.parametrize(("num_classes", "top1"), [(2, 50.0), (3, 50.0), (4, 50.0), (5, 50.0)])
def test_with_five_classes_or_fewer_all_are_among_the_first_five(num_classes, top1):
    logits = torch.zeros(2, num_classes)
    logits[:, 1] = 1.0
    score = Score(CPU)
    score.add(logits, torch.tensor([1, 0]), torch.tensor(0.5))
    score.gather()
    assert (score.top1, score.top5, score.loss) == (top1, 100.0, 0.5)


def test_half_precision_outputs_lose_nothing():
    score = Score(CPU)
    for _ in range(300):
        score.add(torch.eye(10, dtype=torch.bfloat16), torch.arange(10), torch.tensor(1.5, dtype=torch.bfloat16))
    score.gather()
    assert (score.num_images, score.top1, score.top5, score.loss) == (3000, 100.0, 100.0, 1.5)


def test_outputs_are_kept_in_their_order_with_what_was_counted():
    score = Score(CPU)
    first, second = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.5, 0.25]]), torch.tensor([[1.0, 1.0, 0.0]]).bfloat16()
    score.add(first, torch.tensor([0, 2]), torch.tensor(1.0))
    score.add(second.float(), torch.tensor([1]), torch.tensor(1.0))
    outputs = score.gather().collect().outputs
    assert torch.equal(outputs.logits, torch.cat([first, second.float()])) and outputs.targets.tolist() == [0, 2, 1]
    # What is first of two equal ones is torch's choice, and counted so
    counted = torch.zeros(3, 3, dtype=torch.long)
    counted[outputs.targets, outputs.predicted] = 1
    assert torch.equal(score.confusion, counted) and outputs.predicted[:2].tolist() == [0, 1]


@pytest.mark.parametrize(("most", "kept"), [(30, True), (29, False)])
def test_too_many_outputs_are_not_kept_and_all_is_counted(monkeypatch, most, kept):
    monkeypatch.setattr(scores, "KEPT", most)
    score = Score(CPU)
    for _ in range(5):
        score.add(torch.eye(2, 3), torch.tensor([0, 1]), torch.tensor(1.0))
    assert len(score.batches) == 5 * kept
    score.gather().collect()
    assert (score.outputs is not None) is kept and score.num_images == 10 and score.top1 == 100


def test_only_the_best_weights_keep_their_outputs():
    def score():
        found = Score(CPU)
        found.add(torch.eye(2), torch.tensor([0, 1]), torch.tensor(1.0))
        return found.gather()

    known = {"model": score(), "ema": score()}
    known["best"] = known["ema"]
    keep_outputs(known, of="best")
    assert known["model"].outputs is None and known["ema"].outputs is known["best"].outputs is not None
    keep_outputs(known, of=None)
    assert known["best"].outputs is None and known["best"].confusion.tolist() == [[1, 0], [0, 1]]


def test_the_mean_loss_counts_images_not_batches():
    state = RunState()
    losses = TrainingLoss(state, CPU, "epoch 1")
    assert losses.read() == 0.0
    losses.add(torch.tensor(1.0), 6, 0)
    losses.add(torch.tensor(5.0), 2, 1)
    assert losses.read() == pytest.approx(2.0)
    losses.store(state)
    assert (state.loss_sum, state.num_images) == (16.0, 8)
    again = TrainingLoss(state, CPU, "epoch 1")  # a resume
    again.add(torch.tensor(8.0), 2, 2)
    again.store(state)
    assert (state.loss_sum, state.num_images) == (32.0, 10)


def test_what_an_earlier_part_of_the_epoch_summed_goes_on_in_one_process():
    state = RunState(loss_sum=30.0, num_images=10)
    other = TrainingLoss(state, Runtime(device=torch.device("cpu"), rank=1), "epoch 1")
    other.add(torch.tensor(1.0), 4, 5)
    other.store(state)
    assert (state.loss_sum, state.num_images) == (4.0, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_first_step(bad):
    state = RunState()
    losses = TrainingLoss(state, CPU, "epoch 3/9, stage 1")
    for step, loss in enumerate((1.0, 1.0, 1.0, bad, 1.0, math.nan, 1.0)):
        losses.add(torch.tensor(loss), 4, step)
    for ask in (losses.read, lambda: losses.store(state)):
        with pytest.raises(NonFiniteLoss, match=r"not finite in epoch 3/9, stage 1, step 3; lower lr"):
            ask()
    assert state == RunState()


def test_the_first_step_of_all_can_be_the_bad_one():
    losses = TrainingLoss(RunState(), CPU, "epoch 1")
    losses.add(torch.tensor(math.nan), 4, 0)
    losses.add(torch.tensor(math.nan), 4, 1)
    with pytest.raises(NonFiniteLoss, match="step 0;"):
        losses.read()


def test_a_glance_on_a_cpu_is_the_loss_so_far():
    losses = TrainingLoss(RunState(), CPU, "epoch 1")
    losses.add(torch.tensor(3.0), 4, 0)
    assert losses.glance() == 3.0
    losses.add(torch.tensor(1.0), 4, 1)
    assert losses.glance() == 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_glance_on_a_gpu_is_the_loss_at_the_glance_before():
    losses = TrainingLoss(RunState(), Runtime(device=torch.device("cuda", 0)), "epoch 1")
    seen = []
    for step, loss in enumerate((3.0, 1.0, 2.0)):
        losses.add(torch.tensor(loss, device="cuda"), 4, step)
        seen.append(losses.glance())
    assert seen == [None, 3.0, 2.0] and losses.read() == 2.0
    losses.add(torch.tensor(math.nan, device="cuda"), 4, 3)
    assert losses.glance() == 2.0
    with pytest.raises(NonFiniteLoss, match="step 3;"):
        losses.glance()
