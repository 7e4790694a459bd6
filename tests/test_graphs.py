"""CUDA graphs of the step: what a capture leaves behind, on a double of torch's graphs; on a GPU, the same bits as without."""

import gc
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from runs import STAGED, STRONG, assert_same_bits, checkpoint, metrics, start
from torch import nn

from learning import graphs
from learning.graphs import StepGraphs
from learning.learner import Learner, wants_graphs
from learning.models import Classifier
from settings.errors import RunError
from settings.resolve import resolve
from utils import Runtime

CPU = Runtime(device=torch.device("cpu"))


def in_bfloat16(device="cpu"):
    return Runtime(device=torch.device(device), amp_dtype=torch.bfloat16)


def network():
    """Every kind of layer that autocast casts, one that it does not, and one that takes no part."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(144, 2),
    ]
    model = nn.Sequential(*layers)
    model.spare = nn.Linear(2, 2)
    model.forward = lambda images: nn.Sequential(*layers)(images)
    return model


class Step:
    """Loss and gradients of a small model; a replay computes them anew, into the tensors of the capture."""

    def __init__(self, fault=0.0):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.parameters = list(self.model.parameters())
        self.calls, self.fault = 0, fault

    def __call__(self, images, targets):
        self.calls += 1
        loss = nn.functional.cross_entropy(self.model(images), targets)
        loss.backward()
        return loss.detach()


@pytest.fixture
def doubled(monkeypatch):
    """torch.cuda's graphs, on the CPU: `captured` lists those made, `replays` counts."""
    seen = SimpleNamespace(captured=[], pools=[], replays=0, sync_debug_mode=0, breaks=None, collecting=[])

    class Graph:
        def replay(self):
            seen.replays += 1
            step, graph = self.step, self.owner
            graphs.forget_gradients(step.parameters)
            graph.loss.copy_(step(graph.images, graph.targets) + step.fault)
            for static, parameter in zip(graph.gradients, step.parameters):
                static.copy_(parameter.grad)

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        seen.captured.append(graph)
        seen.pools.append(pool)
        seen.collecting.append(gc.isenabled())
        yield
        if seen.breaks:  # what a capture does that met a wait
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the capture's")
            raise RuntimeError(seen.breaks)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: seen.sync_debug_mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(seen, "sync_debug_mode", mode))
    made = graphs.StepGraph.__init__

    def remembering(self, gradients, *args):
        made(self, gradients, *args)
        self.graph.step, self.graph.owner = gradients.__self__.plain, self

    monkeypatch.setattr(graphs.StepGraph, "__init__", remembering)
    return seen


def batch(count):
    return torch.randn(count, 3), torch.zeros(count, dtype=torch.long)


def captured(step, *sizes):
    stage = StepGraphs(step, step.model, step.parameters, CPU)
    stage.capture([batch(size) for size in sizes])
    return stage


def test_a_capture_leaves_weights_statistics_and_gradients_as_they_were(doubled):
    step = Step()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    captured(step, 8, 5)
    assert_same_bits(dict(step.model.state_dict()), before)
    assert all(parameter.grad is None for parameter in step.parameters)
    assert len(doubled.captured) == 2 and doubled.pools[0] is doubled.pools[1]


def test_replays_of_two_forms_in_turn_give_the_gradients_of_their_own_batch(doubled):
    step = Step()
    stage = captured(step, 8, 5)
    for size in (8, 5, 8):
        images, targets = batch(size)
        loss = stage.get(images, targets)(images, targets)
        ours = [parameter.grad.clone() for parameter in step.parameters]
        graphs.forget_gradients(step.parameters)
        assert torch.equal(loss, step(images, targets))
        assert_same_bits(ours, [parameter.grad for parameter in step.parameters])
    assert doubled.replays == 2 + 3  # each is checked once


def test_a_form_that_was_not_captured_has_no_graph(doubled):
    stage = captured(Step(), 8)
    images, targets = batch(8)
    assert stage.get(images, targets) is not None
    assert stage.get(*batch(7)) is None
    assert stage.get(images, torch.zeros(8, 2)) is None  # soft targets


def test_a_replay_that_computes_something_else_is_not_used(doubled, capsys):
    stage = captured(Step(fault=0.1), 8)
    assert not stage.possible and stage.get(*batch(8)) is None
    assert (
        "cuda_graphs off: the step of this model cannot be captured (a replay computes a loss of"
        in capsys.readouterr().out
    )
    made = len(doubled.captured)
    stage.capture([batch(8)])  # the next stage does not try again
    assert len(doubled.captured) == made


