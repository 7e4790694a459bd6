"""Loaders of training and validation images.

The order of samples and every augmentation follow from (seed, epoch, index), so any worker may load any sample and a
run may resume at any step. The workers of a stage start while those of the one before finish, so that a new stage is
not waited for.
"""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from augment.pixels import denormalise
from images.datasets import Data
from images.decode import check_decoder
from images.evaluation import LARGE_EVALUATION, EvalImages, EvalOnDevice, large_batch
from images.order import DrawSampler
from images.sources import Source, find_source
from images.store import StoredImages
from images.store_place import is_stored
from images.workers import make_loader
from presets import batch_mix, resize_for, stage_preset, test_preset
from settings.errors import ConfigError
from settings.table import FOLDERS, Config

if TYPE_CHECKING:
    from stages import Stage
from utils import MIX, Runtime, drawing_from

# ---- training ----


class TrainLoader:
    """The training batches of a stage, on the device.

    A batch is images (N, 3, S, S) float32, normalised, and class numbers (N,), or soft targets (N, K) if the stage
    mixes.

    epochs: of the stage; after an epoch's last step the workers go on with the first of the next
    soft_classes: number of classes K, if the stage mixes
    wait_seconds: time the last epoch's loop has spent waiting for images
    when_drained: called once, when the last step of `epochs` has been handed to the workers
    """

    def __init__(
        self,
        source: Source,
        sampler: DrawSampler,
        runtime: Runtime,
        *,
        mix: nn.Module | None = None,
        soft_classes: int | None = None,
        epochs: range = range(0),
    ):
        self.source = source
        self.sampler = sampler
        self.mix = mix
        self.soft_classes = soft_classes
        self.runtime = runtime
        self.epochs = epochs
        self.wait_seconds = 0.0
        self.when_drained: Callable[[], None] | None = None
        self.iterator: Iterator[Any] = iter(())
        self.position: tuple[int, int] | None = None  # epoch and step of what `iterator` gives next

    def __len__(self) -> int:
        """Count the steps of a whole epoch."""
        return self.sampler.num_steps

    @property
    def images_per_step(self) -> int:
        """Images over all processes, in every step but the last, which may have fewer."""
        return self.sampler.batch_size * self.sampler.world_size

    @property
    def batch_sizes(self) -> set[int]:
        """Sizes of this process's batches: that of most steps, and that of the last."""
        return self.sampler.batch_sizes

    def start(self, epoch: int, first_step: int = 0) -> None:
        """Have the workers load from `first_step` of `epoch` on, unless they do so already."""
        if self.position != (epoch, first_step):
            stop_epoch = self.epochs.stop if epoch in self.epochs else epoch + 1
            self.sampler.start(epoch, first_step, stop_epoch)
            self.iterator = self.source.batches(self.sampler)
            self.position = (epoch, first_step)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield step number, images and targets of each step of `epoch`, from `first_step` on."""
        self.wait_seconds = 0.0
        for step in range(first_step, len(self)):
            asked = time.perf_counter()
            self.start(epoch, step)
            loaded = next(self.iterator)
            if self.sampler.exhausted and self.when_drained is not None:
                self.when_drained()
                self.when_drained = None
            self.wait_seconds += time.perf_counter() - asked
            following = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
            self.position = following if following[0] < self.sampler.stop_epoch else None
            yield step, *self.prepare(loaded, epoch, step)

    def prepare(self, loaded: Any, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Move a loaded batch to the device, augment and mix it.

        On a GPU the step before, which is queued already, goes on meanwhile.
        """

        def finish() -> tuple[Tensor, Tensor]:
            images, targets = self.source.finish(loaded)
            if self.mix is not None:
                with drawing_from(self.sampler.seed, epoch, step, self.runtime.rank, MIX):
                    images, targets = self.mix(images, targets)
            return images.to(memory_format=self.runtime.memory_format), targets  # on a GPU a mix makes them contiguous

        return self.runtime.aside(finish)

    def close(self) -> None:
        """Stop loading, and end the workers."""
        self.position, self.when_drained = None, None
        self.source.close()


