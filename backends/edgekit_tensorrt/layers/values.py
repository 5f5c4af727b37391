"""How a value of each TensorRT dtype is held in torch, and rounded to what it could hold.

Floating-point values are held in float32 and rounded to the declared dtype after every layer, so
that arithmetic is float32 and memory is as narrow as on the device. INT4 is held in int8.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgekit.spec import Array
from edgekit_tensorrt.network import Weights

FLOATS = ("FLOAT", "HALF", "BF16", "FP8", "FP4")
_INTEGERS = {
    "INT4": torch.int8,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
DTYPES = (*FLOATS, *_INTEGERS)
RANGES = {"INT4": (-8, 7), "INT8": (-128, 127), "UINT8": (0, 255)}
_FP8_LARGEST = 448.0
# The magnitudes of 4-bit floats, by their three lower bits.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What an array given or returned has; numpy has no name for the others, they are float32.
ARRAYS = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool", "INT4": "int8"} | {
    name: name.lower() for name in ("INT8", "UINT8", "INT32", "INT64")
}


def rounded(value: Tensor, dtype: str) -> Tensor:
    """``value`` as a tensor of ``dtype`` would hold it."""
    if dtype not in FLOATS:
        return value.to(_INTEGERS[dtype])
    value = value.to(torch.float32)
    if dtype == "HALF":
        return value.to(torch.float16).to(torch.float32)
    if dtype == "BF16":
        return value.to(torch.bfloat16).to(torch.float32)
    if dtype == "FP8":  # there is no infinity: too large a value becomes the largest
        clamped = value.clamp(-_FP8_LARGEST, _FP8_LARGEST)
        return clamped.to(torch.float8_e4m3fn).to(torch.float32)
    return _rounded_fp4(value) if dtype == "FP4" else value


def _rounded_fp4(value: Tensor) -> Tensor:
    """Nearest of eight magnitudes; from the middle between two, the one with an even code."""
    magnitudes = torch.tensor(_FP4)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    size = value.abs()
    code = torch.bucketize(size, middles)  # a middle itself falls to the lower code
    tie = (size[..., None] == middles).any(-1) & (code % 2 == 1)
    return torch.copysign(magnitudes[code + tie.to(torch.int64)], value)


def quantized(value: Tensor, dtype: str) -> Tensor:
    """``value`` in units of its scale, saturated: integers to the nearest, ties to even."""
    if dtype in FLOATS:
        largest = {"FP8": _FP8_LARGEST, "FP4": _FP4[-1]}.get(dtype)
        return rounded(value if largest is None else value.clamp(-largest, largest), dtype)
    return value.round().clamp(*RANGES[dtype]).to(_INTEGERS[dtype])


def converted(value: Tensor, dtype: str) -> Tensor:
    """A cast: fractions are cut off, not rounded; narrow integers saturate."""
    if dtype == "BOOL":
        return value != 0
    if dtype in FLOATS:
        return rounded(value, dtype)
    if value.is_floating_point():
        value = value.trunc()
        if dtype in RANGES:
            value = value.clamp(*RANGES[dtype])
    return value.to(_INTEGERS[dtype])


def tensor_from_array(array: Array, dtype: str) -> Tensor:
    """An input, or a constant from elsewhere, in the form held here."""
    if array.dtype.kind not in "biuf":  # an extension type such as ml_dtypes.bfloat16
        array = array.astype(np.float32)
    if dtype == "HALF" and array.dtype == np.float16:  # nothing to round
        return torch.from_numpy(array.astype(np.float32, order="C"))
    # Copied: torch must not write to the caller's array, nor warn that it could.
    return rounded(torch.from_numpy(np.array(array, order="C")), dtype)


def array_from_tensor(value: Tensor, dtype: str) -> Array:
    """An output as numpy can hold it: BF16 and FP8 values in float32."""
    return value.numpy().astype(ARRAYS.get(dtype, "float32"))


def tensor_from_weights(weights: Weights) -> Tensor | None:
    """The flat values of weights inside a layer; None where they could not be read."""
    array = weights.values
    if array is None:
        return None
    if weights.dtype in ("INT4", "FP4"):
        codes = np.stack([array & 0xF, array >> 4], axis=-1).reshape(-1)[: weights.count]
        if weights.dtype == "INT4":
            return torch.from_numpy(((codes ^ 8).astype(np.int8) - 8).astype(np.int8))
        sign = np.where(codes & 8, np.float32(-1), np.float32(1))
        return torch.from_numpy(np.array(_FP4, np.float32)[codes & 7] * sign)
    tensor = torch.from_numpy(array.copy())
    if weights.dtype == "BF16":
        return tensor.view(torch.bfloat16).to(torch.float32)
    if weights.dtype == "FP8":
        return tensor.view(torch.float8_e4m3fn).to(torch.float32)
    return rounded(tensor, weights.dtype)
