"""Weights from a file or from torchvision, onto a head of another class count."""

import hashlib
import os
import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from augment.pixels import IMAGENET_MEAN, IMAGENET_STD
from learning.checkpoint import Damaged, read_safely
from settings.errors import ConfigError, first_line
from settings.resolve import RUN_SETTINGS
from settings.sources import read_yaml
from settings.table import Config
from utils import Runtime

VIT_SIZE = 224  # pixels; torchvision's default, and the one size that its vision transformers then take


def find_weights(name: str, weights: str) -> Any:
    """Find the member of a model's torchvision weights enum that `weights` names.

    weights: `DEFAULT`, `IMAGENET1K_V1`, or such a name with the class in front

    Raises:
        ConfigError: the model has none of that name, and no such file exists.
    """
    try:
        members = list(get_model_weights(name))
    except (ValueError, AttributeError):  # a model of ours, without weights; before 0.22 torchvision stumbles over None
        members = []
    for member in members:
        if weights in (member.name, str(member)):
            check_size(name, member)
            return member
    if members and weights == "DEFAULT":
        check_size(name, get_model_weights(name).DEFAULT)
        return get_model_weights(name).DEFAULT
    known = ", ".join(["DEFAULT", *map(str, members)]) if members else "none"
    raise ConfigError(f"weights {weights!r} is neither a file nor weights of {name} (it has {known})")


def check_size(name: str, member: Any) -> None:
    """Raise ConfigError for weights of a transformer that was built for another image size than ours: 384 or 512 px."""
    height, _ = member.meta["min_size"]
    if name.startswith("vit") and height != VIT_SIZE:
        raise ConfigError(
            f"weights {member} are for images of {height} px alone, and {name} is built for {VIT_SIZE} here; take others"
        )


def read_weights(name: str, weights: str, runtime: Runtime | None = None) -> dict[str, Tensor]:
    """Read a state dict from a file or from torchvision.

    A file is a bare state dict, or a checkpoint, of which `model_ema` or else `model` is taken; also one of torchvision's
    reference.

    runtime: of several processes that all call this; one of each machine fetches what is not there

    Raises:
        ConfigError: not a file of weights, or it cannot be fetched.
    """
    runtime = runtime or Runtime(device=torch.device("cpu"))
    path = runtime.on_each_machine(lambda: weights if os.path.isfile(weights) else fetch(find_weights(name, weights)))
    try:
        state = read_safely(path)
    except (Damaged, OSError) as error:
        reason = type(error).__name__ if isinstance(error, OSError) else error
        raise ConfigError(f"weights: {path} is not a file of weights that loads safely ({reason})") from error
    if isinstance(state, dict):
        state = next((state[key] for key in ("model_ema", "model") if isinstance(state.get(key), dict)), state)
    if isinstance(state, dict) and "n_averaged" in state:  # of torch's AveragedModel, which the reference saves whole
        state = {str(key).removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}
    if not isinstance(state, dict) or not state or not all(map(is_weight, state.keys(), state.values())):
        raise ConfigError(f"weights: {weights} holds no state dict")
    return state


def began_at_random(weights: str | None) -> bool:
    """Check whether a file of weights is of a run, in whose folder it lies, that began with random ones."""
    beside = os.path.join(os.path.dirname(weights or ""), RUN_SETTINGS)
    with suppress(ConfigError):
        return weights is not None and os.path.isfile(weights) and read_yaml(beside).get("weights") is None
    return False


def preset_doubt(config: Config) -> str | None:
    """Say how images are made ready for torchvision's weights, if that is not what `config` does; None for other weights.

    The reference takes the weights' own transform to evaluate them; here the settings say.
    """
    if config.weights is None or os.path.isfile(config.weights):
        return None
    member = find_weights(config.model, config.weights)
    preset = member.transforms()
    theirs = {
        "val_resize_size": preset.resize_size[0],
        "val_crop_size": preset.crop_size[0],
        "interpolation": preset.interpolation.value,
    }
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in theirs.items() if getattr(config, name) != value]
    asked = f"{' '.join(flags)} evaluates them as they were published" if flags else ""
    if (tuple(preset.mean), tuple(preset.std)) != (IMAGENET_MEAN, IMAGENET_STD):
        other = f"images normalised by mean {preset.mean[0]:g} and deviation {preset.std[0]:g}, which no setting does"
        asked = f"{asked} but for {other}" if asked else f"they were published with {other}"
    return f"weights {member}: {asked}" if asked else None


def is_weight(name: Any, value: Any) -> bool:
    """Check whether an item of a file is a tensor by its name, of a kind that can be copied into a model's."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_complex() or value.is_quantized or value.is_meta or value.is_nested)
    )


def fetch(member: Any) -> str:
    """Find the file of torchvision's weights, and download it if it is not there yet.

    One that was there is compared with the hash in its name: torch does so only after a download.

    Raises:
        ConfigError: it cannot be fetched, or is damaged.
    """
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(urlparse(member.url).path))
    if not os.path.exists(path):
        try:
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(member.url, path, hash_in(path) or None, progress=True)
        except (OSError, RuntimeError) as error:  # no network; a download cut short
            raise ConfigError(
                f"weights {member} cannot be fetched: {first_line(error)}; give a file instead"
            ) from error
        return path
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    if not found.hexdigest().startswith(hash_in(path)):
        raise ConfigError(f"weights {member}: {path} is damaged; remove it, and it is fetched again")
    return path


def hash_in(path: str) -> str:
    """Read the start of a file's SHA-256 from its name, as torchvision's weights have it; "" if there is none."""
    found = re.search(r"-([0-9a-f]{8,})\.", os.path.basename(path))
    return found[1] if found else ""


def load_weights(
    model: nn.Module, name: str, weights: dict[str, Tensor], num_classes: int, new_head: bool = True
) -> str:
    """Load the weights that fit; return a line that says what was loaded and what was not.

    Only a head of another class count and auxiliary heads may stay out.

    new_head: False refuses a head of another class count, where it would not be trained

    Raises:
        ConfigError: weights of another architecture, or that are no numbers.
    """
    state = {key: value for key, value in weights.items() if not key.startswith(("aux", "AuxLogits"))}
    own = model.state_dict()
    head = {
        key for key in own.keys() & state.keys()
        if own[key].ndim and own[key].shape != state[key].shape
        and own[key].shape[0] == num_classes and own[key].shape[1:] == state[key].shape[1:]
    }  # fmt: skip
    misfits = [key for key in own if key not in head and (key not in state or own[key].shape != state[key].shape)]
    misfits += [key for key in state if key not in own]
    if misfits:
        raise ConfigError(
            f"weights are not of {name}: {len(misfits)} tensors are missing, unknown or of another shape, first {misfits[0]}"
        )
    if head and not new_head:
        raise ConfigError(
            f"weights have {len(state[max(head)])} outputs, the data {num_classes} classes; a new head would be evaluated "
            "untrained, so give weights of these classes, or train (leave test_only out)"
        )
    # Refused, not warned of: each such tensor makes every output NaN, and none of them is ever trained to a number.
    broken = [key for key in own if key not in head and not state[key].isfinite().all()]
    if broken:
        raise ConfigError(f"weights: {len(broken)} tensors hold NaN or infinity, first {broken[0]}; they are of no use")
    model.load_state_dict({key: value for key, value in state.items() if key not in head}, strict=False)
    told = f"{len(own) - len(head)} of {len(own)} tensors loaded"
    return f"{told}; new head for {num_classes} classes ({', '.join(sorted(head))})" if head else told
