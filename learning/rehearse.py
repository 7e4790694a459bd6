"""One step of every stage and an evaluation before the first epoch, undone: what does not fit shows in a minute."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from images.evaluation import LARGE_EVALUATION, large_batch
from images.order import DrawSampler
from learning.learner import Learner
from settings.errors import ConfigError, first_line

if TYPE_CHECKING:
    from stages import Stage


AUGMENTING = 2**30  # bytes of GPU memory that batches to come take, and RandAugment on them


def rehearse(
    stages: "Sequence[Stage]",
    learner: Learner,
    num_images: int,
    test_size: int,
    test_batch_size: int,
    on_device: bool = True,
) -> int:
    """Take one whole training step of each stage on noise, and undo it; on a GPU evaluate a batch of noise too.

    What does not fit shows in the first minute, not when its stage comes. The steps are not compiled: uncompiled ones
    take the most memory.

    What a step leaves free, an evaluation takes; but the memory of a CUDA graph serves that graph alone. If not all of
    it fits beside each other, evaluation takes no more images at once than training; if it does not fit even so, there
    are no graphs.

    num_images: of the training set; a small one fills no batch
    test_size, test_batch_size: of the images that are evaluated, pixels, and how many at once at least
    on_device: they may be resized on the GPU, in larger batches if there is room

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
                if is_of_processes(error):  # another one has failed, perhaps in its own rehearsal
                    raise
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
    runtime = learner.runtime
    runtime.release_memory()
    training = max(0, reserved - runtime.reserved_memory())
    evaluating = 0
    if runtime.device.type == "cuda":
        beside = AUGMENTING + (training if learner.graphed else 0)
        size = max([test_size, *(stage.image_size for stage in stages)])  # at the end also these are evaluated
        taken = rehearse_large_evaluation(learner, size, test_batch_size, beside) if on_device else None
        evaluating = rehearse_evaluation(learner, test_size, test_batch_size) if taken is None else taken
    if learner.graphed and training + evaluating + AUGMENTING > runtime.free_memory():
        learner.graphed, learner.graphs = False, None
        runtime.say(
            f"cuda_graphs off: a step would keep {training / 2**30:.1f} GiB, and evaluation wants "
            f"{evaluating / 2**30:.1f} beside it; a lower batch_size leaves room"
        )
    return training + evaluating if learner.graphed else max(training, evaluating)


def rehearse_large_evaluation(learner: Learner, image_size: int, batch_size: int, beside: int) -> int | None:
    """Evaluate a large batch of noise, as all processes do from then on, if it has room; return the bytes that it takes.

    beside: bytes that are taken meanwhile

    Returns: None if one of the processes has no room for it.
    """
    runtime, taken = learner.runtime, 0
    try:
        taken = rehearse_evaluation(learner, image_size, large_batch(batch_size, image_size))
        fits = beside + taken <= runtime.free_memory()
    except (ConfigError, RuntimeError) as error:  # too little memory; or a kernel does not take so many numbers
        if is_of_processes(error):
            raise
        fits = False
    runtime.release_memory()  # what an evaluation held that did not fit
    if runtime.any(not fits):
        return None
    runtime.proven.add(LARGE_EVALUATION)
    return taken


def rehearse_evaluation(learner: Learner, image_size: int, batch_size: int) -> int:
    """Evaluate a batch of noise on a GPU; return the bytes of its memory that this takes.

    Raises:
        ConfigError: out of memory; names what to lower.
    """
    runtime = learner.runtime
    held = runtime.reserved_memory()
    try:
        learner.evaluate_noise(image_size, batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"out of memory in evaluation ({image_size} px, batch_size {batch_size}); lower batch_size or val_crop_size "
            f"({first_line(error)})"
        ) from error
    taken = runtime.reserved_memory() - held
    runtime.release_memory()
    return taken


NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Check whether an error says that a GPU or the CPU has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


# Words of gloo's and NCCL's errors, which are plain RuntimeErrors or of types that differ from version to version.
OF_PROCESSES = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport", "NCCL")


def is_of_processes(error: Exception) -> bool:
    """Check whether an error is of the talk between processes."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OF_PROCESSES)
    )
