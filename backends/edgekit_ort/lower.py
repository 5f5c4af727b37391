"""Captured program to ONNX, and the preflight that lists what ONNX has no op for."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch.onnx._internal.exporter import _dispatching, _fx_passes, _registration

from edgekit.artifact import Artifact
from edgekit.contract import Finding
from edgekit.errors import LoweringFailed, UnsupportedModel
from edgekit.graph import node_source, op_name, quiet
from edgekit.host import installed_version
from edgekit.program import Program
from edgekit.recipe import FP16, Recipe
from edgekit.spec import Dim, TensorSpec
from edgekit_ort.quantize import to_float16

MAIN = "model.onnx"
# One protobuf message cannot be larger; beyond it weights need a second file.
LARGEST_MODEL = 2**31 - 1


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


def artifact_from_program(program: Program, recipe: Recipe) -> Artifact:
    """Export, name dims, convert to the recipe's precision.

    Raises ``UnsupportedModel`` or ``LoweringFailed``.
    """
    try:
        with quiet():
            exported = torch.onnx.export(
                program.exported,
                input_names=[spec.name for spec in program.inputs],
                output_names=[_graph_name(spec, program.inputs) for spec in program.outputs],
                dynamo=True,
                verbose=False,
            )
            model = exported.model_proto  # type: ignore[union-attr]  # None only without dynamo
    except Exception as cause:  # the exporter translates every failure into its own private classes
        if refused := findings_from_program(program):
            raise UnsupportedModel("onnxruntime", refused) from cause
        raise LoweringFailed(
            f"torch.onnx could not export the model: {_summary(str(cause))}"
        ) from cause
    _strip(model)
    _name_dims(model, program)
    if recipe == FP16:
        model = to_float16(model)
    if model.ByteSize() > LARGEST_MODEL:
        raise LoweringFailed("the model is larger than 2 GB, the most that one .onnx file holds.")
    content = model.SerializeToString(deterministic=True)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return Artifact(
        target="onnxruntime",
        recipe=recipe,
        main=MAIN,
        files={MAIN: content},
        inputs=program.inputs,
        outputs=program.outputs,
        provenance={"opsets": opsets, "nodes": len(model.graph.node), "versions": _versions()},
    )


def _graph_name(output: TensorSpec, inputs: tuple[TensorSpec, ...]) -> str:
    """ONNX has one space of names; an output called like an input gets a suffix."""
    taken = {spec.name for spec in inputs}
    return f"{output.name}_output" if output.name in taken else output.name


def _versions() -> dict[str, str | None]:
    return {name: installed_version(name) for name in ("torch", "onnx", "onnxscript")}


def _summary(text: str) -> str:
    """The exporter's reason, without its advice to its own developers."""
    _, _, rest = text.partition("## Exception summary")
    lines = [line.strip() for line in (rest or text).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given."


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
