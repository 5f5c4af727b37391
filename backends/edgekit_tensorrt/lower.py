"""Captured program to typed ONNX that NVIDIA's parser takes, with engines and kernel plans."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import torch

from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.contract import Finding
from edgekit.errors import LoweringFailed, RuntimeFailed, UnsupportedModel
from edgekit.graph import node_source, op_name
from edgekit.host import installed_version
from edgekit.onnx_export import (
    Exported,
    onnx_from_program,
    opsets,
    serialized,
)
from edgekit.onnx_export import (
    findings_from_program as onnx_findings,
)
from edgekit.program import Program
from edgekit.recipe import Recipe
from edgekit.repairs import LOG_SOFTMAX, written_out
from edgekit.spec import Dim, TensorSpec
from edgekit_tensorrt import Settings
from edgekit_tensorrt import build_engine as script
from edgekit_tensorrt.processes import Built, ParserError, build_engine, parse_onnx
from edgekit_tensorrt.quantize import model_in_precision
from edgekit_tensorrt.versions import PARSERS

MAIN = "model.onnx"
Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]


def findings_from_program(program: Program, recipe: Recipe, settings: Settings) -> list[Finding]:
    """What ONNX has no op for; else what NVIDIA's parser refuses, all of it; else its compiler."""
    if refused := onnx_findings(program):
        return refused
    try:
        artifact_from_program(program, recipe, settings)
    except UnsupportedModel as found:
        return list(found.findings)
    except LoweringFailed as cause:
        return [Finding("the graph", "refused", "", "", str(cause))]
    return []


def artifact_from_program(program: Program, recipe: Recipe, settings: Settings) -> Artifact:
    """Export, give it to NVIDIA's parser, build an engine for each compute capability.

    Engines are TensorRT-RTX's; where TensorRT proper is installed instead, there are none.

    Raises ``UnsupportedModel``, ``LoweringFailed`` or ``RuntimeFailed``.
    """
    exported = onnx_from_program(_written_out(program), "tensorrt")
    _write_out_defaults(exported.model)
    model = model_in_precision(exported.model, recipe)
    if refused := _refused_by_version(model, exported, settings.version):
        raise UnsupportedModel("tensorrt", refused)
    content = serialized(model)
    parsed = parse_onnx(content)
    if parsed.errors:
        findings = [_finding(error, exported) for error in parsed.errors]
        raise UnsupportedModel("tensorrt", findings)
    # TensorRT proper builds for the GPU it runs on alone; there the session builds the engine.
    crosses = parsed.runtime.startswith("tensorrt_rtx")
    built = _engines(content, exported, program, settings) if crosses else {}
    plans = {name: each.plan.to_json() for name, each in built.items()}
    return Artifact(
        target="tensorrt",
        recipe=recipe,
        main=MAIN,
        files={
            MAIN: content,
            **{f"model.{name}.engine": each.engine for name, each in built.items()},
            "plan.json": _json({"runtime": parsed.runtime, "plans": plans}),
            "build_engine.py": Path(str(script.__file__)).read_bytes(),
            "evidence.py": Path(str(evidence.__file__)).read_bytes(),
        },
        inputs=program.inputs,
        outputs=program.outputs,
        provenance={
            "version": settings.version,
            "runtime": parsed.runtime,
            "opsets": opsets(model),
            "nodes": len(model.graph.node),
            "kernels": {
                name: {key: plan[key] for key in ("layer_count", "dtypes", "moved_bytes")}
                for name, plan in plans.items()
            },
            "versions": {name: installed_version(name) for name in ("torch", "onnx", "onnxscript")},
        },
    )


def _written_out(program: Program) -> Program:
    """NVIDIA's parser makes of a log-softmax the logarithm of a softmax (measured: minus infinity
    from scores 100 apart)."""
    return replace(program, exported=written_out(program.exported, LOG_SOFTMAX))


# NVIDIA's parser has other defaults for these than ONNX: Selu's constants rounded, Trilu's "lower".
_OTHER_DEFAULTS = ("Selu", "Trilu")


