"""What a parser may change without saying so, each found on a small ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit_tensorrt.faults import faults_of
from edgekit_tensorrt.network import Network, Tensor
from edgekit_tensorrt.processes import parse_onnx

pytestmark = pytest.mark.usefixtures("tensorrt")
Parse = Callable[[bytes], Network]


def value(
    name: str, dtype: int = TensorProto.FLOAT, shape: tuple[int, ...] = (1, 4)
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    initializers = [
        numpy_helper.from_array(array, name) for name, array in (constants or {}).items()
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.fixture(scope="module")
def sums() -> onnx.ModelProto:
    """r = relu(x) + y, and s = relu(x) as it is; z goes nowhere."""
    nodes = [
        helper.make_node("Relu", ["x"], ["s"], name="relu"),
        helper.make_node("Add", ["s", "y"], ["r"], name="add"),
    ]
    return model_of(nodes, [value("x"), value("y"), value("z")], [value("r"), value("s")])


@pytest.fixture(scope="module")
def network(sums: onnx.ModelProto, parse_network: Parse) -> Network:
    return parse_network(sums.SerializeToString())


def test_a_network_that_says_what_the_file_says_has_no_fault(
    sums: onnx.ModelProto, network: Network
) -> None:
    assert faults_of(sums, network, ("a warning of no matter",)) == []


def test_an_input_that_no_layer_reads_any_more_is_named(
    sums: onnx.ModelProto, network: Network
) -> None:
    layers = tuple(
        replace(layer, inputs=tuple("s" if name == "y" else name for name in layer.inputs))
        for layer in network.layers
    )
    assert faults_of(sums, replace(network, layers=layers), ()) == [
        "NVIDIA's parser dropped the input 'y': the file uses it, the network does not."
    ]


def test_an_input_that_is_gone_is_named(sums: onnx.ModelProto, network: Network) -> None:
    without = replace(network, inputs=("x",))
    (fault,) = faults_of(sums, without, ())
    assert "dropped the input 'y'" in fault


def test_an_input_that_is_itself_an_output_is_used(network: Network) -> None:
    node = helper.make_node("Relu", ["x"], ["s"], name="relu")
    model = model_of([node], [value("x"), value("y")], [value("s"), value("y")])
    (fault,) = faults_of(model, replace(network, inputs=("x",), outputs=("s", "y")), ())
    assert "dropped the input 'y'" in fault


def test_an_output_that_is_gone_is_named(sums: onnx.ModelProto, network: Network) -> None:
    without = replace(network, outputs=("r",))
    assert faults_of(sums, without, ()) == ["NVIDIA's parser dropped the output 's'."]


def test_a_value_of_another_type_is_named(sums: onnx.ModelProto, network: Network) -> None:
    tensors = {**network.tensors, "s": Tensor("s", "HALF", (1, 4))}
    assert faults_of(sums, replace(network, tensors=tensors), ()) == [
        "NVIDIA's parser reads 's' as HALF, the file says FLOAT."
    ]


def quantized(zero_point: np.ndarray | None) -> onnx.ModelProto:
    """A number quantized and back; without a zero point ONNX means uint8."""
    point = [] if zero_point is None else ["zero"]
    constants = {"scale": np.array(0.1, np.float32)}
    if zero_point is not None:
        constants["zero"] = zero_point
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", *point], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", *point], ["r"], name="back"),
    ]
    return model_of(nodes, [value("x")], [value("r")], constants)


def test_unsigned_quantization_is_named_with_its_value_and_the_warning() -> None:
    model = quantized(np.array(0, np.uint8))
    parsed = parse_onnx(model.SerializeToString())
    assert parsed.network is not None
    first, *rest = faults_of(model, parsed.network, parsed.warnings)
    assert first == (
        "NVIDIA's parser reads 'q' as INT8, the file says UINT8; the numbers would be others. "
        "Quantize to INT8 with an explicit zero point of 0."
    )
    assert any("Defaulting to INT8" in fault for fault in rest)


def test_quantization_without_a_zero_point_is_unsigned_too() -> None:
    model = quantized(None)
    parsed = parse_onnx(model.SerializeToString())
    assert parsed.network is not None
    assert not parsed.warnings  # the parser says nothing of this one
    (fault,) = faults_of(model, parsed.network, parsed.warnings)
    assert "reads 'q' as INT8, the file says UINT8" in fault


def test_signed_quantization_has_no_fault() -> None:
    model = quantized(np.array(0, np.int8))
    parsed = parse_onnx(model.SerializeToString())
    assert parsed.network is not None
    assert faults_of(model, parsed.network, parsed.warnings) == []


def test_the_lengths_that_attention_drops_are_named() -> None:
    shapes = {"q": (1, 2, 3, 8), "k": (1, 2, 4, 8), "v": (1, 2, 4, 8)}
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["r"], name="a")
    inputs = [value(name, shape=shape) for name, shape in shapes.items()]
    inputs.append(value("lengths", TensorProto.INT64, (1,)))
    model = model_of([node], inputs, [value("r", shape=(1, 2, 3, 8))], opset=24)
    parsed = parse_onnx(model.SerializeToString())
    assert parsed.network is not None
    assert faults_of(model, parsed.network, parsed.warnings) == [
        "NVIDIA's parser dropped the input 'lengths': the file uses it, the network does not."
    ]
