"""CONVOLUTION, DECONVOLUTION, POOLING and LRN against ONNX Runtime, one to three axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.network import Layer, Network, Tensor

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=5, database=None)


@st.composite
def windows(draw: st.DrawFn, *, dilated: bool = True) -> dict[str, Any]:
    """Attributes of a sliding window over one, two or three axes."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel = each(1, 3)
    # A padding as large as the kernel is refused by many; ONNX lists the starts, then the ends.
    pads = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": each(1, 3), "pads": pads}
    return attributes | ({"dilations": each(1, 2)} if dilated else {})


def sizes(rank: int) -> tuple[int, ...]:
    return (9, 8, 7)[:rank]


@few
@given(
    each=st.lists(
        st.tuples(windows(), st.sampled_from([1, 2, 4]), st.booleans()), min_size=6, max_size=6
    )
)
def test_convolutions(ops: type[Ops], each: list[tuple[dict[str, Any], int, bool]]) -> None:
    graph = ops()
    for seed, (window, groups, biased) in enumerate(each):
        kernel = window["kernel_shape"]
        x = ops.normal(2, 4, *sizes(len(kernel)), seed=seed)
        weight = ops.constant(ops.normal(8, 4 // groups, *kernel, seed=seed))
        bias = [ops.constant(ops.normal(8, seed=seed))] if biased else []
        graph.add("Conv", x, weight, *bias, group=groups, **window)
    graph.check()


@few
@given(
    each=st.lists(
        st.tuples(windows(), st.sampled_from([1, 2]), st.booleans()), min_size=6, max_size=6
    )
)
def test_transposed_convolutions(
    ops: type[Ops], each: list[tuple[dict[str, Any], int, bool]]
) -> None:
    graph = ops()
    for seed, (window, groups, more) in enumerate(each):
        kernel = window["kernel_shape"]
        # More output than the windows reach: smaller than the stride, or it makes no sense.
        extra = [min(int(more), step - 1) for step in window["strides"]]
        x = ops.normal(2, 4, *sizes(len(kernel)), seed=seed)
        weight = ops.constant(ops.normal(4, 6 // groups, *kernel, seed=seed))
        bias = ops.constant(ops.normal(6, seed=seed))
        graph.add("ConvTranspose", x, weight, bias, group=groups, output_padding=extra, **window)
    graph.check()


@pytest.mark.parametrize("padding", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(ops: type[Ops], padding: str) -> None:
    graph = ops()
    x = ops.normal(1, 3, 10, 7)
    weight = ops.constant(ops.normal(4, 3, 4, 3))
    graph.add("Conv", x, weight, auto_pad=padding, strides=[2, 3])
    graph.add("MaxPool", x, auto_pad=padding, kernel_shape=[4, 3], strides=[2, 3])
    graph.add("AveragePool", x, auto_pad=padding, kernel_shape=[4, 3], strides=[2, 3])
    if padding != "VALID":
        spread = ops.constant(ops.normal(3, 4, 4, 3))
        graph.add("ConvTranspose", x, spread, auto_pad=padding, strides=[2, 2])
    graph.check()


def test_a_kernel_that_is_computed(ops: type[Ops]) -> None:
    graph = ops()
    (kernel,) = graph.inner("Mul", ops.normal(4, 3, 3, 3), ops.constant(0.5))
    graph.add("Conv", ops.normal(1, 3, 8, 8), kernel, ops.constant(ops.normal(4)))
    graph.check()


@few
@given(each=st.lists(st.tuples(windows(dilated=False), st.booleans()), min_size=6, max_size=6))
def test_pooling(ops: type[Ops], each: list[tuple[dict[str, Any], bool]]) -> None:
    graph = ops()
    for seed, (window, counted) in enumerate(each):
        x = ops.normal(2, 3, *sizes(len(window["kernel_shape"])), seed=seed)
        graph.add("MaxPool", x, **window)
        graph.add("AveragePool", x, count_include_pad=int(counted), **window)
    graph.check()


def test_pooling_that_rounds_sizes_up(ops: type[Ops]) -> None:
    graph = ops()
    for size in (8, 9, 10):
        x = ops.normal(1, 2, size, size + 3)
        for pads in ([0, 0, 0, 0], [1, 1, 1, 1]):
            window: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": pads}
            graph.add("MaxPool", x, ceil_mode=1, **window)
            for counted in (0, 1):
                graph.add("AveragePool", x, ceil_mode=1, count_include_pad=counted, **window)
    graph.check()


def test_global_pooling_and_local_response(ops: type[Ops]) -> None:
    graph = ops()
    x = ops.normal(2, 7, 5, 6)
    graph.add("GlobalAveragePool", x)
    graph.add("GlobalMaxPool", x)
    graph.add("LRN", x, size=3, alpha=0.1, beta=0.6, bias=1.5)
    graph.check()


def test_padding_of_maximum_pooling_is_never_the_maximum(ops: type[Ops]) -> None:
    graph = ops()
    x = -np.abs(ops.normal(1, 1, 4, 4)) - 1
    graph.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    graph.check(0)


@pytest.mark.parametrize("padding", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_of_a_size_that_varies(
    check_model: Callable[..., Network], ops: type[Ops], padding: str
) -> None:
    """Here the parser leaves the padding to the layer, which knows the size when it runs."""
    common: dict[str, Any] = {"auto_pad": padding, "kernel_shape": [4, 3]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], strides=[2, 3], **common),
        helper.make_node("MaxPool", ["x"], ["b"], strides=[2, 3], **common),
        helper.make_node("AveragePool", ["x"], ["c"], strides=[2, 3], **common),
        helper.make_node("ConvTranspose", ["x", "w"], ["d"], strides=[2, 2], **common),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "varying",
        [info("x", onnx.TensorProto.FLOAT, [1, 3, "height", "width"])],
        [info(name, onnx.TensorProto.FLOAT, [1, 3, None, None]) for name in "abcd"],
        [onnx.numpy_helper.from_array(ops.normal(3, 3, 4, 3), "w")],
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    for size in ((10, 7), (9, 11)):
        network = check_model(model, {"x": ops.normal(1, 3, *size)})
    assert {layer.attributes["padding_mode"] for layer in network.layers} == {padding}


def test_a_blend_of_both_poolings_and_zeros_around() -> None:
    """Layers that the parser does not make; other front ends do."""
    window: dict[str, Any] = {
        "window_size_nd": [2, 2],
        "stride_nd": [2, 2],
        "padding_mode": "EXPLICIT_ROUND_DOWN",
    }
    window |= {"pre_padding": [0, 0], "post_padding": [0, 0]}
    blend: dict[str, Any] = {
        "type": "MAX_AVERAGE_BLEND",
        "blend_factor": 0.25,
        "average_count_excludes_padding": True,
    }
    around = {"pre_padding_nd": [1, 0], "post_padding_nd": [0, -1]}
    layers = (
        Layer("POOLING", "pool", ("x",), ("a",), {**window, **blend}),
        Layer("PADDING", "pad", ("x",), ("b",), around),
    )
    tensors = {name: Tensor(name, "FLOAT", (1, 1, -1, -1)) for name in "xab"}
    interpreter = NetworkInterpreter(Network("made", ("x",), ("a", "b"), tensors, layers))
    found = interpreter.run({"x": np.array([[[[1, 2], [3, 6]]]], np.float32)})
    assert found["a"].tolist() == [[[[0.75 * 6 + 0.25 * 3]]]]
    assert found["b"].tolist() == [[[[0], [1], [3]]]]
