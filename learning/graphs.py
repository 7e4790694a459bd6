"""CUDA graphs of the training step: one launch where the processor would make thousands.

EfficientNetV2-S takes some 2,400 kernels forward and backward. At small image sizes the GPU is done with them sooner than
one thread can launch them, and the stage that should be cheapest waits for the processor.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from learning.models import Classifier
from settings.errors import RunError, first_line
from utils import Runtime

WARM_UP = 3  # steps before a capture, in which libraries choose kernels and take their memory

Form = tuple[torch.Size, torch.Size, torch.dtype]
Gradients = Callable[[Tensor, Tensor], Tensor]


def form_of(images: Tensor, targets: Tensor) -> Form:
    """Describe what a graph is captured for: the shapes of images and targets, and whether targets are soft."""
    return images.shape, targets.shape, targets.dtype


class StepGraph:
    """Loss and gradients of batches of one form, captured once and replayed.

    Random draws within follow from the seed set before each replay, as they do without a graph; drop rates are those of
    the capture.

    gradients: computes the loss of (images, targets) and the gradients of `parameters`, from None
    images, targets: hold the batch; a batch is copied into them
    pool: of memory; graphs of one pool share it, and so are never replayed at the same time
    """

    def __init__(
        self, gradients: Gradients, parameters: Sequence[nn.Parameter], images: Tensor, targets: Tensor, pool: Any
    ):
        self.parameters, self.images, self.targets = parameters, images, targets
        forget_gradients(parameters)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: threads of the loader pin memory meanwhile, which must not end the capture.
        with collecting_nothing(), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.loss = gradients(images, targets)
        self.gradients = [parameter.grad for parameter in parameters]

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compute loss and gradients of a batch; return the loss, on the device and detached."""
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):  # another form of batch has its own
            parameter.grad = gradient
        return self.loss.clone()


