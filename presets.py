"""What happens to an image in a stage: training presets, the evaluation preset, mixup and cutmix.

There is a training preset for one image and one for batches. Transforms of one image draw from torch's default CPU
generator, which `images/sources.py` sets from (seed, epoch, index); so an image's augmentation depends on nothing else.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from augment.at_once import augment_at_once
from augment.batch import augment_by_group, draw_groups, normalise, reduce
from augment.draws import CROP, ERASE, ERASED, FLIP, NUM_OPS, OPS, SIGNS, Array, Boxes, crop_boxes, erase_boxes
from augment.pixels import RandomResizedCrop, to_normalised, to_rgb
from augment.randaugment import BINS_PER_UNIT, RandAugment
from settings.table import Config

if TYPE_CHECKING:
    from stages import Stage


def train_preset(
    *,
    image_size: int,
    augment_size: int | None = None,
    auto_augment: str | None = None,
    ra_magnitude: float | None = None,
    ra_scale: str = "torchvision",
    augmix_severity: int = 3,
    random_erase: float = 0.0,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    hflip_prob: float = 0.5,
    interpolation: str = "bilinear",
    backend: str = "pil",
    use_v2: bool = False,
) -> v1.Compose:
    """Build the training transform of a stage, for one image.

    It turns a PIL image, of any mode and perhaps not decoded yet, into a normalised float32 tensor
    (3, image_size, image_size): random resized crop, flip, policy, normalise, random erase; the reference's order.

    augment_size: side of crop and policy; the result is reduced to `image_size` before it is normalised. None: no other
    use_v2: take torchvision's own transforms from `transforms.v2`; the distribution is the same
    """
    lib: Any = v2 if use_v2 else v1
    mode = InterpolationMode(interpolation)
    crop = dict(scale=crop_scale, interpolation=mode, antialias=True)
    steps: list[Any]
    size = augment_size or image_size
    if backend == "tensor":
        steps = [to_rgb, lib.PILToTensor(), lib.RandomResizedCrop(size, **crop)]
    else:
        steps = [RandomResizedCrop(size, **crop)]
    if hflip_prob > 0:
        steps.append(lib.RandomHorizontalFlip(hflip_prob))
    if auto_augment == "ra":
        assert ra_magnitude is not None
        steps.append(RandAugment(ra_magnitude, ra_scale, mode))
    elif auto_augment == "ta_wide":
        steps.append(lib.TrivialAugmentWide(interpolation=mode))
    elif auto_augment == "augmix":
        steps.append(lib.AugMix(interpolation=mode, severity=augmix_severity))
    elif auto_augment is not None:
        steps.append(lib.AutoAugment(policy=AutoAugmentPolicy(auto_augment), interpolation=mode))
    if size != image_size:
        averaging = InterpolationMode.BILINEAR if mode == InterpolationMode.NEAREST else mode
        steps.append(lib.Resize(image_size, interpolation=averaging, antialias=True))
    steps += to_normalised(lib, backend)
    if random_erase > 0:
        steps.append(lib.RandomErasing(p=random_erase))
    return v1.Compose(steps)


def eval_preset(
    *, crop_size: int, resize_size: int, interpolation: str = "bilinear", backend: str = "pil", use_v2: bool = False
) -> v1.Compose:
    """Build the evaluation transform: short side to `resize_size`, centre crop, normalise.

    It turns an RGB PIL image into a normalised float32 tensor (3, crop_size, crop_size).
    """
    lib: Any = v2 if use_v2 else v1
    steps = [lib.PILToTensor()] if backend == "tensor" else []
    steps += [
        lib.Resize(resize_size, interpolation=InterpolationMode(interpolation), antialias=True),
        lib.CenterCrop(crop_size),
    ]
    return v1.Compose(steps + to_normalised(lib, backend))


def resize_for(config: Config, crop_size: int) -> int:
    """Compute the short side that images are resized to before their centre of `crop_size` is evaluated.

    It is in proportion: as val_resize_size is to val_crop_size.
    """
    return round(crop_size * config.val_resize_size / config.val_crop_size)


def test_preset(config: Config, crop_size: int) -> v1.Compose:
    """Build the evaluation transform of a run, at `crop_size`."""
    return eval_preset(
        crop_size=crop_size,
        resize_size=resize_for(config, crop_size),
        interpolation=config.interpolation,
        backend=config.backend,
        use_v2=config.use_v2,
    )


class BatchPreset:
    """A stage's training preset for batches, in two parts.

    `boxes` and `flips` say where to crop and whether to flip, which whoever holds the pixels applies, at `crop_size`.
    `choose` says what else there is to do, and `finish` does it, on the device.

    image_size: side of the finished images, pixels
    crop_size: side of the crops that the policy works on, `image_size` or more
    """

    CHOICES = NUM_OPS + 4  # whole numbers of an image that `finish` needs

    def __init__(
        self,
        *,
        image_size: int,
        augment_size: int | None = None,
        ra_magnitude: float | None = None,
        ra_scale: str = "torchvision",
        random_erase: float = 0.0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        hflip_prob: float = 0.5,
    ):
        self.image_size = image_size
        self.crop_size = augment_size or image_size
        self.level = None if ra_magnitude is None else ra_magnitude * BINS_PER_UNIT[ra_scale]
        self.random_erase = random_erase
        self.crop_scale = crop_scale
        self.hflip_prob = hflip_prob

    def boxes(self, draws: Array, heights: NDArray, widths: NDArray) -> Boxes:
        """Choose where to crop images of these sizes: (N, 4)."""
        return crop_boxes(draws[:, CROP], heights, widths, self.crop_scale)

    def flips(self, draws: Array) -> NDArray[np.bool_]:
        """Choose which images to flip: (N,)."""
        return draws[:, FLIP] < self.hflip_prob

    def choose(self, draws: Array) -> NDArray[np.int64]:
        """Choose what `finish` is to do to each image: (N, CHOICES).

        Columns are the operation of each layer (`draw_groups`), then the first row, the first column, and those after
        the last of the rectangle to erase, all 0 for none.

        draws: (N, NUM_DRAWS)
        """
        boxes = erase_boxes(draws[:, ERASED], self.image_size) * (draws[:, ERASE] < self.random_erase)[:, None]
        boxes[:, 2:] += boxes[:, :2]
        return np.concatenate([draw_groups(draws[:, OPS], draws[:, SIGNS]), boxes], axis=1)

    def finish(
        self, images: Tensor, choices: Tensor, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Apply policy, reduce, normalise and erase: uint8 (N, 3, crop_size, crop_size) to float32 (N, 3, S, S).

        On CUDA nothing here waits for the device, and kernels and shapes are the same for every batch of N images.

        choices: (N, CHOICES), on the images' device
        """
        groups, bounds = choices.split([NUM_OPS, 4], dim=1)
        if self.level is not None:
            if images.is_cuda:
                images = augment_at_once(images, groups, self.level)
            else:
                images = augment_by_group(images, groups.numpy(), self.level)
        if self.crop_size != self.image_size:
            images = reduce(images, self.image_size)
        out = normalise(images, memory_format)
        if self.random_erase > 0:
            place = torch.arange(self.image_size, device=images.device)
            inside = (place >= bounds[:, :2, None]) & (place < bounds[:, 2:, None])  # (N, 2, S): rows, columns
            out.masked_fill_(inside[:, None, 0, :, None] & inside[:, None, 1, None, :], 0.0)
        return out


