"""CONSTANT, SHAPE, SHUFFLE, SLICE, CONCATENATION, SQUEEZE, FILL, PADDING against ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=4, database=None)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Start, end and step on an axis of 7, from either end and in either direction."""
    step = draw(st.sampled_from([1, 2, 3, -1, -2]))
    low, high = draw(st.integers(0, 2)), draw(st.integers(4, 7))
    start, end = (low, high) if step > 0 else (high - 1, low - 1)
    if draw(st.booleans()):
        start = start - 7 if start < 7 else start
        end = end - 7 if 0 <= end < 7 else end
    return start, end if end >= 0 or step > 0 else -100, step


@few
@given(each=st.lists(st.tuples(cuts(), cuts()), min_size=8, max_size=8))
def test_slices(ops: type[Ops], each: list[tuple[tuple[int, int, int], ...]]) -> None:
    graph = ops()
    for seed, pair in enumerate(each):
        starts, ends, steps = (
            ops.constant([cut[index] for cut in pair], "int64") for index in range(3)
        )
        axes = ops.constant([2, 0] if seed % 2 else [1, -1], "int64")
        x = ops.normal(7, 7, 7, seed=seed)
        graph.add("Slice", x, starts, ends, axes, steps)
    graph.check(0)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_padding_of_every_mode(ops: type[Ops], mode: str) -> None:
    graph = ops()
    x = ops.normal(3, 4, 5)
    pads = ops.constant([1, 0, 2, 2, 3, 1], "int64")
    fill = [ops.constant(0.5)] if mode == "constant" else []
    graph.add("Pad", x, pads, *fill, mode=mode)
    if mode == "constant":
        graph.add("Pad", x, pads)
        graph.add("Pad", x, ops.constant([0, -1, 1, 0, 0, -2], "int64"))  # crops
        graph.add("Pad", x, ops.constant([2, 1], "int64"), *fill, ops.constant([1], "int64"))
    graph.check(0)


@few
@given(order=st.permutations([0, 1, 2, 3]), data=st.data())
def test_transposes_and_reshapes(ops: type[Ops], order: list[int], data: st.DataObject) -> None:
    graph = ops()
    x = ops.normal(2, 3, 4, 5)
    graph.add("Transpose", x, perm=order)
    graph.add("Transpose", x)
    target = data.draw(st.permutations([2, 3, 4, 5]))
    graph.add("Reshape", x, ops.constant(target, "int64"))
    target[data.draw(st.integers(0, 3))] = -1
    graph.add("Reshape", x, ops.constant(target, "int64"))
    graph.add("Reshape", x, ops.constant([0, -1, 5], "int64"))
    graph.add("Flatten", x, axis=data.draw(st.integers(0, 4)))
    graph.check(0)


def test_axes_of_one(ops: type[Ops]) -> None:
    graph = ops()
    x = ops.normal(1, 3, 1, 4)
    graph.add("Squeeze", x)
    graph.add("Squeeze", x, ops.constant([0], "int64"))
    graph.add("Squeeze", x, ops.constant([-2, 0], "int64"))
    graph.add("Unsqueeze", x, ops.constant([0, -1], "int64"))
    graph.add("Unsqueeze", x, ops.constant([2], "int64"))
    graph.add("Reshape", ops.normal(1), ops.constant([], "int64"))  # to a scalar
    graph.add("Expand", x, ops.constant([2, 3, 5, 4], "int64"))
    graph.add("Tile", x, ops.constant([2, 1, 3, 2], "int64"))
    graph.check(0)


def test_shapes_are_values(ops: type[Ops]) -> None:
    graph = ops()
    x = ops.normal(2, 3, 4)
    graph.add("Shape", x)
    graph.add("Shape", x, start=1, end=-1)
    graph.add("Size", x)
    (shape,) = graph.inner("Shape", x)
    graph.add("ConstantOfShape", shape)
    (reversed_shape,) = graph.inner("Gather", shape, ops.constant([2, 1, 0], "int64"))
    graph.add("Reshape", x, reversed_shape)
    graph.check(0)


def test_joining_and_splitting(ops: type[Ops]) -> None:
    graph = ops()
    x, y = ops.normal(2, 3, 6), ops.normal(2, 5, 6)
    graph.add("Concat", x, y, axis=1)
    graph.add("Concat", x, x, x, axis=-1)
    graph.add("Split", x, outputs=3, axis=2, num_outputs=3)
    graph.add("Split", y, ops.constant([1, 4], "int64"), outputs=2, axis=1)
    graph.add("SpaceToDepth", ops.normal(1, 2, 4, 6), blocksize=2)
    graph.add("DepthToSpace", ops.normal(1, 8, 2, 3), blocksize=2, mode="DCR")
    graph.add("DepthToSpace", ops.normal(1, 8, 2, 3), blocksize=2, mode="CRD")
    graph.check(0)


def test_ranges_and_triangles(ops: type[Ops]) -> None:
    graph = ops()
    for dtype in ("int32", "int64", "float32"):
        graph.add("Range", *(ops.constant(value, dtype) for value in (2, 11, 3)))
        graph.add("Range", *(ops.constant(value, dtype) for value in (5, -4, -2)))
    x = ops.normal(4, 5)
    for upper in (0, 1):
        graph.add("Trilu", x, upper=upper)
        graph.add("Trilu", x, ops.constant(1, "int64"), upper=upper)
        graph.add("Trilu", x, ops.constant(-2, "int64"), upper=upper)
    graph.add("EyeLike", x, k=1)
    graph.check(0)


def test_constants_of_every_dtype(ops: type[Ops]) -> None:
    graph = ops()
    for dtype in ("float32", "float16", "int32", "int64", "bool"):
        value = np.array([0, 1, 1, 0]).astype(dtype)
        graph.add("Identity", ops.constant(value, dtype))
    graph.check(0)
