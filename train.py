"""Train an image classifier through the stages of EfficientNetV2's progressive learning.

    python train.py --config configs/quickstart.yaml              # two minutes on a laptop's CPU
    python train.py --config configs/imagenette_s.yaml            # one GPU
    torchrun --nproc-per-node 8 train.py --config configs/imagenet_s.yaml

The flags are those of torchvision's references/classification/train.py, and a few more for stages;
`--help` lists them, `--plan` shows the stages and their cost. What to expect of each config, in time and
accuracy, stands at its head.

Exit status: 0 finished; 2 wrong input; 3 stopped early and saved, `--resume auto` continues; 1 the rest.
"""

import sys

from settings import early

if __name__ == "__main__":
    early.answer(sys.argv[1:])  # help and mistakes, before torch is imported

import json
import shlex
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from images.datasets import Data, check_folders, load_data
from images.evaluation import EvalOnDevice
from images.loaders import (
    TrainLoader,
    augment_on,
    batches_of_all,
    eval_loader,
    evaluates_on_device,
    sample_grid,
    train_loader,
)
from images.store_place import with_store
from images.workers import closing_loader
from learning.balance import find_class_weights, tell_class_weights
from learning.faults import one_line
from learning.fit import check_decoding, fit
from learning.learner import Learner, build_learner
from learning.models import check_model
from learning.optim import LearningRate, set_learning_rate
from learning.rehearse import rehearse
from learning.resume import check_data, check_store, find_checkpoint, most_on_device
from learning.scores import NonFiniteLoss, Score, TrainingLoss, keep_outputs
from learning.state import RunState
from learning.stop import Stop, interruptible
from learning.weights import preset_doubt, read_weights
from reporting.folder import RunFolder, check_folder
from reporting.log import Dashboard, FolderLog, RunLog
from reporting.progress import Progress
from reporting.records import cpu_seconds
from settings.errors import ConfigError, first_line, outside_training, process_rank, tell
from settings.resolve import doubts
from settings.table import Config
from stages import Plan, StageScheduler, make_plan, plan_of, plan_stages
from tracking.dashboard import find_dashboard
from tracking.deadline import exit_now
from tracking.settings import find_settings
from utils import Runtime, share_buffers, share_weights, start_runtime

REPORTED_SECONDS = 60.0  # that processes give the first to report why they end


