"""Layers that take or put elements by position: gather, scatter, sorting, one-hot."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Lacks, Run, axes_from_bits
from edgekit_tensorrt.network import Layer


def _positions(indices: Tensor, length: int) -> Tensor:
    """Positions from 0; a negative one counts from the end."""
    indices = indices.to(torch.int64)
    indices = torch.where(indices < 0, indices + length, indices)
    if bool(((indices < 0) | (indices >= length)).any()):
        raise ValueError(f"an index is not within 0..{length - 1}")
    return indices


def _gather(call: Call) -> Tensor:
    x, indices = call.value(0), call.value(1)
    shared = call["num_elementwise_dims"]
    if call["mode"] == "ND":
        return _gather_places(x, indices, shared)
    axis = call["axis"] % x.ndim
    places = _positions(indices, x.shape[axis])
    if call["mode"] == "ELEMENT":
        return x.gather(axis, places)
    if shared:
        return torch.stack([_taken(one, axis - 1, at) for one, at in zip(x, places, strict=True)])
    return _taken(x, axis, places)


def _taken(x: Tensor, axis: int, places: Tensor) -> Tensor:
    taken = x.index_select(axis, places.reshape(-1))
    return taken.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _gather_places(x: Tensor, indices: Tensor, shared: int) -> Tensor:
    """The last axis of ``indices`` holds a position; leading ``shared`` axes go together."""
    outer = indices.shape[:shared]
    x = x.reshape(-1, *x.shape[shared:])
    indices = indices.reshape(-1, *indices.shape[shared:])
    rows = []
    for one, at in zip(x, indices, strict=True):
        columns = (_positions(column, one.shape[axis]) for axis, column in _columns(at))
        rows.append(one[tuple(columns)])
    result = torch.stack(rows)
    return result.reshape(*outer, *result.shape[1:])


def _columns(indices: Tensor) -> list[tuple[int, Tensor]]:
    return list(enumerate(indices.unbind(-1)))


def _scatter(call: Call) -> Tensor:
    x, indices, updates = call.value(0), call.value(1), call.value(2)
    if call["mode"] == "ELEMENT":
        axis = call["axis"] % x.ndim
        return x.scatter(axis, _positions(indices, x.shape[axis]), updates)
    places = tuple(_positions(column, x.shape[axis]) for axis, column in _columns(indices))
    return x.index_put(places, updates)


def _top(call: Call) -> tuple[Tensor, Tensor]:
    """Of equal values the one with the lower index comes first."""
    x = call.value(0)
    (axis,) = axes_from_bits(call["axes"], x.ndim)
    given = call.optional(1)
    count = int(call["k"] if given is None else given)
    values, indices = x.sort(dim=axis, descending=call["op"] == "MAX", stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _one_hot(call: Call) -> Tensor:
    indices, values, depth = call.value(0), call.value(1), int(call.value(2))
    axis = call["axis"] % (indices.ndim + 1)
    indices = torch.where(indices < 0, indices + depth, indices).unsqueeze(axis)
    classes = torch.arange(depth).reshape([-1 if one == axis else 1 for one in range(indices.ndim)])
    return torch.where(indices == classes, values[1], values[0])


def _non_zero(call: Call) -> Tensor:
    return call.value(0).nonzero().T


def _reverse_sequence(call: Call) -> Tensor:
    """Each sequence of the batch turned round up to its own length."""
    x, lengths = call.value(0), call.value(1)
    batch, time = call["batch_axis"], call["sequence_axis"]
    places = torch.arange(x.shape[time]).expand(x.shape[batch], -1)
    until = lengths.to(torch.int64).reshape(-1, 1)
    places = torch.where(places < until, until - 1 - places, places)
    places = places if batch < time else places.T
    shape = [size if axis in (batch, time) else 1 for axis, size in enumerate(x.shape)]
    return x.gather(time, places.reshape(shape).expand(x.shape))


def _cache_update(call: Call) -> Tensor:
    """The new rows of each sequence stand in the cache from its own position on."""
    cache, update, start = call.value(0).clone(), call.value(1), call.value(2)
    if math.prod(update.shape):
        for one, new, at in zip(cache, update, start.reshape(-1).tolist(), strict=True):
            one[:, at : at + new.shape[1]] = new
    return cache


def _lacks_cache(layer: Layer) -> str:
    form = str(layer.attributes.get("update_form", "PADDED_BHND"))
    return "" if form == "PADDED_BHND" else form


LACKS: dict[str, Lacks] = {"KV_CACHE_UPDATE": _lacks_cache}
RUN: dict[str, Run] = {
    "GATHER": _gather,
    "KV_CACHE_UPDATE": _cache_update,
    "NON_ZERO": _non_zero,
    "ONE_HOT": _one_hot,
    "REVERSE_SEQUENCE": _reverse_sequence,
    "SCATTER": _scatter,
    "TOPK": _top,
}
