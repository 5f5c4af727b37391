"""The ops that make values from sizes, orders and counts. Source: MIL's group tensor_operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import (
    Flag,
    Whole,
    Wholes,
    as_dtype,
    axis_of,
    flag,
    integer,
    ints,
)


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def fill(shape: Wholes, value: Tensor | float = 0.0) -> Tensor:
    """The type is the value's."""
    filler = torch.as_tensor(value)
    return filler.reshape(()).expand(ints(shape)).clone()


def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return fill(ref_tensor.shape, value)


def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def one_hot(
    indices: Tensor,
    one_hot_vector_size: Whole,
    axis: Whole = -1,
    on_value: Tensor | int = 1,
    off_value: Tensor | int = 0,
) -> Tensor:
    """An index outside the vector lights nothing."""
    on, off = torch.as_tensor(on_value), torch.as_tensor(off_value)
    lit = indices.unsqueeze(-1) == torch.arange(integer(one_hot_vector_size))
    return torch.where(lit, on, off).movedim(-1, axis_of(axis, indices.dim() + 1))


def band_part(x: Tensor, lower: Whole = -1, upper: Whole = -1) -> Tensor:
    """A negative bound keeps that whole triangle."""
    rows, columns = torch.arange(x.shape[-2]).unsqueeze(-1), torch.arange(x.shape[-1])
    below, above = integer(lower), integer(upper)
    kept = torch.ones(x.shape[-2:], dtype=torch.bool)
    if below >= 0:
        kept &= rows - columns <= below
    if above >= 0:
        kept &= columns - rows <= above
    return torch.where(kept, x, torch.zeros_like(x))


def cumsum(x: Tensor, axis: Whole = 0, exclusive: Flag = False, reverse: Flag = False) -> Tensor:
    place = axis_of(axis, x.dim())
    turned = x.flip(place) if flag(reverse) else x
    sums = turned.cumsum(place)
    if flag(exclusive) and x.shape[place]:
        first = torch.zeros_like(sums.narrow(place, 0, 1))
        sums = torch.cat([first, sums.narrow(place, 0, x.shape[place] - 1)], place)
    return (sums.flip(place) if flag(reverse) else sums).to(x.dtype)


def argsort(x: Tensor, axis: Whole = -1, ascending: Flag = False) -> Tensor:
    """Equal elements keep their order."""
    order = torch.argsort(x, dim=integer(axis), descending=not flag(ascending), stable=True)
    return order.to(torch.int32)


def topk(
    x: Tensor,
    k: Whole = 1,
    axis: Whole = -1,
    ascending: Flag = False,
    sort: Flag = True,
    return_indices: Flag = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    """A ``k`` of -1 takes all. Without ``sort`` the order is open, so here it is sorted too."""
    place = axis_of(axis, x.dim())
    count = x.shape[place] if integer(k) == -1 else integer(k)
    order = argsort(x, place, ascending).narrow(place, 0, count)
    values = x.gather(place, order.long())
    return (values, as_dtype(order, output_indices_dtype)) if flag(return_indices) else values


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).to(torch.int32)


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "argsort": argsort,
    "band_part": band_part,
    "cumsum": cumsum,
    "fill": fill,
    "fill_like": fill_like,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "range_1d": range_1d,
    "shape": shape,
    "topk": topk,
}
