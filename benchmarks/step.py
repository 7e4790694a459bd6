"""What the training step costs beyond the arithmetic, on random images that are on the device already.

    python benchmarks/step.py
    python benchmarks/step.py --device cpu --steps 4 --repeats 15
    python benchmarks/step.py --model efficientnet_v2_s --image-size 300 --batch-size 128 -- --compile

bare        forward, backward, optimizer: a loop written by hand
ours        `train_one_epoch`, with all it does in a step: draws by key, learning rate, losses, progress, stop
ours-eager  the same, each kernel launched by itself, which on a GPU else is one CUDA graph (--cuda-graphs off)
ours-ema    as ours, with a moving average of the weights
reference   the reference's style: loss.item(), top-1 and top-5 accuracy and meters in every step

Then, for each size of --memory-sizes, the most memory that training at it takes: in a process that has
trained at the sizes before it, and in a fresh one. What follows `--` goes to train.py.

A minute on a GPU (an estimate), six on two CPU cores (three with the second command).
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor, nn

from learning.learner import Learner, build_learner
from learning.optim import LearningRate
from learning.state import RunState
from learning.stop import Stop
from reporting import records
from reporting.progress import Progress
from settings.resolve import resolve
from settings.table import Config
from stages import Stage, plan_stages, set_drop_rates
from train import train_one_epoch
from utils import Runtime, start_runtime

WAYS = ("bare", "ours", "ours-ema", "reference")
ON_GPU = ("ours-eager",)  # of interest there alone
OWN_FLAGS = {"ours": [], "ours-eager": common.EAGER, "ours-ema": ["--model-ema"]}  # of train.py, for each way of ours


class ResidentBatches:
    """What a `TrainLoader` gives, without loading: one batch of noise on the device, `steps` times."""

    def __init__(self, image_size: int, batch_size: int, steps: int, num_classes: int, runtime: Runtime):
        device = runtime.device
        images = torch.randn(batch_size, 3, image_size, image_size, device=device)
        self.images = images.to(memory_format=runtime.memory_format)
        self.targets = torch.randint(num_classes, (batch_size,), device=device)
        self.steps = steps
        self.images_per_step = batch_size
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step in range(first_step, self.steps):
            yield step, self.images, self.targets


def train_epoch(config: Config, stage: Stage, learner: Learner, batches: Any) -> RunState:
    """Train an epoch of our loop over `batches`; return its state, in which its time stands.

    batches: gives what a `TrainLoader` gives
    """
    state = RunState(epoch=stage.epochs.start)
    progress = Progress(stage, state.epoch, stage.epochs.stop, config.print_freq, 0, len(batches), show=False)
    train_one_epoch(learner, batches, state, LearningRate(config, [stage]), progress, Stop(learner.runtime))
    return state


def optimizer_of(config: Config, model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """Build SGD for all parameters alike, by the settings."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


