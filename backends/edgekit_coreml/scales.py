"""Whether float16 holds a package's scales: a scale below the smallest normal would be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgekit.errors import LoweringFailed
from edgekit.recipe import Recipe
from edgekit.spec import Array

_SMALLEST = 2.0**-14  # the smallest normal float16


def check_scales(spec: Any, recipe: Recipe) -> None:
    """Raise ``LoweringFailed`` where an activation's scale would lose digits, or become 0."""
    for operation, scale in _activation_scales(spec):
        if not np.isfinite(scale).all() or float(np.abs(scale).min()) < _SMALLEST:
            raise LoweringFailed(
                f"the scale of {operation.outputs[0].name!r} is {float(np.abs(scale).min()):.2g}, "
                f"and float16 holds {_SMALLEST:.2g} to 65504 in full; keep that layer float with "
                f"--keep-float, or choose another precision than {recipe.precision}."
            )


def _activation_scales(spec: Any) -> Iterator[tuple[Any, Array]]:
    for function in spec.mlProgram.functions.values():
        operations = function.block_specializations[function.opset].operations
        constants = {one.outputs[0].name: one for one in operations if one.type == "const"}
        for operation in operations:
            if operation.type in ("quantize", "dequantize"):
                (argument,) = operation.inputs["scale"].arguments
                value = (
                    constants[argument.name].attributes["val"]
                    if argument.WhichOneof("binding") == "name"
                    else argument.value
                )
                yield operation, _numbers(value)


def _numbers(value: Any) -> Array:
    tensor = value.immediateValue.tensor
    if tensor.WhichOneof("value") == "bytes":
        return np.frombuffer(tensor.bytes.values, np.float16).astype(np.float32)
    return np.array(tensor.floats.values, np.float32)
