"""ACTIVATION, ELEMENTWISE, UNARY, SCALE, SELECT, PARAMETRIC_RELU, CAST against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit_tensorrt.network import Network

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=4, database=None)

UNARY = (
    "Abs Atan Asinh Ceil Cos Cosh Erf Exp Floor Neg Round Sign Sin Sinh Tan Softsign Softplus "
    "Sigmoid Tanh Relu Elu LeakyRelu HardSigmoid HardSwish ThresholdedRelu Celu Mish Identity"
)


def test_functions_of_one_number(ops: type[Ops]) -> None:
    graph = ops()
    x = 3 * ops.normal(4, 50)
    x[0, :6] = (0.0, 0.5, 1.5, 2.5, -0.5, -1.5)  # ties, where rounding shows
    for operator in UNARY.split():
        graph.add(operator, x)
    inside = np.tanh(x) * 0.99
    for operator in ("Acos", "Asin", "Atanh"):
        graph.add(operator, inside)
    for operator in ("Log", "Sqrt", "Reciprocal", "Acosh"):
        graph.add(operator, np.abs(x) + 1)
    for approximate in ("none", "tanh"):
        graph.add("Gelu", x, approximate=approximate)
    network = graph.check()
    kinds = {layer.kind for layer in network.layers}
    assert {"UNARY", "ACTIVATION", "IDENTITY"} <= kinds


def test_the_parser_rounds_selu_where_the_model_leaves_its_numbers_out(
    ops: type[Ops], parse_network: Callable[[bytes], Network]
) -> None:
    graph = ops()
    graph.add("Selu", ops.normal(3))
    (layer,) = parse_network(graph.model()).layers
    assert layer.attributes["alpha"] == pytest.approx(1.6732, abs=1e-7)  # ONNX: 1.67326
    assert layer.attributes["beta"] == pytest.approx(1.0507, abs=1e-7)  # ONNX: 1.050701


@few
@given(
    alpha=st.floats(0.0625, 2.0, width=32),
    gamma=st.floats(0.0625, 2.0, width=32),
    low=st.floats(-2.0, 0.0, width=32),
    high=st.floats(0.125, 2.0, width=32),
)
def test_activations_with_parameters(
    ops: type[Ops], alpha: float, gamma: float, low: float, high: float
) -> None:
    graph = ops()
    x = 2 * ops.normal(3, 40)
    graph.add("Elu", x, alpha=alpha)
    graph.add("LeakyRelu", x, alpha=alpha)
    graph.add("ThresholdedRelu", x, alpha=alpha)
    graph.add("HardSigmoid", x, alpha=alpha, beta=gamma)
    graph.add("Selu", x, alpha=alpha, gamma=gamma)
    graph.add("Celu", x, alpha=alpha)
    graph.add("Clip", x, ops.constant(low), ops.constant(high))
    graph.add("PRelu", x, ops.constant(np.linspace(-1, alpha, 40)))
    graph.check()


def test_arithmetic_of_two_tensors_and_their_broadcast(ops: type[Ops]) -> None:
    graph = ops()
    a, b, row = ops.normal(3, 4), ops.normal(3, 4, seed=1), ops.normal(4)
    for operator in ("Add", "Sub", "Mul", "Div"):
        graph.add(operator, a, b)
        graph.add(operator, a, row)
        graph.add(operator, ops.normal(3, 1), row)
    for operator in ("Max", "Min", "Sum", "Mean"):
        graph.add(operator, a, b, row)
    graph.add("Pow", np.abs(a) + 0.1, b)
    graph.add("Mod", a, np.abs(b) + 0.5, fmod=1)
    graph.check()


def test_integers_divide_as_onnx_says(ops: type[Ops]) -> None:
    graph = ops()
    for dtype in ("int32", "int64"):
        a = np.array([7, -7, 7, -7, 0, 6, -9], dtype)
        b = np.array([2, 2, -2, -2, 5, 3, 4], dtype)
        for operator in ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Equal", "Greater"):
            graph.add(operator, a, b)
        for operator in ("Abs", "Neg", "Sign"):
            graph.add(operator, a)
    graph.check(0)


def test_conditions(ops: type[Ops]) -> None:
    graph = ops()
    a, b = ops.normal(3, 5), ops.normal(3, 5, seed=1)
    b[:, :2] = a[:, :2]
    for operator in ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"):
        graph.add(operator, a, b)
    p, q = a > 0, b > 0
    for operator in ("And", "Or", "Xor", "Equal"):
        graph.add(operator, p, q)
    graph.add("Not", p)
    graph.add("Where", p, a, b)
    graph.add("Where", p, ops.constant(0.0), b)
    special = np.array([1.0, np.inf, -np.inf, np.nan], np.float32)
    graph.add("IsInf", special)
    graph.add("IsNaN", special)
    graph.check(0)


@pytest.mark.parametrize("source", ["float32", "float16", "int32", "int64", "bool"])
def test_casts_cut_fractions_off(ops: type[Ops], source: str) -> None:
    graph = ops()
    x = np.array([0.0, 1.0, -1.0, 2.5, -2.5, 100.75, -100.75]).astype(source)
    # numbers by ONNX: float32, int32, int64, bool, float16
    for target in (1, 6, 7, 9, 10):
        graph.add("Cast", x, to=target)
    graph.check(0)


def test_batch_normalization_becomes_a_scale_per_channel(ops: type[Ops]) -> None:
    graph = ops()
    x = ops.normal(2, 3, 4, 5)
    scale, bias, mean = (ops.constant(ops.normal(3, seed=seed)) for seed in (1, 2, 3))
    variance = ops.constant(np.abs(ops.normal(3, seed=4)) + 0.1)
    graph.add("BatchNormalization", x, scale, bias, mean, variance, epsilon=0.01)
    network = graph.check()
    assert "SCALE" in {layer.kind for layer in network.layers}
