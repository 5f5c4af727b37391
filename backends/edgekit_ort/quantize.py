"""Recipes to this runtime's own conversions."""

from __future__ import annotations

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from edgekit.errors import LoweringFailed
from edgekit.graph import quiet


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and activations in float16; inputs and outputs stay float32.

    The CPU provider turns it back into float32 kernels when it loads: what float16 buys on
    this target is half the download, not speed (see README.md here).
    """
    try:
        with quiet():
            converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
            # It appends its casts; this runtime sorts them itself, other readers refuse.
            OnnxModel(converted).topological_sort()
        return converted
    except Exception as cause:  # the tool raises whatever it trips over
        raise LoweringFailed(
            f"onnxruntime could not convert the model to fp16: {cause}. Use --precision fp32."
        ) from cause
