"""Train an image classifier through the stages of EfficientNetV2's progressive learning.

    python train.py --config configs/quickstart.yaml              # two minutes on a laptop's CPU
    python train.py --config configs/imagenette_s.yaml            # one GPU
    torchrun --nproc-per-node 8 train.py --config configs/imagenet_s.yaml

The flags are those of torchvision's references/classification/train.py, and a few more for stages;
`--help` lists them, `--plan` shows the stages and their cost. What to expect of each config, in time and
accuracy, stands at its head.

Exit status: 0 finished; 2 wrong input; 3 stopped early and saved, `--resume auto` continues; 1 the rest.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from images.datasets import load_data
from images.loaders import TrainLoader, augment_on, eval_loader, sample_grid, train_loader
from images.store_place import with_store
from images.workers import closing_loader
from learning.checkpoint import check_data, check_store, find_checkpoint
from learning.ema import EMA
from learning.learner import Learner
from learning.models import build_model, check_model
from learning.optim import build_optimizer, learning_rate_schedule, set_learning_rate
from learning.rehearse import rehearse
from learning.scores import NonFiniteLoss, Score, TrainingLoss
from learning.state import RunState
from learning.weights import read_weights
from reporting.folder import check_folder
from reporting.log import Dashboard, RunLog
from reporting.progress import Progress
from reporting.records import epoch_record, summarise
from settings.errors import ConfigError
from settings.table import Config
from stages import StageScheduler, describe_plan, format_plan, plan_stages
from tracking.deadline import exit_now
from tracking.run import find_dashboard
from tracking.settings import find_settings
from utils import Runtime, Stop, share_buffers, share_weights, start_runtime


def main(config: Config, dashboard: Dashboard) -> int:
    """The run that `config` describes, in its order; returns the exit status."""
    # Where it runs, what it will do, where it continues: all that can be wrong without looking at data
    runtime = start_runtime(config)
    config = replace(config, augment_on=augment_on(config, runtime))  # written down, so that a resume keeps to it
    stop = Stop(runtime, config.time_budget)
    dashboard.ask_to_stop = stop.ask
    stages = plan_stages(config)
    plan = describe_plan(config, stages)
    if not config.test_only:  # which writes nothing
        check_folder(config)
    checkpoint = find_checkpoint(config, runtime)
    weights = read_weights(config.model, config.weights) if config.weights else None

    # Data, model, and what changes with every step
    data = load_data(config, runtime)
    model, loaded = build_model(config.model, len(data.classes), weights, config.bn_momentum)
    model.to(runtime.device, memory_format=runtime.memory_format)
    if config.sync_bn and runtime.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    learner = Learner(
        model,
        build_optimizer(config, model),
        nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        runtime,
        ema=EMA(model, config) if config.model_ema else None,
        clip_grad_norm=config.clip_grad_norm,
        compiled=config.compile,
    )
    state = RunState(epoch=config.start_epoch)
    if checkpoint is not None:
        check_data(checkpoint, data.classes, len(data.train))
        state = learner.load_state_dict(checkpoint)
    runtime.say(f"{loaded}\n{data}\n{runtime}")
    if config.test_only:
        with closing_loader(eval_loader(config, data, runtime, config.val_crop_size)) as val_loader:
            scores = evaluate_all(learner.copies, val_loader, learner.criterion, runtime)
        for name, score in scores.items():
            runtime.say(f"{name}: {score}")
        return 0

    # One step and a few images of every stage to come: what does not fit or cannot be read shows now, not in hours
    ahead = [stage for stage in stages if stage.epochs.stop > state.epoch]
    reserved = rehearse(ahead, learner, len(data.train))
    data = with_store(config, data, runtime, reserved)  # decoded once; on the GPU if training leaves it room
    if checkpoint is not None:
        check_store(checkpoint, config, data.store_side)
    val_loader = eval_loader(config, data, runtime, config.val_crop_size)
    make_loader = partial(train_loader, config, data, runtime)
    samples = {stage.index: sample_grid(make_loader(stage), stage.epochs.start) for stage in ahead}
    log = RunLog(config, data.classes, plan, samples, state.epoch, dashboard) if runtime.is_main else None
    runtime.say(format_plan(plan))
    learning_rate = learning_rate_schedule(config)
    scheduler = StageScheduler(make_loader, learner.copies.values(), ahead)

    # Algorithm 1: the stages and their epochs; weights, optimizer, schedule and EMA carry on
    with stop, scheduler, closing_loader(val_loader):
        for stage in ahead:
            loader = scheduler.enter(stage)
            learner.enter_stage(stage.image_size, loader.batch_sizes)
            for epoch in stage.epochs:
                if epoch < state.epoch:
                    continue  # trained before the resume
                progress = Progress(stage, epoch, config, state.step, len(loader), show=runtime.is_main)
                finished = train_one_epoch(learner, loader, state, learning_rate, progress, stop)
                if finished:
                    scores = {}
                    if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                        scores = evaluate_all(learner.copies, val_loader, learner.criterion, runtime)
                    improved = state.note_best(scores)
                    record = epoch_record(stage, state, learner, scores)
                    if log is not None:
                        log.epoch(record)
                        if improved:
                            name = state.best_weights
                            log.save_best(learner.copies[name], epoch, scores[name].confusion)
                    progress.conclude(record)
                    state.next_epoch()
                if log is not None:
                    log.save_checkpoint(
                        learner.state_dict(state)
                        | {"config": config.as_dict(), "classes": data.classes, "num_images": len(data.train)}
                        | {"store_side": data.store_side}
                    )
                if not finished or (stop() and state.epoch < config.epochs):
                    folder = shlex.quote(config.output_dir)
                    runtime.say(f"stopped: {stop.reason}; saved, `--resume auto --output-dir {folder}` continues")
                    return 3

    # The final and the best weights, at the sizes they were trained at and at test size
    copies = learner.copies | {"best": share_weights(log and log.load_best(), model, runtime)}
    best_stage = next(stage for stage in stages if state.best_epoch in stage.epochs)
    sizes = {
        "stage_size": best_stage.image_size,
        "last_training_size": stages[-1].image_size,
        "test_size": config.val_crop_size,
    }
    closing = {}
    for size in sorted(set(sizes.values())):
        with closing_loader(eval_loader(config, data, runtime, size)) as loader_at_size:
            closing[size] = evaluate_all(copies, loader_at_size, learner.criterion, runtime)
    if log is not None:
        summary = summarise(config, plan, state, learner, sizes, closing, log.records)
        log.finish(summary, closing[config.val_crop_size]["model"].confusion)
        runtime.say(
            f"top1 {summary['top1']:.2f}, best {summary['best_top1']:.2f} in epoch {state.best_epoch + 1}; see {log.path('report.html')}"
        )
    return 0


def train_one_epoch(
    learner: Learner,
    loader: TrainLoader,
    state: RunState,
    learning_rate: Callable[[float], float],
    progress: Progress,
    stop: Stop,
) -> bool:
    """Train what is left of epoch `state.epoch`, from `state.step` on; False if asked to stop before its end.

    `state` then holds where the epoch stands, its losses summed over all processes.

    Raises:
        NonFiniteLoss: naming the step; noticed when the loss is next read, after at most print_freq steps.
    """
    runtime, ema = learner.runtime, learner.ema
    losses = TrainingLoss(state, runtime, progress.title)
    if ema is not None:
        ema.begin_epoch(state.epoch, loader.images_per_step)
    learner.net.train()
    started, asked_to_stop = time.perf_counter(), False
    for step, images, targets in loader.epoch(state.epoch, state.step):
        runtime.draw_from(state.epoch, step)  # dropout and stochastic depth, so that a resume repeats them
        set_learning_rate(learner.optimizer, learning_rate(state.epoch + step / len(loader)))
        loss = learner.step(images, targets)
        if ema is not None and step % ema.steps == 0:
            ema.update(learner.model)
        losses.add(loss, len(images), step)
        progress.step(step, losses)
        state.step = step + 1
        if stop(step + 1):
            asked_to_stop = True
            break
    losses.store(state)
    state.train_seconds += time.perf_counter() - started
    state.wait_seconds += loader.wait_seconds
    return not asked_to_stop


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, criterion: nn.Module, runtime: Runtime) -> Score:
    """Accuracy, loss and confusions of `model` over the whole set, each image counted once, on all processes."""
    model.eval()
    score = Score(runtime)
    for images, targets in loader:
        images = images.to(runtime.device, non_blocking=True, memory_format=runtime.memory_format)
        targets = targets.to(runtime.device, non_blocking=True)
        with runtime.autocast():
            output = model(images)  # (N, K)
            loss = criterion(output, targets)
        score.add(output, targets, loss)
    return score.gather()


def evaluate_all(
    copies: Mapping[str, nn.Module], loader: DataLoader, criterion: nn.Module, runtime: Runtime
) -> dict[str, Score]:
    """`evaluate` for the model, its EMA and so on, by name."""
    return {name: evaluate(share_buffers(model, runtime), loader, criterion, runtime) for name, model in copies.items()}


def run(argv: Sequence[str]) -> int:
    """The program: settings, plan or run; the exit status. What a user can mend is one line, without a traceback."""
    who = "" if os.environ.get("RANK", "0") == "0" else f"[rank {os.environ['RANK']}] "
    try:
        config = find_settings(argv, check_model)
        if config.plan is None:
            with find_dashboard(config) as dashboard:
                return main(config, dashboard)
        stages = plan_stages(config)
        plan = describe_plan(config, stages)
        if not who:
            print(json.dumps(plan, indent=2) if config.plan == "json" else format_plan(plan))
        return 0
    except ConfigError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{who}interrupted", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    exit_now(run(sys.argv[1:]))
