"""Runs on the pretended device, for test_cuda_without_gpu.py; prints what they came to as JSON.

python tests/pretended_runs.py FOLDER
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import tiny  # noqa: F401, makes its model known
import torch
from pictures import keys, photo
from PIL import Image
from pretended_cuda import CUDA
from pretended_driver import install
from pretended_streams import Race, notes
from programs import not_drawn
from runs import make_tree, metrics, start

import reporting.figures
from augment.at_once import augment_at_once
from augment.batch import draw_groups, to_device
from augment.draws import uniforms
from augment.pixels import IMAGENET_STD
from images.datasets import load_data
from images.evaluation import EvalOnDevice
from images.loaders import TrainLoader
from images.sources import augment_whole
from images.store_place import with_store
from inference.inputs import names_of
from inference.predictions import predict
from inference.trained import open_run
from presets import BatchPreset
from settings.resolve import resolve
from utils import Runtime

COMMON = (
    "--device cuda --epochs 2 --stages 2 --train-crop-size 32 40 --batch-size 4 --auto-augment ra --ra-magnitude 5 9 "
    "--random-erase 0.3 --dropout 0.1 0.3 --model-ema"
).split()
FORMS = {
    "store": "--amp --channels-last --mixup-alpha 0 0.2 --cutmix-alpha 0 1 --class-weights auto --workers 0 --decode-cache CACHE",
    "float16": "--amp --amp-dtype float16 --opt adamw --clip-grad-norm 1 --workers 0 --decode-cache CACHE --cuda-graphs off",
    "crops": "--opt rmsprop --workers 1 --decode-cache off",
    "decoded": "--decode-on device --workers 1 --decode-cache off",
    "tuned": "--amp --stage-rule compute --lr-clock compute --augment-size 48 --finetune-epochs 1 --val-crop-size 48 --val-resize-size 56 --workers 0 --decode-cache CACHE",
    "workers": "--augment-on worker --opt adamw --workers 1 --decode-cache off --class-weights 3 1",
}


def counts():
    return {
        "kernels": notes.kernels.total(),
        "copies": [f"{what}, {where}" for (what, where), number in notes.copies.items() for _ in range(number)],
        "waits": [f"{what}, {where}" for (what, where), number in notes.waits.items() for _ in range(number)],
    }


def counted(do):
    """What a call asks of the device, after one that has made what is made once."""
    do()
    notes.clear()
    result = do()
    return counts() | {"result": result}


def crop_and_finish(flat, place, draws, runtime):
    preset, (starts, heights, widths, targets) = BatchPreset(image_size=40), place
    boxes = preset.boxes(draws, heights, widths)
    return counted(lambda: augment_whole(flat, starts, widths, boxes, targets, preset, draws, runtime))


def evaluated(tree, folder):
    """A batch of validation images sent out of the store and resized, beside the CPU's."""
    config = resolve(["--data-path", str(tree), "--decode-cache", str(folder / "store"), "--train-crop-size", "40"])
    how = dict(crop_size=32, resize_size=36, batch_size=10)
    on_cpu, there = Runtime(device=torch.device("cpu")), Runtime(device=CUDA)
    images = with_store(config, load_data(config, on_cpu), on_cpu).val
    ((expected, classes),) = EvalOnDevice(images, on_cpu, **how)
    found = counted(lambda: next(iter(EvalOnDevice(images, there, **how))))
    ours, targets = found.pop("result")
    return found | {
        "grey levels off": grey_levels(ours.cpu() - expected),
        "same classes": torch.equal(targets.cpu(), classes),
    }


def grey_levels(difference):
    return float((difference * torch.tensor(IMAGENET_STD).view(3, 1, 1)).abs().max() * 255)


