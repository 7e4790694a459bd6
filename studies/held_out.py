"""What the best weights of a run come to on images that neither trained nor chose them.

    python -m studies.held_out RUN_FOLDER SPLIT

Evaluates `model_best.pth` at test size on the folder SPLIT beside the run's training images, and writes
`held_out.json` into the run's folder. With two classes, the second one counts as the positive one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from images.datasets import Data, Images, ImageTree, count_common, load_data
from images.encoded import EncodedImages
from images.loaders import eval_loader
from images.workers import closing_loader
from learning.learner import build_learner
from learning.models import as_trained
from learning.weights import read_weights
from reporting.assessment import receiver_operating, scores_of
from reporting.folder import BEST, HELD_OUT, RunFolder
from settings.errors import ConfigError, tell
from settings.resolve import resolve
from settings.table import LAUNCH, Config
from studies.study import with_held_out
from utils import Runtime, start_runtime


def evaluate_held_out(folder: RunFolder, split: str) -> dict[str, Any]:
    """Evaluate the best weights of a run on another split.

    Raises:
        ConfigError: no run; as `load_held_out`.
    """
    if folder.summary() is None:
        raise ConfigError(f"{folder.path} holds no finished run; give the folder of one")
    values = folder.settings()
    published = values.get("weights") is not None
    # What the run began with need not be there any more.
    config = resolve([], {name: value for name, value in values.items() if name not in (*LAUNCH, "weights")})
    config = replace(config, decode_cache="off")
    runtime = start_runtime(config)
    data = load_held_out(config, split, runtime)
    learner, _ = build_learner(config, len(data.classes), read_weights(config.model, folder.at(BEST)), runtime)
    model = as_trained(learner.model, published=published)
    logits, targets = predict(model, data, config, runtime)
    return scores(logits, targets)


def load_held_out(config: Config, split: str, runtime: Runtime) -> Data:
    """Load the data of a run, with the images of another split in the place of its validation images.

    Raises:
        ConfigError: no such split, one of other classes, or with images by which the best weights were chosen.
    """
    data, chosen_by = (load_data(one, runtime) for one in (with_held_out(config, split), config))
    shared = count_shared(data.val, chosen_by.val)
    if shared:
        raise ConfigError(
            f"held_out {split}: {shared} of its {len(data.val)} images are validation images, by which the best weights "
            "are chosen; give others"
        )
    return data


def count_shared(one: Images, other: Images) -> int:
    """Count the images that two splits share by name: those of folders one by one, those of the Hub all or none."""
    if isinstance(one, ImageTree) and isinstance(other, ImageTree):
        return count_common(one.samples, other.samples)
    same = isinstance(one, EncodedImages) and isinstance(other, EncodedImages) and one.root == other.root
    return len(one) if same else 0


@torch.inference_mode()
def predict(model: torch.nn.Module, data: Data, config: Any, runtime: Runtime) -> tuple[NDArray, NDArray]:
    """Compute the logits (N, K) of all validation images, and their class numbers (N,)."""
    model.eval()
    logits, targets = [], []
    with closing_loader(eval_loader(config, data, runtime, config.val_crop_size)) as loader:
        for images, numbers in loader:
            images = images.to(runtime.device, memory_format=runtime.memory_format)
            with runtime.autocast():
                output = model(images)
            logits.append(output.float().cpu().numpy())
            targets.append(numbers.numpy())
    return np.concatenate(logits), np.concatenate(targets)


def scores(outputs: NDArray, targets: NDArray) -> dict[str, Any]:
    """Compute accuracy, also with all classes counting alike; for two classes the area under the ROC curve, sensitivity
    and specificity.

    outputs: (N, K) logits or probabilities; targets: (N,) class numbers

    Returns: percent, but for `auc`, which lies in [0, 1].
    """
    predicted = outputs.argmax(1)
    confusion = np.zeros((outputs.shape[1],) * 2, dtype=np.int64)
    np.add.at(confusion, (targets, predicted), 1)
    both = scores_of(confusion)
    found: dict[str, Any] = {
        "held_out_top1": 100 * float((predicted == targets).mean()),
        "held_out_balanced_accuracy": both["balanced_accuracy"],
        "held_out_images": len(targets),
    }
    if outputs.shape[1] == 2:
        curve = receiver_operating(outputs, targets)
        found["auc"] = curve and curve[0]
        found |= {name: both[name] for name in ("sensitivity", "specificity")}
    return found


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        raise ConfigError("usage: python -m studies.held_out RUN_FOLDER SPLIT")
    folder = RunFolder(arguments[0])
    found = evaluate_held_out(folder, arguments[1])
    folder.write(HELD_OUT, json.dumps({"held_out": arguments[1]} | found))
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items() if value is not None))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        tell(error)
        sys.exit(2)
