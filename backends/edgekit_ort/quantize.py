"""Recipes to this runtime's own conversions."""

from __future__ import annotations

import onnx

from edgekit.onnx_export import float16_from_float32
from edgekit.recipe import FP16, Recipe


def model_in_precision(model: onnx.ModelProto, recipe: Recipe) -> onnx.ModelProto:
    """The float32 model, or in float16 inside with float32 at the edge.

    The CPU provider turns float16 back into float32 kernels when it loads: what it buys on this
    target is half the download, not speed (see README.md here).
    """
    return float16_from_float32(model) if recipe == FP16 else model
