"""What learns: the model, its EMA and optimizer, the one step they take together, and how far they are."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from learning.checkpoint import to_cpu, undone
from learning.ema import EMA
from learning.state import RunState
from settings.errors import ConfigError, first_line
from utils import Runtime


class Learner:
    """The model and what changes with it at every step.

    model: plain, on the device; `net` is the same weights as the steps call them, wrapped for several
        processes and compiled
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        runtime: Runtime,
        *,
        ema: EMA | None = None,
        clip_grad_norm: float | None = None,
        compiled: bool = False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.runtime = runtime
        self.ema = ema
        self.clip_grad_norm = clip_grad_norm
        self.compiled = compiled
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.eager: nn.Module = model
        if runtime.world_size > 1:
            self.eager = DistributedDataParallel(
                model, device_ids=[runtime.device] if runtime.device.type == "cuda" else None
            )
        self.net = torch.compile(self.eager) if compiled else self.eager

    @property
    def copies(self) -> dict[str, nn.Module]:
        """The model, and its EMA if there is one."""
        return {"model": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def step(self, images: Tensor, targets: Tensor, net: nn.Module | None = None) -> Tensor:
        """One training step; the loss, on the device, detached.

        images: (N, 3, S, S); targets: (N,) class numbers or (N, K) soft
        net: another way to call the weights than `self.net`
        """
        with self.runtime.autocast():
            loss = self.criterion((net or self.net)(images), targets)
        self.runtime.backward_and_step(loss, self.optimizer, self.parameters, self.clip_grad_norm)
        return loss.detach()

    def rehearse(self, image_size: int, batch_size: int, net: nn.Module | None = None) -> None:
        """A step on noise, at full size: it takes the memory and finds the faults of a real one. The
        caller undoes it (`undone`)."""
        device, memory_format = self.runtime.device, self.runtime.memory_format
        images = torch.randn(batch_size, 3, image_size, image_size, device=device).to(memory_format=memory_format)
        (net or self.net).train()
        # At full scale float16 may overflow at once, and the optimizer, skipped, would not take its memory.
        self.runtime.scaler.scale(torch.zeros((), device=device))
        self.runtime.scaler.update(1.0)
        self.step(images, torch.zeros(batch_size, dtype=torch.long, device=device), net)
        self.runtime.synchronize()

    def undone(self) -> Any:
        """A context after which weights, optimizer and scaler are as before it."""
        return undone(self.model, self.optimizer, self.runtime.scaler)

    def enter_stage(self, image_size: int, batch_sizes: set[int]) -> None:
        """Compile for a stage: once for each size of batch, before the clock runs.

        torch specialises on image size and drop rates, and stops compiling after a few variants of one
        function; so the variants of the stage before are forgotten.
        """
        if self.compiled:
            torch.compiler.reset()
            with self.undone():
                for batch_size in sorted(batch_sizes, reverse=True):
                    self.rehearse(image_size, batch_size)

    def state_dict(self, state: RunState) -> dict[str, Any]:
        """Everything a resume needs, as plain values and tensors on the CPU."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.runtime.scaler}
        content = {name: to_cpu(part.state_dict()) for name, part in parts.items()}
        if self.ema is not None:
            content.update(model_ema=to_cpu(self.ema.module.state_dict()), ema_updates=self.ema.num_updates)
        return content | {"state": asdict(state), "world_size": self.runtime.world_size}

    def load_state_dict(self, content: Mapping[str, Any]) -> RunState:
        """Take up where `content` was saved."""
        settings = [{key: group[key] for key in group.keys() - {"params"}} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"resume: the checkpoint does not fit these settings: {first_line(error)}") from error
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)  # weight decay, momentum: of the settings given, as config.yaml says
        if content["scaler"]:
            self.runtime.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            # A run that takes up EMA only now starts its average from the weights it has.
            self.ema.module.load_state_dict(content.get("model_ema", content["model"]))
            self.ema.num_updates = content.get("ema_updates", 0)
        return RunState(**content["state"])