def parts():
    """Augmentation of a batch: its cost, and its numbers beside the CPU's."""
    preset = BatchPreset(image_size=40, ra_magnitude=9.0, random_erase=0.25)
    images = torch.stack([photo(40, 40, seed).permute(2, 0, 1) for seed in range(32)])
    draws = uniforms(0, keys(32))
    groups = torch.from_numpy(draw_groups(draws[:, :2], draws[:, 2:4]))
    there = images.to(CUDA)
    finished = counted(lambda: preset.finish(there, to_device(preset.choose(draws), CUDA)))
    at_once = augment_at_once(there, groups.to(CUDA), 9.0).cpu()
    finished |= {"same": torch.equal(at_once, augment_at_once(images, groups, 9.0))}

    flat = torch.cat([photo(50, 70, seed).view(-1, 3) for seed in range(32)])
    place = (np.arange(32) * 50 * 70, np.full(32, 50), np.full(32, 70), np.arange(32))
    runtimes = [Runtime(device=torch.device(device), memory_format=torch.channels_last) for device in ("cpu", "cuda:0")]
    here, ours = (crop_and_finish(flat.to(runtime.device), place, draws, runtime) for runtime in runtimes)
    (expected, classes), (images, targets) = here.pop("result"), ours.pop("result")
    ours["grey levels off"] = grey_levels(images.cpu() - expected)
    ours |= {"same classes": torch.equal(targets.cpu(), classes), "channels last": images.inner.stride()[1] == 1}
    finished.pop("result")
    return {"finish": finished, "crop and finish": ours}


def judged():
    """What the device is to notice: for each, whether it did."""
    there = torch.ones(3, device=CUDA)
    side = torch.cuda.Stream()

    def mixed():
        there + torch.ones(3)

    def race():
        with torch.cuda.stream(side):
            there.add_(1)

    def captured_wait():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            float(there.sum())

    found = {}
    for do, error in ((mixed, "same device"), (race, "not waited for"), (captured_wait, "not permitted")):
        try:
            do()
        except (RuntimeError, Race) as raised:
            found[do.__name__] = error in str(raised)
    side.wait_stream(torch.cuda.current_stream())
    race()  # none any more
    torch.cuda.current_stream().wait_stream(side)
    there.fill_(2)
    early = there.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    arrived = early.tolist() == [2, 2, 2]
    event.synchronize()
    found["early"] = not arrived and early.tolist() == [2, 2, 2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        double = there * 2
    there.fill_(5)
    graph.replay()
    notes.clear()
    found["replay"] = double.tolist() == [10, 10, 10] and len(counts()["waits"]) == 1
    return found


def whole(folder, tree, flags):
    """A run of the program: its status, its losses, and what each step of its last epoch asked of the device."""
    steps, prepare = [], TrainLoader.prepare

    def noting(loader, loaded, epoch, step):
        if epoch == 1 and step > 1:  # from one preparation to the next, the first steps of an epoch left out
            steps.append(counts())
        notes.clear()
        return prepare(loader, loaded, epoch, step)

    TrainLoader.prepare = noting
    began = time.perf_counter()
    try:
        status = start(tree, folder, *flags)
    finally:
        TrainLoader.prepare = prepare
    losses = [line["loss"] for line in metrics(folder)]
    return {"status": status, "losses": losses, "steps": steps, "seconds": time.perf_counter() - began}


def predicted(run, images, device):
    """What a run's model says of images, and what that asked of the device."""
    names = names_of([str(images)])
    predicting = predict(open_run(str(run), device=device), names, top=2, batch_size=3, workers=0)
    notes.clear()
    return {"said": [(row.path, row.classes, row.probabilities) for rows in predicting for row in rows]} | counts()


def main(folder):
    torch.set_num_threads(1)
    reporting.figures.as_svg = not_drawn
    tree = make_tree(folder / "images")
    for file in tree.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".jpg"), quality=95)
        file.unlink()
    flags = {name: [*COMMON, *form.replace("CACHE", str(folder / "store")).split()] for name, form in FORMS.items()}
    on_cpu = [*flags["workers"], "--device", "cpu"]
    found = {"cpu": whole(folder / "cpu", tree, on_cpu)}
    with install():
        found |= {"judged": judged(), "evaluation": evaluated(tree, folder)} | parts()
        for name in FORMS:
            found[name] = whole(folder / name, tree, flags[name])
        found["tuned without graphs"] = whole(folder / "off", tree, [*flags["tuned"], "--cuda-graphs", "off"])
        found["predicted"] = predicted(folder / "workers", tree / "val", "cuda")
        resume = ["--resume", folder / "cpu" / "checkpoint_previous.pth"]
        found["cpu to cuda"] = whole(folder / "there", tree, [*flags["workers"], *resume])
    found["predicted on the cpu"] = predicted(folder / "workers", tree / "val", "cpu")
    resume = ["--resume", folder / "workers" / "checkpoint_previous.pth"]
    found["cuda to cpu"] = whole(folder / "back", tree, [*on_cpu, *resume])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
