"""Gathers and scatters. Source: the MIL op reference, group scatter_gather.

Negative indices count from the end. From iOS17 they are out of bounds: ``validate_indices``, which
came with it, refuses them, and without it the device may do anything. What lies beyond the axis is
an IndexError here in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Flag, Whole, axis_of, flag, integer, wrapped


def _checked(indices: Tensor, size: int, validate: Flag) -> Tensor:
    positive = indices.long() if flag(validate) else wrapped(indices, size)
    if bool(((positive < 0) | (positive >= size)).any()):
        raise IndexError(f"an index is outside of an axis of size {size}")
    return positive


def gather(
    x: Tensor,
    indices: Tensor,
    axis: Whole = 0,
    batch_dims: Whole = 0,
    validate_indices: Flag = False,
) -> Tensor:
    """Replaces ``axis`` by the axes of ``indices`` that are not batch axes."""
    place, batch = axis_of(axis, x.dim()), integer(batch_dims)
    index = _checked(indices, x.shape[place], validate_indices)
    lead, picked = x.shape[:batch], index.shape[batch:]
    # [batch, axis, the rest] indexed by [batch, picked], then the picked axes go where axis was.
    table = x.movedim(place, batch).flatten(0, batch - 1) if batch > 1 else x.movedim(place, batch)
    if batch == 0:
        found = table.index_select(0, index.reshape(-1))
        y = found.reshape(picked + table.shape[1:])
    else:
        rows = index.reshape(math.prod(lead), math.prod(picked))
        found = table[torch.arange(rows.shape[0]).unsqueeze(-1), rows]
        y = found.reshape(lead + picked + table.shape[2:])
    source = list(range(batch, batch + len(picked)))
    return y.movedim(source, [axis + place - batch for axis in source])


def gather_along_axis(
    x: Tensor, indices: Tensor, axis: Whole = 0, validate_indices: Flag = False
) -> Tensor:
    place = axis_of(axis, x.dim())
    return x.gather(place, _checked(indices, x.shape[place], validate_indices))


def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Whole = 0, validate_indices: Flag = False
) -> Tensor:
    """The last axis of ``indices`` addresses the axes of ``x`` after the batch axes."""
    batch = integer(batch_dims)
    address: list[Tensor] = []
    for axis in range(batch):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = -1
        address.append(torch.arange(x.shape[axis]).reshape(shape).expand(indices.shape[:-1]))
    for axis in range(indices.shape[-1]):
        address.append(_checked(indices[..., axis], x.shape[batch + axis], validate_indices))
    return x[tuple(address)] if address else x.expand(indices.shape[:-1] + x.shape)


_REDUCES = {"add": "sum", "sub": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scattered(data: Tensor, index: Tensor, updates: Tensor, mode: str) -> Tensor:
    """``data`` with rows of ``updates`` put into the rows at ``index``, in order."""
    y = data.clone()
    if mode == "update":
        # Of several writes to one place the last stays: torch would leave that open.
        last = torch.full((len(y),), -1).scatter_reduce_(0, index, torch.arange(len(index)), "amax")
        kept = last[index] == torch.arange(len(index))
        return y.index_copy_(0, index[kept], updates[kept])
    if mode == "div":
        for place, value in zip(index.tolist(), updates, strict=True):
            y[place] = (y[place] / value).to(y.dtype)
        return y
    if mode not in _REDUCES:
        raise ValueError(f"scatter has no mode {mode!r}")
    spread = index.reshape([-1] + [1] * (y.dim() - 1)).expand(updates.shape)
    return y.scatter_reduce_(0, spread, -updates if mode == "sub" else updates, _REDUCES[mode])


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Whole = 0,
    mode: str = "add",
    validate_indices: Flag = False,
) -> Tensor:
    place = axis_of(axis, data.dim())
    index = _checked(indices, data.shape[place], validate_indices).reshape(-1)
    rows = updates.flatten(place, place + indices.dim() - 1) if indices.dim() > 1 else updates
    rows = rows.reshape(*data.shape[:place], len(index), *data.shape[place + 1 :])
    return _scattered(data.movedim(place, 0), index, rows.movedim(place, 0), mode).movedim(0, place)


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Whole = 0,
    mode: str = "add",
    validate_indices: Flag = False,
) -> Tensor:
    place = axis_of(axis, data.dim())
    numbered = torch.arange(data.numel()).reshape(data.shape)
    index = numbered.gather(place, _checked(indices, data.shape[place], validate_indices)).reshape(
        -1
    )
    flat = _scattered(data.reshape(-1), index, updates.reshape(-1), mode)
    return flat.reshape(data.shape)


def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: Flag = False,
) -> Tensor:
    depth = indices.shape[-1]
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis in range(depth):
        rows = rows * data.shape[axis] + _checked(
            indices[..., axis], data.shape[axis], validate_indices
        )
    inner = data.shape[depth:]
    table = data.reshape(math.prod(data.shape[:depth]), *inner)
    return _scattered(table, rows.reshape(-1), updates.reshape(-1, *inner), mode).reshape(
        data.shape
    )


OPS: dict[str, Callable[..., Tensor]] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}
