"""QUANTIZE and DEQUANTIZE against ONNX Runtime, and the dtypes numpy has no name for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.layers.values import quantized, rounded, tensor_from_weights
from edgekit_tensorrt.network import Network, Weights

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=4, database=None)
anything = settings(derandomize=True, deadline=None, max_examples=200, database=None)
Parse = Callable[[bytes], Network]


def raw(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The same 8-bit numbers as raw bytes; ``helper.make_tensor`` puts each into an int32."""
    content = bytes(tensor.int32_data)
    return helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, content, raw=True)


@few
@given(scale=st.floats(0.015625, 0.5, width=32), axis=st.integers(0, 2))
def test_int8_per_tensor_and_per_axis(ops: type[Ops], scale: float, axis: int) -> None:
    graph = ops()
    x = 20 * ops.normal(3, 4, 5)  # some values saturate
    x[0, 0, :4] = np.float32(scale) * np.array([0.5, 1.5, -0.5, -2.5])  # ties
    zero = ops.constant(0, "int8")
    (q,) = graph.inner("QuantizeLinear", x, ops.constant(scale), zero)
    graph.add("DequantizeLinear", q, ops.constant(scale), zero)
    size = x.shape[axis]
    scales = ops.constant(np.linspace(scale, 2 * scale, size))
    zeros = ops.constant(np.zeros(size), "int8")
    (q,) = graph.inner("QuantizeLinear", x, scales, zeros, axis=axis)
    graph.add("DequantizeLinear", q, scales, zeros, axis=axis)
    graph.check(0)


def test_int8_values_leave_the_network_as_int8(ops: type[Ops]) -> None:
    graph = ops()
    zero = ops.constant(0, "int8")
    graph.add("QuantizeLinear", 20 * ops.normal(50), ops.constant(0.25), zero)
    network = graph.check(0)
    assert network.tensors[network.outputs[0]].dtype == "INT8"


def test_the_parser_takes_fp8_in_int32_fields_for_bytes(parse_network: Parse) -> None:
    """A fault of the parser, and silent: FP8 weights must be stored raw."""
    stored = helper.make_tensor("w", onnx.TensorProto.FLOAT8E4M3FN, [4], [1.0, 2.0, 3.0, 4.0])
    for tensor, expected in ((stored, [1, 0, 0, 0]), (raw(stored), [1, 2, 3, 4])):
        graph = helper.make_graph(
            [helper.make_node("DequantizeLinear", ["w", "scale"], ["y"])],
            "weights",
            [],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])],
            [tensor, helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [1.0])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        network = parse_network(model.SerializeToString())
        assert NetworkInterpreter(network).run({})["y"].tolist() == expected


@pytest.mark.parametrize("kind", [onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN])
def test_narrow_weights_in_blocks_are_read_from_the_parser(parse_network: Parse, kind: int) -> None:
    values = np.resize([-8, -3, 0, 1, 6, 7], (8, 6)).astype(np.float32)
    scale = np.linspace(0.25, 2, 12).reshape(2, 6).astype(np.float32)
    weight = helper.make_tensor("weight", kind, values.shape, values.ravel())
    if kind == onnx.TensorProto.FLOAT8E4M3FN:
        weight = raw(weight)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], axis=0, block_size=4),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "blocks",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 6])],
        [weight, onnx.numpy_helper.from_array(scale, "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    found = NetworkInterpreter(parse_network(model.SerializeToString())).run({"x": x})["y"]
    np.testing.assert_allclose(found, x @ (values * scale.repeat(4, axis=0)), rtol=1e-6)


def test_an_unsigned_quantization_becomes_a_signed_one(
    ops: type[Ops], parse_network: Parse
) -> None:
    """The parser does so with a warning; only numbers or dtypes show it."""
    graph = ops()
    zero = ops.constant(0, "uint8")
    (q,) = graph.inner("QuantizeLinear", np.array([100, 200], np.float32), ops.constant(1.0), zero)
    (name,) = graph.add("DequantizeLinear", q, ops.constant(1.0), zero)
    network = parse_network(graph.model())
    (quantize,) = (layer for layer in network.layers if layer.kind == "QUANTIZE")
    assert network.tensors[quantize.outputs[0]].dtype == "INT8"
    found = NetworkInterpreter(network).run(graph.inputs)[name]
    np.testing.assert_array_equal(found, [100, 127])


@anything
@given(value=st.floats(width=32, allow_nan=False))
def test_rounding_to_narrow_floats_is_that_of_torch(value: float) -> None:
    x = torch.tensor([value])
    assert rounded(x, "HALF").equal(x.half().float())
    assert rounded(x, "BF16").equal(x.bfloat16().float())
    assert rounded(x, "FP8").abs().item() <= 448


@anything
@given(value=st.floats(-8, 8, width=32))
def test_four_bits_take_the_nearest_magnitude(value: float) -> None:
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    found = rounded(torch.tensor([value]), "FP4").item()
    assert abs(found) in magnitudes
    nearest = np.abs(np.concatenate([magnitudes, -magnitudes]) - value).min()
    assert abs(found - value) == nearest


@pytest.mark.parametrize(
    ("value", "expected"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (5, 4), (99, 6)]
)
def test_between_two_of_four_bits_the_even_code_wins(value: float, expected: float) -> None:
    assert rounded(torch.tensor([value, -value]), "FP4").tolist() == [expected, -expected]


def test_quantizing_saturates_and_rounds_ties_to_even() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 200.0, -200.0, 7.4])
    assert quantized(x, "INT8").tolist() == [0, 2, -2, 127, -128, 7]
    assert quantized(x, "UINT8").tolist() == [0, 2, 0, 200, 0, 7]
    assert quantized(x, "INT4").tolist() == [0, 2, -2, 7, -8, 7]
    assert quantized(torch.tensor([1e9, -1e9]), "FP8").tolist() == [448, -448]


def test_packed_weights_are_unpacked_low_half_first() -> None:
    packed = np.array([0x1F, 0x87], np.uint8)
    four = tensor_from_weights(Weights("INT4", 3, packed))
    assert four is not None
    assert four.tolist() == [-1, 1, 7]
    small = tensor_from_weights(Weights("FP4", 4, packed))
    assert small is not None
    assert small.tolist() == [-6, 0.5, 6, 0]
    half = tensor_from_weights(Weights("BF16", 2, np.array([0x3F80, 0xC000], np.uint16)))
    assert half is not None
    assert half.tolist() == [1, -2]
    eight = tensor_from_weights(Weights("FP8", 2, np.array([0x38, 0xB8], np.uint8)))
    assert eight is not None
    assert eight.tolist() == [1, -1]
    assert tensor_from_weights(Weights("FP8", 2, None)) is None