def train_loader(config: Config, data: Data, runtime: Runtime, stage: "Stage") -> TrainLoader:
    """Build the training loader of a stage."""
    transform = stage_preset(config, stage, augment_on(config, runtime) == "device")
    repeats = config.ra_reps if config.ra_sampler else 1
    sampler = DrawSampler(len(data.train), stage.batch_size, config.seed, runtime.rank, runtime.world_size, repeats)
    mix = batch_mix(stage.mixup_alpha, stage.cutmix_alpha, len(data.classes))
    soft_classes = None if mix is None else len(data.classes)
    source = find_source(data.train, transform, config.seed, runtime, config.workers, config.decode_on == "device")
    return TrainLoader(source, sampler, runtime, mix=mix, soft_classes=soft_classes, epochs=stage.epochs)


def augment_on(config: Config, runtime: Runtime) -> str:
    """Decide where images are augmented: as `augment_on` of the settings says, with auto resolved.

    With auto that is "device" on CUDA, where a GPU would wait for the workers, if the settings have a form for batches
    and neither `backend` nor `use_v2` was set by hand. Else it is "worker", which leaves the processor that trains to
    training.

    Raises:
        ConfigError: the device has no such augmentation; decode_on device, where it cannot be.
    """
    on_cuda = runtime.device.type == "cuda"
    way = config.augment_on
    if way == "auto":
        batched = config.auto_augment in (None, "ra") and config.interpolation == "bilinear"
        own_way = config.backend != "pil" or config.use_v2  # asked for by hand
        way = "device" if on_cuda and batched and not own_way else "worker"
    if way == "device" and runtime.device.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"augment_on device works on CUDA GPUs and the CPU, the device is {runtime.device}; leave it out"
        )
    if config.decode_on == "device" and not (on_cuda and way == "device" and config.dataset in FOLDERS):
        raise ConfigError("decode_on device needs image files, a CUDA GPU and augment_on device; leave it out")
    if config.decode_on == "device":
        check_decoder(runtime.device)
    return way


# ---- evaluation, pictures ----


def evaluates_on_device(config: Config, runtime: Runtime) -> bool:
    """Decide whether validation images are resized on a GPU, if they come out of a store."""
    return runtime.device.type == "cuda" and is_stored(config) and augment_on(config, runtime) == "device"


def eval_loader(config: Config, data: Data, runtime: Runtime, crop_size: int) -> DataLoader | EvalOnDevice:
    """Build the loader of this process's share of the validation images, at `crop_size`.

    On a GPU, where training images are augmented on the device, stored ones are resized there too, in large batches if
    the rehearsal has found memory for them; else workers do it.
    """
    resize_size = resize_for(config, crop_size)
    batch_size = int(max(config.batch_size))
    if isinstance(data.val, StoredImages) and evaluates_on_device(config, runtime):
        if LARGE_EVALUATION in runtime.proven:
            batch_size = large_batch(batch_size, crop_size)
        return EvalOnDevice(data.val, runtime, crop_size=crop_size, resize_size=resize_size, batch_size=batch_size)
    images = EvalImages(data.val, test_preset(config, crop_size), runtime.rank, runtime.world_size)
    return make_loader(images, runtime, config.workers, batch_size=batch_size)


def batches_of_all(loader: DataLoader | EvalOnDevice, runtime: Runtime) -> int:
    """Count the full batches of validation images that every process has."""
    images = loader.images if isinstance(loader, EvalOnDevice) else loader.dataset.images  # type: ignore[attr-defined]
    return len(images) // runtime.world_size // (loader.batch_size or 1)


def sample_grid(loader: TrainLoader, epoch: int, num_images: int = 16) -> Tensor:
    """Draw augmented training images of a loader as one picture, uint8 (3, H, W).

    The images are the same for every stage, each augmented as it is in `epoch`.
    """
    count = loader.sampler.num_images
    step = max(1, count // num_images)  # over all classes, where images are sorted by class
    draws = [(epoch, index, 0) for index in range(0, step * num_images, step) if index < count]
    return make_grid(denormalise(loader.source.samples(draws)), nrow=8)
