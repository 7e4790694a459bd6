"""Data sets by name, and the loaders: the order of samples and every augmentation follow from
(seed, epoch, index), so any worker may load any sample and a run may resume at any step."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import Imagenette
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import Compose
from torchvision.utils import make_grid

from config import Config, ConfigError
from presets import batch_mix, denormalise, eval_preset, train_preset
from utils import MIX, ORDER, SAMPLE, Runtime, drawing_from, key_to_seed

# ---- data sets ----


class Images(Protocol):
    """Item i is an RGB PIL image and its class number."""

    classes: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Data:
    """Training and validation images, which share `classes`: the names, in the order of their numbers."""

    train: Images
    val: Images

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    def __str__(self) -> str:
        return f"{len(self.train)} training and {len(self.val)} validation images of {len(self.classes)} classes"


class ImageTree:
    """The images of a folder that holds one folder per class, at any depth below it.

    Raises:
        ConfigError: no such folder, no class folders, a class folder without images.
    """

    def __init__(self, root: str, keep_list: bool = False):
        if not os.path.isdir(root):
            raise ConfigError(
                f"no folder {root}; data_path and the names of its splits must lead to one folder per class"
            )
        try:
            folders, numbers = find_classes(root)
            listed = read_list(root, folders) if keep_list else None
            self.samples = listed or make_dataset(root, numbers, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:  # torchvision's message names the empty classes
            raise ConfigError(f"{root}: {str(error).splitlines()[0]}") from error
        if keep_list and listed is None:
            write_list(root, folders, self.samples)
        self.classes = [WORDNET_NAMES.get(folder, folder) for folder in folders]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        try:
            with Image.open(path) as image:
                return to_rgb(image), target
        except Exception as error:  # what PIL raises on a damaged file varies with the damage
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{path} cannot be read as an image: {reason}; mend or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and RGBA images as RGB; of 16 bits of grey the upper 8, where PIL would clip to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def list_path(root: str) -> str:
    name = hashlib.sha1(os.path.abspath(root).encode()).hexdigest()[:16]
    return os.path.join(torch.hub.get_dir(), "imagefolder", f"{name}.json")


def read_list(root: str, classes: Sequence[str]) -> list[tuple[str, int]] | None:
    """The list kept for `root`, or None if there is none that fits its folders as they are now."""
    try:
        with open(list_path(root), encoding="utf-8") as file:
            kept = json.load(file)
        unchanged = all(os.stat(os.path.join(root, folder)).st_mtime_ns == time for folder, time in kept["folders"])
        if unchanged and kept["classes"] == list(classes):
            return [(os.path.join(root, path), target) for path, target in kept["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or damaged: listed anew
    return None


def write_list(root: str, classes: Sequence[str], samples: Sequence[tuple[str, int]]) -> None:
    """Keep the list, with the time of every folder below `root`: a new file changes its folder's."""
    folders = [folder for folder, _, _ in os.walk(root)]
    times = [(os.path.relpath(folder, root), os.stat(folder).st_mtime_ns) for folder in folders]
    relative = [(os.path.relpath(file, root), target) for file, target in samples]
    path = list_path(root)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
            json.dump({"classes": list(classes), "folders": times, "samples": relative}, file)
        os.replace(f"{path}.{os.getpid()}", path)
    except OSError as error:
        raise ConfigError(f"cache_dataset: cannot write {path}: {error.strerror}; leave it out") from error


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels: real, and there without a download.

    Source: E. Alpaydin, C. Kaynak, UCI ML hand-written digits (test part), by way of sklearn.datasets.
    """

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits  # takes a second; other data sets need not wait
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        halves = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
        pixels, targets = (halves[0], halves[2]) if train else (halves[1], halves[3])
        # 0..16 to 0..240. Not to 255: torchvision's Solarize turns that black even at strength 0.
        self.images = [Image.fromarray((image * 15).astype("uint8")).convert("RGB") for image in pixels]
        self.targets = [int(target) for target in targets]
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]


# The folders of Imagenette and Imagewoof are WordNet numbers.
WORDNET_NAMES = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle", "n02089973": "English foxhound",
    "n02093754": "Border terrier", "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # fmt: skip


def fastai_tree(config: Config, runtime: Runtime) -> str:
    """The folder of Imagenette or Imagewoof below data_path, fetched first if that is asked for."""
    name, _, size = config.dataset.partition("-")
    folder = f"{name}2" + (f"-{size.removesuffix('px')}" if size else "")
    tree = os.path.join(config.data_path, folder)
    if config.download and runtime.local_rank == 0 and not os.path.isdir(tree):
        try:
            if name == "imagenette":
                Imagenette(config.data_path, split="train", size=size or "full", download=True)
            else:  # torchvision has no Imagewoof; it lies beside Imagenette
                url = f"https://s3.amazonaws.com/fast-ai-imageclas/{folder}.tgz"
                download_and_extract_archive(url, config.data_path)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"download: {config.dataset} cannot be fetched into {config.data_path}: {reason}"
            ) from error
    runtime.barrier()
    if not os.path.isdir(tree):
        raise ConfigError(
            f"data_path {config.data_path} holds no {folder}; --download fetches it, or give the folder that holds it"
        )
    return tree


def load_data(config: Config, runtime: Runtime) -> Data:
    """The data set of the run.

    Raises:
        ConfigError: not there, empty, or the two splits have different classes.
    """
    if config.dataset == "digits":
        return Data(train=Digits(train=True), val=Digits(train=False))
    if config.dataset == "imagefolder":
        train_root, val_root = (
            os.path.join(config.data_path, split) for split in (config.train_split, config.val_split)
        )
    else:
        tree = fastai_tree(config, runtime)
        train_root, val_root = os.path.join(tree, "train"), os.path.join(tree, "val")
    data = Data(train=ImageTree(train_root, config.cache_dataset), val=ImageTree(val_root, config.cache_dataset))
    if len(data.val) < runtime.world_size:
        raise ConfigError(f"{val_root} has {len(data.val)} images, too few for {runtime.world_size} processes")
    if data.train.classes != data.val.classes:
        odd = sorted(set(data.train.classes) ^ set(data.val.classes))
        raise ConfigError(
            f"{train_root} and {val_root} must hold the same class folders; only one has {', '.join(odd[:5])}"
        )
    return data


# ---- order ----

Draw = tuple[int, int, int]  # epoch, index of the image, repeat: the key of one augmented sample


class DrawSampler(Sampler[list[Draw]]):
    """The batches of one process: a permutation per epoch, cut into steps, each step dealt out to processes.

    Counter-based: step s of an epoch is known without the steps before it, at any number of workers.
    Each epoch has every image once. The last step has what is left, as many for each process, at least two
    (batch norm needs them); fewer than that are left out of this epoch.

    repeats: each image so many times in a row, dealt to different processes first; the epoch stays as long
        and so has fewer images (repeated augmentation, arXiv:1901.09335)
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, repeats: int = 1
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.epoch = 0
        self.first_step = 0
        rest = num_images % (batch_size * world_size) // world_size  # images per process in a last, shorter step
        self.last_batch = rest if rest >= 2 or batch_size == 1 else 0
        self.num_steps = num_images // (batch_size * world_size) + (self.last_batch > 0)
        if self.num_steps == 0:
            raise ConfigError(
                f"{num_images} training image(s) are too few for {world_size} process(es); each needs at least 2"
            )

    def start(self, epoch: int, first_step: int = 0) -> None:
        """What the next iteration yields: the steps of `epoch` from `first_step`."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        # Not seed + epoch: torch's CPU generator takes 32 bits, and neighbouring runs would share orders.
        generator = torch.Generator().manual_seed(key_to_seed(self.seed, self.epoch, ORDER))
        order = torch.randperm(self.num_images, generator=generator)
        per_step = self.batch_size * self.world_size
        for step in range(self.first_step, self.num_steps):
            start = step * per_step
            count = min(per_step, (self.num_images - start) // self.world_size * self.world_size)
            places = range(start + self.rank, start + count, self.world_size)
            yield [(self.epoch, int(order[place // self.repeats]), place % self.repeats) for place in places]


# ---- loaders ----


class DrawnImages(Dataset):
    """Images under a random transform whose draws follow from the key of the sample."""

    def __init__(self, images: Images, transform: Compose, seed: int):
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        image, target = self.images[draw[1]]
        with drawing_from(self.seed, *draw, SAMPLE):
            return self.transform(image), target


class EvalImages(Dataset):
    """Every world_size-th image under a fixed transform, from number `rank` on: no image twice."""

    def __init__(self, images: Images, transform: Compose, rank: int, world_size: int):
        self.images = images
        self.transform = transform
        self.indices = range(rank, len(images), world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.images[self.indices[index]]
        return self.transform(image), target


def ignore_signals(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole group of processes; the training process decides,
    # and still needs its workers for the step it is in.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(dataset: Dataset, runtime: Runtime, workers: int, **kwargs: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,  # started once per stage; the sampler's keys say all that changes
        pin_memory=runtime.device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own, or every epoch would draw from the global one
        **kwargs,
    )


def close_loader(loader: DataLoader) -> None:
    """End the worker processes now. Left to garbage collection they linger into the next stage
    (pytorch/pytorch#22133); torch has no public call for it."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    loader._iterator = None


@contextmanager
def closing_loader(loader: DataLoader) -> Iterator[DataLoader]:
    """Within, use `loader`; afterwards its workers are gone, also if something was raised."""
    try:
        yield loader
    finally:
        close_loader(loader)


class TrainLoader:
    """The training batches of a stage, on the device: images (N, 3, S, S) float32, normalised, and class
    numbers (N,), or soft targets (N, K) if the stage mixes.

    wait_seconds: time the last epoch's loop has spent waiting for images
    """

    def __init__(
        self,
        images: Images,
        transform: Compose,
        sampler: DrawSampler,
        runtime: Runtime,
        *,
        workers: int = 0,
        mix: nn.Module | None = None,
    ):
        self.sampler = sampler
        self.mix = mix
        self.runtime = runtime
        self.loader = make_loader(DrawnImages(images, transform, sampler.seed), runtime, workers, batch_sampler=sampler)
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.sampler.num_steps

    @property
    def images_per_step(self) -> int:
        """Over all processes, in all steps but the last."""
        return self.sampler.batch_size * self.sampler.world_size

    @property
    def batch_sizes(self) -> set[int]:
        """Of this process: of most steps, and of the last."""
        sampler = self.sampler
        full = {sampler.batch_size} if sampler.num_images >= self.images_per_step else set()
        return full | ({sampler.last_batch} if sampler.last_batch else set())

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Step number, images and targets of each step of `epoch` from `first_step` on."""
        self.sampler.start(epoch, first_step)
        self.wait_seconds = 0.0
        asked = time.perf_counter()
        for step, (images, targets) in enumerate(self.loader, first_step):
            self.wait_seconds += time.perf_counter() - asked
            images = images.to(self.runtime.device, non_blocking=True, memory_format=self.runtime.memory_format)
            targets = targets.to(self.runtime.device, non_blocking=True)
            if self.mix is not None:
                with drawing_from(self.sampler.seed, epoch, step, self.runtime.rank, MIX):
                    images, targets = self.mix(images, targets)
            yield step, images, targets
            asked = time.perf_counter()

    def close(self) -> None:
        close_loader(self.loader)


def train_loader(config: Config, data: Data, runtime: Runtime, stage: Any) -> TrainLoader:
    """The loader of a stage (a `stages.Stage`)."""
    transform = train_preset(
        image_size=stage.image_size,
        auto_augment=config.auto_augment,
        ra_magnitude=stage.ra_magnitude,
        ra_scale=config.ra_scale,
        augmix_severity=config.augmix_severity,
        random_erase=stage.random_erase,
        crop_scale=config.train_crop_scale,
        hflip_prob=config.hflip_prob,
        interpolation=config.interpolation,
        backend=config.backend,
        use_v2=config.use_v2,
    )
    repeats = config.ra_reps if config.ra_sampler else 1
    sampler = DrawSampler(len(data.train), stage.batch_size, config.seed, runtime.rank, runtime.world_size, repeats)
    mix = batch_mix(stage.mixup_alpha, stage.cutmix_alpha, len(data.classes))
    return TrainLoader(data.train, transform, sampler, runtime, workers=config.workers, mix=mix)


def eval_loader(config: Config, data: Data, runtime: Runtime, crop_size: int) -> DataLoader:
    """This process's share of the validation images at `crop_size`, resized in proportion."""
    transform = eval_preset(
        crop_size=crop_size,
        resize_size=round(crop_size * config.val_resize_size / config.val_crop_size),
        interpolation=config.interpolation,
        backend=config.backend,
        use_v2=config.use_v2,
    )
    images = EvalImages(data.val, transform, runtime.rank, runtime.world_size)
    return make_loader(images, runtime, config.workers, batch_size=int(max(config.batch_size)))


def sample_grid(loader: TrainLoader, epoch: int, num_images: int = 16) -> Tensor:
    """Augmented training images of a loader as a picture, uint8 (3, H, W); the same ones for every stage,
    each under the draws it has in `epoch`."""
    dataset = loader.loader.dataset
    step = max(1, len(dataset) // num_images)  # over all classes, where images are sorted by class
    images = [dataset[(epoch, index, 0)][0] for index in range(0, step * num_images, step) if index < len(dataset)]
    return make_grid(denormalise(torch.stack(images)), nrow=8)
