"""GATHER, SCATTER, TOPK, ONE_HOT, REVERSE_SEQUENCE, KV_CACHE_UPDATE against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import RuntimeFailed
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.network import Network

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=4, database=None)


def indices(
    shape: tuple[int, ...], length: int, seed: int = 0
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(-length, length, shape, dtype=np.int64)


@few
@given(axis=st.integers(-3, 2), shape=st.lists(st.integers(1, 3), max_size=3))
def test_gather(ops: type[Ops], axis: int, shape: list[int]) -> None:
    graph = ops()
    x = ops.normal(4, 5, 6)
    length = x.shape[axis]
    graph.add("Gather", x, indices(tuple(shape), length), axis=axis)
    same_rank = list(x.shape)
    same_rank[axis] = 7
    graph.add("GatherElements", x, indices(tuple(same_rank), length), axis=axis)
    graph.check(0)


@pytest.mark.parametrize(
    ("shared", "shape"), [(0, (2, 3, 2)), (0, (4, 3)), (1, (4, 2, 1)), (2, (4, 5, 1))]
)
def test_gather_of_places(ops: type[Ops], shared: int, shape: tuple[int, ...]) -> None:
    graph = ops()
    graph.add("GatherND", ops.normal(4, 5, 6), indices(shape, 4), batch_dims=shared)
    graph.check(0)


@few
@given(axis=st.integers(-2, 1), depth=st.integers(1, 2))
def test_scatter(ops: type[Ops], axis: int, depth: int) -> None:
    graph = ops()
    x = ops.normal(5, 6)
    length = x.shape[axis]
    places = np.stack([np.random.default_rng(one).permutation(length)[:3] for one in range(2)])
    places = places if axis % 2 else places.T
    graph.add("ScatterElements", x, places - length, ops.normal(*places.shape), axis=axis)
    at = np.array([[1, 2], [3, -1], [0, 0]])[:, :depth]
    graph.add("ScatterND", x, at, ops.normal(3, *x.shape[depth:]))
    graph.check(0)


@few
@given(count=st.integers(1, 4), axis=st.integers(-2, 1), largest=st.integers(0, 1))
def test_top(ops: type[Ops], count: int, axis: int, largest: int) -> None:
    graph = ops()
    x = np.round(2 * ops.normal(5, 6))  # with equal values
    number = ops.constant([count], "int64")
    graph.add("TopK", x, number, outputs=2, axis=axis, largest=largest)
    graph.add("ArgMax", x, axis=axis, keepdims=count % 2)
    graph.add("ArgMin", x, axis=axis, keepdims=count % 2)
    graph.check(0)


def test_one_hot(ops: type[Ops]) -> None:
    graph = ops()
    where = np.array([[0, 2], [-1, 3]])
    for axis in (-1, 0, 1):
        depth, values = ops.constant(4, "int64"), ops.constant([-1.0, 2.0])
        graph.add("OneHot", where, depth, values, axis=axis)
    graph.check(0)


def test_reversed_sequences(ops: type[Ops]) -> None:
    graph = ops()
    x = ops.normal(4, 3, 2)
    lengths = np.array([1, 4, 2])
    graph.add("ReverseSequence", x, lengths, time_axis=0, batch_axis=1)
    lengths = np.array([3, 2, 1, 3])
    graph.add("ReverseSequence", x, lengths, time_axis=1, batch_axis=0)
    graph.check(0)


def test_a_cache_takes_new_rows_where_each_sequence_ends(
    ops: type[Ops], parse_network: Callable[[bytes], Network]
) -> None:
    graph = ops(24)
    cache, rows = ops.normal(2, 3, 9, 4), ops.normal(2, 3, 2, 4)
    start = np.array([1, 6])
    (name,) = graph.add("TensorScatter", cache, rows, start, axis=-2)
    network = parse_network(graph.model())
    assert "KV_CACHE_UPDATE" in {layer.kind for layer in network.layers}
    expected = cache.copy()
    expected[0, :, 1:3], expected[1, :, 6:8] = rows
    found = NetworkInterpreter(network).run(graph.inputs)
    np.testing.assert_array_equal(found[name], expected)


def test_an_index_beyond_the_end_is_named(
    ops: type[Ops], parse_network: Callable[[bytes], Network]
) -> None:
    graph = ops()
    graph.add("Gather", ops.normal(4, 5), np.array([7]), axis=1)
    interpreter = NetworkInterpreter(parse_network(graph.model()))
    with pytest.raises(RuntimeFailed, match=r"layer 'Gather0' \(GATHER\).*not within 0\.\.4"):
        interpreter.run(graph.inputs)
