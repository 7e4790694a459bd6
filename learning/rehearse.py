"""One step of every stage before the first epoch, undone: what does not fit shows in a minute."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from images.order import DrawSampler
from learning.learner import Learner
from settings.errors import ConfigError, first_line

if TYPE_CHECKING:
    from stages import Stage


def rehearse(stages: "Sequence[Stage]", learner: Learner, num_images: int) -> int:
    """Take one whole training step of each stage on noise, and undo it.

    What does not fit shows in the first minute, not when its stage comes. The steps are not compiled: uncompiled ones
    take the most memory.

    num_images: of the training set; a small one fills no batch

    Returns: bytes of GPU memory that training takes at most, beyond what is held before and after; 0 without a CUDA
        device.

    Raises:
        ConfigError: out of memory, or images too small for the model; names the stage and what to lower.
    """
    reserved = 0
    with learner.undoing():
        for stage in stages:
            sizes = DrawSampler(num_images, stage.batch_size, 0, world_size=learner.runtime.world_size).batch_sizes
            where = f"stage {stage.index} ({stage.image_size} px, batch_size {max(sizes)})"
            learner.finetune(stage.finetune)
            try:
                learner.step_on_noise(stage.image_size, max(sizes), learner.eager)
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = first_line(error)
                if is_out_of_memory(error):
                    raise ConfigError(
                        f"out of memory in {where}; lower batch_size for it (one value per stage is accepted) or "
                        f"train_crop_size, or use --amp ({reason})"
                    ) from error
                raise ConfigError(f"the model cannot train in {where}: {reason}") from error
            reserved = max(reserved, learner.runtime.reserved_memory())
            learner.runtime.release_memory()
    learner.finetune(False)
    learner.runtime.release_memory()
    return max(0, reserved - learner.runtime.reserved_memory())


def is_out_of_memory(error: Exception) -> bool:
    """Check whether an error says that a GPU or the CPU has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
