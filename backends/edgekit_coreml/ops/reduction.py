"""The reductions. Source: the MIL op reference, group reduction.

Without ``axes`` every axis is reduced. An integer input gives an integer result, cut toward zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Flag, Whole, Wholes, as_dtype, flag, integer, ints

Reducer: TypeAlias = Callable[[Tensor, list[int], bool], Tensor]


def _over_axes(reducer: Reducer) -> Callable[..., Tensor]:
    def op(x: Tensor, axes: Wholes | None = None, keep_dims: Flag = False) -> Tensor:
        dims = list(range(x.dim())) if axes is None else ints(axes)
        values = x if x.is_floating_point() else x.double()
        if dims:
            y = reducer(values, dims, flag(keep_dims))
        else:  # torch reads an empty list as all axes
            y = reducer(values.unsqueeze(-1), [-1], False)
        return y.to(x.dtype)

    return op


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted({dim % x.dim() for dim in dims}, reverse=True):
        x = torch.prod(x, dim, keepdim=keep)
    return x


def _over_axis(choose: Callable[[Tensor, int, bool], Tensor]) -> Callable[..., Tensor]:
    def op(
        x: Tensor, axis: Whole = -1, keep_dims: Flag = False, output_dtype: str = "int32"
    ) -> Tensor:
        return as_dtype(choose(x, integer(axis), flag(keep_dims)), output_dtype)

    return op


OPS: dict[str, Callable[..., Tensor]] = {
    "reduce_argmax": _over_axis(lambda x, dim, keep: torch.argmax(x, dim, keep)),
    "reduce_argmin": _over_axis(lambda x, dim, keep: torch.argmin(x, dim, keep)),
    "reduce_l1_norm": _over_axes(lambda x, dims, keep: x.abs().sum(dims, keep)),
    "reduce_l2_norm": _over_axes(lambda x, dims, keep: x.square().sum(dims, keep).sqrt()),
    "reduce_log_sum": _over_axes(lambda x, dims, keep: x.sum(dims, keep).log()),
    "reduce_log_sum_exp": _over_axes(lambda x, dims, keep: torch.logsumexp(x, dims, keep)),
    "reduce_max": _over_axes(lambda x, dims, keep: torch.amax(x, dims, keep)),
    "reduce_mean": _over_axes(lambda x, dims, keep: x.mean(dims, keep)),
    "reduce_min": _over_axes(lambda x, dims, keep: torch.amin(x, dims, keep)),
    "reduce_prod": _over_axes(_product),
    "reduce_sum": _over_axes(lambda x, dims, keep: x.sum(dims, keep)),
    "reduce_sum_square": _over_axes(lambda x, dims, keep: x.square().sum(dims, keep)),
}
