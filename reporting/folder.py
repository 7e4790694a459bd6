"""A run's folder: every file's name, and how it is written and read."""

import json
import os
import platform
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from learning.checkpoint import (
    NOT_THERE,
    TIMED,
    UNFINISHED,
    Checkpoint,
    Damaged,
    appearing,
    fingerprint,
    naming_fault,
    put_in_place,
    read_safely,
    write_beside,
    write_safely,
)
from settings.errors import ConfigError, RunError
from settings.resolve import FORECAST, RUN_SETTINGS
from settings.table import Config
from stages import Plan
from utils import Runtime

METRICS, SUMMARY, REPORT, CHECKPOINT, BEST = (
    "metrics.jsonl", "summary.json", "report.html", "checkpoint.pth", "model_best.pth",
)  # fmt: skip
PLAN, CLEARML, TASK = "report/plan.json", "clearml", "clearml/task.json"
ASSESSMENT = "report/best.json"  # what is drawn of the best weights
TENSORBOARD = "tensorboard"
LOCK = ".run.lock"  # held by the run that uses the folder; a decode cache in it has a lock of its own
ERROR = "error.txt"  # tracebacks
HELD_OUT = "held_out.json"  # what the best weights come to on images that chose nothing


def confusion_file(weights: str) -> str:
    return f"report/confusion_{weights}.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Text files and weights are written beside the old file and then take its place, so that they are whole at any
    moment, after a loss of power too. What cannot be written is a RunError that names the file. Metrics, summary and confusions that are not there read as an empty list or None.
    """

    path: str

    def at(self, name: str) -> str:
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        return os.path.exists(self.at(name))

    @property
    def checkpoint(self) -> str:
        return self.at(CHECKPOINT)

    def held(self) -> list[str]:
        """List the files by which a folder holds a run; `clear` removes these."""
        return [
            name
            for name in (
                RUN_SETTINGS, METRICS, SUMMARY, CHECKPOINT, "checkpoint_previous.pth", BEST, REPORT,
                confusion_file("best"), confusion_file("last"), ASSESSMENT, HELD_OUT, TASK,
            )
            if self.has(name)
        ]  # fmt: skip

    def clear(self) -> None:
        """Remove the files of an older run, no others."""
        unfinished = [name + UNFINISHED for name in (CHECKPOINT, BEST, TIMED)]
        there = os.listdir(self.path) if os.path.isdir(self.path) else []
        errors = [name for name in there if re.fullmatch(r"error(_\d+)?\.txt", name)]
        for name in [*self.held(), *filter(self.has, [*unfinished, FORECAST]), *errors, *self.events()]:
            with naming_fault(self.at(name)):
                os.remove(self.at(name))

    def events(self) -> list[str]:
        """List the files of TensorBoard's events, in the order of their making."""
        folder = self.at(TENSORBOARD)
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        return [f"{TENSORBOARD}/{name}" for name in names if ".tfevents." in name]

    @contextmanager
    def used_alone(self, runtime: Runtime) -> Iterator[None]:
        """Let no other run use the folder within the block; the processes of one run share it.

        The system lets go of the lock of a process that is gone. The folder is made, and unmade where nothing came of it.

        Raises:
            ConfigError: another run uses it, or it cannot be made.
        """
        from filelock import FileLock, Timeout  # brings asyncio: a plan or a mistake need not wait for it

        lock = FileLock(self.at(LOCK), timeout=0)
        trouble = ""
        if runtime.is_main:
            locking = False
            try:
                os.makedirs(self.path, exist_ok=True)
                locking = True
                lock.acquire()
                locking = False
                with open(self.at(LOCK), "w", encoding="utf-8") as file:
                    file.write(f"process {os.getpid()} on {platform.node()}")
            except Timeout:
                with suppress(OSError), open(self.at(LOCK), encoding="utf-8") as file:
                    trouble = file.read()
                trouble = (
                    f"another run uses it ({trouble or 'which has just begun'}); wait for its end, or give another"
                )
            except NotImplementedError:
                pass  # a disk that knows no locks
            except OSError as error:
                if not (locking and error.errno in NOT_THERE):  # some such disks say it so
                    trouble = f"{error.strerror}; give another folder"
        if runtime.any(bool(trouble)):
            raise ConfigError(f"output_dir {self.path}: {trouble or 'process 0 says why it cannot be used'}")
        try:
            yield
        finally:
            if lock.is_locked:
                with suppress(OSError):
                    if os.listdir(self.path) == [LOCK]:
                        os.remove(self.at(LOCK))
                        os.rmdir(self.path)
                lock.release()

    def note_error(self, rank: int = 0) -> str:
        """Add the traceback of the error that is being handled to a file; return its path, "" if that cannot be."""
        path = self.at(ERROR if rank == 0 else f"error_{rank}.txt")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(traceback.format_exc() + "\n")
        except OSError:
            return ""
        return path

    def write(self, name: str, text: str) -> None:
        """Write a text file by way of a temporary one; make its folder if need be."""
        path = self.at(name)
        with naming_fault(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with appearing(path, "w", encoding="utf-8") as file:
                file.write(text)

    def read_json(self, name: str) -> Any:
        """Read a JSON file; None if it is not there."""
        try:
            with open(self.at(name), encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    # ---- settings, plan, pictures ----

    def settings(self) -> dict[str, Any]:
        with open(self.at(RUN_SETTINGS), encoding="utf-8") as file:
            return yaml.safe_load(file)

    def write_settings(self, values: Mapping[str, Any]) -> None:
        self.write(RUN_SETTINGS, yaml.safe_dump(dict(values), sort_keys=False))

    def plan(self) -> Plan:
        return Plan.from_dict(self.read_json(PLAN))

    def classes(self) -> list[str]:
        return self.read_json(PLAN)["classes"]

    def write_plan(self, plan: Plan, classes: Sequence[str]) -> None:
        self.write(PLAN, json.dumps(plan.as_dict() | {"classes": list(classes)}))

    def picture(self, stage: int) -> str:
        """Build the path of the picture that shows a stage's augmented images."""
        return self.at(f"report/stage_{stage}.png")

    def write_picture(self, stage: int, grid: Tensor) -> None:
        """Write the picture of a stage's augmented images, uint8 (3, H, W)."""
        self.save_picture(self.picture(stage), Image.fromarray(grid.permute(1, 2, 0).numpy()))

    def mistake(self, place: int) -> str:
        """Build the path of the picture of the mistake in this place of their list."""
        return self.at(f"report/mistake_{place}.jpg")

    def write_mistake(self, place: int, picture: Image.Image) -> None:
        """Write the picture of a mistake."""
        self.save_picture(self.mistake(place), picture)

    def save_picture(self, path: str, picture: Image.Image) -> None:
        """Write a picture; make its folder if need be."""
        with naming_fault(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            picture.save(path, quality=85)

    # ---- figures ----

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, a line for each epoch; leave out what is none, such as one that a crash cut short."""
        records = []
        if self.has(METRICS):
            with open(self.at(METRICS), "rb") as file:
                for line in file:
                    with suppress(ValueError):
                        record = json.loads(line)
                        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
                            records.append(record)
        return records

    def write_metrics(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl anew."""
        self.write(METRICS, "".join(json.dumps(record) + "\n" for record in records))

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the line of an epoch to metrics.jsonl."""
        with naming_fault(self.at(METRICS)), open(self.at(METRICS), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def summary(self) -> dict[str, Any] | None:
        return self.read_json(SUMMARY)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write(SUMMARY, json.dumps(summary, indent=2) + "\n")

    def confusion(self, weights: str) -> tuple[int, NDArray[np.int64]] | None:
        """Read the confusion matrix of the "best" or the "last" weights, and the epoch they are from.

        Returns: epoch, counts (K, K), rows true; None if there are none.
        """
        content = self.read_json(confusion_file(weights))
        return content and (content["epoch"], np.array(content["confusion"]))

    def write_confusion(self, weights: str, epoch: int, counts: Tensor) -> None:
        self.write(confusion_file(weights), json.dumps({"epoch": epoch, "confusion": counts.tolist()}))

    def assessment(self) -> dict[str, Any]:
        """Read what is drawn of the best weights; nothing of a run that has not finished, or is older than that."""
        return self.read_json(ASSESSMENT) or {}

    def write_assessment(self, shown: Mapping[str, Any]) -> None:
        self.write(ASSESSMENT, json.dumps(shown))

    # ---- weights ----

    def best_weights(self) -> dict[str, Tensor]:
        """Read the best weights.

        Raises:
            RunError: they are not there any more, or damaged.
        """
        try:
            return read_safely(self.at(BEST))
        except (OSError, Damaged) as error:
            raise RunError(f"{self.at(BEST)} is gone or damaged ({error}); --resume auto goes on without it") from error

    def write_best_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights alone, under torchvision's names."""
        write_safely(self.at(BEST), dict(weights))

    def save(self, checkpoint: Checkpoint, best: tuple[Mapping[str, Tensor], Tensor] | None, keep: bool) -> str | None:
        """Write a checkpoint, and the best weights and their confusions (K, K) if it tells of new ones.

        The checkpoint names them by their fingerprint, and they take their place after it: whenever this is cut off,
        the weights that it names are there, in their place or beside it.

        Returns: their fingerprint.
        """
        if best is not None:
            write_beside(self.at(BEST), dict(best[0]))
            checkpoint.best = fingerprint(self.at(BEST) + UNFINISHED)
        checkpoint.save(self.checkpoint, keep)
        if best is not None:
            put_in_place(self.at(BEST))
            self.write_confusion("best", checkpoint.state.best_epoch, best[1])
        return checkpoint.best

    def mend_best(self, checkpoint: Checkpoint, num_epochs: int, runtime: Runtime) -> None:
        """Make the best weights in the folder those that `checkpoint` tells of, or have it tell of none; say so.

        num_epochs: that the run trains
        """
        if runtime.is_main and checkpoint.state.best_epoch >= 0 and not self.has_best(checkpoint.best):
            state, last = checkpoint.state, checkpoint.state.epoch - 1
            what = f"{self.at(BEST)} is missing, damaged or of another epoch"
            if state.step == 0 and last in (state.best_epoch, num_epochs - 1):
                if state.best_epoch != last:  # nothing is left to train, so that the last weights have to do
                    state.best_epoch, state.best_weights = last, "model"
                average = checkpoint.model_ema if state.best_weights == "ema" else None
                self.write_best_weights(average or checkpoint.model)
                checkpoint.best = fingerprint(self.at(BEST))
                runtime.say(f"{what}; built anew from the weights of epoch {last + 1}")
            else:
                state.best_top1, state.best_epoch, state.best_weights, checkpoint.best = -1.0, -1, "model", None
                runtime.say(f"{what}; the best is looked for anew from epoch {state.epoch + 1} on")
        checkpoint.state = runtime.from_main(checkpoint.state)

    def has_best(self, wanted: str | None) -> bool:
        """Check whether the best weights are whole and those wanted; put them in place if they lie beside it.

        wanted: their fingerprint; None: any
        """
        path = self.at(BEST)
        for at in (path, path + UNFINISHED):
            with suppress(OSError, Damaged):
                read_safely(at)
                if (wanted is None and at == path) or (wanted is not None and fingerprint(at) == wanted):
                    if at != path:
                        put_in_place(path)
                    return True
        return False


def check_folder(config: Config) -> RunFolder:
    """Check that the run may use its output_dir, and return it.

    Raises:
        ConfigError: it holds a run that the settings would neither continue nor replace, or cannot be written to.
    """
    folder = RunFolder(config.output_dir)
    if config.test_only:  # which writes nothing
        return folder
    place = os.path.abspath(folder.path)
    while not os.path.exists(place):  # the nearest that is there; the rest is made when training begins
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"output_dir {folder.path}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"output_dir {folder.path}: {place} cannot be written to; give another folder")
    held = folder.held()
    if held and not config.overwrite and config.resume != "auto":
        raise ConfigError(
            f"output_dir {folder.path} already holds a run ({held[0]}); --resume auto continues it, --overwrite starts "
            "again, another --output-dir leaves it alone"
        )
    return folder