class CentrePreset(BatchPreset):
    """A preset for batches that crops the centre, as evaluation does, at whole pixels of the image.

    share: of the image's short side
    """

    def __init__(self, *, image_size: int, share: float, hflip_prob: float):
        super().__init__(image_size=image_size, hflip_prob=hflip_prob)
        self.share = share

    def boxes(self, draws: Array, heights: NDArray, widths: NDArray) -> Boxes:
        """Choose the centres of images of these sizes: (N, 4)."""
        sides = np.maximum(np.round(np.minimum(heights, widths) * self.share).astype(np.int64), 1)
        return np.stack([(heights - sides) // 2, (widths - sides) // 2, sides, sides], axis=1)


def finetune_preset(config: Config, image_size: int, on_device: bool) -> v1.Compose | BatchPreset:
    """Build the preset of fine-tuning: images as evaluation sees them, and flipped as in training.

    Source: arXiv:1906.06423 (FixRes), section 4: the augmentation of tests, which leaves no shift between the two.
    """
    if on_device:
        share = config.val_crop_size / config.val_resize_size
        return CentrePreset(image_size=image_size, share=share, hflip_prob=config.hflip_prob)
    lib: Any = v2 if config.use_v2 else v1
    seen = test_preset(config, image_size).transforms
    return v1.Compose([to_rgb, *seen, lib.RandomHorizontalFlip(config.hflip_prob)])


def stage_preset(config: Config, stage: "Stage", on_device: bool) -> v1.Compose | BatchPreset:
    """Build the training preset of a stage: of one image, or of batches on the device."""
    if stage.finetune:
        return finetune_preset(config, stage.image_size, on_device)
    shared: dict[str, Any] = dict(
        image_size=stage.image_size,
        augment_size=config.augment_size,
        ra_magnitude=stage.ra_magnitude,
        ra_scale=config.ra_scale,
        random_erase=stage.random_erase,
        crop_scale=config.train_crop_scale,
        hflip_prob=config.hflip_prob,
    )
    if on_device:
        return BatchPreset(**shared)
    return train_preset(
        **shared,
        auto_augment=config.auto_augment,
        augmix_severity=config.augmix_severity,
        interpolation=config.interpolation,
        backend=config.backend,
        use_v2=config.use_v2,
    )


def batch_mix(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> nn.Module | None:
    """Build mixup or cutmix of a batch, one of the two per batch if both alphas are above 0.

    It takes images (N, 3, S, S) and class numbers (N,), and gives images and soft targets (N, K). Its draws
    come from the CPU generator, so nothing waits for the device. Label smoothing is the loss's.

    Returns: None if neither alpha is above 0.

    Source: arXiv:1710.09412 (mixup), arXiv:1905.04899 (cutmix).
    """
    mixes: list[nn.Module] = []
    if mixup_alpha > 0:
        mixes.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
    if cutmix_alpha > 0:
        mixes.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
    if len(mixes) == 2:
        return v2.RandomChoice(mixes)
    return mixes[0] if mixes else None
