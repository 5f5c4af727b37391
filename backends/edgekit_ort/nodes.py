"""Which nodes of an ONNX model are worth computing in integers on a CPU, and which stay float.

What is chosen here was measured; the table is in README.md.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import onnx

WEIGHTED = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")
# They move numbers, and take their scale along.
MOVES = (
    *("MaxPool", "AveragePool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"),
    *("Slice", "Split", "Pad", "Resize"),
)
# There is no integer kernel for ConvTranspose: it would be converted there and back for nothing.
OPS = (*WEIGHTED, *ACTIVATIONS, *MOVES, "Add", "Concat")

# To convert the input and the result of a product this small costs more than it saves.
SMALL_PRODUCTS, SMALL_SHARE = 30_000, 1e-3


def float_nodes(model: onnx.ModelProto, kept: Collection[str]) -> frozenset[str]:
    """Names of those nodes of ``OPS`` that are better left float; ``kept`` are so anyway.

    - products of two computed values (attention), and small ones;
    - sums with a constant, and clips that no product feeds: they are parts of hard-sigmoid;
    - sums of what is float on both sides;
    - joins of which a part is float: one scale for parts of unlike ranges costs accuracy.

    ``model`` has the shapes of its values.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    counts = products(model)
    small = min(SMALL_PRODUCTS, SMALL_SHARE * sum(counts.values()))
    fed: set[str] = set()  # values that a product makes, as it is
    integers: set[str] = set()  # and what becomes of them without arithmetic
    floats: set[str] = set()
    for node in graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type in WEIGHTED:
            integer = node.input[1] in constants and counts[node.name] >= small
        elif node.op_type == "Clip":
            integer = first in fed
        elif node.op_type == "Add":
            integer = not constants & set(node.input) and bool(integers & set(node.input))
        elif node.op_type == "Concat":
            integer = set(node.input) <= integers
        else:
            integer = node.op_type in OPS and first in integers
        if not integer or node.name in kept:
            if node.op_type in OPS:
                floats.add(node.name)
            continue
        integers.update(node.output)
        if node.op_type in WEIGHTED:
            fed.update(node.output)
    return frozenset(floats)


def products(model: onnx.ModelProto) -> dict[str, int]:
    """Multiplications of each product, by node; free dims count as 1, and so do unknown ones."""
    graph = model.graph
    shapes = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    shapes.update((tensor.name, list(tensor.dims)) for tensor in graph.initializer)
    counts = {}
    for node in graph.node:
        if node.op_type not in WEIGHTED:
            continue
        result, weight = (shapes.get(name, []) for name in (node.output[0], node.input[1]))
        if node.op_type == "Conv":
            inner = prod(weight[1:])
        else:
            transposed = any(each.name == "transB" and each.i for each in node.attribute)
            inner = (weight[-1:] if transposed else weight[-2:-1] or [1])[0]
        counts[node.name] = prod(result) * inner
    return counts


def with_firm_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """Float layers in an integer model that the runtime leaves float.

    It gives a Conv or a Gemm whose input comes out of a DequantizeLinear and whose result goes
    into a QuantizeLinear 8-bit weights of its own when it loads (WeightBiasQuantization, one
    scale for the whole tensor). A Max of one value in between, which copies its input, stops it.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.input else None
        if (
            node.op_type in ("Conv", "ConvTranspose", "Gemm")
            and node.input[1] in weights
            and maker is not None
            and maker.op_type in ("DequantizeLinear", *MOVES)
        ):
            value = f"{node.input[0]}_for_{node.name}"
            nodes.append(onnx.helper.make_node("Max", [node.input[0]], [value], f"{node.name}_in"))
            node.input[0] = value
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return model
