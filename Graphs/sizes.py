"""The picture of what `augment_size` changes: the same operations at full size and at a stage's size."""

import os

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from augment.batch import crop_tensor
from augment.pixels import denormalise
from augment.randaugment import OPERATIONS
from Graphs.rows import ROOT
from presets import BatchPreset

PICTURE = os.path.join(ROOT, "docs", "augment_size.jpg")
SIDE, FULL, ZOOM = 96, 224, 2  # pixels of a stage, of augment_size; how much the picture is enlarged
SHOWN = ("Sharpness", "Posterize", "Rotate")  # each at magnitude 9 of the paper's scale, a row
TIMES = 4  # what is shown of a difference, in grey levels
BOX = (40, 130, 340, 340)  # of scikit-learn's photo of a temple: top, left, height, width


def augmented(photo: Tensor, name: str, augment_size: int | None) -> NDArray[np.uint8]:
    """Crop a photo, uint8 (H, W, 3), apply an operation, and reduce it to SIDE: uint8 (SIDE, SIDE, 3)."""
    preset = BatchPreset(image_size=SIDE, augment_size=augment_size, ra_magnitude=9, ra_scale="paper")
    choice = torch.tensor([[2 * list(OPERATIONS).index(name), 0, 0, 0, 0, 0]])
    pixels = preset.finish(crop_tensor(photo, BOX, preset.crop_size)[None], choice)
    return denormalise(pixels)[0].permute(1, 2, 0).numpy()


def draw() -> Image.Image:
    """Draw a row for each operation: augmented at full size and reduced; at the stage's size; how far they are apart."""
    photo = torch.from_numpy(np.array(load_sample_images().images[0]))
    rows = []
    for name in SHOWN:
        full, small = augmented(photo, name, FULL), augmented(photo, name, None)
        apart = (TIMES * np.abs(full.astype(int) - small.astype(int))).clip(max=255).astype(np.uint8)
        rows.append(np.concatenate([full, small, apart], axis=1))
    return Image.fromarray(np.concatenate(rows)).resize(
        (3 * SIDE * ZOOM, len(SHOWN) * SIDE * ZOOM), Image.Resampling.NEAREST
    )


def write() -> None:
    """Write the picture that docs/stages.md shows."""
    draw().save(PICTURE, "JPEG", quality=88, subsampling=0)