def main(config: Config, runtime: Runtime, dashboard: Dashboard, at_end: ExitStack) -> int:
    """Carry out the run that `config` describes, from start to end; return the exit status.

    at_end: closes what is opened here, in the opposite order, however the run ends
    """
    # What it will do, where it continues: all that can be wrong without looking at data. What auto comes to here is
    # written down, so that a resume keeps to it, on another machine too.
    config = replace(config, augment_on=augment_on(config, runtime), amp_dtype=runtime.precision or config.amp_dtype)
    stop = at_end.enter_context(Stop(runtime, config.time_budget, patient=False))
    dashboard.ask_to_stop = stop.ask
    plan = make_plan(config)
    learning_rate = LearningRate(config, plan.stages)
    for doubt in doubts(config, learning_rate.span, runtime.world_size > 1):
        runtime.say(f"warning: {doubt}")
    folder = check_folder(config)
    if not config.test_only:
        at_end.enter_context(folder.used_alone(runtime))
    config, checkpoint = find_checkpoint(config, runtime, folder.checkpoint, plan.num_epochs)
    if checkpoint is not None and config.resume == "auto" and not config.test_only:
        folder.mend_best(checkpoint, plan.num_epochs, runtime)
        stop.resumable = True
    check_folders(config)  # before weights are fetched
    weights = read_weights(config.model, config.weights, runtime) if config.weights and checkpoint is None else None

    # Data, model, and what changes with every step
    data = load_data(config, runtime)
    class_weights = find_class_weights(config, data)
    learner, loaded = build_learner(config, len(data.classes), weights, runtime, class_weights)
    state = RunState(epoch=config.start_epoch)
    if checkpoint is not None:
        check_data(checkpoint, data)
        state = learner.restore(checkpoint, to_train=not config.test_only)
        loaded = f"{config.model}: weights of {checkpoint.read_from}"
    runtime.say(f"{loaded}\n{data}\n{runtime}")
    if config.test_only:
        return test(config, data, learner)
    if class_weights is not None:
        runtime.say(tell_class_weights(class_weights, data.classes))

    # One step and a few images of every stage to come: what does not fit or cannot be read shows now, not in hours
    ahead = plan.ahead(state.epoch)
    test_batch, on_device = int(max(config.batch_size)), evaluates_on_device(config, runtime)
    reserved = rehearse(ahead, learner, len(data.train), config.val_crop_size, test_batch, on_device)
    fitting = config.fit_time is not None and checkpoint is None
    if fitting:
        check_decoding(config, data, runtime)
    # Decoded once; on the GPU if training leaves it room
    data = with_store(config, data, runtime, reserved, most_on_device(checkpoint, config))
    if config.decode_cache == "auto":
        config = replace(config, decode_cache=data.store_folder or "off")
    if checkpoint is not None:
        check_store(checkpoint, config, data, runtime)
    make_loader = partial(train_loader, config, data, runtime)
    forecast = None
    if fitting:  # the epochs that a time affords, from steps and an evaluation that are timed and undone
        scheduler = StageScheduler(make_loader, learner.copies.values())
        config, forecast = fit(config, data, learner, ahead, scheduler, train_one_epoch, evaluate)
        plan = plan_of(config, plan_stages(config), plan.gflops_per_image)
        ahead, learning_rate = plan.ahead(0), LearningRate(config, plan.stages)
    samples = {stage.index: sample_grid(make_loader(stage), stage.epochs.start) for stage in ahead}
    log = RunLog()
    if runtime.is_main:
        log = FolderLog(folder, config, plan, data, samples, state.epoch, dashboard, checkpoint, forecast)
    at_end.enter_context(log)
    runtime.say(f"{plan}\n{forecast}" if forecast else str(plan))
    val_loader = eval_loader(config, data, runtime, config.val_crop_size)
    known: dict[str, Score] = {}  # at test size: of the weights as they are, and of the best

    # Algorithm 1: the stages and their epochs; weights, optimizer, schedule and EMA carry on
    scheduler = StageScheduler(make_loader, learner.copies.values(), ahead)
    with stop.patiently(), scheduler, closing_loader(val_loader):
        for stage in ahead:
            log.begin_stage(stage)
            loader = scheduler.enter(stage)
            if stage.finetune and (state.epoch, state.step) == (stage.epochs.start, 0):
                # What is fine-tuned is the better of the model and its average.
                learner.unify(state.better or state.best_weights)
            learner.enter_stage(stage.image_size, loader.batch_sizes, loader.soft_classes, stage.finetune)
            for epoch in range(max(stage.epochs.start, state.epoch), stage.epochs.stop):
                progress = Progress(
                    stage, epoch, plan.num_epochs, config.print_freq, state.step, len(loader), show=runtime.is_main
                )
                finished = train_one_epoch(learner, loader, state, learning_rate, progress, stop)
                scores: dict[str, Score] = {}
                if finished and plan.evaluates(epoch, config.eval_every):
                    scores = evaluate(learner.copies, val_loader, learner.criterion, runtime, stop)
                    finished = bool(scores)  # else asked to stop: evaluated when the run goes on
                if finished:
                    improved = state.note_best(scores)
                    progress.conclude(log.epoch(stage, state, learner, scores))
                    known = {name: score for name, score in known.items() if name == "best"} | scores
                    if improved:
                        known["best"] = scores[state.best_weights]
                        log.save_best(learner, state, known["best"])
                    keep_outputs(known, of="best")
                    state.next_epoch()
                stopping = not finished or (stop() and (stop.asked or state.epoch < plan.num_epochs))
                log.save_checkpoint(learner, state, data, always=stopping or state.epoch == stage.epochs.stop)
                stop.resumable = stop.resumable or log.saved
                if stopping:
                    log.wait()
                    if stop.failure is not None:
                        raise stop.failure
                    runtime.say(f"stopped: {stop.reason}; saved, {how_to_continue(config)}")
                    return 3
        log.wait()  # signals are not waited for any more

    # The final and the best weights, at the sizes they were trained at and at test size
    sizes = {
        "stage_size": plan.stage_of(state.best_epoch).image_size,
        "last_training_size": plan.stages[-1].image_size,
        "test_size": config.val_crop_size,
    }
    last_is_best = state.best_epoch == plan.num_epochs - 1
    closing = evaluate_outcome(config, data, learner, state, log, known, set(sizes.values()), last_is_best)
    log.finish(state, learner, sizes, closing)
    return 0


