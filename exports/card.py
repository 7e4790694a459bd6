"""The model card: README.md of an export, and the figures it shows."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml

from exports.gate import Comparison
from exports.hub import is_of_torchvision
from exports.options import FIGURES, Options
from inference.trained import Trained
from reporting.page import accuracy_table, calibration, class_table, confusions, curves, draw, stage_table, verdict
from settings.errors import printable


def render_card(
    options: Options,
    trained: Trained,
    how: Mapping[str, Any],
    about: Mapping[str, str],
    compared: Comparison | None,
    quantized: Comparison | None,
    figures: Sequence[str],
) -> str:
    """Render the card.

    about: the file's metadata
    figures: paths of pictures, from the card's folder
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = as_text
    folder, summary = trained.folder, trained.folder.summary()
    assessed = summary if trained.weights.startswith("best") else None  # the run assesses no others
    calibrated = calibration(assessed) if assessed else ""
    return environment.get_template("card.md.j2").render(
        front=yaml.safe_dump(front_matter(trained, about, compared), sort_keys=False, allow_unicode=True),
        options=options,
        trained=trained,
        how=how,
        about=about,
        compared=compared,
        quantized=quantized,
        figures=figures,
        of_torchvision=is_of_torchvision(trained),
        description=json.dumps({name: value for name, value in how.items() if name != "classes"}, indent=2),
        stages=stage_table(folder.plan(), folder.metrics()),
        accuracy=accuracy_table(summary) if summary else None,
        by_class=class_table(assessed) if assessed else None,
        said=[verdict(assessed) if assessed else "", f"Calibration: {calibrated}" if calibrated else ""],
    )


def front_matter(trained: Trained, about: Mapping[str, str], compared: Comparison | None) -> dict[str, Any]:
    """Build what the Hub reads of a card: tags, and the accuracy that was measured."""
    front: dict[str, Any] = {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "efficientnetv2", "progressive-learning", trained.config.model],
    }
    if compared is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": about["data"], "type": about["data"], "split": "validation"},
            "metrics": [{"type": "accuracy", "value": round(compared.run_top1 / 100, 6)}],
        }
        front["model-index"] = [{"name": trained.config.model, "results": [result]}]
    return front


def figures_of(trained: Trained) -> dict[str, str]:
    """Draw the figures of the run's report: SVG by path in the export's folder."""
    folder, records = trained.folder, trained.folder.metrics()
    drawn = draw(folder.settings(), folder.plan(), records) if records else {}
    named = {
        f"{FIGURES}/{heading.lower().replace(' ', '_')}{f'_{i}' if i else ''}.svg": svg
        for heading, drawings in drawn.items()
        for i, svg in enumerate(drawings)
    }
    if not trained.weights.startswith("best"):
        return named  # the others are of the best weights
    summary, found = folder.summary(), confusions(folder)
    if summary:
        named |= {f"{FIGURES}/curve_{i}.svg": svg for i, svg in enumerate(curves(summary, folder.assessment()))}
    return named | ({f"{FIGURES}/confusions.svg": found["figure"]} if "figure" in found else {})


def as_text(value: Any) -> str:
    """Write other people's text, such as names of classes, so that Markdown shows it as it is."""
    text = "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~!&" else char for char in printable(str(value)))
    return re.sub(r"^(\s*)(?=[-+])|^(\s*\d+)(?=[.)](\s|$))", r"\1\2\\", text)  # or it would begin a list
