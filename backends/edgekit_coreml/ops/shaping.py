"""The ops that move elements without changing them: shapes, joins, blocks of space.

Source: the MIL op reference, groups tensor_transformation and tensor_operation. What picks
elements by index is in indexing.py; what makes new ones is in creation.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit_coreml.ops.arguments import (
    Flag,
    Whole,
    Wholes,
    axis_of,
    flag,
    integer,
    ints,
)


def reshape(x: Tensor, shape: Wholes) -> Tensor:
    """A 0 takes the size of ``x`` in that place, counted from the right as iOS17 does.

    Before iOS17 a 0 needs equal ranks, where both directions agree.
    """
    target = ints(shape)
    sizes = [1] * (len(target) - x.dim()) + list(x.shape)
    kept = sizes[len(sizes) - len(target) :]
    return x.reshape([have if want == 0 else want for want, have in zip(target, kept, strict=True)])


def reshape_like(
    x: Tensor,
    ref_tensors: tuple[Tensor, ...],
    begins: tuple[Tensor, ...],
    ends: tuple[Tensor, ...],
    end_masks: tuple[Tensor, ...],
) -> Tensor:
    shape: list[int] = []
    for ref, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += ref.shape[integer(begin) : None if flag(masked) else integer(end)]
    return x.reshape(shape)


def flatten2d(x: Tensor, axis: Whole = 1) -> Tensor:
    # Sizes by hand: -1 cannot be worked out of no elements.
    before, after = x.shape[: integer(axis)], x.shape[integer(axis) :]
    return x.reshape(math.prod(before), math.prod(after))


def expand_dims(x: Tensor, axes: Wholes) -> Tensor:
    added = ints(axes)
    rank = x.dim() + len(added)
    for axis in sorted(axis_of(axis, rank) for axis in added):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Wholes | None = None) -> Tensor:
    """An axis that is not of size 1 stays."""
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def transpose(x: Tensor, perm: Wholes) -> Tensor:
    return x.permute(ints(perm))


def identity(x: Tensor) -> Tensor:
    return x


def _at_least_1d(values: tuple[Tensor, ...]) -> list[Tensor]:
    return [value.reshape(1) if value.dim() == 0 else value for value in values]


def concat(values: tuple[Tensor, ...], axis: Whole, interleave: Flag = False) -> Tensor:
    """Scalars join as vectors of one. Interleaved, element i of every input comes before i + 1."""
    parts = _at_least_1d(values)
    place = axis_of(axis, parts[0].dim())
    if flag(interleave):
        return torch.stack(parts, place + 1).flatten(place, place + 1)
    return torch.cat(parts, place)


def stack(values: tuple[Tensor, ...], axis: Whole) -> Tensor:
    return torch.stack(values, integer(axis))


def split(
    x: Tensor, axis: Whole, num_splits: Whole | None = None, split_sizes: Wholes | None = None
) -> tuple[Tensor, ...]:
    place = axis_of(axis, x.dim())
    if split_sizes is not None:
        return tuple(torch.split(x, ints(split_sizes), place))
    if num_splits is None:
        raise ValueError("split needs num_splits or split_sizes")
    count = integer(num_splits)
    return tuple(torch.split(x, [x.shape[place] // count] * count, place))


def tile(x: Tensor, reps: Wholes) -> Tensor:
    return x.repeat(ints(reps))


def _reflected(size: int, before: int, after: int) -> Tensor:
    """The edge is not repeated: 2 1 | 0 1 2 | 1 0."""
    places = torch.arange(-before, size + after).abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)


def pad(
    x: Tensor, pad: Wholes, mode: str = "constant", constant_val: Tensor | float = 0.0
) -> Tensor:
    """Pads the last ``len(pad) / 2`` axes, listed from front to back."""
    flat = ints(pad)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    if mode == "constant":
        value = float(constant_val)
        return F.pad(x, [count for pair in reversed(pairs) for count in pair], value=value)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"pad has no mode {mode!r}")
    # By indices: F.pad has these modes for some ranks and some axes only.
    for axis, (before, after) in enumerate(pairs, start=x.dim() - len(pairs)):
        size = x.shape[axis]
        edge = torch.arange(-before, size + after).clamp(0, max(size - 1, 0))
        index = _reflected(size, before, after) if mode == "reflect" else edge
        x = x.index_select(axis, index)
    return x


def crop(x: Tensor, crop_height: Wholes, crop_width: Wholes) -> Tensor:
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def depth_to_space(x: Tensor, block_size: Whole) -> Tensor:
    """The block is the outer part of the channels; in pixel_shuffle it is the inner one."""
    b, (n, c, h, w) = integer(block_size), x.shape
    blocks = x.reshape(n, b, b, c // (b * b), h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Tensor, block_size: Whole) -> Tensor:
    b, (n, c, h, w) = integer(block_size), x.shape
    blocks = x.reshape(n, c, h // b, b, w // b, b)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def pixel_shuffle(x: Tensor, upscale_factor: Whole) -> Tensor:
    f, (n, c, h, w) = integer(upscale_factor), x.shape
    blocks = x.reshape(n, c // (f * f), f, f, h, w)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, c // (f * f), h * f, w * f)


def pixel_unshuffle(x: Tensor, downscale_factor: Whole) -> Tensor:
    f, (n, c, h, w) = integer(downscale_factor), x.shape
    blocks = x.reshape(n, c, h // f, f, w // f, f)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(n, c * f * f, h // f, w // f)


def space_to_batch(x: Tensor, block_shape: Wholes, paddings: Wholes) -> Tensor:
    """The place inside the block is the outer part of the new batch."""
    p, q = ints(block_shape)
    top, bottom, left, right = ints(paddings)
    padded = F.pad(x, [left, right, top, bottom])
    n, c, h, w = padded.shape
    blocks = padded.reshape(n, c, h // p, p, w // q, q)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(n * p * q, c, h // p, w // q)


def batch_to_space(x: Tensor, block_shape: Wholes, crops: Wholes) -> Tensor:
    p, q = ints(block_shape)
    top, bottom, left, right = ints(crops)
    n, c, h, w = x.shape
    blocks = x.reshape(p, q, n // (p * q), c, h, w).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(n // (p * q), c, h * p, w * q)
    return crop(whole, (top, bottom), (left, right))


def sliding_windows(x: Tensor, axis: Whole, size: Whole, stride: Whole = 1) -> Tensor:
    place = axis_of(axis, x.dim())
    return x.unfold(place, integer(size), integer(stride)).movedim(-1, place + 1)


def reverse(x: Tensor, axes: Wholes | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else ints(axes))


def reverse_sequence(
    x: Tensor, lengths: Wholes, seq_axis: Whole = 0, batch_axis: Whole = 0
) -> Tensor:
    along, batch = axis_of(seq_axis, x.dim()), axis_of(batch_axis, x.dim())
    rows = list(x.unbind(batch))
    along -= along > batch
    for index, length in enumerate(ints(lengths)):
        places = torch.arange(rows[index].shape[along])
        turned = torch.where(places < length, length - 1 - places, places)
        rows[index] = rows[index].index_select(along, turned)
    return torch.stack(rows, batch)


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "batch_to_space": batch_to_space,
    "concat": concat,
    "crop": crop,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "flatten2d": flatten2d,
    "identity": identity,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
