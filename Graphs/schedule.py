"""The schedule as a picture: what the model sees and what acts on it in each stage, drawn from a config's plan."""

import base64
import io
import json
import os
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from augment.pixels import denormalise
from Graphs.figure import COLOURS, ROOT, Figure, Specification, styled
from presets import BatchPreset, stage_preset
from settings.resolve import resolve
from settings.table import Config
from stages import COLUMNS, Plan, Stage, make_plan
from utils import drawing_from

STRIDE, SCALE, GAP, BAR, ROOM = (
    170,
    0.53,
    12,
    40,
    34,
)  # pixels: of a column, per pixel of an image, between images, of the largest bar, below one
DRAWS = (4, 2)  # of the two photos: such that one can tell at all sizes what is on them


@dataclass(frozen=True)
class ScheduleFigure(Figure):
    """The picture of a config's stages. It is drawn from the plan, and from scikit-learn's two photos.

    config: its file, from the root
    """

    config: str

    def settings(self) -> Config:
        return resolve(["--config", os.path.join(ROOT, self.config)])

    def content(self) -> bytes:
        text = json.dumps(make_plan(self.settings()).as_dict(), sort_keys=True)
        # To nine digits: Python adds floats up more exactly since 3.12.
        return json.dumps(json.loads(text, parse_float=lambda number: f"{float(number):.9g}")).encode()

    def specification(self) -> Specification:
        config = self.settings()
        plan = make_plan(config)
        subtitle = (
            f"{config.model} on {config.dataset}: {plan.num_epochs} epochs in {len(plan.stages)} stages, "
            f"{plan.relative_cost:.2f} of their arithmetic at {plan.stages[-1].image_size} px throughout"
        )
        note = [f"the plan of {self.config}", "scikit-learn's photos, as the stages' training presets give them"]
        chart = styled(draw(config, plan), self.title, subtitle, note)
        chart.usermeta = {"fixed": True}  # laid out in pixels
        return chart.to_dict()


def draw(config: Config, plan: Plan) -> alt.LayerChart:
    """Lay out a column for each stage: photos as large as its images are, and bars of what grows with them."""
    largest = plan.stages[-1].image_size * SCALE
    photos = load_sample_images().images
    below = len(photos) * (largest + GAP)
    layers, texts, bars = [], [], []
    for stage in plan.stages:
        x, side = (stage.index + 0.5) * STRIDE, stage.image_size * SCALE
        shown = [
            {"x": x, "y": (row + 1) * (largest + GAP) - side / 2, "url": as_seen(config, stage, photo, row)}
            for row, photo in enumerate(photos)
        ]
        layers.append(placed(shown).mark_image(width=side, height=side).encode(url="url:N"))
        texts.append({"x": x, "y": below + 12, "text": f"{stage.image_size} px", "large": True})
        texts.append({"x": x, "y": below + 32, "text": f"epochs {stage.epochs.start + 1} to {stage.epochs.stop}"})
    low = below + 30
    for name, values, labels in growing(plan):
        low += BAR + ROOM
        for stage, value, label in zip(plan.stages, values, labels):
            x, high = (stage.index + 0.5) * STRIDE, BAR * value / max(values)
            bars.append({"x": x, "y": low - high, "y2": low, "name": name})
            texts.append({"x": x, "y": low + 12, "text": label})
    shade = alt.Color("name:N", scale=alt.Scale(range=list(COLOURS)), legend=None)
    layers.append(placed(bars).mark_bar(width=70).encode(alt.Y2("y2:Q"), shade))
    layers.append(placed([text for text in texts if "large" in text]).mark_text(fontSize=16).encode(text="text:N"))
    layers.append(placed([text for text in texts if "large" not in text]).mark_text(fontSize=12).encode(text="text:N"))
    return alt.LayerChart(layer=layers, width=STRIDE * len(plan.stages), height=low)


def placed(values: list[dict[str, Any]]) -> alt.Chart:
    """Begin a chart of values whose x and y are pixels."""
    x, y = alt.X("x:Q", axis=None, scale=None), alt.Y("y:Q", axis=None, scale=None)
    return alt.Chart(alt.Data(values=values)).encode(x, y)


def growing(plan: Plan) -> list[tuple[str, list[float], list[str]]]:
    """List what grows from stage to stage besides the image: its name, its values and how they are told."""
    found = [
        ("GFLOPs", list(plan.gflops_per_image), [f"{value:.2f} GFLOPs an image" for value in plan.gflops_per_image])
    ]
    for name, schedule in COLUMNS.items():
        values = [getattr(stage, name) for stage in plan.stages]
        if name != "image_size" and None not in values and len(set(values)) > 1:
            found.append((name, values, [f"{schedule.heading} {schedule.show(value)}" for value in values]))
    return found


def as_seen(config: Config, stage: Stage, photo: NDArray[np.uint8], row: int) -> str:
    """Augment a photo as the stage does, and return it as a data URL, an address that holds the picture itself."""
    preset = stage_preset(config, stage, on_device=False)
    assert not isinstance(preset, BatchPreset)
    with drawing_from(DRAWS[row], row):  # the same draws in every stage
        pixels = denormalise(preset(Image.fromarray(photo)))
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
