"""How large the measurements of gpu.py are, and where they lie: for real, or as a rehearsal."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from PIL import Image

from utils import find_device


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How large everything is, and where it lies.

    data: the folder's name, of at most `limit` images
    sizes: of the four stages, pixels; other_sizes: measured besides
    steps, repeats: of each way in a round, and rounds
    epochs: of each stage in whole training; staged_epochs: of a staged run and of its control
    batch_sizes: tried in search of the best
    matrix: side of the matrices of the product; copied: bytes
    out: where what is kept lies; scratch: where links to the images, the decoded ones and the runs lie meanwhile
    tiny: a rehearsal
    """

    device: str = "auto"
    data: str | None = None
    limit: int = 10_000
    model: str = "efficientnet_v2_s"
    sizes: tuple[int, ...] = (128, 185, 242, 300)
    other_sizes: tuple[int, ...] = (192, 256, 320)
    batch_size: int = 128
    workers: int = 16
    steps: int = 12
    repeats: int = 3
    epochs: int = 3
    staged_epochs: int = 8
    batch_sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    matrix: int = 8192
    copied: int = 1 << 30
    classes: int = 1000
    profiled_steps: int = 20
    out: str = "."
    scratch: str = "."
    tiny: bool = False

    @property
    def tree(self) -> str:
        """Links to the images, with train/ and val/."""
        return os.path.join(self.scratch, "images")

    @property
    def store(self) -> str:
        """Where images are kept decoded."""
        return os.path.join(self.scratch, "store")

    @property
    def on_gpu(self) -> bool:
        return find_device(self.device, 0).type == "cuda"

    def flags(self, sizes: Sequence[int], epochs: int = 1, batch_size: int | None = None) -> list[str]:
        """List the flags of train.py for `epochs` at each size; the small rate keeps noise from diverging."""
        flags = [
            *common.machine_flags(self.device),
            "--model",
            self.model,
            "--batch-size",
            str(batch_size or self.batch_size),
        ]
        flags += ["--lr", "0.001", "--epochs", str(epochs * len(sizes)), "--workers", str(self.workers)]
        return flags + ["--stages", str(len(sizes)), "--train-crop-size", *map(str, sizes)]

    def data_flags(self) -> list[str]:
        """List the flags of train.py that name the images; RandAugment, because it is what loading has to bear."""
        return ["--data-path", self.tree, "--decode-cache", self.store, "--auto-augment", "ra"]


# A rehearsal: every line that runs on a GPU, as far as a CPU has it, in two minutes.
TINY = Setup(
    device="cpu", model="shufflenet_v2_x0_5", sizes=(32, 40), other_sizes=(48,), batch_size=6, workers=0, steps=1,
    repeats=1, epochs=1, staged_epochs=2, batch_sizes=(2, 4), matrix=64, copied=1 << 20, profiled_steps=2, tiny=True,
)  # fmt: skip


def make_images(folder: str) -> None:
    """Draw a small tree of images, for a rehearsal without data: two classes of 24 to train on and 4 to validate."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("val", 4)):
        for name in ("dark", "light"):
            place = Path(folder, split, name)
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = torch.randint(128, (48, 56, 3), generator=generator) + (128 if name == "light" else 0)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{i}.jpg")
