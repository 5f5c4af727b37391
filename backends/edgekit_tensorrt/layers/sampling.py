"""Layers that read an image between its pixels: resize and grid sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Run

_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "HALF_UP": lambda x: torch.floor(x + 0.5),
    "HALF_DOWN": lambda x: torch.ceil(x - 0.5),
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
}


def _resize(call: Call) -> Tensor:
    """One axis after the other: the weights of an axis do not depend on the others."""
    x = call.value(0).to(torch.float32)
    scales = call["scales"] or []
    sizes = call.integers(1, "shape")
    if not sizes:
        # In float32, where 10 times 1.3 is 13 and not a little less.
        wide = np.array(x.shape, np.float32) * np.array(scales, np.float32)
        sizes = [int(size) for size in np.floor(wide)]
    for axis, (before, after) in enumerate(zip(tuple(x.shape), sizes, strict=True)):
        scale = scales[axis] if scales else after / before
        if before != after or scale != 1:
            x = _resized_axis(call, x, axis, after, scale)
    return x


def _resized_axis(call: Call, x: Tensor, axis: int, after: int, scale: float) -> Tensor:
    before = x.shape[axis]
    at = _coordinates(call, before, after, scale)
    if call["resize_mode"] == "NEAREST":
        places = _ROUND[call["nearest_rounding"]](at).to(torch.int64)
        return x.index_select(axis, places.clamp(0, before - 1))
    base = at.floor()
    rest = at - base
    if call["resize_mode"] == "LINEAR":
        taps = {0: 1 - rest, 1: rest}
    else:
        taps = _cubic_taps(rest, call["cubic_coeff"])
    if call["exclude_outside"]:
        taps = _without_outside(taps, base, before)
    result = torch.zeros(())
    for offset, weight in taps.items():
        places = (base + offset).to(torch.int64).clamp(0, before - 1)
        shape = [-1 if one == axis else 1 for one in range(x.ndim)]
        result = result + x.index_select(axis, places) * weight.to(torch.float32).reshape(shape)
    return result


def _coordinates(call: Call, before: int, after: int, scale: float) -> Tensor:
    """Where each pixel of the result lies in the input."""
    index = torch.arange(after, dtype=torch.float64)
    if after == 1 and call["selector_for_single_pixel"] == "UPPER":
        return torch.zeros(1, dtype=torch.float64)
    match call["coordinate_transformation"]:
        case "ALIGN_CORNERS":
            return index * (before - 1) / max(after - 1, 1)
        case "HALF_PIXEL":
            return (index + 0.5) / scale - 0.5
    return index / scale


def _cubic_taps(rest: Tensor, a: float) -> dict[int, Tensor]:
    """Weights of the four pixels around; ``a`` is the cubic coefficient."""

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return {-1: far(rest + 1), 0: near(rest), 1: near(1 - rest), 2: far(2 - rest)}


def _without_outside(taps: dict[int, Tensor], base: Tensor, before: int) -> dict[int, Tensor]:
    inside = {
        offset: torch.where((base + offset < 0) | (base + offset >= before), 0.0, weight)
        for offset, weight in taps.items()
    }
    total = torch.stack(list(inside.values())).sum(0)
    return {offset: weight / total for offset, weight in inside.items()}


def _grid_sample(call: Call) -> Tensor:
    return F.grid_sample(
        call.value(0),
        call.value(1),
        mode={"NEAREST": "nearest", "LINEAR": "bilinear", "CUBIC": "bicubic"}[
            call["interpolation_mode"]
        ],
        padding_mode={"FILL": "zeros", "CLAMP": "border", "REFLECT": "reflection"}[
            call["sample_mode"]
        ],
        align_corners=call["align_corners"],
    )


RUN: dict[str, Run] = {"GRID_SAMPLE": _grid_sample, "RESIZE": _resize}
