"""Recipes to typed ONNX: TensorRT is always strongly typed here, so types are in the file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx

from edgekit.calibration import Calibration
from edgekit.errors import LoweringFailed
from edgekit.onnx_export import Exported, float16_from_float32
from edgekit.onnx_quantize import Measured, Style, measured, rewritten
from edgekit.program import Program
from edgekit.recipe import FP32, Recipe
from edgekit.selection import kept_nodes
from edgekit_tensorrt.blocks import with_int4_weights
from edgekit_tensorrt.islands import drop_unread, with_islands

WEIGHTED = ("Conv", "Gemm", "MatMul")
PER_CHANNEL, PER_TENSOR = "per-channel", "per-tensor"
# NVIDIA's parser refuses int32 biases and zero points other than 0, reads unsigned types as int8
# without an error, and its compiler refuses quantized constants of Add and Mul. A result is
# quantized by the layers that read it, where they are.
_OPTIONS: Mapping[str, object] = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
}
# A convolution of fewer channels is padded to 4: a depthwise one would compute four times as
# much, and a kernel of its own would copy its input.
FEWEST_CHANNELS = 4


@dataclass(frozen=True)
class Typed:
    """A model with its types, and what the recipe did to it, by names of ONNX nodes."""

    model: onnx.ModelProto
    quantized: frozenset[str] = frozenset()
    islands: tuple[str, ...] = ()


def models_in_precision(exported: Exported, program: Program, recipe: Recipe) -> dict[str, Typed]:
    """The model in ``recipe``, float32 at its edge; int8 in every kind of scale that may win.

    Inside it is float16 with explicit casts, but for fp32. int8 without calibration data is
    float16 all over. Raises ``LoweringFailed``.
    """
    if recipe == FP32:
        return {"": Typed(exported.model)}
    kept = _kept(exported, program, recipe) if recipe.quantized else frozenset()
    if recipe.weights == "int4":
        return {"": Typed(*with_int4_weights(exported, kept))}
    if recipe.calibrated and program.calibration is not None:
        return _int8_models(exported, program.calibration, recipe, kept)
    return {"": Typed(float16_from_float32(exported.model))}


def _kept(exported: Exported, program: Program, recipe: Recipe) -> frozenset[str]:
    """The ONNX nodes of what the recipe keeps in float."""
    names = kept_nodes(program, recipe)
    return frozenset(node for node, origin in exported.origins.items() if origin.name in names)


def _int8_models(
    exported: Exported, calibration: Calibration, recipe: Recipe, kept: Collection[str]
) -> dict[str, Typed]:
    asked = int8_nodes(exported.model, kept)
    if not asked:
        raise LoweringFailed(
            f"{recipe.precision} would quantize nothing: no convolution or matrix product is left "
            f"that has constant weights, {FEWEST_CHANNELS} channels or more, and is not kept in "
            "float. Use --precision fp16."
        )
    weighted = {node.name for node in exported.model.graph.node if node.op_type in WEIGHTED}
    floats = weighted - asked | set(kept)
    ready = measured(
        exported.model,
        calibration,
        method=recipe.method,
        keep_float=floats,
        doing=f"calibrating tensorrt {recipe.precision}",
    )
    # Narrow codes share the scales of wide ones: one for a whole weight would leave them nothing.
    scales = (PER_CHANNEL,) if recipe.switchable else (PER_CHANNEL, PER_TENSOR)
    return {name: _int8_model(ready, asked, floats, name == PER_CHANNEL) for name in scales}


def _int8_model(
    ready: Measured, asked: Collection[str], floats: Collection[str], per_channel: bool
) -> Typed:
    style = Style("int8", per_channel=per_channel, ops=WEIGHTED, options=_OPTIONS)
    model = rewritten(ready, style, keep_float=floats)
    quantized = _both_sides(model, asked)
    _restore_float_readers(model, ready.model, quantized)
    half = float16_from_float32(model)
    return Typed(half, quantized, tuple(with_islands(half, model)))


def _both_sides(model: onnx.ModelProto, asked: Collection[str]) -> frozenset[str]:
    """Those of ``asked`` whose operands are both integers; the library leaves out what it cannot.

    With one side alone the product runs in float16, after a kernel that quantizes for nothing.
    """
    integers = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return frozenset(
        node.name
        for node in model.graph.node
        if node.name in asked and integers.issuperset(node.input[:2])
    )


def int8_nodes(model: onnx.ModelProto, kept: Collection[str]) -> frozenset[str]:
    """Names of the nodes that are computed in int8: what has weights and does not lose by it.

    Products of two activations (attention) stay float: softmax and both products are one kernel
    in float16, and quantizing one operand alone breaks it.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return frozenset(
        node.name
        for node in model.graph.node
        if node.op_type in WEIGHTED
        and node.name not in kept
        and node.input[0] not in sizes
        and (size := sizes.get(node.input[1])) is not None
        and (size[1] >= FEWEST_CHANNELS if node.op_type == "Conv" else len(size) == 2)
    )


def _restore_float_readers(
    model: onnx.ModelProto, single: onnx.ModelProto, quantized: Collection[str]
) -> None:
    """Give every reader that is not to be int8 the float value again.

    The library gives all readers of a tensor the quantized one: the sum after a residual, a layer
    that shares its weights and is kept in float, the model's own output. ``single`` is the model
    before, whose weights are float.
    """
    graph = model.graph
    _restore_outputs(graph, quantized)
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    floats = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            source = quantizers.get(node.input[0])
            name = node.input[0].removesuffix("_quantized") if source is None else source.input[0]
            floats[node.output[0]] = name
    weights = {tensor.name: tensor for tensor in single.graph.initializer}
    held = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in floats and not (node.name in quantized and index < 2):
                node.input[index] = floats[name]
                if floats[name] in weights and floats[name] not in held:
                    graph.initializer.add().CopyFrom(weights[floats[name]])
                    held.add(floats[name])
    drop_unread(graph, list(graph.node))


def _restore_outputs(graph: onnx.GraphProto, quantized: Collection[str]) -> None:
    """A model's output that is also an int8 layer's input was made the dequantized one."""
    outputs = {value.name for value in graph.output}
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear" or node.output[0] not in outputs:
            continue
        name = node.output[0]
        node.output[0] = f"{name}_DequantizeLinear_Output"
        inner = f"{name}_QuantizeLinear_Input"
        for other in graph.node:
            if other.name in quantized and other.input[0] == name:
                other.input[0] = node.output[0]
            other.input[:] = [name if each == inner else each for each in other.input]
            other.output[:] = [name if each == inner else each for each in other.output]
