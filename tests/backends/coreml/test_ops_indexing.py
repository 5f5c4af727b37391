"""Slices, gathers and scatters against numpy indexing and loops in the reference's words."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekit_coreml import ops

OPS: dict[str, Any] = {**ops.OPS}
few = settings(max_examples=30, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
MODES = ["update", "add", "sub", "mul", "div", "max", "min"]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def _int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def _slices(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(shapes)
    axis = [
        {
            "begin": draw(st.integers(-n, n - 1)),
            "end": draw(st.integers(-n - 1, n + 2)),
            "stride": draw(st.sampled_from([1, 2, 3, -1, -2])),
            "begin_mask": draw(st.booleans()),
            "end_mask": draw(st.booleans()),
            "squeeze_mask": draw(st.sampled_from([False, False, True])),
        }
        for n in shape
    ]
    return {"shape": shape, **{key: [one[key] for one in axis] for key in axis[0]}}


def _indices(case: dict[str, Any]) -> tuple[Any, ...]:
    """What the same op would be in numpy."""
    found: list[Any] = []
    for axis in range(len(case["shape"])):
        first = None if case["begin_mask"][axis] else case["begin"][axis]
        if case["squeeze_mask"][axis]:
            found.append(0 if first is None else first)
        else:
            last = None if case["end_mask"][axis] else case["end"][axis]
            found.append(slice(first, last, case["stride"][axis]))
    return tuple(found)


def _arguments(case: dict[str, Any]) -> dict[str, Tensor]:
    masks = {key: torch.tensor(case[key]) for key in ("begin_mask", "end_mask", "squeeze_mask")}
    return {**{key: _int32(case[key]) for key in ("begin", "end", "stride")}, **masks}


@few
@given(_slices())
def test_a_slice_is_numpys(case: dict[str, Any]) -> None:
    x = _random(0, *case["shape"])
    y = OPS["slice_by_index"](x=x, **_arguments(case))
    np.testing.assert_array_equal(y, x.numpy()[_indices(case)])


@few
@given(_slices())
def test_an_updated_slice_is_numpys(case: dict[str, Any]) -> None:
    x = _random(0, *case["shape"])
    kept, expected = x.clone(), x.numpy().copy()
    update = _random(1, *expected[_indices(case)].shape)
    expected[_indices(case)] = update
    y = OPS["slice_update"](x=x, update=update, **_arguments(case))
    np.testing.assert_array_equal(y, expected)
    torch.testing.assert_close(x, kept)  # a state may still hold it


def test_slices_without_strides_and_masks() -> None:
    x = _random(0, 4, 5)
    y = OPS["slice_by_index"](x=x, begin=_int32([1, -2]), end=_int32([3, 99]))
    torch.testing.assert_close(y, x[1:3, -2:])
    y = OPS["slice_by_size"](x=x, begin=_int32([1, -2]), size=_int32([-1, 1]))
    torch.testing.assert_close(y, x[1:, 3:4])


@few
@given(st.data())
def test_gather_takes_slices(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    batch = data.draw(st.integers(0, len(shape) - 1))
    axis = data.draw(st.integers(batch, len(shape) - 1))
    picked = data.draw(st.lists(st.integers(1, 2), max_size=2))
    count = math.prod(shape[:batch]) * math.prod(picked)
    index = st.lists(st.integers(-shape[axis], shape[axis] - 1), min_size=count, max_size=count)
    indices = np.array(data.draw(index)).reshape(shape[:batch] + picked)
    x = _random(0, *shape)
    y = OPS["gather"](
        x=x,
        indices=_int32(indices.tolist()),
        axis=torch.tensor(axis - len(shape)),
        batch_dims=torch.tensor(batch),
    )
    assert list(y.shape) == shape[:axis] + picked + shape[axis + 1 :]
    for place in itertools.product(*map(range, y.shape)):
        before, at = place[:axis], place[axis : axis + len(picked)]
        found = indices[(*place[:batch], *at)]
        assert y[place] == x[(*before, found, *place[axis + len(picked) :])]


@few
@given(shapes, st.data())
def test_gather_along_an_axis_is_numpys(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x, sizes = _random(0, *shape), list(shape)
    sizes[axis] = data.draw(st.integers(1, 5))
    indices = np.random.default_rng(0).integers(-shape[axis], shape[axis], sizes)
    y = OPS["gather_along_axis"](x=x, indices=_int32(indices.tolist()), axis=torch.tensor(axis))
    np.testing.assert_array_equal(y, np.take_along_axis(x.numpy(), indices, axis))


@few
@given(st.data())
def test_gather_nd_addresses_by_its_last_axis(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    batch = data.draw(st.integers(0, len(shape) - 1))
    depth = data.draw(st.integers(0 if batch else 1, len(shape) - batch))
    lead = shape[:batch] + data.draw(st.lists(st.integers(1, 3), max_size=2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    bounds = [rng.integers(-n, n, lead) for n in shape[batch : batch + depth]]
    indices = np.stack(bounds, -1) if bounds else np.zeros((*lead, 0), int)
    x = _random(0, *shape)
    y = OPS["gather_nd"](
        x=x, indices=torch.from_numpy(indices.astype(np.int32)), batch_dims=torch.tensor(batch)
    )
    assert list(y.shape) == lead + shape[batch + depth :]
    for place in itertools.product(*map(range, lead)):
        address = (*place[:batch], *(int(i) for i in indices[place]))
        torch.testing.assert_close(y[place], x[address])


def _merge(old: Any, new: Any, mode: str) -> Any:
    return {
        "update": lambda: new,
        "add": lambda: old + new,
        "sub": lambda: old - new,
        "mul": lambda: old * new,
        "div": lambda: old / new,
        "max": lambda: np.maximum(old, new),
        "min": lambda: np.minimum(old, new),
    }[mode]()


@few
@given(shapes, st.sampled_from(MODES), st.data())
def test_scatter_writes_slices_in_order(shape: list[int], mode: str, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = shape[axis]
    indices = data.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=4))
    x = _random(0, *shape)
    updates = _random(1, *shape[:axis], len(indices), *shape[axis + 1 :])
    expected = np.moveaxis(x.double().numpy(), axis, 0)
    for index, update in zip(indices, np.moveaxis(updates.numpy(), axis, 0), strict=True):
        expected[index] = _merge(expected[index], update, mode)
    y = OPS["scatter"](
        data=x,
        indices=_int32(indices),
        updates=updates,
        axis=torch.tensor(axis - len(shape)),
        mode=mode,
    )
    np.testing.assert_allclose(y, np.moveaxis(expected, 0, axis), rtol=1e-5)


@few
@given(shapes, st.sampled_from(MODES), st.data())
def test_scatter_along_an_axis_writes_elements_in_order(
    shape: list[int], mode: str, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    sizes = list(shape)
    sizes[axis] = data.draw(st.integers(1, 4))
    indices = np.random.default_rng(1).integers(-shape[axis], shape[axis], sizes)
    x, updates = _random(0, *shape), _random(1, *sizes)
    expected = x.double().numpy()
    for place in itertools.product(*map(range, sizes)):
        target = (*place[:axis], indices[place], *place[axis + 1 :])
        expected[target] = _merge(expected[target], updates[place].item(), mode)
    y = OPS["scatter_along_axis"](
        data=x,
        indices=_int32(indices.tolist()),
        updates=updates,
        axis=torch.tensor(axis),
        mode=mode,
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5)


@few
@given(shapes, st.sampled_from(MODES), st.data())
def test_scatter_nd_writes_where_its_last_axis_says(
    shape: list[int], mode: str, data: st.DataObject
) -> None:
    depth = data.draw(st.integers(1, len(shape)))
    lead = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    indices = np.stack([rng.integers(-n, n, lead) for n in shape[:depth]], -1)
    x, updates = _random(0, *shape), _random(1, *lead, *shape[depth:])
    expected = x.double().numpy()
    for place in itertools.product(*map(range, lead)):
        target = tuple(indices[place])
        expected[target] = _merge(expected[target], updates[place].numpy(), mode)
    y = OPS["scatter_nd"](data=x, indices=_int32(indices.tolist()), updates=updates, mode=mode)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_scatters_add_by_default_and_keep_integers() -> None:
    """The example of the reference."""
    x = _int32([[1, 2, 3], [4, 5, 6]])
    updates = _int32([[5, 6, 7], [8, 9, 10]])
    y = OPS["scatter"](data=x, indices=_int32([1, 0]), updates=updates)
    assert (y.dtype, y.tolist()) == (torch.int32, [[9, 11, 13], [9, 11, 13]])
    for mode in MODES:
        kept = OPS["scatter"](data=x, indices=_int32([1, 0]), updates=updates, mode=mode)
        assert kept.dtype == torch.int32
    with pytest.raises(ValueError, match="'average'"):
        OPS["scatter"](data=x, indices=_int32([1, 0]), updates=updates, mode="average")


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_out_of_bounds_is_an_error(index: int) -> None:
    x, out = _random(0, 3), _int32([index])
    for name in ("gather", "gather_along_axis"):
        with pytest.raises(IndexError, match="size 3"):
            OPS[name](x=x, indices=out)
    with pytest.raises(IndexError, match="size 3"):
        OPS["gather_nd"](x=x, indices=out[:, None])
    for name in ("scatter", "scatter_along_axis"):
        with pytest.raises(IndexError, match="size 3"):
            OPS[name](data=x, indices=out, updates=torch.zeros(1))
    with pytest.raises(IndexError, match="size 3"):
        OPS["scatter_nd"](data=x, indices=out[:, None], updates=torch.zeros(1))


def test_a_validated_index_does_not_count_from_the_end() -> None:
    x, last, valid = _random(0, 3), _int32([-1]), torch.tensor(True)
    assert OPS["gather"](x=x, indices=last) == x[2]
    with pytest.raises(IndexError, match="size 3"):
        OPS["gather"](x=x, indices=last, validate_indices=valid)
    with pytest.raises(IndexError, match="size 3"):
        OPS["scatter"](data=x, indices=last, updates=x[:1], validate_indices=valid)
