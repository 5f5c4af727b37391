"""Convolutions and pools: what slides a window over the spatial axes of ``[n, C, *spatial]``.

Source: the MIL op reference, groups conv and pool. Every padding is worked out here, by one rule
for all of them, and given to torch as explicit pads: ``same`` puts an odd pad's extra element at
the end, ``same_lower`` at the front. With ``ceil_mode`` a pool may reach past its pads; what lies
there is never counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit_coreml.ops.arguments import Flag, Whole, Wholes, along, flag, integer, ints

Pairs = list[tuple[int, int]]

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _ones(x: Tensor) -> list[int]:
    return [1] * (x.dim() - 2)


def _halves(total: int, lower: bool) -> tuple[int, int]:
    less = total // 2
    return (total - less, less) if lower else (less, total - less)


def _pairs(values: Wholes) -> Pairs:
    flat = ints(values)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _pads(
    pad_type: str,
    pad: Wholes | None,
    sizes: Sequence[int],
    windows: Sequence[int],
    strides: Sequence[int],
) -> Pairs:
    """What is put before and after each spatial axis; ``windows`` include their dilation."""
    kind = pad_type.lower()
    if kind == "custom":
        return [(0, 0)] * len(sizes) if pad is None else _pairs(pad)
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind not in ("same", "same_lower"):
        raise ValueError(f"there is no pad_type {pad_type!r}")
    totals = (
        max((-(-size // stride) - 1) * stride + window - size, 0)
        for size, window, stride in zip(sizes, windows, strides, strict=True)
    )
    return [_halves(total, kind == "same_lower") for total in totals]


def _padded(x: Tensor, pads: Pairs, value: float = 0.0) -> Tensor:
    """Torch lists the last axis first; a negative pad crops."""
    if not any(before or after for before, after in pads):
        return x
    return F.pad(x, [count for pair in reversed(pads) for count in pair], value=value)


def _windows(weight: Tensor, dilations: Sequence[int]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Wholes | None = None,
    pad_type: str = "valid",
    pad: Wholes | None = None,
    dilations: Wholes | None = None,
    groups: Whole = 1,
) -> Tensor:
    step = _ones(x) if strides is None else ints(strides)
    spread = _ones(x) if dilations is None else ints(dilations)
    pads = _pads(pad_type, pad, x.shape[2:], _windows(weight, spread), step)
    function = _CONV[x.dim() - 3]
    return function(_padded(x, pads), weight, bias, step, 0, spread, integer(groups))


def conv_quantized(
    x: Tensor,
    weight: Tensor,
    quantization_type: str,
    quant_scale: Tensor,
    quant_bias: Tensor,
    bias: Tensor | None = None,
    nbits: Whole = 8,
    **rest: Tensor,
) -> Tensor:
    """Experimental in the reference, which gives no formula for its ``lut`` form."""
    if quantization_type != "linear":
        raise ValueError(f"conv_quantized is defined for 'linear', not {quantization_type!r}")
    scale, offset = (along(p, weight.dim(), 0) for p in (quant_scale, quant_bias))
    real_bias = None if bias is None else bias.float()
    return conv(x, weight.float() * scale + offset, real_bias, **rest)  # type: ignore[arg-type]


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Wholes | None = None,
    output_shape: Wholes | None = None,
    pad_type: str = "valid",
    strides: Wholes | None = None,
    dilations: Wholes | None = None,
    groups: Whole = 1,
) -> Tensor:
    step = _ones(x) if strides is None else ints(strides)
    spread = _ones(x) if dilations is None else ints(dilations)
    function = _CONV_TRANSPOSE[x.dim() - 3]
    full = function(x, weight, None, step, 0, 0, integer(groups), spread)
    wanted = None if output_shape is None else ints(output_shape)[2:]
    crops = _crops(pad_type, pad, full, [n * s for n, s in zip(x.shape[2:], step, strict=True)])
    if wanted is not None:
        # The front stays; the end gives or takes, and beyond the full result there is the bias.
        sizes = zip(crops, wanted, full.shape[2:], strict=True)
        crops = [(front, size - front - want) for (front, _), want, size in sizes]
    y = _padded(full, [(-front, -end) for front, end in crops])
    return y if bias is None else y + along(bias, y.dim(), 1)


def _crops(pad_type: str, pad: Wholes | None, full: Tensor, same: Sequence[int]) -> Pairs:
    """What is taken off before and after each spatial axis of the full transposed convolution."""
    kind = pad_type.lower()
    if kind not in ("same", "same_lower"):
        return _pads(kind, pad, full.shape[2:], full.shape[2:], _ones(full))
    excess = [size - want for size, want in zip(full.shape[2:], same, strict=True)]
    # A stride longer than the window leaves a gap at the end.
    return [_halves(n, kind == "same_lower") if n > 0 else (0, n) for n in excess]


def _reach(sizes: Sequence[int], kernel: list[int], step: list[int], pads: Pairs) -> Pairs:
    """The pads that ``ceil_mode`` needs: torch's rule, a window must not start in the end pad."""
    reached = []
    for size, window, stride, (front, end) in zip(sizes, kernel, step, pads, strict=True):
        count = -(-(size + front + end - window) // stride) + 1
        if (count - 1) * stride >= size + front and front + end > 0:
            count -= 1
        reached.append((front, (count - 1) * stride + window - size - front))
    return reached


def _framed(
    x: Tensor,
    kernel_sizes: Wholes,
    strides: Wholes | None,
    pad_type: str,
    pad: Wholes | None,
    ceil_mode: Flag,
) -> tuple[list[int], list[int], Pairs, Pairs]:
    """Kernel, strides, the stated pads, and the pads with what ``ceil_mode`` adds."""
    kernel = ints(kernel_sizes)
    step = _ones(x) if strides is None else ints(strides)
    pads = _pads(pad_type, pad, x.shape[2:], kernel, step)
    reached = _reach(x.shape[2:], kernel, step, pads) if flag(ceil_mode) else pads
    return kernel, step, pads, reached


def max_pool(
    x: Tensor,
    kernel_sizes: Wholes,
    strides: Wholes | None = None,
    pad_type: str = "valid",
    pad: Wholes | None = None,
    ceil_mode: Flag = False,
) -> Tensor:
    kernel, step, _, reached = _framed(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    y: Tensor = _MAX_POOL[x.dim() - 3](_padded(x, reached, float("-inf")), kernel, step)
    return y


def avg_pool(
    x: Tensor,
    kernel_sizes: Wholes,
    strides: Wholes | None = None,
    pad_type: str = "valid",
    pad: Wholes | None = None,
    ceil_mode: Flag = False,
    exclude_padding_from_average: Flag = False,
) -> Tensor:
    """Pads count as zeros unless excluded."""
    kernel, step, pads, reached = _framed(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    function = _AVG_POOL[x.dim() - 3]
    y = function(_padded(x, reached), kernel, step)
    counted = torch.ones(1, 1, *x.shape[2:])
    if not flag(exclude_padding_from_average):
        counted = _padded(counted, pads, 1.0)
        reached = [(0, b[1] - a[1]) for a, b in zip(pads, reached, strict=True)]
    if not any(front or end for front, end in reached):
        return y
    return y / function(_padded(counted, reached), kernel, step)


def l2_pool(
    x: Tensor,
    kernel_sizes: Wholes,
    strides: Wholes | None = None,
    pad_type: str = "valid",
    pad: Wholes | None = None,
    ceil_mode: Flag = False,
) -> Tensor:
    """The root of the sum of squares: no mean is taken."""
    kernel, step, _, reached = _framed(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    y = _padded(x, reached).square()
    for axis, (window, stride) in enumerate(zip(kernel, step, strict=True), start=2):
        y = y.unfold(axis, window, stride).sum(-1)
    return y.sqrt()


OPS: dict[str, Callable[..., Tensor]] = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_quantized": conv_quantized,
    "conv_transpose": conv_transpose,
    "l2_pool": l2_pool,
    "max_pool": max_pool,
}