def _write_out_defaults(model: onnx.ModelProto) -> None:
    opset = opsets(model)["ai.onnx"]
    for node in model.graph.node:
        if node.op_type in _OTHER_DEFAULTS and not node.domain:
            given = {attribute.name for attribute in node.attribute}
            schema = onnx.defs.get_schema(node.op_type, opset)
            node.attribute.extend(
                attribute.default_value
                for name, attribute in schema.attributes.items()
                if name not in given and attribute.default_value.name
            )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _engines(
    content: bytes, exported: Exported, program: Program, settings: Settings
) -> dict[str, Built]:
    """One for each GPU, each built in its own process."""
    built = {}
    for name in settings.compute_capabilities:
        try:
            built[name] = build_engine(
                content,
                compute_capabilities=[name],
                profiles=profiles_from_specs(program.inputs),
                seconds=settings.build_seconds,
                memory_gb=settings.build_memory_gb,
            )
        except RuntimeFailed as cause:
            said = f"for {name}, {cause}{' Try --precision fp16.' if 'FP32' in str(cause) else ''}"
            if node := _named(str(cause), exported):
                raise UnsupportedModel("tensorrt", [_refusal(node, op_name(node), said)]) from cause
            raise LoweringFailed(said) from cause
    return built


_NODE, _INITIALIZER = re.compile(r"'(node_\w+)'"), re.compile(r"import initializer: (\S+)$")


def _named(said: str, exported: Exported) -> torch.fx.Node | None:
    """The node of the program that a message speaks of, by its ONNX node or an initializer."""
    if (match := _NODE.search(said)) and match[1] in exported.origins:
        return exported.origins[match[1]]
    if match := _INITIALIZER.search(said):
        for node in exported.model.graph.node:
            if match[1] in node.input and node.name in exported.origins:
                return exported.origins[node.name]
    return None


def profiles_from_specs(inputs: Sequence[TensorSpec]) -> Mapping[str, Shapes]:
    """Smallest, middle and largest shape of each input that has a named dim."""
    profiles = {}
    for spec in inputs:
        if spec.dims:
            sizes = (
                {dim.name: size(dim) for dim in spec.dims}
                for size in (_smallest, _middle, _largest)
            )
            low, middle, high = (spec.sizes(chosen) for chosen in sizes)
            profiles[spec.name] = (low, middle, high)
    return profiles


def _smallest(dim: Dim) -> int:
    return dim.minimum


def _middle(dim: Dim) -> int:
    return (dim.minimum + dim.maximum) // 2


def _largest(dim: Dim) -> int:
    return dim.maximum


def _refused_by_version(model: onnx.ModelProto, exported: Exported, version: str) -> list[Finding]:
    parser = PARSERS[version]
    opset = opsets(model)["ai.onnx"]
    if opset > parser.opset:
        raise LoweringFailed(
            f"the model needs ONNX opset {opset}; TensorRT {version} takes {parser.opset}."
        )
    return [
        _finding(
            ParserError("", node.op_type, node.name, f"TensorRT {version} cannot import it"),
            exported,
        )
        for node in model.graph.node
        if node.op_type in parser.lacks
    ]


def _finding(error: ParserError, exported: Exported) -> Finding:
    """The parser's words with the user's source line."""
    # "false" is all it says of an op that it has no importer for.
    reason = " ".join(error.description.split())
    said = (
        "NVIDIA's parser does not know it; write it with simpler ops"
        if reason == "false"
        else f"NVIDIA's parser says: {reason}"
    )
    node = exported.origins.get(error.node) or _named(said, exported)
    if node is None:
        return Finding(error.operator or "the graph", "refused", "", "", said)
    name = op_name(node)
    return _refusal(node, f"{error.operator} ({name})" if error.operator else name, said)


def _refusal(node: torch.fx.Node, name: str, said: str) -> Finding:
    source, module = node_source(node)
    return Finding(name, "refused", source, module, said)
