"""What the rehearsal makes of a GPU's memory, on one whose figures are given. What it does to a run: test_resume.py."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from images.evaluation import LARGE_EVALUATION
from learning.rehearse import rehearse
from settings.errors import ConfigError

GIB = 2**30
STAGES = [SimpleNamespace(index=i, image_size=size, batch_size=8, finetune=False) for i, size in enumerate((32, 48))]


class Gpu:
    """Holds 1 GiB. Steps take 3 and 5 more, an evaluation 2, one of a large batch 4."""

    device, world_size = SimpleNamespace(type="cuda"), 1

    def __init__(self, free):
        self.free, self.peak, self.said, self.proven = free, 1, [], set()

    def release_memory(self):
        self.peak = 1

    def reserved_memory(self):
        return self.peak * GIB

    def free_memory(self):
        return int(self.free * GIB)

    def say(self, line):
        self.said.append(line)

    def any(self, wish):
        return wish


class OnGpu:
    """A learner, as far as the rehearsal asks."""

    def __init__(self, free=80.0, graphed=True):
        self.runtime, self.graphed, self.graphs, self.eager = Gpu(free), graphed, object(), None
        self.evaluated = []

    def undoing(self):
        return nullcontext()

    def finetune(self, on):
        pass

    def step_on_noise(self, image_size, batch_size, net):
        self.runtime.peak = 1 + {32: 3, 48: 5}.get(image_size, 5)

    def evaluate_noise(self, image_size, batch_size):
        self.evaluated.append((image_size, batch_size))
        self.runtime.peak = 1 + (2 if batch_size == 16 else 4)


@pytest.mark.parametrize(
    ("free", "large", "graphs", "taken"),
    [(10, True, True, 9), (9.9, False, True, 7), (8, False, True, 7), (7.9, False, False, 5)],
)
def test_a_graph_s_memory_leaves_room_for_evaluation_or_there_are_no_graphs(free, large, graphs, taken):
    learner = OnGpu(free)  # 5 of the largest step, 4 or 2 of an evaluation, 1 of batches to come
    assert rehearse(STAGES, learner, 100, 64, 16) == taken * GIB
    assert learner.evaluated == [(64, 512), (64, 16)][: 1 if large else 2]
    assert (LARGE_EVALUATION in learner.runtime.proven) is large
    assert learner.graphed is graphs and (learner.graphs is not None) is graphs
    assert bool(learner.runtime.said) is not graphs
    if not graphs:
        assert learner.runtime.said[0].startswith(
            "cuda_graphs off: a step would keep 5.0 GiB, and evaluation wants 2.0"
        )


def test_a_large_evaluation_is_rehearsed_where_it_may_come_and_given_up_where_a_kernel_refuses_it(monkeypatch):
    learner = OnGpu()
    rehearse(STAGES, learner, 100, 64, 16, on_device=False)
    assert learner.evaluated == [(64, 16)] and not learner.runtime.proven
    learner, evaluate = OnGpu(), OnGpu.evaluate_noise

    def refuse(self, image_size, batch_size):
        evaluate(self, image_size, batch_size)
        if batch_size == 512:
            raise RuntimeError("integer out of range")

    monkeypatch.setattr(OnGpu, "evaluate_noise", refuse)
    rehearse(STAGES, learner, 100, 64, 16)
    assert learner.evaluated == [(64, 512), (64, 16)] and not learner.runtime.proven


def test_without_graphs_an_evaluation_takes_what_a_step_has_left():
    assert rehearse(STAGES, OnGpu(6, graphed=False), 100, 64, 16) == 5 * GIB


def test_the_largest_size_that_is_evaluated_is_rehearsed():
    """That of a stage, where it is more than the test size: the last weights are evaluated at it, too."""
    learner = OnGpu()
    rehearse([SimpleNamespace(**vars(STAGES[1]) | {"image_size": 300})], learner, 100, 224, 16)
    assert learner.evaluated == [(300, 372)]


def test_a_run_without_stages_to_come_still_has_an_evaluation():
    learner = OnGpu()
    assert rehearse([], learner, 100, 64, 16) == 4 * GIB and learner.evaluated == [(64, 512)]


def test_a_large_evaluation_that_does_not_fit_is_no_error():
    learner, evaluate = OnGpu(), OnGpu.evaluate_noise

    def too_large(image_size, batch_size):
        if batch_size > 16:
            learner.runtime.peak = 80
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        evaluate(learner, image_size, batch_size)

    learner.evaluate_noise = too_large
    assert rehearse(STAGES, learner, 100, 64, 16) == 7 * GIB and learner.graphed
    assert learner.evaluated == [(64, 16)] and not learner.runtime.proven and not learner.runtime.said


def test_processes_evaluate_large_batches_together_or_not_at_all():
    learner = OnGpu()
    learner.runtime.any = lambda wish: True  # another one has no room for them
    assert rehearse(STAGES, learner, 100, 64, 16) == 7 * GIB and not learner.runtime.proven


def test_an_evaluation_that_does_not_fit_names_what_to_lower():
    learner = OnGpu()

    def too_large(image_size, batch_size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    learner.evaluate_noise = too_large
    with pytest.raises(
        ConfigError, match=r"out of memory in evaluation \(384 px, batch_size 128\); lower batch_size or"
    ):
        rehearse(STAGES, learner, 100, 384, 128)


def test_another_process_that_fails_meanwhile_is_no_size_that_does_not_fit():
    learner = OnGpu()

    def cut_off(*args):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")

    learner.step_on_noise = cut_off
    with pytest.raises(RuntimeError, match="Connection reset by peer") as told:
        rehearse(STAGES, learner, 100, 64, 16)
    assert not isinstance(told.value, ConfigError)


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_memory_that_a_library_does_not_get_is_memory_too(words):
    learner = OnGpu()

    def full(*args):
        raise RuntimeError(words)

    learner.step_on_noise = full
    with pytest.raises(ConfigError, match=r"out of memory in stage 0 \(.*\); lower batch_size for it"):
        rehearse(STAGES, learner, 100, 64, 16)
