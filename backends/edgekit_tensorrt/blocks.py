"""int4: weights of matrix products in blocks of 4-bit codes, everything else in float16.

Written here because onnxruntime's quantizer gives blocks negative scales, and a zero block the
scale -0; TensorRT takes scales above 0 alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import LoweringFailed
from edgekit.onnx_export import Exported, float16_from_float32
from edgekit.spec import Array
from edgekit_tensorrt.islands import drop_unread

# Weights along the sum that share a scale. TensorRT takes 32, 64 and 128 in one and the same
# kernel (one block for a whole column gets a kernel of its own); the least loses least.
BLOCK = 32
_LARGEST_CODE = 7
OPSET, IR = 21, 10  # the first with 4-bit integers and blocks
# Ops that opset 21 defines otherwise than opset 20, beyond new element types.
_CHANGED = ("GroupNormalization",)


def with_int4_weights(
    exported: Exported, kept: Collection[str]
) -> tuple[onnx.ModelProto, frozenset[str]]:
    """The model in float16 with 4-bit weights, and the names of the nodes that have them.

    ``kept`` names nodes that stay float. Raises ``LoweringFailed`` where there is no such node.
    """
    weights = {tensor.name: tensor for tensor in exported.model.graph.initializer}
    axes = {
        node.name: axis
        for node in exported.model.graph.node
        if node.op_type in ("Gemm", "MatMul") and node.name not in kept
        if (axis := _axis(node, weights)) is not None
    }
    if not axes:
        raise LoweringFailed(
            "int4 would quantize nothing: TensorRT has it for matrix products with constant "
            f"weights (Linear) alone, with inputs in multiples of {BLOCK} features, and this model "
            "has none that is not kept in float; convolutions stay float16. Use --precision int8, "
            "or fp16."
        )
    _refuse_changed(exported.model)
    model = float16_from_float32(exported.model)
    ordered = []
    made: dict[tuple[str, int], str] = {}  # weight and axis to the value dequantized of it
    for node in model.graph.node:
        if node.name in axes:
            key = node.input[1], axes[node.name]
            if key not in made:
                ordered.append(_dequantizer(model.graph, weights[key[0]], key[1]))
                made[key] = ordered[-1].output[0]
            node.input[1] = made[key]
        ordered.append(node)
    drop_unread(model.graph, ordered)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = OPSET
    model.ir_version = max(model.ir_version, IR)
    return model, frozenset(axes)


def _axis(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> int | None:
    """The axis of the weight that is summed over, None where it cannot be cut into blocks."""
    weight = weights.get(node.input[1])
    if weight is None or len(weight.dims) != 2 or node.input[0] in weights:
        return None
    flags = {each.name: each.i for each in node.attribute}
    axis = 1 if node.op_type == "Gemm" and flags.get("transB") else 0
    # Two codes share a byte along the last axis.
    return None if weight.dims[axis] % BLOCK or weight.dims[1] % 2 else axis


def _refuse_changed(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in _CHANGED:
            raise LoweringFailed(
                f"int4 needs ONNX opset {OPSET}, where {node.op_type} means something else than "
                "in the opset of the export; use --precision int8."
            )


def _dequantizer(graph: onnx.GraphProto, weight: onnx.TensorProto, axis: int) -> onnx.NodeProto:
    codes, scales = block_codes(numpy_helper.to_array(weight), axis)
    name = f"{weight.name}_axis{axis}"
    packed = codes.reshape(-1).astype(np.uint8) & 0xF
    content = (packed[0::2] | packed[1::2] << 4).tobytes()
    graph.initializer.extend(
        [
            helper.make_tensor(f"{name}_int4", TensorProto.INT4, codes.shape, content, raw=True),
            numpy_helper.from_array(scales, f"{name}_scale"),
        ]
    )
    return helper.make_node(
        "DequantizeLinear",
        [f"{name}_int4", f"{name}_scale"],
        [f"{name}_dequantized"],
        f"{name}_DequantizeLinear",
        axis=axis,
        block_size=BLOCK,
    )


def block_codes(weight: Array, axis: int) -> tuple[Array, Array]:
    """4-bit codes of ``weight`` in int8, and the float16 scale of each block along ``axis``.

    The codes follow the scale as float16 has it, so that its rounding costs nothing.
    """
    moved = np.moveaxis(weight.astype(np.float64), axis, 0)
    blocks = moved.reshape(-1, BLOCK, moved.shape[1])
    scales = (np.abs(blocks).max(axis=1) / _LARGEST_CODE).astype(np.float16)
    scales = np.maximum(scales, np.finfo(np.float16).smallest_subnormal)
    codes = np.rint(blocks / scales[:, None].astype(np.float64))
    codes = codes.clip(-_LARGEST_CODE, _LARGEST_CODE).astype(np.int8).reshape(moved.shape)
    return (
        np.ascontiguousarray(np.moveaxis(codes, 0, axis)),
        np.ascontiguousarray(np.moveaxis(scales.astype(np.float16), 0, axis)),
    )
