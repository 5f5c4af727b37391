"""Quantize and dequantize: one scale for a tensor, one per index of an axis, one per block."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Run
from edgekit_tensorrt.layers.values import quantized


def _spread(scale: Tensor, like: Tensor, axis: int) -> Tensor:
    """``scale`` in a shape that multiplies ``like``."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim != like.ndim:
        return scale.reshape([-1 if one == axis else 1 for one in range(like.ndim)])
    for one, (few, many) in enumerate(zip(scale.shape, like.shape, strict=True)):
        if few not in (1, many):
            scale = scale.repeat_interleave(-(-many // few), dim=one).narrow(one, 0, many)
    return scale


def _quantize(call: Call) -> Tensor:
    x = call.value(0)
    units = x / _spread(call.value(1), x, call["axis"])
    zero = call.optional(2)
    if zero is not None and bool((zero != 0).any()):
        units = units.round() + _spread(zero, x, call["axis"]).to(torch.float32)
    return quantized(units, call.dtypes[0])


def _dequantize(call: Call) -> Tensor:
    x = call.value(0).to(torch.float32)
    zero = call.optional(2)
    if zero is not None:
        x = x - _spread(zero, x, call["axis"]).to(torch.float32)
    return x * _spread(call.value(1), x, call["axis"])


RUN: dict[str, Run] = {"DEQUANTIZE": _dequantize, "QUANTIZE": _quantize}
