"""Layers that make, move and join values without computing with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Lacks, Run
from edgekit_tensorrt.network import Layer


def _constant(call: Call) -> Tensor:
    values = call.weights("weights")
    if values is None:
        if 0 in call["shape"]:
            return torch.zeros(call["shape"])
        raise ValueError("its weights could not be read")
    return values.reshape(call["shape"])


def _shape(call: Call) -> Tensor:
    return torch.tensor(call.value(0).shape, dtype=torch.int64)


def _concatenation(call: Call) -> Tensor:
    return torch.cat([call.value(index) for index in range(len(call.inputs))], dim=call["axis"])


def _shuffle(call: Call) -> Tensor:
    """Transpose, reshape, transpose; each may be left out."""
    x = call.value(0)
    x = x.permute(call["first_transpose"][: x.ndim])
    sizes = call.integers(1, "reshape_dims")
    # An unset reshape and one to a scalar look the same here; the declared shape tells.
    if sizes or (sizes is not None and not call.shapes[0]):
        if call["zero_is_placeholder"]:
            sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
        x = x.reshape(sizes)
    return x.permute(call["second_transpose"][: x.ndim])


def _squeeze(call: Call) -> Tensor:
    x = call.value(0)
    given = call.integers(1, "axes")
    if given is None:
        return x.squeeze()
    axes = [axis % x.ndim for axis in given]
    if any(x.shape[axis] != 1 for axis in axes):
        raise ValueError(f"an axis of {axes} in shape {list(x.shape)} is not 1")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


def _unsqueeze(call: Call) -> Tensor:
    x = call.value(0)
    axes = call.integers(1, "axes") or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(call: Call) -> Tensor:
    """Any window with any step; what lies outside is taken as the mode says."""
    x = call.value(0)
    start, size, stride = (
        call.integers(index, name) or []
        for index, name in ((1, "start"), (2, "shape"), (3, "stride"))
    )
    axes = call.integers(5, "axes")
    chosen = range(len(start)) if axes is None else [axis % x.ndim for axis in axes]
    mode = call["mode"]
    outside: list[tuple[int, Tensor]] = []
    for axis, first, count, step in zip(chosen, start, size, stride, strict=True):
        places = first + step * torch.arange(count)
        length = x.shape[axis]
        beyond = (places < 0) | (places >= length)
        if bool(beyond.any()):
            if mode == "STRICT_BOUNDS":
                raise ValueError(f"it reads beyond axis {axis} of shape {list(x.shape)}")
            outside.append((axis, beyond))
            places = _inside(places, length, mode)
        x = x.index_select(axis, places)
    return _filled(call, x, outside) if mode == "FILL" else x


def _inside(places: Tensor, length: int, mode: str) -> Tensor:
    if mode == "WRAP":
        return places.remainder(length)
    if mode == "REFLECT":  # the edge itself is not repeated
        period = max(2 * (length - 1), 1)
        places = places.remainder(period)
        return torch.minimum(places, period - places)
    return places.clamp(0, length - 1)


def _filled(call: Call, x: Tensor, outside: list[tuple[int, Tensor]]) -> Tensor:
    given = call.optional(4)
    fill = torch.zeros((), dtype=x.dtype) if given is None else given.reshape(()).to(x.dtype)
    for axis, beyond in outside:
        mask = beyond.reshape([-1 if one == axis else 1 for one in range(x.ndim)])
        x = torch.where(mask, fill, x)
    return x


def _padding(call: Call) -> Tensor:
    """Zeros around the image axes; a negative number crops."""
    pairs = list(zip(call["pre_padding_nd"], call["post_padding_nd"], strict=True))
    return F.pad(call.value(0), [size for pair in reversed(pairs) for size in pair])


def _fill(call: Call) -> Tensor:
    """alpha + beta[0] * i + beta[1] * j + ... at place (i, j, ...)."""
    sizes = call.integers(0, "shape") or []
    alpha, beta = call.optional(1), call.optional(2)
    whole = call.dtypes[0] in ("INT32", "INT64")
    dtype = torch.int64 if whole else torch.float32
    start = torch.tensor(call["alpha"]) if alpha is None else alpha.reshape(())
    steps = torch.tensor(call["beta"]) if beta is None else beta
    result = start.to(dtype).expand(sizes)
    for axis, step in enumerate(steps.reshape(-1).to(dtype)):
        places = torch.arange(sizes[axis], dtype=dtype)
        result = result + step * places.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
    return result


def _lacks_fill(layer: Layer) -> str:
    operation = str(layer.attributes["operation"])
    return "" if operation == "LINSPACE" else operation.lower()


RUN: dict[str, Run] = {
    "CONCATENATION": _concatenation,
    "CONSTANT": _constant,
    "FILL": _fill,
    "PADDING": _padding,
    "SHAPE": _shape,
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "SQUEEZE": _squeeze,
    "UNSQUEEZE": _unsqueeze,
}
LACKS: dict[str, Lacks] = {"FILL": _lacks_fill}
