"""Ops written out in simpler ones, where a converter lacks them or gets them wrong (torch).

What only one converter needs stands beside it; here is what several do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgekit.graph import quiet

aten = torch.ops.aten


def written_out(
    exported: ExportedProgram, table: Mapping[Any, Callable[..., Any]]
) -> ExportedProgram:
    """``exported`` with the ops of ``table`` replaced by what its functions do.

    The same object where none of them occurs; names of other nodes stay.
    """
    if not any(node.target in table for node in exported.graph.nodes):
        return exported
    with quiet():
        replaced: ExportedProgram = exported.run_decompositions(dict(table))
    return replaced


def log_softmax(x: Tensor, axis: int, _dtype: object = None) -> Tensor:
    """Not the logarithm of a softmax, which may have rounded to 0."""
    shifted = x - x.amax(axis, keepdim=True)
    return shifted - torch.log(torch.exp(shifted).sum(axis, keepdim=True))


LOG_SOFTMAX = {aten.log_softmax.int: log_softmax, aten._log_softmax.default: log_softmax}


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """(..., C, H r, W r) to (..., C r r, H, W), channels outermost."""
    *batch, channels, height, width = x.shape
    axes = len(batch)
    rows, columns = height // factor, width // factor
    split = x.reshape(*batch, channels, rows, factor, columns, factor)
    order = (*range(axes + 1), axes + 2, axes + 4, axes + 1, axes + 3)
    return split.permute(order).reshape(*batch, channels * factor * factor, rows, columns)


def with_pool_strides(exported: ExportedProgram) -> ExportedProgram:
    """Write out the stride that ``F.max_pool2d(x, 2)`` leaves out: converters read it."""
    for node in exported.graph.nodes:
        if node.target in _POOLS and len(node.args) == 2:
            node.args = (*node.args, node.args[1])
    return exported


_POOLS = (
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
)