def test_a_step_that_waits_for_the_device_is_not_captured(doubled, capsys):
    step = Step()

    def asking(images, targets):
        if doubled.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return step(images, targets)

    stage = StepGraphs(asking, step.model, step.parameters, CPU)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    stage.capture([batch(8)])
    assert "cannot be captured (called a synchronizing CUDA operation)" in capsys.readouterr().out
    assert not stage.possible and not doubled.captured and doubled.sync_debug_mode == 0
    assert_same_bits(dict(step.model.state_dict()), before)


def test_what_torch_says_of_its_own_watching_is_kept_from_users(doubled, monkeypatch, recwarn):
    def watch(mode):
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        doubled.sync_debug_mode = mode

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watch)
    with graphs.no_waits():
        assert not recwarn.list and doubled.sync_debug_mode == "error"
        warnings.warn("of the step", stacklevel=1)
    assert str(recwarn.list[0].message) == "of the step"


def test_a_capture_that_breaks_ends_the_run_because_torch_does_not_recover(doubled):
    doubled.breaks = "operation not permitted when stream is capturing"
    with pytest.raises(RunError, match=r"give --cuda-graphs off \(operation not permitted"):
        captured(Step(), 8)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("breaks", [None, "operation not permitted"])
def test_no_garbage_is_collected_during_a_capture_and_after_it_as_before(doubled, breaks, before):
    """A dead graph among it, destroyed meanwhile, would break the capture."""
    doubled.breaks = breaks
    enabled = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        with nullcontext() if breaks is None else pytest.raises(RunError):
            captured(Step(), 8)
        assert doubled.collecting == [False] and gc.isenabled() is before
    finally:
        (gc.enable if enabled else gc.disable)()


def test_garbage_is_collected_before_a_stage_s_captures(doubled):
    class Cycle:
        def __init__(self):
            self.itself = self

    dead = weakref.ref(Cycle())
    gc.disable()
    try:
        captured(Step(), 8)
        assert dead() is None
    finally:
        gc.enable()


def test_a_failed_capture_keeps_no_gradients_in_half_precision(doubled):
    model = network()
    gradients = Gradients(model)

    def failing(images, targets):
        gradients(images, targets)
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage = StepGraphs(failing, model, list(model.parameters()), in_bfloat16())
    stage.capture([(torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long))])
    assert not stage.possible
    assert all(weight.grad is None for weight in [*stage.together.half, *stage.parameters])


class Gradients:
    """Loss and gradients of a model, in bfloat16."""

    def __init__(self, model):
        self.model = model

    def __call__(self, images, targets):
        with in_bfloat16().autocast():
            loss = nn.functional.cross_entropy(self.model(images), targets)
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("runtime", [CPU, in_bfloat16()], ids=["float32", "bfloat16"])
def test_casts_and_counts_taken_together_change_no_bit(runtime):
    images, targets = torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    outcomes = []
    for together in (False, True):
        model = network()

        def gradients(images, targets, model=model):
            with runtime.autocast():
                loss = nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            return loss.detach()

        stage = StepGraphs(gradients, model, list(model.parameters()), runtime)
        for _ in range(2):
            graphs.forget_gradients(stage.parameters)
            loss = (stage.gradients if together else gradients)(images, targets)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        outcomes.append([loss, state, [parameter.grad for parameter in model.parameters()]])
    assert_same_bits(*outcomes)
    assert outcomes[1][1]["1.num_batches_tracked"] == 2 and outcomes[1][1]["0.weight"].dtype == torch.float32


def test_what_is_not_trained_has_no_cast_of_its_own_and_counts_no_batches():
    model = network()
    model.requires_grad_(False)
    model[5].requires_grad_(True)
    model.eval()
    stage = StepGraphs(Gradients(model), model, list(model[5].parameters()), in_bfloat16())
    assert len(stage.together.half) == 2
    stage.gradients(torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long))
    assert model[1].num_batches_tracked == 0 and model[0].weight.grad is None and model[5].weight.grad is not None


