"""The affine quantizers of activations. Source: the MIL op reference, iOS17 group quantization.

Without an axis the parameters are scalars. Weights are not quantized by these ops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Whole, along, as_dtype, axis_of


def _spread(parameter: Tensor, x: Tensor, axis: Whole | None) -> Tensor:
    return parameter if axis is None else along(parameter, x.dim(), axis_of(axis, x.dim()))


# `input` is the reference's name for it.
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Whole | None = None,
) -> Tensor:
    """Halves go to the even neighbour, before the zero point is added."""
    codes = torch.round(input / _spread(scale, input, axis))
    if zero_point is not None:
        codes = codes + _spread(zero_point, input, axis).float()
    low, high = (0, 255) if output_dtype == "uint8" else (-128, 127)
    return as_dtype(codes.clamp(low, high), output_dtype)


def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Whole | None = None
) -> Tensor:
    codes = input.float()
    if zero_point is not None:
        # In float: between narrow integers the difference would wrap.
        codes = codes - _spread(zero_point, input, axis).float()
    return codes * _spread(scale, input, axis)


OPS: dict[str, Callable[..., Tensor]] = {"dequantize": dequantize, "quantize": quantize}
