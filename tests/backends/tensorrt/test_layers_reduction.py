"""REDUCE, SOFTMAX, NORMALIZATION, CUMULATIVE against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.network import Network

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=4, database=None)

REDUCE = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]


@few
@given(axes=st.sets(st.integers(-3, 2), max_size=3), keep=st.booleans())
def test_reductions(ops: type[Ops], axes: set[int], keep: bool) -> None:
    graph = ops()
    distinct = sorted({axis % 3 for axis in axes})
    for name in REDUCE:
        x = np.abs(ops.normal(3, 4, 5)) + 0.5
        chosen = [ops.constant(distinct, "int64")] if distinct else []
        graph.add(f"Reduce{name}", x, *chosen, keepdims=int(keep))
    for name in ("Sum", "Max", "Min", "Prod"):
        whole = np.arange(1, 7, dtype=np.int32).reshape(1, 2, 3)
        graph.add(f"Reduce{name}", whole, keepdims=int(keep))
    graph.check()


def test_softmax_over_each_axis(ops: type[Ops]) -> None:
    graph = ops()
    x = 30 * ops.normal(3, 4, 5)
    for axis in (-1, 0, 1):
        graph.add("Softmax", x, axis=axis)
        graph.add("LogSoftmax", x, axis=axis)
        graph.add("Hardmax", x, axis=axis)
    graph.check()


@few
@given(axis=st.integers(1, 3), epsilon=st.sampled_from([1e-5, 1e-2]), biased=st.booleans())
def test_layer_normalization(ops: type[Ops], axis: int, epsilon: float, biased: bool) -> None:
    graph = ops()
    x = 2 + 3 * ops.normal(2, 3, 4, 5)
    shape = x.shape[axis:]
    arguments = [ops.constant(ops.normal(*shape, seed=seed)) for seed in range(1 + biased)]
    graph.add("LayerNormalization", x, *arguments, axis=axis, epsilon=epsilon)
    graph.check()


def test_group_and_instance_normalization(ops: type[Ops]) -> None:
    scale, bias = ops.constant(ops.normal(6)), ops.constant(ops.normal(6, seed=1))
    for opset, per in ((18, "group"), (21, "channel")):
        graph = ops(opset)
        for groups in (2, 3, 6):
            x = 1 + 2 * ops.normal(2, 6, 4, 5, seed=groups)
            few_scale, few_bias = (
                ops.constant(one.value[:groups]) if per == "group" else one for one in (scale, bias)
            )
            graph.add("GroupNormalization", x, few_scale, few_bias, num_groups=groups)
        graph.add("InstanceNormalization", x, scale, bias)
        graph.add("InstanceNormalization", ops.normal(2, 6, 7), scale, bias)
        graph.check()


def test_the_parser_takes_one_group_for_one_group_per_channel(
    ops: type[Ops], parse_network: Callable[[bytes], Network]
) -> None:
    """A fault of the parser (NVIDIA/TensorRT#4756); once it is gone, this test may go."""
    graph = ops(21)
    x, one, zero = ops.normal(2, 4, 5), ops.constant(np.ones(4)), ops.constant(np.zeros(4))
    (name,) = graph.add("GroupNormalization", x, one, zero, num_groups=1)
    found = NetworkInterpreter(parse_network(graph.model())).run(graph.inputs)[name]
    variance = x.var(2, keepdims=True)
    per_channel = (x - x.mean(2, keepdims=True)) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(found, per_channel, atol=1e-5)


def test_mean_variance_normalization(ops: type[Ops]) -> None:
    graph = ops()
    x = ops.normal(2, 3, 4, 5)
    graph.add("MeanVarianceNormalization", x, axes=[0, 2, 3])
    graph.add("LpNormalization", x, axis=1, p=2)
    graph.add("LpNormalization", x, axis=-1, p=1)
    graph.check()


def test_running_sums(ops: type[Ops]) -> None:
    graph = ops()
    x = ops.normal(3, 4)
    for axis in (0, 1, -1):
        for exclusive in (0, 1):
            for reverse in (0, 1):
                place = ops.constant(axis, "int64")
                graph.add("CumSum", x, place, exclusive=exclusive, reverse=reverse)
    graph.add("CumSum", np.arange(5, dtype=np.int32), ops.constant(0, "int64"))
    graph.check()
