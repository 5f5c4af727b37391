"""Ops that move, make and order elements, where value inference gives no answer.

The rest of these groups is checked in test_ops_inference.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from edgekit_coreml import ops

OPS: dict[str, Any] = {**ops.OPS}
few = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(1, 3)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def _numbered(*shape: int) -> Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape)


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@few
@given(small, small, small, small, st.integers(2, 3))
def test_blocks_of_space_by_their_indices(n: int, c: int, h: int, w: int, b: int) -> None:
    """depth_to_space takes the block from the outer channels, pixel_shuffle from the inner."""
    x, size = _numbered(n, c * b * b, h, w), torch.tensor(b)
    outer, inner = OPS["depth_to_space"](x=x, block_size=size), F.pixel_shuffle(x, b)
    torch.testing.assert_close(OPS["pixel_shuffle"](x=x, upscale_factor=size), inner)
    for channel, row, column in itertools.product(range(c), range(h * b), range(w * b)):
        source = (row % b * b + column % b) * c + channel
        torch.testing.assert_close(
            outer[:, channel, row, column], x[:, source, row // b, column // b]
        )
    torch.testing.assert_close(OPS["space_to_depth"](x=outer, block_size=size), x)
    torch.testing.assert_close(OPS["pixel_unshuffle"](x=inner, downscale_factor=size), x)


def test_space_to_batch_and_back() -> None:
    """The example of TensorFlow's operator, whose order of batches MIL has."""
    x = torch.arange(1.0, 17).reshape(2, 1, 2, 4)
    y = OPS["space_to_batch"](
        x=x, block_shape=_int32(2, 2), paddings=_int32(0, 0, 2, 0).reshape(2, 2)
    )
    rows = [[0, 1, 3], [0, 9, 11], [0, 2, 4], [0, 10, 12], [0, 5, 7], [0, 13, 15]]
    assert y[:6, 0, 0].tolist() == rows
    assert y[6:, 0, 0].tolist() == [[0, 6, 8], [0, 14, 16]]
    back = OPS["batch_to_space"](
        x=y, block_shape=_int32(2, 2), crops=_int32(0, 0, 2, 0).reshape(2, 2)
    )
    torch.testing.assert_close(back, x)


