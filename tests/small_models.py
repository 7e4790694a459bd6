"""Models of a few numbers, training steps on them, and checkpoints of them."""

import torch
from torch import nn

from learning.checkpoint import Checkpoint
from learning.state import RunState
from utils import Runtime

CPU = Runtime(device=torch.device("cpu"))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def train_a_step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()


def copied(state):
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state)


def checkpoint_of(epoch, config=None, world_size=1, **state):
    """A checkpoint of a model of one weight, which holds `epoch`."""
    return Checkpoint(
        model={"w": torch.full((500,), epoch)}, optimizer={}, scaler={}, state=RunState(epoch=epoch, **state),
        world_size=world_size, config=config or {}, classes=["ant", "bee"], num_images=8,
    )  # fmt: skip
