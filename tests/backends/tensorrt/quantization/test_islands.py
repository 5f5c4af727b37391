"""Islands of float32 around int8 layers: where, and what NVIDIA's compiler makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.onnx_export import float16_from_float32, serialized
from edgekit.spec import Array
from edgekit_tensorrt.choice import answers, left_in_float, sqnr_db
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.islands import SMALLEST_NORMAL, drop_unread, with_islands
from edgekit_tensorrt.processes import build_engine, parse_onnx

K, N = 64, 16


def product(
    operator: str = "Gemm",
    *,
    per_channel: bool = True,
    weights: float = 1.0,
    inputs: float = 1.0,
    codes: int = 127,
    bias: bool = True,
) -> onnx.ModelProto:
    """One quantized layer in float32; ``weights`` and ``inputs`` scale its two scales."""
    generator = np.random.default_rng(0)
    convolution = operator == "Conv"
    shape = (N, K, 1, 1) if convolution else (N, K)
    axis = 0 if convolution or operator == "Gemm" else 1
    held: dict[str, Array] = {
        "codes": generator.integers(-codes, codes + 1, shape).astype(np.int8),
        "scale": (np.linspace(0.5, 1, N) * 0.01 * weights).astype(np.float32),
        "x_scale": np.array(0.03 * inputs, np.float32),
        "zero": np.array(0, np.int8),
        "zeros": np.zeros(N, np.int8),
        "bias": generator.standard_normal(N).astype(np.float32) * np.float32(inputs * weights),
    }
    if operator == "MatMul":
        held["codes"] = held["codes"].T.copy()
    if not per_channel:
        held["scale"], held["zeros"] = held["scale"][-1], held["zero"]
    attributes: dict[str, Any] = {"transB": 1} if operator == "Gemm" else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "zero"], ["xd"], name="xd"),
        helper.make_node(
            "DequantizeLinear", ["codes", "scale", "zeros"], ["wd"], name="wd", axis=axis
        ),
        helper.make_node(
            operator,
            ["xd", "wd", *(["bias"] if bias and operator != "MatMul" else [])],
            ["y"],
            name="layer",
            **attributes,
        ),
    ]
    size = [4, K, 1, 1] if convolution else [4, K]
    out = [4, N, 1, 1] if convolution else [4, N]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def samples(model: onnx.ModelProto, inputs: float = 1.0) -> list[dict[str, Array]]:
    sizes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).standard_normal(sizes).astype(np.float32)
    return [{"x": x * np.float32(inputs)}]


def in_half(single: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    half = float16_from_float32(single)
    names = with_islands(half, single)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(half, strict_mode=True))
    return half, names


def int8_kernels(model: onnx.ModelProto) -> list[str]:
    """The types that kernels of int8 inputs write."""
    built = build_engine(serialized(model), compute_capabilities=["sm86"], profiles={})
    assert left_in_float(built.plan, {"layer"}, "Int8") == []
    return [
        layer.outputs[0].dtype
        for layer in built.plan.layers
        if any(tensor.dtype == "Int8" for tensor in layer.inputs)
    ]


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_a_product_with_a_scale_for_each_channel_sums_in_float32(operator: str) -> None:
    """In float16 the sum itself, of up to 64 * 128 * 127, would be handed on as float16."""
    single = product(operator)
    plain = float16_from_float32(single)
    assert int8_kernels(plain) == ["Half"]
    half, names = in_half(single)
    assert names == ["layer"]
    assert int8_kernels(half) == ["Float"]


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("operator", ["Gemm", "MatMul", "Conv"])
@pytest.mark.parametrize(("weights", "inputs"), [(1.0, 1.0), (1e-3, 1.0), (1.0, 1e-3)])
def test_an_island_says_what_the_layer_said(operator: str, weights: float, inputs: float) -> None:
    single = product(operator, weights=weights, inputs=inputs)
    half, names = in_half(single)
    assert names == ([] if operator == "Conv" and weights == inputs == 1.0 else ["layer"])
    feeds = samples(single, inputs)
    exact = answers(serialized(single), feeds)
    parsed = parse_onnx(serialized(half))
    assert (parsed.errors, parsed.warnings) == ((), ())
    assert parsed.network is not None
    network = NetworkInterpreter(parsed.network)
    found = [list(network.run(feed).values()) for feed in feeds]
    # The input is in float16 before it is rounded to a code; a few fall to the other side.
    assert sqnr_db(answers(serialized(half), feeds), found) > 45
    assert sqnr_db(exact, found) > 35
    assert network.overflow is None


def test_one_scale_for_all_or_a_small_sum_needs_no_island() -> None:
    """One scale is multiplied in before the sum is rounded; a small sum fits as it is."""
    assert in_half(product(per_channel=False))[1] == []
    assert in_half(product(codes=3))[1] == []
    assert in_half(product("Conv"))[1] == []
    for layer in ("Gemm", "Conv"):
        assert in_half(product(layer, per_channel=False, weights=1e-3))[1] == ["layer"]


def test_a_scale_below_float16s_normal_numbers_is_held_in_float32() -> None:
    single = product("Conv", weights=1e-4)
    half, _ = in_half(single)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in single.graph.initializer}
    assert exact["scale"].max() < SMALLEST_NORMAL
    np.testing.assert_array_equal(held["scale_float32"], exact["scale"])
    np.testing.assert_array_equal(held["bias_float32"], exact["bias"])
    assert "scale" not in held  # nothing reads the rounded one any more
    assert "bias" not in held


def test_an_input_is_read_with_the_scale_that_it_was_rounded_with() -> None:
    half, _ = in_half(product())
    made = {name: node for node in half.graph.node for name in node.output}
    (layer,) = (node for node in half.graph.node if node.name == "layer")
    back = made[layer.input[0]]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    there, again = held[made[back.input[0]].input[1]], held[back.input[1]]
    assert [each.dtype.name for each in (there, again)] == ["float16", "float32"]
    assert np.float32(there) == again != np.float32(0.03)


def test_a_bias_that_is_computed_is_cast() -> None:
    single = product()
    (layer,) = (node for node in single.graph.node if node.name == "layer")
    layer.input[2] = "made"
    single.graph.node.insert(0, helper.make_node("Abs", ["bias"], ["made"], name="abs"))
    half, names = in_half(single)
    assert names == ["layer"]
    feeds = samples(single)
    assert sqnr_db(answers(serialized(single), feeds), answers(serialized(half), feeds)) > 35


def test_what_an_inner_graph_reads_is_kept() -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["held"], ["inner"])],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])],
    )
    nodes = [
        helper.make_node("Identity", ["constant"], ["held"], name="held"),
        helper.make_node("Identity", ["constant"], ["unread"], name="unread"),
        helper.make_node("If", ["flag"], ["y"], name="if", then_branch=inner, else_branch=inner),
    ]
    names = ("constant", "nobody's")
    held = [numpy_helper.from_array(np.ones(1, np.float32), name) for name in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [], [output], held)
    drop_unread(graph, list(graph.node))
    assert [node.name for node in graph.node] == ["held", "if"]
    assert [tensor.name for tensor in graph.initializer] == ["constant"]