@few
@given(small, small, small, small, st.tuples(small, small), st.lists(small, min_size=4, max_size=4))
def test_space_to_batch_by_its_indices(
    n: int, c: int, h: int, w: int, block: tuple[int, int], pads: list[int]
) -> None:
    p, q = block
    top, left = pads[0], pads[2]
    pads[1] += -(h + top + pads[1]) % p
    pads[3] += -(w + left + pads[3]) % q
    x = _numbered(n, c, h, w) + 1
    y = OPS["space_to_batch"](x=x, block_shape=_int32(p, q), paddings=_int32(*pads).reshape(2, 2))
    assert y.shape == (n * p * q, c, (h + sum(pads[:2])) // p, (w + sum(pads[2:])) // q)
    for batch, row, column in itertools.product(*map(range, (len(y), *y.shape[2:]))):
        place, image = divmod(batch, n)
        i, j = row * p + place // q - top, column * q + place % q - left
        inside = 0 <= i < h and 0 <= j < w
        expected = x[image, :, i, j] if inside else torch.zeros(c)
        torch.testing.assert_close(y[batch, :, row, column], expected)
    crops = _int32(*pads).reshape(2, 2)
    torch.testing.assert_close(OPS["batch_to_space"](x=y, block_shape=_int32(p, q), crops=crops), x)


@few
@given(shapes, st.data())
def test_sliding_windows(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = data.draw(st.integers(1, shape[axis]))
    stride = data.draw(small)
    x = _numbered(*shape)
    y = OPS["sliding_windows"](
        x=x, axis=torch.tensor(axis), size=torch.tensor(size), stride=torch.tensor(stride)
    )
    place = axis % len(shape)
    count = (shape[axis] - size) // stride + 1
    rows = [x.numpy().take(range(k * stride, k * stride + size), place) for k in range(count)]
    np.testing.assert_array_equal(y, np.stack(rows, place))


def test_sliding_windows_move_by_one() -> None:
    y = OPS["sliding_windows"](x=_numbered(4), axis=torch.tensor(0), size=torch.tensor(3))
    assert y.tolist() == [[0, 1, 2], [1, 2, 3]]


@few
@given(shapes.filter(lambda shape: len(shape) > 1), st.data())
def test_reverse_sequence(shape: list[int], data: st.DataObject) -> None:
    axes = data.draw(st.permutations(range(len(shape))))[:2]
    batch, along = axes
    lengths = [data.draw(st.integers(0, shape[along])) for _ in range(shape[batch])]
    x = _numbered(*shape)
    expected = np.moveaxis(x.numpy().copy(), (batch, along), (0, 1))
    for row, length in enumerate(lengths):
        expected[row, :length] = expected[row, :length][::-1].copy()
    y = OPS["reverse_sequence"](
        x=x,
        lengths=_int32(*lengths),
        seq_axis=torch.tensor(along - len(shape)),
        batch_axis=torch.tensor(batch),
    )
    np.testing.assert_array_equal(y, np.moveaxis(expected, (0, 1), (batch, along)))


def test_concat_interleaved_is_the_references_example() -> None:
    values = (_numbered(3, 2) + 1, _numbered(3, 2) + 7)
    y = OPS["concat"](values=values, axis=torch.tensor(0), interleave=torch.tensor(True))
    assert y.tolist() == [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]
    y = OPS["concat"](values=values, axis=torch.tensor(-1), interleave=torch.tensor(True))
    assert y[0].tolist() == [1, 7, 2, 8]


def test_concat_joins_scalars() -> None:
    values = (torch.tensor(1), torch.tensor(2))
    assert OPS["concat"](values=values, axis=torch.tensor(0)).tolist() == [1, 2]


def test_reshape_counts_zeros_from_the_right() -> None:
    """The example of the iOS17 reference."""
    y = OPS["reshape"](x=_numbered(2, 50), shape=_int32(1, 0, -1, 0))
    assert y.shape == (1, 1, 2, 50)


def test_reshape_like_joins_parts_of_shapes() -> None:
    y = OPS["reshape_like"](
        x=_numbered(180),
        ref_tensors=(torch.zeros(2, 3, 4), torch.zeros(1, 5, 6)),
        begins=(torch.tensor(0), torch.tensor(1)),
        ends=(torch.tensor(2), torch.tensor(0)),
        end_masks=(torch.tensor(False), torch.tensor(True)),
    )
    assert y.shape == (2, 3, 5, 6)


def test_squeeze_leaves_longer_axes() -> None:
    assert OPS["squeeze"](x=torch.zeros(2, 1, 4), axes=_int32(0, 1)).shape == (2, 4)


def test_split_into_equal_or_stated_parts() -> None:
    x, axis = _numbered(2, 6), torch.tensor(-1)
    parts = OPS["split"](x=x, axis=axis, num_splits=torch.tensor(3))
    assert [part.shape for part in parts] == [(2, 2)] * 3
    # Where both are stated the sizes count.
    parts = OPS["split"](x=x, axis=axis, num_splits=torch.tensor(2), split_sizes=_int32(1, 5))
    assert [part.shape[1] for part in parts] == [1, 5]
    with pytest.raises(ValueError, match="num_splits or split_sizes"):
        OPS["split"](x=x, axis=axis)


@few
@given(st.lists(st.integers(2, 4), min_size=1, max_size=5), st.data())
def test_pad_takes_every_rank(shape: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(shape)))
    pads = [(data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))) for n in shape]
    pads = [(0, 0)] * (len(shape) - count) + pads[len(shape) - count :]
    flat = [number for pair in pads[len(shape) - count :] for number in pair]
    x = _numbered(*shape)
    for mode, other in {"constant": "constant", "reflect": "reflect", "replicate": "edge"}.items():
        y = OPS["pad"](x=x, pad=_int32(*flat), mode=mode)
        np.testing.assert_array_equal(y, np.pad(x.numpy(), pads, other))  # type: ignore[call-overload]


def test_pad_refuses_a_mode_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'circular'"):
        OPS["pad"](x=_numbered(3), pad=_int32(1, 1), mode="circular")


def test_crop_takes_off_both_ends() -> None:
    y = OPS["crop"](x=_numbered(1, 1, 4, 4), crop_height=_int32(0, 1), crop_width=_int32(1, 1))
    assert y.reshape(3, 2).tolist() == [[1, 2], [5, 6], [9, 10]]


