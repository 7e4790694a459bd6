"""The optimizer by name, its parameter groups, and the learning rate as a function of the epoch."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from settings.table import Config

NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch norm of every kind, instance norm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
EMBEDDINGS = ("class_token", "pos_embedding", "position_embedding", "relative_position_bias_table")

# FixRes fine-tunes ResNet-50 with 0.001 after a training with 0.02, both for 512 images a step (facebookresearch/FixRes).
FINETUNE_SHARE = 20


def parameter_groups(
    model: nn.Module, weight_decay: float, norm: float | None, bias: float | None, embedding: float | None
) -> list[dict[str, Any]]:
    """Group the trainable parameters by their weight decay.

    norm, bias, embedding: weight decay of normalisation layers, of biases, and of a transformer's class token and
        position embeddings; None: no rule for that kind, `weight_decay` applies

    A bias of a normalisation layer follows the rule for biases if there is one, as in the reference.
    """
    groups: dict[float, list[nn.Parameter]] = {weight_decay: []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decay: float | None = None
            if name == "bias":
                decay = bias
            elif name in EMBEDDINGS:
                decay = embedding
            if decay is None and isinstance(module, NORM_LAYERS):
                decay = norm
            if parameter.requires_grad:
                groups.setdefault(weight_decay if decay is None else decay, []).append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the settings name, with its parameter groups."""
    groups = parameter_groups(
        model,
        config.weight_decay,
        config.norm_weight_decay,
        config.bias_weight_decay,
        config.transformer_embedding_decay,
    )
    lr, momentum = config.lr, config.momentum
    # One kernel for all parameters; under float16's gradient scaler it skips a step by itself, where others have the
    # processor wait for the GPU in each. None: torch's choice.
    fused = True if next(model.parameters()).is_cuda else None
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    if config.opt == "rmsprop":  # eps and alpha of the reference; decay 0.9 is also the paper's; no fused form
        return torch.optim.RMSprop(groups, lr=lr, momentum=momentum, eps=0.0316, alpha=0.9)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=config.opt == "sgd_nesterov", fused=fused)


def learning_rate_schedule(config: Config) -> Callable[[float], float]:
    """Build the learning rate as a function of the epoch.

    The epoch is a whole number or, with `lr_update: step`, a fraction. The rate depends on epochs alone: a stage's
    batch size moves none of its changes, and a resumed run needs no state. At whole epochs it is what the reference's
    chain of torch schedulers gives. In fine-tuning it is constant.
    """

    def decayed(epoch: float) -> float:  # epochs since the end of warm-up
        if config.lr_scheduler == "steplr":
            return config.lr * config.lr_gamma ** (epoch // config.lr_step_size)
        if config.lr_scheduler == "exponentiallr":
            return config.lr * config.lr_gamma**epoch
        share = epoch / (config.epochs - config.lr_warmup_epochs)
        return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * share)) / 2

    def learning_rate(epoch: float) -> float:
        if epoch >= config.epochs:
            return config.finetune_lr or config.lr / FINETUNE_SHARE
        if config.lr_update == "epoch":
            epoch = math.floor(epoch)
        warmup = config.lr_warmup_epochs
        if epoch >= warmup:
            return decayed(epoch - warmup)
        progress = epoch / warmup if config.lr_warmup_method == "linear" else 0.0
        return config.lr * (config.lr_warmup_decay + (1 - config.lr_warmup_decay) * progress)

    return learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
