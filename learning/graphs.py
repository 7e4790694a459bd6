"""CUDA graphs of the training step: one launch where the processor would make thousands.

EfficientNetV2-S takes some 2,400 kernels forward and backward. At small image sizes the GPU is done with them sooner than
one thread can launch them, and the stage that should be cheapest waits for the processor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from settings.errors import first_line
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
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):  # capturing is forbidden in the default stream, and so is first use in it
            for _ in range(WARM_UP):
                gradients(images, targets)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        forget_gradients(parameters)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: threads of the loader pin memory meanwhile, which must not end the capture.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
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
        self.gradients, self.model, self.parameters, self.runtime = gradients, model, parameters, runtime
        self.graphs: dict[Form, StepGraph] = {}
        self.possible = True

    def get(self, images: Tensor, targets: Tensor) -> StepGraph | None:
        """Find the graph for a batch."""
        return self.graphs.get(form_of(images, targets))

    def capture(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Capture a graph for each of `batches`, the largest first; forget those of the stage before.

        Weights and optimizer are not touched, batch norm's statistics are put back.
        """
        self.graphs.clear()
        forget_gradients(self.parameters)
        self.runtime.release_memory()
        if not self.possible:
            return
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        pool = torch.cuda.graph_pool_handle()
        self.model.train()
        try:
            for images, targets in batches:
                graph = StepGraph(self.gradients, self.parameters, images, targets, pool)
                self.check(graph)
                self.graphs[form_of(images, targets)] = graph
        except RuntimeError as error:
            self.graphs.clear()
            self.possible = False
            self.runtime.synchronize()
            self.runtime.say(f"cuda_graphs off: the step of this model cannot be captured ({first_line(error)})")
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        forget_gradients(self.parameters)

    def check(self, graph: StepGraph) -> None:
        """Raise RuntimeError unless a replay computes the loss that the step itself computes."""
        self.runtime.draw_from(0, 0)
        expected = self.gradients(graph.images, graph.targets)
        self.runtime.draw_from(0, 0)
        replayed = graph(graph.images, graph.targets)
        if not torch.allclose(replayed, expected, rtol=1e-3, equal_nan=True):
            raise RuntimeError(f"a replay computes a loss of {float(replayed):.6g}, the step {float(expected):.6g}")


def forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Set gradients to None, so that the next backward pass takes new memory for them."""
    for parameter in parameters:
        parameter.grad = None