@few
@given(shapes, st.data())
def test_cumsum_in_its_four_forms(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = torch.from_numpy(np.random.default_rng(0).integers(-9, 9, shape).astype(np.int32))
    for exclusive, reverse in itertools.product([False, True], repeat=2):
        y = OPS["cumsum"](
            x=x,
            axis=torch.tensor(axis),
            exclusive=torch.tensor(exclusive),
            reverse=torch.tensor(reverse),
        )
        assert y.dtype == torch.int32
        values = np.moveaxis(x.numpy(), axis, 0)
        expected = np.zeros_like(values)
        for i in range(len(values)):
            seen = slice(i + exclusive, None) if reverse else slice(0, i + (not exclusive))
            expected[i] = values[seen].sum(0)
        np.testing.assert_array_equal(y, np.moveaxis(expected, 0, axis))


@few
@given(st.lists(st.integers(-2, 5), min_size=1, max_size=4), st.integers(-3, 2))
def test_one_hot(indices: list[int], axis: int) -> None:
    index = _int32(*indices).reshape(1, -1)
    y = OPS["one_hot"](
        indices=index,
        one_hot_vector_size=torch.tensor(4),
        axis=torch.tensor(axis),
        on_value=torch.tensor(2.0),
        off_value=torch.tensor(-1.0),
    )
    rows = torch.full((1, len(indices), 4), -1.0)
    for place, value in enumerate(indices):
        if 0 <= value < 4:
            rows[0, place, value] = 2.0
    torch.testing.assert_close(y, rows.movedim(-1, axis))


def test_one_hot_of_whole_numbers_and_of_a_scalar() -> None:
    y = OPS["one_hot"](indices=torch.tensor(1), one_hot_vector_size=torch.tensor(3))
    assert y.tolist() == [0, 1, 0]
    assert not y.is_floating_point()


def test_sorts_keep_the_order_of_equals() -> None:
    x = torch.tensor([2.0, 1.0, 2.0, 1.0])
    assert OPS["argsort"](x=x).tolist() == [0, 2, 1, 3]
    assert OPS["argsort"](x=x, ascending=torch.tensor(True)).tolist() == [1, 3, 0, 2]
    values, order = OPS["topk"](x=x, k=torch.tensor(3))
    assert (values.tolist(), order.tolist()) == ([2, 2, 1], [0, 2, 1])
    assert order.dtype == torch.int32


def test_topk_may_take_all_and_keep_its_indices() -> None:
    x = torch.tensor([[3, 1], [2, 4]], dtype=torch.int32)
    only = OPS["topk"](
        x=x, k=torch.tensor(-1), axis=torch.tensor(0), ascending=torch.tensor(True),
        return_indices=torch.tensor(False),
    )  # fmt: skip
    assert only.tolist() == [[2, 1], [3, 4]]


def test_made_values_have_the_type_of_their_filler() -> None:
    whole = OPS["fill"](shape=_int32(2, 1), value=torch.tensor(4, dtype=torch.int32))
    assert (whole.dtype, whole.tolist()) == (torch.int32, [[4], [4]])
    assert OPS["fill"](shape=_int32(2)).dtype == torch.float32
    like = OPS["fill_like"](ref_tensor=whole, value=torch.tensor(True))
    assert (like.dtype, like.shape) == (torch.bool, (2, 1))


def test_shape_and_non_zero_are_int32() -> None:
    x = torch.tensor([[0, 5], [7, 0]])
    assert OPS["shape"](x=torch.zeros(2, 0)).tolist() == [2, 0]
    found = OPS["non_zero"](x=x)
    assert (found.dtype, found.tolist()) == (torch.int32, [[0, 1], [1, 0]])


@pytest.mark.parametrize("name", ["relu", "reverse", "shape", "non_zero", "cumsum", "softmax"])
def test_no_elements_are_no_trouble(name: str) -> None:
    y = OPS[name](x=torch.zeros(0, 3))
    assert y.shape == {"shape": (2,), "non_zero": (0, 2)}.get(name, (0, 3))


def test_no_elements_move_too() -> None:
    x = torch.zeros(2, 0, 3)
    assert OPS["flatten2d"](x=x, axis=torch.tensor(1)).shape == (2, 0)
    assert OPS["transpose"](x=x, perm=_int32(-1, 0, 1)).shape == (3, 2, 0)
    assert OPS["concat"](values=(x, x), axis=torch.tensor(0)).shape == (4, 0, 3)
