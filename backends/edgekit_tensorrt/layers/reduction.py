"""Layers that bring an axis together: sums, softmax, normalization, running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Lacks, Run, axes_from_bits
from edgekit_tensorrt.network import Layer


def _product(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x


REDUCE: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "SUM": lambda x, axes: x.sum(axes, keepdim=True, dtype=x.dtype),
    "PROD": _product,
    "MAX": lambda x, axes: x.amax(axes, keepdim=True),
    "MIN": lambda x, axes: x.amin(axes, keepdim=True),
    "AVG": lambda x, axes: x.mean(axes, keepdim=True),
}


def _reduce(call: Call) -> Tensor:
    x = call.value(0)
    axes = axes_from_bits(call["axes"], x.ndim)
    result = REDUCE[call["op"]](x, axes) if axes else x
    if call["keep_dims"]:
        return result
    return result.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


def _softmax(call: Call) -> Tensor:
    x = call.value(0)
    (axis,) = axes_from_bits(call["axes"], x.ndim)
    return torch.softmax(x, axis)


def _normalization(call: Call) -> Tensor:
    """Mean 0 and variance 1 over the axes (of each group of channels), then scale and shift."""
    x, scale, shift = call.value(0), call.value(1), call.optional(2)
    groups = call["num_groups"]
    axes = axes_from_bits(call["axes"], x.ndim)
    shape = x.shape
    if groups != 1:
        x = x.reshape(shape[0], groups, -1)
        axes = [2]
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    result: Tensor = (centred / (variance + call["epsilon"]).sqrt()).reshape(shape)
    result = result * _per_channel(scale, shape, groups)
    return result if shift is None else result + _per_channel(shift, shape, groups)


def _per_channel(value: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """One number per group serves all channels of the group."""
    if groups != 1 and value.shape[1] == groups != shape[1]:
        return value.repeat_interleave(shape[1] // groups, dim=1)
    return value


def _cumulative(call: Call) -> Tensor:
    x = call.value(0)
    axis = int(call.value(1))
    x = x.flip(axis) if call["reverse"] else x
    total = x.cumsum(axis, dtype=x.dtype)
    if call["exclusive"]:
        total = total - x
    return total.flip(axis) if call["reverse"] else total


def _lacks_operation(layer: Layer) -> str:
    operation = str(layer.attributes["op"])
    return "" if operation in REDUCE else operation


RUN: dict[str, Run] = {
    "CUMULATIVE": _cumulative,
    "NORMALIZATION": _normalization,
    "REDUCE": _reduce,
    "SOFTMAX": _softmax,
}
LACKS: dict[str, Lacks] = {"CUMULATIVE": _lacks_operation, "REDUCE": _lacks_operation}
