"""Convolutions and pooling: windows that slide over the last one, two or three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Lacks, Run
from edgekit_tensorrt.network import Layer

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SPREAD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

Pairs = list[tuple[int, int]]


def _paddings(
    call: Call, sizes: Sequence[int], window: Sequence[int], dilation: Sequence[int]
) -> tuple[Pairs, Pairs]:
    """Per axis: the declared padding, and what rounding up adds at the end beyond it."""
    mode = call["padding_mode"]
    pairs = list(zip(call["pre_padding"], call["post_padding"], strict=True))
    extra = [(0, 0)] * len(pairs)
    for axis, (size, step) in enumerate(zip(sizes, call["stride_nd"], strict=True)):
        extent = dilation[axis] * (window[axis] - 1) + 1
        if mode.startswith("SAME"):
            total = max((-(-size // step) - 1) * step + extent - size, 0)
            small, large = total // 2, total - total // 2
            pairs[axis] = (small, large) if mode == "SAME_UPPER" else (large, small)
        elif mode == "EXPLICIT_ROUND_UP":
            rest = size + sum(pairs[axis]) - extent
            extra[axis] = (0, -rest % step)
    return pairs, extra


def _padded(x: Tensor, pairs: Pairs, value: float = 0.0) -> Tensor:
    if not any(size for pair in pairs for size in pair):
        return x
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=value)


def _kernel_and_bias(call: Call, channels: int) -> tuple[Tensor, Tensor | None]:
    """From the inputs where they are given, else from inside the layer."""
    kernel, bias = call.optional(1), call.optional(2)
    if kernel is None:
        stored = call.weights("kernel")
        if stored is None:
            raise ValueError("its kernel could not be read")
        kernel = stored.reshape(_kernel_shape(call, channels))
    bias = call.weights("bias") if bias is None else bias
    return kernel, None if bias is None else bias.reshape(-1)


def _kernel_shape(call: Call, channels: int) -> list[int]:
    maps, groups, window = call["num_output_maps"], call["num_groups"], call["kernel_size_nd"]
    if call.layer.kind == "DECONVOLUTION":
        return [channels, maps // groups, *window]
    return [maps, channels // groups, *window]


def _convolution(call: Call) -> Tensor:
    x = call.value(0)
    kernel, bias = _kernel_and_bias(call, x.shape[1])
    rank = kernel.ndim - 2
    pairs, extra = _paddings(call, x.shape[2:], kernel.shape[2:], call["dilation_nd"])
    return _CONVOLVE[rank](
        _padded(_padded(x, pairs), extra),
        kernel,
        bias,
        stride=call["stride_nd"],
        dilation=call["dilation_nd"],
        groups=call["num_groups"],
    )


def _deconvolution(call: Call) -> Tensor:
    """Padding crops the result; a negative one adds rows that only the bias reaches."""
    x = call.value(0)
    kernel, bias = _kernel_and_bias(call, x.shape[1])
    rank = kernel.ndim - 2
    full = _SPREAD[rank](
        x, kernel, None, call["stride_nd"], 0, 0, call["num_groups"], call["dilation_nd"]
    )
    mode = call["padding_mode"]
    pairs = list(zip(call["pre_padding"], call["post_padding"], strict=True))
    if mode.startswith("SAME"):
        totals = [
            size - given * step
            for size, given, step in zip(
                full.shape[2:], x.shape[2:], call["stride_nd"], strict=True
            )
        ]
        pairs = [
            (total // 2, total - total // 2)
            if mode == "SAME_UPPER"
            else (total - total // 2, total // 2)
            for total in totals
        ]
    result = _padded(full, [(-before, -after) for before, after in pairs])
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def _pooling(call: Call) -> Tensor:
    x = call.value(0).to(torch.float32)
    window, stride = call["window_size_nd"], call["stride_nd"]
    rank = len(window)
    pairs, extra = _paddings(call, x.shape[-rank:], window, [1] * rank)
    if call["type"] == "MAX":
        return _maximum(x, pairs, extra, window, stride)
    if call["type"] == "AVERAGE":
        return _average(call, x, pairs, extra)
    blend = float(call["blend_factor"])
    largest = _maximum(x, pairs, extra, window, stride)
    return (1 - blend) * largest + blend * _average(call, x, pairs, extra)


def _maximum(x: Tensor, pairs: Pairs, extra: Pairs, window: list[int], step: list[int]) -> Tensor:
    lowest = float("-inf")
    padded = _padded(_padded(x, pairs, lowest), extra, lowest)
    return _MAXIMUM[len(window)](padded, window, step)


def _average(call: Call, x: Tensor, pairs: Pairs, extra: Pairs) -> Tensor:
    """The sum over what a window covers; padding counts or not, rounding up never does."""
    counted = torch.ones((1, 1, *x.shape[-len(pairs) :]))
    counts_padding = not call["average_count_excludes_padding"]
    counted = _padded(_padded(counted, pairs, float(counts_padding)), extra)
    total = _window_sums(_padded(_padded(x, pairs), extra), call)
    return total / _window_sums(counted, call)


def _window_sums(x: Tensor, call: Call) -> Tensor:
    window = call["window_size_nd"]
    rank, channels = len(window), x.shape[1]
    ones = torch.ones((channels, 1, *window))
    return _CONVOLVE[rank](x, ones, stride=call["stride_nd"], groups=channels)


def _local_response(call: Call) -> Tensor:
    return F.local_response_norm(
        call.value(0), call["window_size"], call["alpha"], call["beta"], call["k"]
    )


def _lacks_rank(attribute: str) -> Lacks:
    def lacks(layer: Layer) -> str:
        rank = len(layer.attributes[attribute])
        return "" if rank in _CONVOLVE else f"over {rank} axes"

    return lacks


RUN: dict[str, Run] = {
    "CONVOLUTION": _convolution,
    "DECONVOLUTION": _deconvolution,
    "LRN": _local_response,
    "POOLING": _pooling,
}
LACKS: dict[str, Lacks] = {
    "CONVOLUTION": _lacks_rank("kernel_size_nd"),
    "DECONVOLUTION": _lacks_rank("kernel_size_nd"),
    "POOLING": _lacks_rank("window_size_nd"),
}