def train_one_epoch(
    learner: Learner, loader: TrainLoader, state: RunState, learning_rate: LearningRate, progress: Progress, stop: Stop
) -> bool:
    """Train what is left of an epoch, from `state.step` on; return False if asked to stop before its end.

    `state` then holds where the epoch stands, its losses summed over all processes.

    Raises:
        NonFiniteLoss: naming the step; noticed when the loss is next looked at, after at most 2 print_freq steps.
    """
    runtime, ema = learner.runtime, learner.ema
    losses = TrainingLoss(state, runtime, progress.title)
    # Of the last step taken: it is what the epoch's record reads, also of one that is resumed with no step left.
    set_learning_rate(learner.optimizer, learning_rate(state.epoch + max(state.step - 1, 0) / len(loader)))
    if ema is not None:
        ema.begin_epoch(loader.images_per_step, learning_rate.num_epochs, learning_rate.warming_up(state.epoch))
    learner.train()
    cpu_before, started, asked_to_stop = cpu_seconds(), time.perf_counter(), False
    for step, images, targets in stop.while_they_come(loader.epoch(state.epoch, state.step)):
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
    state.cpu_seconds += cpu_seconds() - cpu_before
    state.wait_seconds += loader.wait_seconds
    return not asked_to_stop and stop.failure is None


@torch.inference_mode()
def evaluate(
    copies: Mapping[str, nn.Module],
    loader: DataLoader | EvalOnDevice,
    criterion: nn.Module,
    runtime: Runtime,
    stop: Stop | None = None,
) -> dict[str, Score]:
    """Measure accuracy, loss and confusions of each of `copies` (the model, its EMA) on the whole set; keep their outputs.

    They take one pass together, on all processes; each image is counted once.

    stop: keeps for later why workers failed; without one that is raised

    Returns: scores by copy; none if `stop` asked to stop meanwhile, for which the time budget does not count.
    """
    scores = {name: Score(runtime) for name in copies}
    for model in copies.values():
        share_buffers(model, runtime).eval()
    num_shared = batches_of_all(loader, runtime)  # at which processes agree on whether to stop
    for step, (images, targets) in enumerate(loader if stop is None else stop.while_they_come(loader)):
        if stop is not None and step < num_shared and stop(step, budget=False):
            return {}
        images = images.to(runtime.device, non_blocking=True, memory_format=runtime.memory_format)
        targets = targets.to(runtime.device, non_blocking=True)
        for name, model in copies.items():
            with runtime.autocast():
                output = model(images)  # (N, K)
                loss = criterion(output, targets)
            scores[name].add(output, targets, loss)
    if stop is not None and stop.failure is not None:
        return {}
    return {name: score.gather() for name, score in scores.items()}


