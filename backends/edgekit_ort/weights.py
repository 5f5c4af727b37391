"""Integers for weights alone: smaller files, computed in float."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.errors import LoweringFailed
from edgekit.graph import first_line, quiet
from edgekit.spec import Array

with quiet():
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

BLOCK = 32  # weights that share a scale and a zero point in 4 bits
_OPSET = 21  # the first with 4-bit types and blocks


def with_integer_weights(
    model: onnx.ModelProto, kept: Collection[str], bits: int
) -> onnx.ModelProto:
    """A copy whose weights of products are integers of 8 or 4 bits; nodes in ``kept`` are not.

    8 bits are signed, with a scale for each output channel. 4 bits are unsigned, with a scale and
    a zero point for each 32 input channels: one scale for a whole channel costs 2 to 6 dB more.
    Raises ``LoweringFailed``.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    try:
        if bits == 4:
            changed = onnx.version_converter.convert_version(changed, _OPSET)
            changed = _with_packed_products(changed, kept)
        _dequantize(changed, kept, bits)
    except Exception as cause:  # the tools raise whatever they trip over
        raise LoweringFailed(
            f"the weights could not be made {bits}-bit integers: {first_line(cause)} Use "
            "--precision fp32."
        ) from cause
    return changed


def _with_packed_products(model: onnx.ModelProto, kept: Collection[str]) -> onnx.ModelProto:
    """Matrix products as the runtime's own op for 4-bit weights, which never unpacks them all."""
    _gemm_as_matmul(model, kept)
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            model, block_size=BLOCK, is_symmetric=False, nodes_to_exclude=sorted(kept)
        )
        quantizer.process()
    packed: onnx.ModelProto = quantizer.model.model
    return packed


def _gemm_as_matmul(model: onnx.ModelProto, kept: Collection[str]) -> None:
    """A plain Gemm becomes MatMul and Add: there is no 4-bit Gemm."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in reversed(list(enumerate(model.graph.node))):
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0
        weight = tensors.get(node.input[1]) if node.op_type == "Gemm" else None
        if weight is None or node.name in kept or not plain or settings.get("transA"):
            continue
        if settings.get("transB"):
            array = np.ascontiguousarray(numpy_helper.to_array(weight).T)
            weight = numpy_helper.from_array(array, f"{weight.name}_of_{node.name}")
            model.graph.initializer.append(weight)
        given, result = node.input[0], node.output[0]
        product = result if len(node.input) < 3 else f"{result}_product"
        nodes = [helper.make_node("MatMul", [given, weight.name], [product], node.name)]
        if len(node.input) > 2:
            bias = helper.make_node("Add", [product, node.input[2]], [result], f"{node.name}_bias")
            nodes.append(bias)
        del model.graph.node[index]
        for offset, each in enumerate(nodes):
            model.graph.node.insert(index + offset, each)
    _drop_unread(model)


def _dequantize(model: onnx.ModelProto, kept: Collection[str], bits: int) -> None:
    """A DequantizeLinear in front of every weight that only quantized products read."""
    graph = model.graph
    tensors = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    added = []
    for name, tensor in tensors.items():
        nodes = readers.get(name, [])
        axes = {_output_axis(node, tensor) for node in nodes if _is_weight(node, name, kept)}
        if len(axes) != 1 or not all(_is_weight(node, name, kept) for node in nodes):
            continue
        (axis,) = axes
        array = numpy_helper.to_array(tensor)
        if bits == 8:
            codes, scale, zero, settings = _by_channel(array, axis)
        else:
            codes, scale, zero, settings = _by_block(array, 0 if axis else 1)
        parts = {f"{name}_codes": codes, f"{name}_scale": scale, f"{name}_zero": zero}
        graph.initializer.remove(tensor)
        graph.initializer.extend(numpy_helper.from_array(*each[::-1]) for each in parts.items())
        added.append(
            helper.make_node("DequantizeLinear", [*parts], [name], f"{name}_float", **settings)
        )
    for node in reversed(added):
        graph.node.insert(0, node)


def _is_weight(node: onnx.NodeProto, name: str, kept: Collection[str]) -> bool:
    products = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    place = [index for index, given in enumerate(node.input) if given == name]
    return node.op_type in products and place == [1] and node.name not in kept


def _output_axis(node: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    """The axis of ``weight`` that counts output channels."""
    settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type == "MatMul":
        return len(weight.dims) - 1
    if node.op_type == "Gemm":
        return 0 if settings.get("transB") else 1
    return 1 if node.op_type == "ConvTranspose" else 0


def _by_channel(array: Array, axis: int) -> tuple[Array, Array, Array, dict[str, Any]]:
    others = tuple(index for index in range(array.ndim) if index != axis)
    scale = np.maximum(np.abs(array).max(others, keepdims=True), np.float32(1e-12)) / 127
    codes = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
    flat = scale.reshape(-1).astype(np.float32)
    return codes, flat, np.zeros(len(flat), np.int8), {"axis": axis}


def _by_block(array: Array, axis: int) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Blocks along ``axis``, which counts input channels; the last one may be shorter."""
    moved = np.moveaxis(array, axis, 0)
    block = min(BLOCK, len(moved))
    starts = np.arange(0, len(moved), block)
    # Zero must be a code: padding relies on it, and so do pruned weights.
    low = np.minimum(np.minimum.reduceat(moved, starts, axis=0), 0)
    high = np.maximum(np.maximum.reduceat(moved, starts, axis=0), 0)
    scale = (np.maximum(high - low, np.float32(1e-12)) / 15).astype(np.float32)
    zero = np.rint(-low / scale)
    sizes = np.diff(np.append(starts, len(moved)))
    spread = (np.repeat(each, sizes, axis=0) for each in (scale, zero))
    steps, offsets = spread
    codes = np.clip(np.rint(moved / steps) + offsets, 0, 15)
    back = [np.ascontiguousarray(np.moveaxis(each, 0, axis)) for each in (codes, scale, zero)]
    settings = {"axis": axis, "block_size": block}
    return back[0].astype(ml_dtypes.uint4), back[1], back[2].astype(ml_dtypes.uint4), settings


def _drop_unread(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    for tensor in [each for each in model.graph.initializer if each.name not in read]:
        model.graph.initializer.remove(tensor)
