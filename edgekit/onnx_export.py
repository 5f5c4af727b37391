"""Captured program to ONNX, shared by every target that starts from it. Needs onnx and torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _dispatching, _fx_passes, _registration

from edgekit.contract import Finding
from edgekit.errors import LoweringFailed, UnsupportedModel
from edgekit.graph import node_source, op_name, quiet
from edgekit.program import Program
from edgekit.repairs import pixel_unshuffle, written_out
from edgekit.spec import Dim, TensorSpec

# One protobuf message cannot be larger; beyond it weights need a second file.
LARGEST_MODEL = 2**31 - 1
LARGEST_FLOAT16 = 65504.0
SMALL = 64  # elements


@dataclass(frozen=True)
class Exported:
    """An ONNX model, and the graph node of the program that each of its nodes came from."""

    model: onnx.ModelProto
    origins: Mapping[str, torch.fx.Node]


def findings_from_program(program: Program) -> list[Finding]:
    """Every op that the exporter would find no ONNX function for.

    It asks the exporter's own dispatcher about the graph after the exporter's own
    decompositions. These are private names of torch.onnx; the torch version is pinned.
    """
    with quiet():
        registry = _registration.ONNXRegistry.from_torchlib()
        decomposed = _fx_passes.decompose_with_registry(program.exported, registry)
        graph = _fx_passes.remove_assertion_nodes(decomposed.graph_module).graph
        refused = [
            node
            for node in graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
            and _dispatching.dispatch(node, registry)[0] is None
        ]
    return [_finding(node) for node in refused]


def _finding(node: torch.fx.Node) -> Finding:
    source, module = node_source(node)
    remedy = (
        "ONNX has no op for it; write it with simpler ones, or leave it to the code that "
        "runs the model."
    )
    return Finding(op_name(node), "refused", source, module, remedy)


def onnx_from_program(program: Program, target: str) -> Exported:
    """Export at the exporter's opset, 20, in float32; name dims; drop the maker's paths.

    Values keep the names of the program's graph nodes. Raises ``UnsupportedModel`` in the name
    of ``target``, or ``LoweringFailed``.
    """
    source = written_out(program.exported, _WRONG)
    inputs = [spec.name for spec in program.inputs]
    outputs = output_names(program.inputs, program.outputs)
    try:
        with quiet():
            exported = torch.onnx.export(
                source,
                # Names of no node; the user's come afterwards, where they cannot meet one.
                input_names=[f"{_OURS}{name}" for name in inputs],
                output_names=[f"{_OURS}{name}" for name in outputs],
                dynamo=True,
                verbose=False,
            )
            model = exported.model_proto  # type: ignore[union-attr]  # None only without dynamo
    except Exception as cause:  # the exporter translates every failure into its own private classes
        if refused := findings_from_program(program):
            raise UnsupportedModel(target, refused) from cause
        raise LoweringFailed(
            f"torch.onnx could not export the model: {_summary(str(cause))}"
        ) from cause
    origins = _origins(model, source)
    _rename(model, [*inputs, *outputs])
    _repair_gru(model)
    _strip(model)
    _name_dims(model, program)
    return Exported(model, origins)


def serialized(model: onnx.ModelProto) -> bytes:
    """The file's bytes. Raises ``LoweringFailed`` where one file cannot hold them."""
    if model.ByteSize() > LARGEST_MODEL:
        raise LoweringFailed("the model is larger than 2 GB, the most that one .onnx file holds.")
    return bytes(model.SerializeToString(deterministic=True))


def opsets(model: onnx.ModelProto) -> dict[str, int]:
    """Version by domain; the standard one is called ai.onnx."""
    return {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}


