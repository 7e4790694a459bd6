"""Losses and correct answers, counted on the device and read when someone asks; outputs, kept for the report."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from learning.state import RunState
from utils import Runtime


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message says where."""


class TrainingLoss:
    """The losses of an epoch, kept on the device: adding them waits for nothing, `glance` for what is done already.

    title: where training is, for the message of NonFiniteLoss
    """

    def __init__(self, state: RunState, runtime: Runtime, title: str):
        self.runtime, self.title = runtime, title
        # What an earlier part of this epoch summed over all processes goes on in one of them.
        self.num_images = state.num_images if runtime.is_main else 0
        self.sum = torch.tensor(state.loss_sum if runtime.is_main else 0.0, device=runtime.device)
        self.bad_step = torch.tensor(-1, device=runtime.device)
        self.noted: tuple[Tensor, Tensor, int, torch.cuda.Event] | None = None  # copies on their way to the host

    def add(self, loss: Tensor, num_images: int, step: int) -> None:
        """Add the mean loss of a step; remember the first step whose loss is not finite."""
        self.sum += loss * num_images
        self.num_images += num_images
        self.bad_step = torch.where(torch.isfinite(loss) | (self.bad_step >= 0), self.bad_step, step)

    def glance(self) -> float | None:
        """Return the mean loss of this process as it was at the last glance, None at the first; on a CPU as it is now.

        A GPU is several steps behind the processor. Asked for the loss of this step it would be waited for, and then have
        nothing queued: 5 % of the time, at ten steps from one reading to the next.

        Raises:
            NonFiniteLoss: that of some step up to then was not finite.
        """
        if self.runtime.device.type != "cuda":
            return self.read()
        before = self.noted
        copies = [value.to("cpu", non_blocking=True) for value in (self.sum, self.bad_step)]  # into pinned memory
        event = torch.cuda.Event()
        event.record()
        self.noted = copies[0], copies[1], self.num_images, event
        if before is None:
            return None
        loss_sum, bad_step, num_images, copied = before
        copied.synchronize()
        return self.mean(loss_sum, bad_step, num_images)

    def read(self) -> float:
        """Compute the mean loss of this process so far; waits for the device.

        Raises:
            NonFiniteLoss: that of some step was not finite.
        """
        return self.mean(self.sum, self.bad_step, self.num_images)

    def mean(self, loss_sum: Tensor, bad_step: Tensor, num_images: int) -> float:
        """Compute a mean loss, unless that of some step was not finite.

        Raises:
            NonFiniteLoss: naming the step.
        """
        if bad_step >= 0:
            raise NonFiniteLoss(
                f"the loss is not finite in {self.title}, step {int(bad_step)}; lower lr, warm up longer, or set "
                "clip_grad_norm. What was saved after the last whole epoch is not touched"
            )
        return float(loss_sum) / max(num_images, 1)

    def store(self, state: RunState) -> None:
        """Write the sums over all processes into `state`.

        Raises:
            NonFiniteLoss: as `read`.
        """
        self.read()
        sums = self.runtime.sum(torch.stack([self.sum, torch.tensor(float(self.num_images), device=self.sum.device)]))
        state.loss_sum, state.num_images = float(sums[0]), int(sums[1])


# Numbers that outputs are kept up to, over all processes: 134,000 images of 1,000 classes, at most 512 MiB
KEPT = 2**27


@dataclass
class Outputs:
    """What a model has put out for images.

    logits: (N, K); targets, predicted: (N,) class numbers
    """

    logits: Tensor
    targets: Tensor
    predicted: Tensor


class Score:
    """What an evaluation counted; `gather` adds it up over processes, then the figures can be read.

    top1, top5: percent of `num_images`; loss: mean per image
    confusion: (K, K) images, rows true, columns predicted
    outputs: on the CPU, of this process's images, once they were collected of all; None where there are more than `KEPT`,
        where `keep_outputs` has let go of them, and once collected, on all ranks but 0
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.sums = torch.zeros(2, device=runtime.device)  # loss, images with the class among the first five
        self.counts: Tensor | None = None  # (K, K)
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []  # on the device, which is not waited for
        self.num_kept = 0
        self.outputs: Outputs | None = None

    def add(self, output: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Count the answers of one batch.

        output: (N, K) logits; targets: (N,); loss: mean over the batch
        """
        num_classes = output.shape[1]
        if self.counts is None:
            self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=output.device)
        first = output.topk(min(5, num_classes)).indices  # (N, 5)
        self.counts.index_put_((targets, first[:, 0]), torch.ones_like(targets), accumulate=True)
        self.sums += torch.stack([loss.float() * len(targets), (first == targets[:, None]).sum()])
        self.num_kept += output.numel() * self.runtime.world_size
        self.batches.append((output, targets, first[:, 0]))
        if self.num_kept > KEPT:
            self.batches.clear()

    def gather(self) -> "Score":
        """Add up the counts of all processes and compute the figures; return self."""
        assert self.counts is not None, "a process without an image to evaluate"
        self.confusion = self.runtime.sum(self.counts).cpu()
        loss_sum, top5 = self.runtime.sum(self.sums).tolist()
        self.num_images = int(self.confusion.sum())
        self.loss = loss_sum / self.num_images
        self.top1 = 100 * int(self.confusion.trace()) / self.num_images
        self.top5 = 100 * top5 / self.num_images
        if self.num_kept <= KEPT:
            self.outputs = Outputs(*(torch.cat([part.cpu() for part in parts]) for parts in zip(*self.batches)))
        self.batches.clear()
        return self

    def collect(self) -> "Score":
        """Bring the outputs of all processes to rank 0, in the order of the images; all must call this together."""
        own = self.outputs
        if self.runtime.any(own is None) or own is None:  # the largest share alone was too many, say
            self.outputs = None
        elif self.runtime.world_size > 1:
            parts = (own.logits.float(), own.targets, own.predicted)
            whole = [to_main(part, self.num_images, self.runtime) for part in parts]
            self.outputs = Outputs(*whole) if self.runtime.is_main else None
        return self

    def __str__(self) -> str:
        return f"top1 {self.top1:.3f}, top5 {self.top5:.3f}, loss {self.loss:.4f} on {self.num_images} images"


def to_main(share: Tensor, num_rows: int, runtime: Runtime) -> Tensor:
    """Bring rows to rank 0, of which each process has every world_size-th: there they are all (num_rows, ...), in order.

    Elsewhere `share` is returned as it is.
    """
    if not runtime.is_main:
        dist.send(share.contiguous(), dst=0, group=runtime.control)
        return share
    whole = torch.empty(num_rows, *share.shape[1:], dtype=share.dtype)
    whole[:: runtime.world_size] = share
    for rank in range(1, runtime.world_size):
        rows = torch.empty_like(whole[rank :: runtime.world_size])
        dist.recv(rows, src=rank, group=runtime.control)
        whole[rank :: runtime.world_size] = rows
    return whole


def keep_outputs(scores: Mapping[str, Score], of: str | None) -> None:
    """Let go of the outputs of all scores but the one by the name `of`: 200 MB each on ImageNet's validation images."""
    for score in scores.values():
        if of is None or score is not scores.get(of):
            score.outputs = None
