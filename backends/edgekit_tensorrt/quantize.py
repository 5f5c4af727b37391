"""Recipes to typed ONNX: TensorRT is always strongly typed here, so types are in the file."""

from __future__ import annotations

import onnx

from edgekit.onnx_export import float16_from_float32
from edgekit.recipe import FP16, Recipe


def model_in_precision(model: onnx.ModelProto, recipe: Recipe) -> onnx.ModelProto:
    """The float32 model, or float16 inside with explicit casts and float32 at the edge."""
    return float16_from_float32(model) if recipe == FP16 else model