def float16_from_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and activations in float16 with explicit casts; inputs and outputs stay float32.

    Constants beyond float16 are held at its largest number: -1e9 in a mask must not become
    minus infinity, whose softmax is NaN where a whole row is masked. Raises ``LoweringFailed``.
    """
    try:
        exact = _small_floats(model)
        with quiet():
            converted: onnx.ModelProto = convert_float_to_float16(
                model, keep_io_types=True, max_finite_val=LARGEST_FLOAT16
            )
            # It appends its casts; onnxruntime sorts them itself, other readers refuse.
            OnnxModel(converted).topological_sort()
        _without_detours(converted, exact)
        converted.graph.ClearField("value_info")  # it leaves some in float32
        return converted
    except Exception as cause:  # the tool raises whatever it trips over
        raise LoweringFailed(
            f"the ONNX model could not be converted to fp16: {cause}. Use --precision fp32."
        ) from cause


_OURS = "edgekit:"
# torch 2.13 exports it with the channels in another order (measured: -2 dB from eager).
_WRONG = {torch.ops.aten.pixel_unshuffle.default: pixel_unshuffle}


def output_names(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
    """ONNX has one space of names; an output called like an input gets ``_output`` after it.

    Raises ``LoweringFailed`` where that meets another name.
    """
    taken = {spec.name for spec in inputs}
    names = [f"{spec.name}_output" if spec.name in taken else spec.name for spec in outputs]
    twice = [name for name in names if names.count(name) > 1 or name in taken]
    if twice:
        raise LoweringFailed(
            f"two values of the model would both be called {twice[0]!r} in ONNX, since an output "
            "named like an input gets '_output' after it; name the outputs otherwise."
        )
    return names


def _rename(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give inputs and outputs the user's names; an inner value that has one of them yields."""
    wanted = {f"{_OURS}{name}": name for name in names}
    changed = {**{name: f"{name}_inner" for name in names}, **wanted}
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = changed.get(value.name, value.name)
        for node in graph.node:
            node.input[:] = [changed.get(name, name) for name in node.input]
            node.output[:] = [changed.get(name, name) for name in node.output]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _small_floats(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Copies of the constants that are no weights: scales, bounds, steps."""
    copies = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and prod(tensor.dims) <= SMALL:
            copies[tensor.name] = onnx.TensorProto()
            copies[tensor.name].CopyFrom(tensor)
    return copies


def _without_detours(model: onnx.ModelProto, exact: Mapping[str, onnx.TensorProto]) -> None:
    """Ops that stay in float32 get their constants as they were, not by way of float16.

    A scale of 1.3 for Resize would come back as 1.2998 and change the size of the result.
    """
    for node in list(model.graph.node):
        to_float = node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT
        if to_float and node.input[0] in exact:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(exact[node.input[0]])
            tensor.name = node.output[0]
            model.graph.node.remove(node)


def _summary(text: str) -> str:
    """The exporter's reason, without its advice to its own developers."""
    _, _, rest = text.partition("## Exception summary")
    lines = [line.strip() for line in (rest or text).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given."


_FX_NODE = re.compile(r"%(\w+)")


def _origins(model: onnx.ModelProto, source: ExportedProgram) -> dict[str, torch.fx.Node]:
    """By the name of the ONNX node; read before the notes that say so are dropped."""
    nodes = {node.name: node for node in source.graph.nodes}
    origins = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        match = _FX_NODE.match(notes.get("pkg.torch.onnx.fx_node", ""))
        if match and match[1] in nodes:
            origins[node.name] = nodes[match[1]]
    return origins


def _repair_gru(model: onnx.ModelProto) -> None:
    """PyTorch's GRU multiplies by the reset gate after the matrix product; torch 2.13 exports the
    other kind (measured: 9 to 13 dB from eager)."""
    for node in model.graph.node:
        if node.op_type == "GRU":
            for attribute in node.attribute:
                if attribute.name == "linear_before_reset":
                    attribute.i = 1


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they hold the paths of the machine that made the file."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("doc_string")


def _name_dims(model: onnx.ModelProto, program: Program) -> None:
    """Give the free dims the user's names instead of PyTorch's (s77)."""
    names = _dim_names(model, program)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _dim_names(model: onnx.ModelProto, program: Program) -> Mapping[str, str]:
    return {
        dim.dim_param: wanted.name
        for value, spec in zip(model.graph.input, program.inputs, strict=True)
        for dim, wanted in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True)
        if isinstance(wanted, Dim) and dim.dim_param
    }
