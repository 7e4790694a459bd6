"""What happens to an image before the model: told in full, done as told, and done by the exported file itself."""

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from augment.pixels import IMAGENET_MEAN, IMAGENET_STD
from inference.trained import Trained
from settings.errors import ConfigError

STEPS = ("resize", "crop", "scale", "normalise")
INSIDE = {"beside": (), "crops": STEPS[2:], "inside": STEPS}  # which of them the exported file does
TAKES = {
    "beside": "float32 (N, 3, {0}, {0}): RGB crops, resized, scaled and normalised",
    "crops": "uint8 (N, {0}, {0}, 3): RGB crops, resized",
    "inside": "uint8 (N, height, width, 3): RGB images as decoded, of any size, those of a batch of one size",
}


def describe(trained: Trained, place: str) -> dict[str, Any]:
    """Describe in full what is done to an image; the content of preprocessing.json.

    place: "beside", "crops" or "inside": what of it the exported file does by itself

    Raises:
        ConfigError: this run's way of resizing cannot be inside.
    """
    config = trained.config
    by = "PIL" if config.backend == "pil" else f"torchvision.transforms{'.v2' if config.use_v2 else ''}"
    if place == "inside" and (by != "PIL" or config.interpolation == "nearest"):
        way = "--interpolation nearest" if by == "PIL" else "--backend tensor"
        raise ConfigError(
            f"--preprocessing inside resizes as PIL does, bilinear or bicubic; the run had {way}, whose pixels differ; use "
            "--preprocessing crops"
        )
    return {
        "format": 1,
        "input": TAKES[place].format(trained.image_size),
        "inside": list(INSIDE[place]),
        "decode": "to 8-bit RGB, not turned by EXIF; of 16-bit grey the upper 8 bits",
        "resize": {
            "short_side": trained.resize_size,
            "long_side": "in proportion, rounded down",
            "interpolation": config.interpolation,
            "antialias": config.interpolation != "nearest",
            "by": by,
        },
        "crop": {"size": trained.image_size, "from": "the centre; a half pixel to the even side"},
        "scale": {"divide_by": 255},
        "normalise": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        "output": "logits (N, classes); softmax(logits / temperature) are probabilities",
        "temperature": trained.temperature,
        "classes": trained.classes,
    }


def prepare(image: Image.Image, how: dict[str, Any]) -> NDArray:
    """Make of an image what the exported file takes, as its preprocessing.json says; one item of a batch.

    It follows that file alone, as its reader would: the gate tries what is written.

    image: RGB
    """
    if "resize" not in how["inside"]:
        image = cropped(resized(image, how["resize"]), how["crop"]["size"])
    pixels = np.asarray(image)
    if "normalise" in how["inside"]:
        return pixels
    scaled = pixels.astype(np.float32) / np.float32(how["scale"]["divide_by"])
    mean, std = (np.array(how["normalise"][name], np.float32) for name in ("mean", "std"))
    return ((scaled - mean) / std).transpose(2, 0, 1)


def resized(image: Image.Image, how: dict[str, Any]) -> Image.Image:
    """Resize an image to its short side."""
    side, short = how["short_side"], min(image.size)
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    if how["by"] == "PIL":
        return image.resize((width, height), Image.Resampling[how["interpolation"].upper()])
    functional = importlib.import_module(f"{how['by']}.functional")
    mode = functional.InterpolationMode(how["interpolation"])
    tensor = functional.resize(functional.pil_to_tensor(image), [height, width], mode, antialias=True)
    return Image.fromarray(tensor.permute(1, 2, 0).numpy())


def cropped(image: Image.Image, size: int) -> Image.Image:
    """Crop the centre of an image."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ---- the same as a part of the model ----


class Preprocessed(nn.Module):
    """A model that takes uint8 images (N, H, W, 3), and does to them what of `how` is to be inside."""

    def __init__(self, model: nn.Module, how: dict[str, Any]):
        super().__init__()
        self.model = model
        self.resize = ResizedCrop(how) if "resize" in how["inside"] else None
        self.divide_by = how["scale"]["divide_by"]
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(how["normalise"][name]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2)
        pixels = pixels.float() if self.resize is None else self.resize(pixels).float()
        return self.model(pixels.div(self.divide_by).sub(self.mean).div(self.std))


class ResizedCrop(nn.Module):
    """PIL's resize and a centre crop, to the grey level, for images of any size: uint8 (N, 3, H, W) to (N, 3, S, S).

    Bilinear or bicubic. A resize of torch or of ONNX gives other pixels by a grey level, and logits that differ by
    hundredths. PIL's is two products with a matrix of whole numbers: each pixel of the result is a weighted mean of a
    row's pixels, rounded to 8 bits, then of a column's. In float64 those products are exact, in any order.

    Source: Pillow, src/libImaging/Resample.c.
    """

    UNIT = 2.0**22  # weights are whole multiples of its inverse

    def __init__(self, how: dict[str, Any]):
        super().__init__()
        self.short_side, self.interpolation = how["resize"]["short_side"], how["resize"]["interpolation"]
        self.size = how["crop"]["size"]

    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = (torch.arange(length, dtype=torch.float64, device=pixels.device) for length in pixels.shape[2:])
        # As tensors, not as numbers: one graph then holds for upright and wide images.
        height, width = rows.max() + 1, columns.max() + 1
        short = torch.minimum(height, width)
        down = self.weights(rows, height, torch.floor(self.short_side * height / short))  # (S, H)
        across = self.weights(columns, width, torch.floor(self.short_side * width / short))  # (S, W)
        return self.rounded(down @ self.rounded(pixels.double() @ across.T))

    def rounded(self, sums: Tensor) -> Tensor:
        return torch.floor((sums + self.UNIT / 2) / self.UNIT).clamp(0, 255)

    def weights(self, places: Tensor, length: Tensor, resized: Tensor) -> Tensor:
        """Compute the weight of each pixel of a line in each pixel of the crop, (S, length), times UNIT.

        places: 0 up to length
        resized: length of the line after the resize, before the crop
        """
        scale = length / resized
        first = torch.round((resized - self.size) / 2)  # to even, as Python rounds
        centre = (first + torch.arange(self.size, dtype=torch.float64, device=places.device) + 0.5)[:, None] * scale
        stretch = torch.clamp(scale, min=1.0)  # the filter covers what is shrunk to a pixel
        reach = stretch * (1.0 if self.interpolation == "bilinear" else 2.0)
        within = (places >= torch.floor(centre - reach + 0.5)) & (places < torch.floor(centre + reach + 0.5))
        shares = torch.where(within, self.filter((places - centre + 0.5) * (1 / stretch)), 0.0)
        shares = shares / shares.sum(dim=1, keepdim=True) * self.UNIT
        return torch.where(shares < 0, -torch.floor(0.5 - shares), torch.floor(shares + 0.5))

    def filter(self, at: Tensor) -> Tensor:
        """Compute the filter's height at distances from its centre: a triangle, or a cubic with a = -0.5."""
        at = at.abs()
        if self.interpolation == "bilinear":
            return torch.clamp(1 - at, min=0.0)
        inner = (1.5 * at - 2.5) * at * at + 1
        outer = (((at - 5) * at + 8) * at - 4) * -0.5
        return torch.where(at < 1, inner, torch.where(at < 2, outer, 0.0))