def evaluate_outcome(
    config: Config,
    data: Data,
    learner: Learner,
    state: RunState,
    log: RunLog,
    known: Mapping[str, Score],
    sizes: set[int],
    last_is_best: bool,
) -> dict[int, dict[str, Score]]:
    """Evaluate the final copies and the best weights at each of `sizes`.

    What is `known` at test size is not repeated.

    Returns: scores by size and by copy ("model", "ema", "best").
    """
    runtime = learner.runtime
    copies = learner.copies
    if not last_is_best and ("best" not in known or sizes != {config.val_crop_size}):
        copies["best"] = share_weights(log.best_weights(), learner.model, runtime)
    closing: dict[int, dict[str, Score]] = {}
    for size in sorted(sizes):
        closing[size] = dict(known) if size == config.val_crop_size else {}
        missing = {name: model for name, model in copies.items() if name not in closing[size]}
        if missing:
            with closing_loader(eval_loader(config, data, runtime, size)) as loader:
                closing[size] |= evaluate(missing, loader, learner.criterion, runtime)
        if last_is_best:
            closing[size]["best"] = closing[size][state.best_weights]
        keep_outputs(closing[size], of="best" if size == config.val_crop_size else None)
    closing[config.val_crop_size]["best"].collect()
    return closing


def test(config: Config, data: Data, learner: Learner) -> int:
    """Evaluate the model and print its scores; write nothing."""
    doubt = None if config.resume else preset_doubt(config)
    if doubt is not None:
        learner.runtime.say(f"warning: {doubt}")
    with closing_loader(eval_loader(config, data, learner.runtime, config.val_crop_size)) as loader:
        scores = evaluate(learner.copies, loader, learner.criterion, learner.runtime)
    for name, score in scores.items():
        learner.runtime.say(f"{name}: {score}")
    return 0


def show_plan(plan: Plan, form: str, rank: int) -> None:
    """Print the plan as a table or as JSON, on rank 0 alone."""
    if rank == 0:
        print(json.dumps(plan.as_dict(), indent=2) if form == "json" else plan)


def how_to_continue(config: Config) -> str:
    return f"`--resume auto --output-dir {shlex.quote(config.output_dir)}` continues"


def run(argv: Sequence[str]) -> int:
    """Run the program: settings, then plan or training; return the exit status.

    What a user can mend is told in one line, without a traceback.
    """
    config = runtime = status = None
    try:
        with interruptible():
            config = find_settings(argv, check_model)
            if config.plan is not None:
                show_plan(make_plan(config), config.plan, process_rank(config.world_size))
                return 0
            with find_dashboard(config) as dashboard, ExitStack() as at_end:
                runtime = start_runtime(config)
                status = main(config, runtime, dashboard, at_end)
            # They leave together. torchrun ends all as soon as one ends otherwise than with 0, and the first may still be
            # saving or reporting; and one that is gone early may leave another waiting for it (torch 2.6).
            runtime.barrier()
            return status
    except ConfigError as error:
        tell(error)
        return 2
    except KeyboardInterrupt as error:
        if status is not None:  # it came to its end before
            return status
        if config is None or not getattr(error, "resumable", False):
            tell(f"stopped: {error}; nothing was saved")
            return 1
        tell(f"stopped: {error}; what was saved before stays, {how_to_continue(config)}")
        return 3
    except Exception as error:
        tell(f"error: {told(error, config)}")
        if runtime is not None and isinstance(error, NonFiniteLoss):  # as a rule all processes meet with it
            runtime.meet(REPORTED_SECONDS)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def told(error: Exception, config: Config | None) -> str:
    """Say in one line what an error was and what helps; keep its traceback, or show it with `debug`."""
    line = one_line(error)
    if line is not None and config is not None and config.test_only:
        line = outside_training(line)
    if config is not None and config.debug:
        traceback.print_exc()
    elif line is None and config is not None:
        path = RunFolder(config.output_dir).note_error(process_rank(config.world_size))
        return f"{type(error).__name__}: {first_line(error)}; {f'its traceback is in {path}' if path else '--debug shows where'}"
    return line or f"{type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    early.imported()
    exit_now(run(sys.argv[1:]))
