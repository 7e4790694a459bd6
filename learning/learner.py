"""The learner: the model, its EMA and optimizer, and the one step that they take together."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.parallel import DistributedDataParallel

from images.datasets import Data
from learning.balance import WeightedLoss
from learning.checkpoint import Checkpoint, Stateful, to_cpu, undone
from learning.ema import EMA
from learning.graphs import StepGraphs, forget_gradients
from learning.models import as_trained, build_model, tuned_layers
from learning.optim import build_optimizer
from learning.state import RunState
from learning.weights import began_at_random
from settings.errors import ConfigError, first_line
from settings.table import Config
from utils import Runtime

# The name of DistributedDataParallel's setting, since torch 2.14 and before.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class Learner:
    """The model and what changes with it at every step.

    criterion: the loss that evaluations report
    training_loss: the one that is trained on, by default the same
    model: plain, on the device; `eager` is the same weights wrapped for several processes, `net` that one compiled if
        asked for, as the steps call it
    parameters: that are trained now
    tuned: the classifier and the last batch norm where they alone are trained, else None
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        runtime: Runtime,
        *,
        training_loss: nn.Module | None = None,
        ema: EMA | None = None,
        clip_grad_norm: float | None = None,
        compiled: bool = False,
        graphed: bool = False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.training_loss = training_loss or criterion
        self.runtime = runtime
        self.ema = ema
        self.clip_grad_norm = clip_grad_norm
        self.compiled, self.graphed = compiled, graphed
        self.full_batch = 0  # images in most batches of the stage
        self.tuned: tuple[nn.Module, nn.Module | None] | None = None
        self.wrap()

    def wrap(self) -> None:
        """Wrap the model for the parameters that are trained now: DDP and graphs do not follow when these change."""
        model, runtime = self.model, self.runtime
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.eager: nn.Module = model
        if runtime.world_size > 1:
            self.eager = DistributedDataParallel(
                model,
                device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
                **{SYNC_BUFFERS: False},  # type: ignore[arg-type]  # `share_buffers` does so once, before an evaluation
            )
        # Not dynamic: a last batch of another size would replace the variant for full ones by a slower one for any size.
        self.net: nn.Module = torch.compile(self.eager, dynamic=False) if self.compiled else self.eager  # type: ignore[assignment]
        self.graphs = StepGraphs(self.gradients, model, self.parameters, runtime) if self.graphed else None

    def finetune(self, on: bool) -> None:
        """Train the classifier alone from now on, or all of the model again; weights and optimizer stay as they are.

        What is not trained has no gradient, so that neither the optimizer nor its weight decay changes it.
        """
        if on == (self.tuned is not None):
            return
        forget_gradients(self.parameters)
        self.tuned = tuned_layers(self.model) if on else None
        self.model.requires_grad_(not on)
        if self.tuned is not None:
            self.tuned[0].requires_grad_(True)
        self.wrap()

    def unify(self, name: str) -> None:
        """Give the model and its average the same weights: those of the copy called `name`, if there is one."""
        weights = self.copies.get(name, self.model).state_dict()
        for copy in self.copies.values():
            copy.load_state_dict(weights)

    def train(self) -> None:
        """Put the model into training mode; in fine-tuning the last batch norm alone, so that nothing else adapts or drops."""
        self.net.train(self.tuned is None)
        if self.tuned is not None and self.tuned[1] is not None:
            self.tuned[1].train()

    @property
    def copies(self) -> dict[str, nn.Module]:
        """The model, and its EMA if there is one."""
        return {"model": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def gradients(self, images: Tensor, targets: Tensor, net: nn.Module | None = None) -> Tensor:
        """Compute the gradients of a batch; return its loss, on the device and detached.

        net: what is called; by default `self.net` for a full batch, `self.eager` for others: a compilation for the last
            batch of an epoch would take as long as all of those batches

        Gradients are kept until the next update: if they were freed after it, a forward pass would reuse their memory,
        which costs a CPU thousands of page faults, 6 to 8 % of a small step.
        """
        forget_gradients(self.parameters)
        net = net or (self.net if len(images) == self.full_batch else self.eager)
        with self.runtime.autocast():
            loss = self.training_loss(net(images), targets)
        self.runtime.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, images: Tensor, targets: Tensor, net: nn.Module | None = None) -> Tensor:
        """Take one training step; return the loss, on the device and detached.

        images: (N, 3, S, S); targets: (N,) class numbers or (N, K) soft
        net: called in place of `self.net`; it has the same weights
        """
        graph = self.graphs.get(images, targets) if self.graphs is not None and net is None else None
        loss = graph(images, targets) if graph is not None else self.gradients(images, targets, net)
        self.runtime.update(self.optimizer, self.parameters, self.clip_grad_norm)
        return loss

    def step_on_noise(self, image_size: int, batch_size: int, net: nn.Module | None = None) -> None:
        """Take a training step on noise, at full size, which the caller undoes (`undoing`).

        It takes the memory of a real step and finds the same faults.
        """
        images, targets = self.noise(image_size, batch_size)
        self.train()
        # At full scale float16 may overflow at once, and the optimizer, skipped, would not take its memory.
        self.runtime.scaler.scale(torch.zeros((), device=images.device))
        self.runtime.scaler.update(1.0)
        self.step(images, targets, net)
        self.runtime.synchronize()

    @torch.inference_mode()
    def evaluate_noise(self, image_size: int, batch_size: int) -> None:
        """Evaluate a batch of noise, for the memory that it takes."""
        images, _ = self.noise(image_size, batch_size)
        for model in self.copies.values():
            with self.runtime.autocast():
                model.eval()(images)
        self.runtime.synchronize()

    def undoing(self) -> AbstractContextManager[None]:
        """Return a context after which weights, optimizer and scaler are as before it."""
        return undone(self.model, self.optimizer, self.runtime.scaler)

    def enter_stage(
        self, image_size: int, batch_sizes: set[int], soft_classes: int | None = None, finetune: bool = False
    ) -> None:
        """Set what a stage trains, compile for it, capture its CUDA graphs: before the clock runs.

        torch specialises on image size and drop rates, and stops compiling after a few variants of one function; so the
        variants of the stage before are forgotten. Without compilation and graphs there is nothing to do.

        batch_sizes: that of most steps, and that of the last if it is smaller
        soft_classes: number of classes, if the stage mixes images and targets are soft
        finetune: whether the stage trains the classifier alone
        """
        self.finetune(finetune)
        self.full_batch = max(batch_sizes)
        if self.compiled:
            torch.compiler.reset()
        if self.graphs is not None:
            self.train()
            sizes = sorted(batch_sizes, reverse=True)
            self.graphs.capture([self.noise(image_size, batch_size, soft_classes) for batch_size in sizes])
        if self.compiled and (self.graphs is None or not self.graphs.possible):
            with self.undoing():
                self.step_on_noise(image_size, self.full_batch)

    def noise(self, image_size: int, batch_size: int, soft_classes: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw a batch of noise in the form of a real one, on the device; all its images are of class 0."""
        device = self.runtime.device
        images = torch.randn(batch_size, 3, image_size, image_size, device=device)
        targets = torch.zeros(batch_size, dtype=torch.long, device=device)
        if soft_classes is not None:
            targets = one_hot(targets, soft_classes).float()
        return images.to(memory_format=self.runtime.memory_format), targets

    def checkpoint(self, state: RunState, config: Config, data: Data) -> Checkpoint:
        """Gather everything that a resume needs, copied to the CPU."""
        parts: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer, "scaler": self.runtime.scaler}
        if self.ema is not None:
            parts["model_ema"] = self.ema.module
        return Checkpoint(
            **to_cpu({name: part.state_dict() for name, part in parts.items()}),
            ema_updates=0 if self.ema is None else self.ema.num_updates,
            state=replace(state),
            world_size=self.runtime.world_size,
            config=config.as_dict(),
            classes=data.classes,
            num_images=len(data.train),
            store_side=data.store_side,
            on_device=data.on_device,
        )

    def restore(self, checkpoint: Checkpoint, to_train: bool = True) -> RunState:
        """Restore what `checkpoint` holds; return how far its run was.

        to_train: False leaves out optimizer and scaler

        Raises:
            ConfigError: it has other weights or parameter groups.
        """
        # Weight decay, momentum: of the settings given, as config.yaml says. Merged before loading, because what a group
        # says of itself decides where its step counters go: a fused optimizer's on the device, others' on the CPU.
        saved = checkpoint.optimizer["param_groups"]
        own = [{key: group[key] for key in group.keys() - {"params"}} for group in self.optimizer.param_groups]
        groups = [theirs | ours for theirs, ours in zip(saved, own)] if len(saved) == len(own) else saved
        try:
            self.model.load_state_dict(checkpoint.model)
            if to_train:
                self.optimizer.load_state_dict(checkpoint.optimizer | {"param_groups": groups})
                self.lay_out_moments()
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"resume: the checkpoint does not fit these settings: {first_line(error)}") from error
        for copy in self.copies.values():
            as_trained(copy, published=checkpoint.config.get("weights") is not None)
        if checkpoint.scaler and to_train:
            self.runtime.scaler.load_state_dict(checkpoint.scaler)
        if self.ema is not None:
            # A run that takes up EMA only now starts its average from the weights it has.
            self.ema.module.load_state_dict(checkpoint.model_ema or checkpoint.model)
            self.ema.num_updates = checkpoint.ema_updates
        return replace(checkpoint.state)

    def lay_out_moments(self) -> None:
        """Lay the optimizer's averages out as the weights are now: a fused step refuses those of another memory format."""
        for weight, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() == weight.dim() == 4:  # what channels_last changes
                    state[name] = torch.empty_like(weight).copy_(value)


def build_model_of(
    config: Config, num_classes: int, weights: dict[str, Tensor] | None, runtime: Runtime
) -> tuple[nn.Module, str]:
    """Build the model of a run, on the device, and a line that says what of `weights` it holds."""
    model, loaded = build_model(config.model, num_classes, weights, config.bn_momentum, new_head=not config.test_only)
    if weights is not None and hasattr(model, "transform_input") and began_at_random(config.weights):
        if not config.test_only:
            raise ConfigError(
                f"weights {config.weights} are of a {config.model} that was trained from random weights, on images normalised "
                "otherwise than for published ones; go on from its checkpoint with --resume instead"
            )
        as_trained(model, published=False)
    return model.to(runtime.device).to(memory_format=runtime.memory_format), loaded  # type: ignore[call-overload]


def build_learner(
    config: Config,
    num_classes: int,
    weights: dict[str, Tensor] | None,
    runtime: Runtime,
    class_weights: Sequence[float] | None = None,
) -> tuple[Learner, str]:
    """Build what `config` trains, on the device, and a line that says what of `weights` it holds.

    class_weights: of the training loss. That of validation knows none, so that it compares with that of other runs.
    """
    model, loaded = build_model_of(config, num_classes, weights, runtime)
    if config.sync_bn and runtime.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    training_loss = None
    if class_weights is not None:
        training_loss = WeightedLoss(class_weights, config.label_smoothing).to(runtime.device)
    learner = Learner(
        model,
        build_optimizer(config, model),
        nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        runtime,
        training_loss=training_loss,
        ema=EMA(model, config) if config.model_ema else None,
        clip_grad_norm=config.clip_grad_norm,
        compiled=config.compile,
        graphed=wants_graphs(config, runtime),
    )
    return learner, loaded


def wants_graphs(config: Config, runtime: Runtime) -> bool:
    """Decide whether the step is captured in CUDA graphs, if it can be.

    With several processes DDP's exchange of gradients is part of the backward pass, and stays outside of graphs. Compiled
    kernels within a graph have not been seen on a GPU, and are left to who asks for them.
    """
    asked = config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and not config.compile)
    return asked and runtime.device.type == "cuda" and runtime.world_size == 1