def bare_steps(
    net: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batches: ResidentBatches, runtime: Runtime
) -> None:
    """Train over `batches` with a loop as one would write it by hand."""
    net.train()
    for _, images, targets in batches.epoch(0):
        with runtime.autocast():
            loss = criterion(net(images), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def reference_steps(
    net: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, batches: ResidentBatches, runtime: Runtime
) -> None:
    """Train over `batches` in the reference's style.

    In each step the loop waits for the device three times, to read the loss and two accuracies.
    """
    net.train()
    meters: dict[str, list[float]] = {"loss": [], "acc1": [], "acc5": [], "images_per_second": []}
    for _, images, targets in batches.epoch(0):
        start = time.perf_counter()
        with runtime.autocast():
            output = net(images)
            loss = criterion(output, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = output.topk(5).indices == targets[:, None]  # (N, 5)
        acc1, acc5 = (100 * right[:, :k].any(1).float().mean() for k in (1, 5))
        meters["loss"].append(loss.item())
        meters["acc1"].append(acc1.item())
        meters["acc5"].append(acc5.item())
        meters["images_per_second"].append(len(images) / (time.perf_counter() - start))


def compare(args: argparse.Namespace) -> list[common.Measures]:
    """Measure the ways in turn and print their table; return a row for each."""
    flags = train_flags(args, [args.image_size])
    config = resolve(flags)
    runtime = start_runtime(config)
    stage = plan_stages(config)[0]
    batches = ResidentBatches(stage.image_size, stage.batch_size, args.steps, args.classes, runtime)
    first = build_learner(config, args.classes, None, runtime)[0].model

    def timed(steps: Callable[[], object]) -> common.Measures:
        runtime.synchronize()
        start = time.perf_counter()
        state = steps()
        runtime.synchronize()
        seconds = time.perf_counter() - start
        if isinstance(state, RunState):  # which leaves out a look at the times of all processes, once an epoch
            seconds = state.train_seconds
        seconds /= args.steps
        return {"ms_per_step": 1000 * seconds, "images_per_second": stage.batch_size / seconds}

    def prepare(way: str) -> Callable[[], object]:
        """Build the way's own model, with weights that are the same for all at first; return its steps."""
        if way in OWN_FLAGS:
            own_config = resolve([*flags, *OWN_FLAGS[way]])
            learner, _ = build_learner(own_config, args.classes, None, runtime)
            learner.model.load_state_dict(first.state_dict())
            learner.enter_stage(stage.image_size, {stage.batch_size})
            return partial(train_epoch, own_config, stage, learner, batches)
        model = copy.deepcopy(first)
        # The optimizer one would write by hand is torch's fused one on a GPU; the reference takes the default.
        optimizer = optimizer_of(config, model, fused=way == "bare" and runtime.device.type == "cuda")
        net: Any = torch.compile(model) if config.compile else model
        criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        return partial(bare_steps if way == "bare" else reference_steps, net, optimizer, criterion, batches, runtime)

    rounds = common.interleave({way: partial(timed, prepare(way)) for way in args.ways}, args.repeats)
    rows = []
    for way in args.ways:
        row = {"way": way, **common.medians(rounds[way])}
        if "bare" in rounds:
            row["times_bare"] = common.ratio(rounds[way], rounds["bare"], "ms_per_step")
        rows.append(row)
    common.print_table(rows, {"way": "way", "ms_per_step": "ms/step", "images_per_second": "images/s", "times_bare": "x bare"})  # fmt: skip
    return rows


# ---- memory ----


def peak_memory(flags: Sequence[str], num_classes: int, steps: int) -> list[float | None]:
    """Measure the most memory held during each stage, GiB: of the GPU, or of this process up to its end."""
    config = resolve(flags)
    runtime = start_runtime(config)
    learner = build_learner(config, num_classes, None, runtime)[0]
    peaks = []
    for stage in plan_stages(config):
        set_drop_rates(learner.model, stage)
        learner.enter_stage(stage.image_size, {stage.batch_size})
        runtime.release_memory()
        batches = ResidentBatches(stage.image_size, stage.batch_size, steps, num_classes, runtime)
        train_epoch(config, stage, learner, batches)
        peak = runtime.peak_memory_gib()
        peaks.append(records.host_memory_gib() if peak is None else peak)
    return peaks


def compare_memory(args: argparse.Namespace) -> list[common.Measures]:
    """Measure the peak at each size, after the sizes before it and in a fresh process; return the rows."""
    sizes = sorted(args.memory_sizes)  # a process's peak never falls
    steps = min(args.steps, 5)
    measured = partial(common.fresh_process, peak_memory)
    held, _ = measured(train_flags(args, sizes), args.classes, steps)
    rows = []
    for size, peak in zip(sizes, held):
        fresh = measured(train_flags(args, [size]), args.classes, steps)[0][0]
        rows.append({"way": "fresh", "image_size": size, "peak_memory_gib": fresh})
        rows.append(
            {
                "way": "stage-to-stage",
                "image_size": size,
                "peak_memory_gib": peak,
                "times_fresh": peak / fresh if peak and fresh else None,
            }
        )
    common.print_table(rows, {"way": "way", "image_size": "px", "peak_memory_gib": "peak GiB", "times_fresh": "x fresh"})  # fmt: skip
    return rows


def train_flags(args: argparse.Namespace, sizes: Sequence[int]) -> list[str]:
    """List the flags of train.py for a stage of one epoch at each size.

    The learning rate is small: noise teaches nothing, and must not diverge.
    """
    flags = [
        *common.machine_flags(args.device),
        "--model",
        args.model,
        "--batch-size",
        str(args.batch_size),
        "--lr",
        "0.001",
    ]
    flags += ["--epochs", str(len(sizes)), "--stages", str(len(sizes)), "--train-crop-size", *map(str, sizes)]
    return flags + args.flags


def main(args: argparse.Namespace) -> list[common.Measures]:
    """Measure the steps and, if sizes for it are given, the memory; return the rows of both."""
    rows = compare(args)
    return rows + compare_memory(args) if args.memory_sizes else rows


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.parser("step", __doc__ or "")
    parser.add_argument("--model", default="efficientnet_v2_b0", help="as train.py's (default: efficientnet_v2_b0)")
    parser.add_argument("--image-size", type=common.positive, default=128, help="pixels (default: 128)")
    parser.add_argument("--batch-size", type=common.positive, default=32, help="images (default: 32)")
    parser.add_argument("--classes", type=common.positive, default=1000, help="of the model's head (default: 1000)")
    parser.add_argument("--steps", type=common.positive, default=20, help="of each way in each round (default: 20)")
    parser.add_argument("--repeats", type=common.positive, default=7, help="rounds (default: 7)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS + ON_GPU, default=list(WAYS), help="which ways (default: all but ours-eager)"
    )
    parser.add_argument("--memory-sizes", nargs="*", type=common.positive, metavar="S", default=[64, 96, 128], help="sizes whose memory is measured; none: not (default: 64 96 128)")  # fmt: skip
    return common.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(common.run(main, read_options(sys.argv[1:])))
