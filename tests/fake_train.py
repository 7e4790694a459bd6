"""Stands in for train.py where only what a sweep does with it is tested: same flags, files and exit statuses; accuracy
follows from lr and seed. Each start that trains adds a letter to `starts` in the run's folder. As long as a file
`hold_RUN` lies beside that folder, it stays in the epoch that the file names."""

import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from settings.errors import ConfigError, tell
from settings.resolve import resolve


def main(config):
    if config.lr == 13:
        raise ConfigError("no folder of images at all")
    if config.lr == 14:
        signal.raise_signal(signal.SIGKILL)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    folder = Path(config.output_dir)
    hold = folder.parent / f"hold_{folder.name}"
    (folder / "report").mkdir(parents=True, exist_ok=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    if len(lines) < config.epochs:
        with open(folder / "starts", "a") as file:
            file.write("x")
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (folder / name).touch()
    for epoch in range(len(lines), config.epochs):
        while not asked and hold.exists() and hold.read_text() == str(epoch):
            time.sleep(0.01)
        if asked:
            return 3
        record = {"epoch": epoch, "stage": 0, "image_size": 32, "loss": 1.0, "top1": 50.0, "top1_ema": None}
        record |= {"images_per_second": 100.0, "epoch_seconds": 2.0, "cpu_seconds": 1.5}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    top1 = 1000 * config.lr + config.seed
    summary = {"relative_cost": 1.0, "top1": top1, "top1_ema": None, "best_top1": top1 + 1, "best_epoch": 0}
    summary["final"] = {"balanced_accuracy": top1 - 2, "macro_f1": top1 - 3}
    summary |= {"train_seconds": 2.0 * config.epochs, "images_per_second": 100.0, "device": "cpu", "processes": 1}
    summary |= {"commit": "0" * 40, "versions": {"python": "3", "torch": "2", "torchvision": "0", "system": "Linux"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    if config.weights:
        assert Path(config.weights).exists()
    (folder / "model_best.pth").touch()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(resolve(sys.argv[1:])))
    except ConfigError as error:
        tell(error)
        sys.exit(2)
