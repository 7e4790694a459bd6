"""What an error that ended a run means, in one line."""

import torch.distributed as dist

import utils
from learning.rehearse import is_of_processes, is_out_of_memory
from learning.scores import NonFiniteLoss
from settings.errors import RunError, first_line


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
    if isinstance(error, dist.DistNetworkError) and not dist.is_initialized():
        return (
            f"the processes of this run do not find each other ({first_line(error)}); see to the address they are given"
        )
    if "NCCL" in str(error) and is_of_processes(error):  # of a process that has ended, or of the machine
        return (
            f"the processes of this run cannot work together ({nccl_reason(error)}): look at what each of them says; "
            "--resume auto continues from the last checkpoint"
        )
    if is_of_processes(error):
        return (
            f"another process of this run has ended, or did not answer for {utils.RANK_SECONDS:.0f} s: look at what it says; "
            "--resume auto continues from the last checkpoint"
        )
    return None


def nccl_reason(error: Exception) -> str:
    """Find what NCCL names as its reason: the line after "Last error:", or the first that there is."""
    _, _, last = str(error).partition("Last error:\n")
    return last.strip().split("\n")[0] or first_line(error)
