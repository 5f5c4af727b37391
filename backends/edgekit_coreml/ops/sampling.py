"""Reads images between their pixels: positions along an axis, and points in a plane.

What resizing.py builds its ops from. Source: the notes of MIL's resize_bilinear and resample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grid(mode: str, start: Tensor, end: Tensor, count: int) -> Tensor:
    """The ``count`` positions, along a last axis, at which a mode samples the pixels start..end.

    A whole axis of n pixels is 0..n-1. The reference gives every mode in these terms, for resizes
    and for crops, whose bounds may lie between pixels or run backward.
    """
    start, end = start.double().unsqueeze(-1), end.double().unsqueeze(-1)
    size = end - start + 1
    steps = torch.arange(count, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count > 1:
            return start + steps * (size - 1) / (count - 1)
        middle = (start + end) / 2
        return middle if mode == "ALIGN_CORNERS" else start
    if mode == "DEFAULT":
        return start + steps * size / count
    if mode == "OFFSET_CORNERS":
        return start + (steps + 0.5) * (size - 1).clamp(min=1) / count
    if mode == "UNALIGN_CORNERS":
        return start + (steps + 0.5) * size / count - 0.5
    raise ValueError(f"there is no sampling mode {mode!r}")


def axis_grid(mode: str, size: int, count: int) -> Tensor:
    """The positions at which a resize from ``size`` to ``count`` samples a whole axis."""
    bounds = torch.tensor([0, size - 1])
    return grid(mode, bounds[0], bounds[1], count).clamp(0, size - 1)


def interpolated(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    """``x`` read at positions along one axis, linearly between its two neighbours."""
    low = positions.floor()
    share = (positions - low).to(x.dtype)
    before = low.long()
    after = (before + 1).clamp(max=x.shape[axis] - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    left, right = x.index_select(axis, before), x.index_select(axis, after)
    return torch.lerp(left, right, share.reshape(shape))


def nearest(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    """``x`` read at the pixels that hold the positions."""
    return x.index_select(axis, positions.floor().long().clamp(0, x.shape[axis] - 1))


def _folded(points: Tensor, size: int, padding: str) -> Tensor:
    """Coordinates brought into the image, before any rounding, as the padding repeats it."""
    if padding == "border":
        return points.clamp(0, size - 1)
    if padding == "constant":
        return points
    if padding not in ("reflection", "symmetric"):
        raise ValueError(f"there is no padding mode {padding!r}")
    # Mirrors stand in the centers of the outer pixels, or on their outer edges.
    edge, length = (0.0, size - 1) if padding == "reflection" else (-0.5, size)
    if length == 0:
        return torch.zeros_like(points)
    turn = torch.remainder(points - edge, 2 * length)
    return (torch.minimum(turn, 2 * length - turn) + edge).clamp(0, size - 1)


def _pixels(x: Tensor, row: Tensor, column: Tensor, value: float) -> Tensor:
    """``x [B, C, H, W]`` at whole rows and columns ``[B, h, w]``, and the value outside of it."""
    height, width = x.shape[-2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    rows, columns = row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()
    batch = torch.arange(len(x)).reshape(-1, 1, 1)
    found = x[batch, :, rows, columns].permute(0, 3, 1, 2)
    return torch.where(inside.unsqueeze(1), found, value)


def sampled(x: Tensor, points: Sequence[Tensor], mode: str, padding: str, value: float) -> Tensor:
    """``x [B, C, H, W]`` at pixel coordinates: columns and rows, each ``[B, h, w]``."""
    column, row = (_folded(p, x.shape[-1 - i], padding) for i, p in enumerate(points))
    if mode == "nearest":
        return _pixels(x, row.round(), column.round(), value)
    if mode != "bilinear":
        raise ValueError(f"there is no sampling mode {mode!r}")
    top, left = row.floor(), column.floor()
    down, right = ((p - q).to(x.dtype).unsqueeze(1) for p, q in ((row, top), (column, left)))
    # The neighbour of a point on the last pixel weighs nothing, and must not be a padding's NaN.
    under, beside = (
        (top + 1, left + 1)
        if padding == "constant"
        else ((top + 1).clamp(max=x.shape[-2] - 1), (left + 1).clamp(max=x.shape[-1] - 1))
    )
    corners = [_pixels(x, i, j, value) for i in (top, under) for j in (left, beside)]
    above = corners[0] * (1 - right) + corners[1] * right
    below = corners[2] * (1 - right) + corners[3] * right
    return above * (1 - down) + below * down
