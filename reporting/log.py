"""What a run leaves to look at: its folder, and the lines and the bar on the terminal.

Training code calls `RunLog`; it names what happened, and knows nothing of where that is shown.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchvision
import yaml
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from learning.checkpoint import save_checkpoint, to_cpu, write_safely
from learning.learner import Learner, RunState
from learning.scores import Score, TrainingLoss
from reporting import page as graphs
from settings.resolve import LAUNCH, Config, ConfigError
from stages import Stage
from utils import Runtime

RUN_FILES = (
    "config.yaml", "metrics.jsonl", "summary.json", "checkpoint.pth", "checkpoint_previous.pth", "model_best.pth", "report.html",
    "report/confusion_best.json", "report/confusion_last.json", "clearml/task.json",
)  # fmt: skip
REPORT_EVERY = 60.0  # seconds; drawing the page takes one or two


def check_folder(config: Config) -> None:
    """Raise ConfigError if output_dir holds a run that the settings would neither continue nor replace."""
    folder = config.output_dir
    place = os.path.abspath(folder)
    while not os.path.exists(place):  # the nearest that is there; the rest is made when training begins
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"output_dir {folder}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"output_dir {folder}: {place} cannot be written to; give another folder")
    held = [name for name in RUN_FILES if os.path.exists(os.path.join(folder, name))]
    if held and not config.overwrite and config.resume != "auto":
        raise ConfigError(
            f"output_dir {folder} already holds a run ({held[0]}); --resume auto continues it, --overwrite starts again, "
            "another --output-dir leaves it alone"
        )


class Dashboard:
    """Where a run is shown besides its folder; here, nowhere. `tracking.py` has the one for ClearML.

    ask_to_stop: called with a reason when someone wants the run to end early, saved
    """

    ask_to_stop: Callable[[str], None]

    def start(self, log: "RunLog", config: Config) -> None:
        """The run begins, or goes on: `log` holds what came before."""

    def epoch(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written."""

    def best(self, epoch: int, confusion: Tensor) -> None:
        """Weights that evaluate better than all before; (K, K) counts, rows true."""

    def finish(self, summary: Mapping[str, Any], confusion: Tensor) -> None:
        """The run is at its end; what the last weights confuse."""

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, *exception: object) -> None:
        """The program leaves, for whatever reason."""