def test_the_classifier_alone_is_trained_at_the_precision_it_is_evaluated_at():
    """In fine-tuning, where it is in evaluation mode, with graphs and without."""
    outcomes = []
    for together in (False, True):
        model = network()
        head = Classifier(144, 2)
        head.load_state_dict(model[5].state_dict())
        model[5] = head
        model.forward = lambda images, model=model: nn.Sequential(*[model[i] for i in range(6)])(images)
        model.requires_grad_(False)
        head.requires_grad_(True)
        model.eval()
        gradients = Gradients(model)
        stage = StepGraphs(gradients, model, list(head.parameters()), in_bfloat16())
        torch.manual_seed(1)
        loss = (stage.gradients if together else gradients)(torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long))
        outcomes.append([loss, head.weight.grad, head.bias.grad])
    assert_same_bits(*outcomes)
    assert not torch.equal(outcomes[0][1], outcomes[0][1].bfloat16().float())  # float32's own digits


def test_a_compiled_step_is_compiled_once_and_has_the_same_gradients():
    """The weights that a capture puts in the place of the model's are those that it is compiled for."""
    images, targets = torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    outcomes = []
    for compiled in (False, True):
        model = network()
        gradients = Gradients(model)
        gradients.model = torch.compile(model, dynamic=False, backend="aot_eager") if compiled else model
        stage = StepGraphs(gradients, model, list(model.parameters()), in_bfloat16())
        for repeat in range(2):
            graphs.forget_gradients(stage.parameters)
            with torch.compiler.set_stance("fail_on_recompile" if repeat else "default"):
                loss = stage.gradients(images, targets)
        outcomes.append([loss, [parameter.grad for parameter in model.parameters()]])
    assert_same_bits(*outcomes)


@pytest.mark.parametrize(
    ("flags", "device", "processes", "wanted"),
    [
        ("", "cuda", 1, True),
        ("--compile", "cuda", 1, False),
        ("--compile --cuda-graphs on", "cuda", 1, True),
        ("--cuda-graphs on", "cuda", 1, True),
        ("--cuda-graphs off", "cuda", 1, False),
        ("", "cuda", 2, False),
        ("", "cpu", 1, False),
    ],
)
def test_when_the_step_is_captured(flags, device, processes, wanted):
    runtime = Runtime(device=torch.device(device), world_size=processes)
    assert wants_graphs(resolve(flags.split()), runtime) is wanted


@pytest.mark.parametrize("possible", [True, False])
def test_a_step_that_is_compiled_and_not_captured_is_compiled_before_the_clock_runs(monkeypatch, possible):
    learner = Learner(model := nn.Linear(3, 2), torch.optim.SGD(model.parameters()), nn.CrossEntropyLoss(), CPU)
    learner.compiled, learner.graphs = True, SimpleNamespace(capture=lambda batches: None, possible=possible)
    steps = []
    monkeypatch.setattr(learner, "step_on_noise", lambda *args: steps.append(args))
    learner.enter_stage(32, {8, 5})
    assert steps == ([] if possible else [(32, 8)])


def test_casts_are_taken_together_in_half_precision_only():
    model = network()
    assert len(graphs.Together(model, torch.bfloat16).half) == 1 + 2 + 2 + 2  # weights and biases of four layers
    assert graphs.Together(model, None).half == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "flags", ["--amp --channels-last", "--amp --amp-dtype float16 --opt adamw", "", "--amp --finetune-epochs 2"]
)
def test_a_run_with_graphs_has_the_bits_of_one_without(tree, tmp_path, flags):
    common = ["--device", "cuda", *STAGED, *STRONG, "--use-deterministic-algorithms", *flags.split()]
    for way in ("auto", "off"):
        assert start(tree, tmp_path / way, *common, "--cuda-graphs", way) == 0
    ours, theirs = checkpoint(tmp_path / "auto"), checkpoint(tmp_path / "off")
    for part in ("model", "model_ema", "optimizer"):
        assert_same_bits(ours[part], theirs[part])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_compiled_step_can_be_captured(tree, tmp_path, capsys):
    """Not to the bit: a compiler rounds to half precision where it likes."""
    common = ["--device", "cuda", *STAGED, "--amp", "--channels-last", "--compile"]
    for way in ("on", "off"):
        assert start(tree, tmp_path / way, *common, "--cuda-graphs", way) == 0
    assert "cuda_graphs off:" not in capsys.readouterr().out
    ours, theirs = ([line["loss"] for line in metrics(tmp_path / way)] for way in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=0.05)
