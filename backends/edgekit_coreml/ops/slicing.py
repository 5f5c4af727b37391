"""Slices read and slices written. Source: the MIL op reference, group tensor_transformation.

Bounds follow numpy: negative ones count from the end, those out of range are clamped, and a masked
one is left out, which for a negative stride is the other end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Wholes, flags, ints

# Where squeezed, one element is taken, whatever the end says: files hold anything there.
_FAR = 2**31 - 1


def _slices(
    x: Tensor,
    begin: Wholes,
    end: Wholes,
    stride: Wholes | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> tuple[list[range], list[int]]:
    """The places taken along each axis, and the axes to squeeze."""
    steps = [1] * x.dim() if stride is None else ints(stride)
    opened, closed, squeezed = (flags(m, x.dim()) for m in (begin_mask, end_mask, squeeze_mask))
    places = []
    for axis, (first, last, step) in enumerate(zip(ints(begin), ints(end), steps, strict=True)):
        taken = slice(
            None if opened[axis] else first,
            None if closed[axis] or squeezed[axis] else last,
            _FAR if squeezed[axis] else step,
        )
        places.append(range(*taken.indices(x.shape[axis])))
    return places, [axis for axis, gone in enumerate(squeezed) if gone]


def _taken(x: Tensor, places: list[range]) -> Tensor:
    for axis, at in enumerate(places):
        if at.step > 0:
            x = x[(slice(None),) * axis + (slice(at.start, at.stop, at.step),)]
        else:  # torch has no negative steps
            x = x.index_select(axis, torch.tensor(list(at), dtype=torch.int64))
    return x


def slice_by_index(
    x: Tensor,
    begin: Wholes,
    end: Wholes,
    stride: Wholes | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    places, gone = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    taken = _taken(x, places)
    return taken.squeeze(tuple(gone)) if gone else taken


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Wholes,
    end: Wholes,
    stride: Wholes | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    places, _ = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    backward = [axis for axis, at in enumerate(places) if at.step < 0]
    patch = update.reshape([len(at) for at in places]).flip(backward)
    y = x.clone()
    _taken(y, [at[::-1] if at.step < 0 else at for at in places]).copy_(patch)
    return y


def slice_by_size(x: Tensor, begin: Wholes, size: Wholes) -> Tensor:
    """A size of -1 takes the rest."""
    for axis, (first, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start = first + x.shape[axis] if first < 0 else first
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


OPS: dict[str, Callable[..., Tensor]] = {
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
}