class StepGraphs:
    """The graphs of a stage: one for each form of batch, in one pool of memory.

    A form that was not captured has no graph, and its steps run launch by launch. So do all, once a step has turned out
    not to be captured rightly: where the model asks the device for a number, say.
    """

    def __init__(self, gradients: Gradients, model: nn.Module, parameters: Sequence[nn.Parameter], runtime: Runtime):
        self.plain, self.model, self.parameters, self.runtime = gradients, model, parameters, runtime
        self.together = Together(model, runtime.amp_dtype)
        self.graphs: dict[Form, StepGraph] = {}
        self.possible = True

    def get(self, images: Tensor, targets: Tensor) -> StepGraph | None:
        """Find the graph for a batch."""
        return self.graphs.get(form_of(images, targets))

    def gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compute loss and gradients, small operations on all weights taken together."""
        with self.together.aside():
            return self.plain(images, targets)

    def capture(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Capture a graph for each of `batches`, the largest first; forget those of the stage before.

        Weights and optimizer are not touched, batch norm's statistics are put back. The model is in the mode that it
        trains in.

        Raises:
            RunError: a capture failed in a way that leaves torch unfit to go on.
        """
        self.graphs.clear()
        forget_gradients(self.parameters)
        gc.collect()  # what only dead cycles hold; torch does so no more since 2.9
        self.runtime.release_memory()
        if not self.possible:
            return
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        training = torch.cuda.current_stream(self.runtime.device)
        try:
            # All before the first capture, whose memory stays taken: so they need no more than a step does.
            expected = [self.warm_up(images, targets) for images, targets in batches]
            pool = torch.cuda.graph_pool_handle()
            for (images, targets), loss in zip(batches, expected):
                graph = StepGraph(self.gradients, self.parameters, images, targets, pool)
                self.check(graph, loss)
                self.graphs[form_of(images, targets)] = graph
        except RuntimeError as error:
            if torch.cuda.current_stream(self.runtime.device) != training:
                # Stream, random generator and memory are still those of the capture, and torch has no way back.
                raise RunError(
                    f"cuda_graphs: the step of this model broke its capture; give --cuda-graphs off ({first_line(error)})"
                ) from error
            self.graphs.clear()
            self.possible = False
            forget_gradients([*self.parameters, *self.together.half])
            self.runtime.synchronize()
            self.runtime.say(f"cuda_graphs off: the step of this model cannot be captured ({first_line(error)})")
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        forget_gradients(self.parameters)

    def warm_up(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compute gradients a few times in a stream of their own, as a capture will; return the last loss.

        Raises:
            RuntimeError: the processor waits for the device in between, which would break a capture.
        """
        device = images.device
        stream, training = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            for step in range(WARM_UP):
                self.runtime.draw_from(0, 0)
                with no_waits() if step == WARM_UP - 1 else nullcontext():
                    loss = self.gradients(images, targets)
        training.wait_stream(stream)
        forget_gradients(self.parameters)
        return loss

    def check(self, graph: StepGraph, expected: Tensor) -> None:
        """Raise RuntimeError unless a replay computes the loss that the step itself computed."""
        self.runtime.draw_from(0, 0)
        replayed = graph(graph.images, graph.targets)
        if not torch.allclose(replayed, expected, rtol=1e-3, equal_nan=True):
            raise RuntimeError(f"a replay computes a loss of {float(replayed):.6g}, the step {float(expected):.6g}")


@contextmanager
def collecting_nothing() -> Iterator[None]:
    """Keep Python's garbage collection from starting by itself within the block.

    Were it to find the graph of a learner that is gone, it would destroy it, which breaks the capture under way
    (pytorch/pytorch#161037).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def no_waits() -> Iterator[None]:
    """Have torch raise RuntimeError within the block where the processor would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once a process torch warns of a prototype, which no user has asked for
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Together:
    """What autocast and batch norm do to every weight by a kernel of its own, done to all of them by a few.

    Autocast casts each weight to half precision and its gradient back; batch norm counts its batches. In
    EfficientNetV2-S that is a quarter of a step's launches, for numbers that are the same to the bit.

    dtype: of autocast, None for full precision, which needs no casts
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        cast = (nn.modules.conv._ConvNd, nn.Linear)
        owners = [module for module in model.modules() if dtype is not None and isinstance(module, cast)]
        self.places = [
            (module, name, weight) for module in owners for name, weight in module.named_parameters(recurse=False)
        ]
        self.whole: list[Tensor] = list(
            {id(weight): weight for _, _, weight in self.places if weight.requires_grad}.values()
        )
        self.half: list[Tensor] = [nn.Parameter(weight.detach().to(dtype)) for weight in self.whole]
        self.half_of = {id(weight): half for weight, half in zip(self.whole, self.half)}
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        # Without a momentum the average is over all batches so far: the layer needs its count.
        self.norms = [norm for norm in norms if norm.num_batches_tracked is not None and norm.momentum is not None]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Give the model its weights in half precision, and no counters; afterwards bring gradients and counters up."""
        # A classifier in evaluation mode, as in fine-tuning, computes at the precision of its own weights.
        places = [place for place in self.places if place[0].training or not isinstance(place[0], Classifier)]
        norms = [norm for norm in self.norms if norm.training]
        counters: list[Any] = [norm.num_batches_tracked for norm in norms]
        if self.half:
            with torch.no_grad():
                torch._foreach_copy_(self.half, self.whole)
        for module, name, weight in places:
            module._parameters[name] = self.half_of.get(id(weight), weight)  # type: ignore[assignment]
        for norm in norms:
            norm._buffers["num_batches_tracked"] = None
        try:
            yield
        finally:
            for module, name, weight in places:
                module._parameters[name] = weight
            for norm, counter in zip(norms, counters):
                norm._buffers["num_batches_tracked"] = counter
        reached = [(weight, half) for weight, half in zip(self.whole, self.half) if half.grad is not None]
        if reached:
            whole: list[Any] = [torch.empty_like(weight) for weight, _ in reached]
            halves: list[Any] = [half.grad for _, half in reached]
            torch._foreach_copy_(whole, halves)
            for i, (original, half) in enumerate(reached):
                original.grad, half.grad = whole[i], None
        if counters:
            torch._foreach_add_(counters, 1)


def forget_gradients(parameters: Sequence[Tensor]) -> None:
    """Set gradients to None, so that the next backward pass takes new memory for them."""
    for parameter in parameters:
        parameter.grad = None