class RunLog:
    """The run's folder, written by rank 0: config.yaml, metrics.jsonl, summary.json, report.html, and what
    the report shows in `report/`. Every file is whole at any moment.

    samples: a picture of augmented images for each stage to come, uint8 (3, H, W)
    records: the lines of metrics.jsonl, of earlier parts of a resumed run too
    dashboard: is told the same
    """

    def __init__(
        self,
        config: Config,
        classes: Sequence[str],
        plan: Mapping[str, Any],
        samples: Mapping[int, Tensor],
        first_epoch: int,
        dashboard: Dashboard,
    ):
        self.folder = config.output_dir
        self.dashboard = dashboard
        self.records: list[dict[str, Any]] = []
        self.report_due = time.monotonic() + REPORT_EVERY
        os.makedirs(os.path.join(self.folder, "report"), exist_ok=True)
        if config.overwrite:
            for name in RUN_FILES:
                if os.path.exists(self.path(name)):
                    os.remove(self.path(name))
        if config.resume == "auto":
            # Epochs after the checkpoint are trained again, to the same numbers.
            self.records = [record for record in graphs.read_metrics(self.folder) if record["epoch"] < first_epoch]
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        settings = {name: value for name, value in config.as_dict().items() if name not in LAUNCH}
        if config.resume not in ("", "auto"):
            settings["resume"] = config.resume  # where the run started from is part of it
        self.write("config.yaml", yaml.safe_dump(settings, sort_keys=False))
        self.write("report/plan.json", json.dumps(dict(plan, classes=list(classes))))
        for stage, grid in samples.items():
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(self.path(f"report/stage_{stage}.png"))
        dashboard.start(self, config)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def write(self, name: str, text: str) -> None:
        with open(self.path(name) + ".tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(self.path(name) + ".tmp", self.path(name))

    def epoch(self, record: dict[str, Any]) -> None:
        """A line of metrics. A number that is not finite is a fault of the caller: JSON has none."""
        assert all(not isinstance(value, float) or math.isfinite(value) for value in record.values()), record
        self.records.append(record)
        with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.dashboard.epoch(record)
        if time.monotonic() >= self.report_due:
            self.report()

    def save_checkpoint(self, content: dict[str, Any]) -> None:
        save_checkpoint(self.path("checkpoint.pth"), content)

    def save_best(self, model: nn.Module, epoch: int, confusion: Tensor) -> None:
        """Weights alone, under torchvision's names, and what they confuse: (K, K), rows true, columns predicted."""
        write_safely(self.path("model_best.pth"), to_cpu(model.state_dict()))
        self.write("report/confusion_best.json", json.dumps({"epoch": epoch, "confusion": confusion.tolist()}))
        self.dashboard.best(epoch, confusion)

    def load_best(self) -> dict[str, Tensor]:
        return torch.load(self.path("model_best.pth"), map_location="cpu", weights_only=True)

    def finish(self, summary: Mapping[str, Any], confusion: Tensor) -> None:
        """The run's figures, and what the last weights confuse."""
        last = {"epoch": summary["epochs"] - 1, "confusion": confusion.tolist()}
        self.write("report/confusion_last.json", json.dumps(last))
        self.write("summary.json", json.dumps(summary, indent=2) + "\n")
        self.report()
        self.dashboard.finish(summary, confusion)

    def report(self) -> None:
        self.write("report.html", graphs.report_page(self.folder))
        self.report_due = time.monotonic() + REPORT_EVERY


def epoch_record(stage: Stage, state: RunState, learner: Learner, scores: Mapping[str, Score]) -> dict[str, Any]:
    """An epoch's line of metrics.jsonl. None: not evaluated, not there on this device, or listed as not finite."""
    plain, average = scores.get("model"), scores.get("ema")
    # JSON has no infinity; a training loss that is not finite ends the run
    diverged = plain is not None and not math.isfinite(plain.loss)
    return {
        "epoch": state.epoch,
        "stage": stage.index,
        "image_size": stage.image_size,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "loss": state.loss_sum / state.num_images,
        "val_loss": None if plain is None or diverged else plain.loss,
        "top1": plain and plain.top1,
        "top5": plain and plain.top5,
        "top1_ema": average and average.top1,
        "images_per_second": state.num_images / state.train_seconds,
        "epoch_seconds": state.train_seconds,
        "data_wait_fraction": state.wait_seconds / state.train_seconds,
        "gpu_memory_gib": learner.runtime.peak_memory_gib(),
        "non_finite": ["val_loss"] if diverged else [],
        **stage.settings(),
    }


def summarise(
    config: Config,
    plan: Mapping[str, Any],
    state: RunState,
    learner: Learner,
    sizes: Mapping[str, int],
    closing: Mapping[int, Mapping[str, Score]],
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """A finished run's summary.json.

    sizes: what the last evaluations were made at, by name, pixels
    closing: their scores, by size and by copy of the weights ("model", "ema", "best")
    """

    def at_sizes(copy: str) -> dict[str, dict[str, Any]]:
        rows = {}
        for name, size in sizes.items():
            score = closing[size][copy]
            rows[name] = {"image_size": size, "top1": score.top1, "top5": score.top5}
            if copy == "model" and "ema" in closing[size]:
                rows[name].update(top1_ema=closing[size]["ema"].top1, top5_ema=closing[size]["ema"].top5)
        return rows

    # The final weights come from the last stage, the best ones perhaps not.
    final = at_sizes("model")
    final["stage_size"] = final["last_training_size"]
    stages = []
    for stage in plan["stages"]:
        seconds, speed = graphs.stage_speed(records, stage["index"])
        stages.append(dict(stage, train_seconds=seconds, images_per_second=speed))
    seconds = sum(stage["train_seconds"] for stage in stages)
    images = sum(stage["train_seconds"] * stage["images_per_second"] for stage in stages)
    return {
        "model": config.model,
        "dataset": config.dataset,
        "top1": final["test_size"]["top1"],
        "top5": final["test_size"]["top5"],
        "top1_ema": final["test_size"].get("top1_ema"),
        "best_top1": state.best_top1,
        "best_epoch": state.best_epoch,
        "final": final,
        "best": {"epoch": state.best_epoch, "weights": state.best_weights, **at_sizes("best")},
        "stages": stages,
        "relative_cost": plan["relative_cost"],
        "train_seconds": seconds,
        "images_per_second": images / seconds,
        # As many images at the last stage's measured speed, over the time the run took
        "speedup_over_fixed_size": images / stages[-1]["images_per_second"] / seconds,
        "epochs": config.epochs,
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
        "memory_gib": host_memory_gib(),
        "gpu_memory_gib": max(
            (record["gpu_memory_gib"] for record in records if record["gpu_memory_gib"]), default=None
        ),
        "device": device_name(learner.runtime),
        "processes": learner.runtime.world_size,
        "seed": config.seed,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda if learner.runtime.device.type == "cuda" else None,
            "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        },
    }


def device_name(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    return runtime.device.type


def host_memory_gib() -> float | None:
    """Most memory the training process has held, GiB, workers left out; None where the system does not count it."""
    if os.path.exists("/proc/self/status"):  # Linux's getrusage begins at the peak of the program that started this one
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) / 2**20 for line in file if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def commit() -> str | None:
    """The commit of this code, `-dirty` if it was changed since; None outside a clone."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"],
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))), capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class Progress:
    """An epoch on the terminal: a bar, or, where no one watches, a line every print_freq steps; a line at its end."""

    def __init__(self, stage: Stage, epoch: int, config: Config, first_step: int, num_steps: int, show: bool):
        self.title = f"stage {stage.index}, {stage.image_size} px, epoch {epoch + 1}/{config.epochs}"
        self.print_freq, self.num_steps, self.show = config.print_freq, num_steps, show
        watched = show and sys.stderr.isatty()
        self.bar = tqdm(
            desc=self.title, initial=first_step, total=num_steps, unit="step", leave=False, disable=not watched
        )

    def step(self, step: int, losses: TrainingLoss) -> None:
        """A step is done. Only every print_freq of them is the device waited for, to read the loss."""
        self.bar.update()
        if (step + 1) % self.print_freq == 0:
            loss = losses.read()  # on every process, so that all of them notice a loss that is not finite
            if not self.bar.disable:
                self.bar.set_postfix_str(f"loss {loss:.4f}")
            elif self.show:
                print(f"{self.title} [{step + 1}/{self.num_steps}] loss {loss:.4f}", flush=True)

    def conclude(self, record: Mapping[str, Any]) -> None:
        self.bar.close()
        if self.show:
            parts = [f"{name} {record[name]:.2f}" for name in ("top1", "top1_ema") if record[name] is not None]
            speed = f"{record['images_per_second']:.0f} images/s, {record['epoch_seconds']:.1f} s"
            print(f"{self.title}: " + ", ".join([f"loss {record['loss']:.4f}", *parts, speed]), flush=True)
