"""Weights and activations in 8 bits, by onnxruntime."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exports.formats import IMAGES
from exports.preprocessing import prepare
from images.datasets import Images
from settings.errors import RunError, first_line


class Calibration:
    """Training images from all over the set, one by one, in the form in which onnxruntime asks for them."""

    def __init__(self, images: Images, how: Mapping[str, Any], count: int):
        chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)  # sorted by class: some of each
        self.count = len(chosen)
        self.images = ({IMAGES: prepare(images[int(index)][0], dict(how))[None]} for index in chosen)

    def get_next(self) -> dict[str, NDArray] | None:
        return next(self.images, None)


def quantize(source: str, target: str, calibration: Calibration | None) -> None:
    """Write the ONNX model in `source` as one of 8 bits to `target`.

    calibration: what ranges of activations are found on; None: they are found anew for each batch, as it runs

    Raises:
        RunError: onnxruntime cannot.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    merged = source + ".merged"
    try:
        quant_pre_process(source, merged, skip_symbolic_shape=True)  # batch norm goes into the convolutions
        if calibration is None:
            quantize_dynamic(merged, target, weight_type=QuantType.QUInt8)  # signed convolutions it cannot run
        else:
            quantize_static(merged, target, calibration, quant_format=QuantFormat.QDQ, per_channel=True)
    except Exception as error:  # what it raises varies with what it stumbles over
        raise RunError(
            f"onnxruntime cannot quantise this model ({type(error).__name__}: {first_line(error)}); leave out --quantize"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.remove(merged)
