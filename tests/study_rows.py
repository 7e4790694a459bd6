"""Rows of studies that were never run, in the form of studies/rows.py: to draw figures and tables from."""

import random

from studies.rows import write_rows

MACHINE = {
    "device": "cpu", "processes": 1, "threads": 1, "at_once": 2, "python": "3.11.2", "torch": "2.14.1",
    "torchvision": "0.29.1", "system": "Linux x86_64, 2 cores", "commit": "0" * 40, "date": "2026-11-26",
}  # fmt: skip
REPRODUCE = {"progressive": 71.0, "released rule": 70.8, "size only": 70.0, "fixed": 72.0, "fixed, same time": 66.0}
DROPOUT = {
    "0.1 → 0.3": ("[0.1, 0.3]", 70.0), "0.1 → 0.7": ("[0.1, 0.7]", 68.0), "0.2 → 0.7": ("[0.2, 0.7]", 67.0), "none": ("0", 70.5),
}  # fmt: skip


def row(condition, seed, top1, cpu_seconds=600.0, epochs=12, varying=None, **more):
    return {
        "condition": condition, "seed": seed, **(varying or {}), "epochs": epochs, "relative_cost": 0.6, "images": 36000,
        "top1": top1, "top1_ema": top1 + 2, "best_top1": top1 + 0.25, "best_epoch": epochs - 1, **more,
        "train_seconds": cpu_seconds * 1.1, "cpu_seconds": cpu_seconds, "images_per_second": 60.0, **MACHINE,
        "settings": "0123456789ab",
    }  # fmt: skip


def epoch_rows(condition, seed, sizes, per_stage=3, top1=70.0):
    """An epoch's row each; accuracy at the end of each stage."""
    rows, spent = [], 0.0
    for epoch in range(len(sizes) * per_stage):
        stage = epoch // per_stage
        seconds = 60.0 * (sizes[stage] / 128) ** 2
        spent += seconds
        evaluated = epoch % per_stage == per_stage - 1
        rows.append({
            "condition": condition, "seed": seed, "epoch": epoch, "stage": stage, "image_size": sizes[stage],
            "loss": 2.0, "top1": top1 * (epoch + 1) / (len(sizes) * per_stage) if evaluated else "",
            "top1_ema": 5 + top1 * (epoch + 1) / (len(sizes) * per_stage) if evaluated else "",
            "images_per_second": 3000 / seconds, "epoch_seconds": seconds, "cpu_seconds": seconds, "train_seconds": spent,
        })  # fmt: skip
    return rows


def write_reproduce(folder, name="reproduce_small", seeds=5):
    noise = random.Random(0)
    runs, epochs = [], []
    for condition, middle in REPRODUCE.items():
        for seed in range(seeds):
            top1 = middle + noise.uniform(-1, 1)
            staged = not condition.startswith("fixed")
            seconds = (540.0 if staged or "time" in condition else 900.0) + noise.uniform(-20, 20)
            runs.append(row(condition, seed, top1, seconds, 7 if "time" in condition else 12))
            epochs += epoch_rows(condition, seed, [64, 80, 96, 128] if staged else [128, 128, 128, 128], top1=top1)
    write_rows(f"{folder}/{name}.csv", runs)
    write_rows(f"{folder}/{name}_epochs.csv", epochs)


def write_dropout(folder, name="dropout_small", seeds=3):
    noise = random.Random(1)
    write_rows(f"{folder}/{name}.csv", [
        row(condition, seed, middle + noise.uniform(-1, 1), varying={"dropout": dropout})
        for condition, (dropout, middle) in DROPOUT.items() for seed in range(seeds)
    ])  # fmt: skip


def write_image_size(folder, name="image_size_small", seeds=3):
    noise = random.Random(2)
    pairs = [(32, 64), (32, 48), (48, 64), (32, 96), (64, 64)]
    write_rows(f"{folder}/{name}.csv", [
        row(f"{first} → {last}", seed, 60 + last / 10 + noise.uniform(-1, 1), 3.0 * (first + last),
            varying={"train_crop_size": f"[{first}, {last}]" if first != last else f"{last}"})
        for first, last in pairs for seed in range(seeds)
    ])  # fmt: skip


def write_epochs(folder, name="epochs_small", seeds=3):
    noise = random.Random(3)
    write_rows(f"{folder}/{name}.csv", [
        row(f"{count} per stage", seed, 60 + 2 * count + noise.uniform(-1, 1), 100.0 * count, 4 * count)
        for count in (2, 3, 4, 6) for seed in range(seeds)
    ])  # fmt: skip


def write_magnitude(folder, name="ra_magnitude_small", seeds=3):
    noise = random.Random(4)
    write_rows(f"{folder}/{name}.csv", [
        row(f"{size} px, {scale} {magnitude}", seed, 55 + size / 10 - abs(magnitude - size / 10) + noise.uniform(-1, 1),
            varying={"train_crop_size": str(size), "ra_magnitude": str(magnitude), "ra_scale": scale})
        for size in (64, 128) for scale in ("paper", "torchvision") for magnitude in (0, 5, 10, 15) for seed in range(seeds)
    ])  # fmt: skip


def write_transfer(folder, name="transfer_small", seeds=3):
    noise = random.Random(5)
    kinds = {"pneumonia": 80.0, "ants and bees": 60.0, "monkeys": 50.0}
    runs = []
    for data, middle in kinds.items():
        for start, gain in (("scratch", 0), ("Imagenette", 12)):
            for seed in range(seeds):
                top1 = middle + gain + noise.uniform(-2, 2)
                held = {"held_out_top1": "", "auc": "", "sensitivity": "", "specificity": "", "held_out_images": ""}
                if data == "pneumonia":
                    held = {
                        "held_out_top1": top1 - 8,
                        "auc": 0.93,
                        "sensitivity": 96.2,
                        "specificity": 61.5,
                        "held_out_images": 624,
                    }
                weights = "" if start == "scratch" else "of Imagenette"
                runs.append(row(f"{data}, from {start}", seed, top1, varying={"weights": weights}, **held))
    write_rows(f"{folder}/{name}.csv", runs)


def write_all(folder):
    for write in (write_reproduce, write_dropout, write_image_size, write_epochs, write_magnitude, write_transfer):
        write(folder)
    for name in ("schedules_small", "strengths_small"):
        write_reproduce(folder, name)
