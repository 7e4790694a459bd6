"""What an error that ended a run means, in one line."""

import torch.distributed as dist

import utils
from learning.rehearse import is_out_of_memory
from learning.scores import NonFiniteLoss
from settings.errors import RunError, first_line

# Words of gloo's and NCCL's errors, which are plain RuntimeErrors or of types that differ from version to version.
OF_PROCESSES = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport", "NCCL")


def one_line(error: Exception) -> str | None:
    """Describe an error of training or of the machine: the thing, where it is, what helps; None if it is another."""
    if isinstance(error, RunError | NonFiniteLoss):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return str(RunError.of_disk(error, str(error.filename)))
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return (
            f"out of memory in training ({first_line(error)}); end what else uses it, or start anew with a lower "
            "batch_size; --resume auto continues from the last checkpoint"
        )
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OF_PROCESSES)
    ):
        return (
            f"another process of this run has ended, or did not answer for {utils.RANK_SECONDS:.0f} s: look at what it says; "
            "--resume auto continues from the last checkpoint"
        )
    return None
