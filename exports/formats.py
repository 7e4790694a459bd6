"""The formats: how a model is written to a file of each, and opened again to be run."""

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.models import get_model

from exports.preprocessing import Preprocessed
from inference.trained import Trained
from learning.models import Classifier
from settings.errors import RunError

Artifact = Callable[[NDArray], NDArray]  # a batch of what the file takes, to logits (N, K) float32
ABOUT = "about.json"  # the metadata in a file of torch.export
IMAGES, LOGITS = "images", "logits"  # what input and output are called in ONNX
ONNX_LIMIT = 2**31  # bytes of a file, which is one protobuf message


def to_export(trained: Trained) -> nn.Module:
    """Copy the model, for the CPU, to be exported: in plain memory order, its classifier a plain layer.

    `Classifier` leaves autocast, of which there is none in the exported file; a block of it would stay in the graph.
    """
    model = copy.deepcopy(trained.model).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, Classifier):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def trace(trained: Trained, how: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """Trace the model, with what of the preprocessing is to be inside, for batches of any number of images.

    Raises:
        RunError: this torch cannot.
    """
    model, size = to_export(trained), trained.image_size
    if not how["inside"]:
        example = torch.zeros(2, 3, size, size)
    else:
        model = Preprocessed(model, dict(how)).eval()
        example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        if "resize" in how["inside"]:
            example = torch.zeros(2, 61, 83, 3, dtype=torch.uint8)  # any two lengths that differ
    try:
        return torch.export.export(model, (example,), dynamic_shapes=(dynamic_sizes(how),), strict=False)
    except Exception as error:  # what torch raises varies with what it stumbles over
        raise cannot("torch.export", trained, error) from error


def dynamic_sizes(how: Mapping[str, Any]) -> dict[int, Any]:
    """Name the axes of the input that may have any length."""
    names = ["batch", "height", "width"] if "resize" in how["inside"] else ["batch"]
    return {axis: torch.export.Dim(name) for axis, name in enumerate(names)}


def cannot(exporter: str, trained: Trained, error: BaseException) -> RunError:
    """Make the error of a model that does not go through an exporter, in one line: what it began with, which versions."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = re.sub(r"\x1b\[\d*m", "", (str(error).strip() or type(error).__name__).splitlines()[0])
    with_script = f" with onnxscript {version('onnxscript')}" if exporter == "torch.onnx" else ""
    return RunError(
        f"{exporter} of torch {torch.__version__}{with_script} cannot export {trained.config.model} ({said}); a newer torch "
        "may, docs/export.md says which packages go with an older one; --to safetensors needs no exporter"
    )


# ---- ONNX ----


def write_onnx(trained: Trained, how: Mapping[str, Any], path: str, about: Mapping[str, str]) -> None:
    """Write the model as ONNX, with its metadata.

    Raises:
        RunError: the exporter cannot, or the model is too large for one file.
    """
    import onnx
    from onnx.helper import set_model_props

    program = trace(trained, how)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size >= ONNX_LIMIT:
        raise RunError(
            f"{trained.config.model} has {size / 2**30:.1f} GiB of weights, ONNX holds less than 2 in a file"
        )
    try:
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=[IMAGES],
            output_names=[LOGITS],
            dynamic_shapes=(dynamic_sizes(how),),  # once more, for the names of the axes
            external_data=False,
            verbose=False,
        )
        assert exported is not None
        model = exported.model_proto
    except Exception as error:
        raise cannot("torch.onnx", trained, error) from error
    set_model_props(model, dict(about))
    onnx.save(model, path)


def rewrite_about_onnx(path: str, about: Mapping[str, str]) -> None:
    """Replace the metadata of an ONNX file, and nothing else in it."""
    import onnx
    from onnx.helper import set_model_props

    model = onnx.load(path)
    set_model_props(model, dict(about))
    onnx.save(model, path)


def open_onnx(path: str) -> Artifact:
    """Open an ONNX file with onnxruntime, on the CPU, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run([LOGITS], {IMAGES: images})[0]


# ---- torch.export ----


def write_torch(trained: Trained, how: Mapping[str, Any], path: str, about: Mapping[str, str]) -> None:
    """Write the model as torch.export does, its metadata beside the program in the file."""
    torch.export.save(trace(trained, how), path, extra_files={ABOUT: json.dumps(dict(about), indent=2)})


def open_torch(path: str) -> Artifact:
    return from_module(torch.export.load(path).module())


# ---- safetensors ----


def write_safetensors(trained: Trained, path: str, about: Mapping[str, str]) -> None:
    """Write the weights under torchvision's names."""
    from safetensors.torch import save_file

    weights = {name: tensor.detach().contiguous() for name, tensor in to_export(trained).state_dict().items()}
    save_file(weights, path, metadata=dict(about))
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # as the other files: safetensors lets no one else read it


def open_safetensors(path: str) -> Artifact:
    """Build the model anew from what the file says of itself, as its reader would, and load the weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    classes, arguments = json.loads(about["classes"]), json.loads(about["arguments"])
    model = get_model(about["model"], weights=None, num_classes=len(classes), **arguments)
    model.load_state_dict(load_file(path))
    return from_module(model.eval())


def arguments_of(trained: Trained) -> dict[str, Any]:
    """List what torchvision's builder of the model must be told besides the number of classes."""
    if not hasattr(trained.model, "transform_input"):
        return {}
    # GoogLeNet and Inception: without auxiliary heads; normalised anew inside if they began with published weights.
    return {"aux_logits": False, "init_weights": False, "transform_input": trained.model.transform_input}


def from_module(module: nn.Module) -> Artifact:
    """Make a module take and give arrays."""

    def run(images: NDArray) -> NDArray:
        with torch.inference_mode():
            return module(torch.from_numpy(np.ascontiguousarray(images))).numpy()

    return run
