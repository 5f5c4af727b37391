"""Captured program to typed ONNX that NVIDIA's parser takes, with engines and kernel plans."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto

from edgekit import evidence, rounding
from edgekit.artifact import Artifact
from edgekit.contract import Finding
from edgekit.errors import EdgekitError, LoweringFailed, RuntimeFailed, UnsupportedModel
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
from edgekit.onnx_quantize import serialized_with_codes
from edgekit.program import Program
from edgekit.recipe import Recipe
from edgekit.repairs import LOG_SOFTMAX, written_out
from edgekit.spec import Dim, TensorSpec
from edgekit.widths import places_to_json
from edgekit_tensorrt import Settings
from edgekit_tensorrt import build_engine as script
from edgekit_tensorrt.choice import (
    CODES,
    MOST_SAMPLES,
    answers,
    chosen,
    figures_of,
    left_in_float,
    sqnr_db,
)
from edgekit_tensorrt.processes import Built, Parsed, ParserError, build_engine, parse_onnx
from edgekit_tensorrt.quantize import Typed, models_in_precision
from edgekit_tensorrt.versions import PARSERS

MAIN, PLAN = "model.onnx", "plan.json"
Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]


def findings_from_program(program: Program, recipe: Recipe, settings: Settings) -> list[Finding]:
    """What ONNX has no op for; else what NVIDIA's parser refuses, all of it; else its compiler.

    Where neither refuses: the layers that the compiler computes in float16 though they were to
    be integers. Without calibration data int8 is checked as float16.
    """
    if refused := onnx_findings(program):
        return refused
    try:
        exported, made, _ = _made_best(program, recipe, settings)
        _left(exported, made, recipe)
    except UnsupportedModel as found:
        return list(found.findings)
    except LoweringFailed as cause:
        return [Finding("the graph", "refused", "", "", str(cause))]
    return _outside(exported, made, recipe)


def artifact_from_program(program: Program, recipe: Recipe, settings: Settings) -> Artifact:
    """Export, give it to NVIDIA's parser, build an engine for each compute capability.

    Engines are TensorRT-RTX's; where TensorRT proper is installed instead, there are none.

    Raises ``UnsupportedModel``, ``LoweringFailed`` or ``RuntimeFailed``.
    """
    if recipe.calibrated and program.calibration is None:
        raise LoweringFailed(
            f"{recipe.precision} needs calibration data, to measure ranges on, and none was given."
        )
    exported, made, variants = _made_best(program, recipe, settings)
    plans = {name: each.plan.to_json() for name, each in made.built.items()}
    engines = {f"model.{name}.engine": each.engine for name, each in made.built.items()}
    scripts = [script, evidence, *([rounding] if recipe.switchable else [])]
    paths = [Path(str(each.__file__)) for each in scripts]
    return Artifact(
        target="tensorrt",
        recipe=recipe,
        main=MAIN,
        files={
            MAIN: made.content,
            **engines,
            PLAN: _json({"runtime": made.parsed.runtime, "plans": plans}),
            **{path.name: path.read_bytes() for path in paths},
        },
        inputs=program.inputs,
        outputs=program.outputs,
        provenance={
            "version": settings.version,
            "runtime": made.parsed.runtime,
            "opsets": opsets(made.typed.model),
            "nodes": len(made.typed.model.graph.node),
            "kernels": {
                name: {key: plan[key] for key in ("layer_count", "dtypes", "moved_bytes")}
                for name, plan in plans.items()
            },
            "versions": {name: installed_version(name) for name in ("torch", "onnx", "onnxscript")},
            **(_quantization(exported, made, recipe, variants) if recipe.quantized else {}),
        },
        derived=frozenset({PLAN, *engines}),
    )


@dataclass(frozen=True)
class _Made:
    """A model as a file, as NVIDIA's parser took it, and its engines by compute capability."""

    typed: Typed
    content: bytes
    places: list[dict[str, Any]]  # of the codes, where the recipe is switchable
    parsed: Parsed
    built: Mapping[str, Built]


def _made_best(
    program: Program, recipe: Recipe, settings: Settings
) -> tuple[Exported, _Made, dict[str, Any]]:
    """The model in ``recipe``; of several variants the best, and what each was judged by."""
    exported = onnx_from_program(_written_out(program), "tensorrt")
    _write_out_defaults(exported.model)
    models = models_in_precision(exported, program, recipe)
    names = settings.compute_capabilities
    first = settings if len(models) == 1 else replace(settings, compute_capabilities=names[:1])
    made: dict[str, _Made] = {}
    refusals: dict[str, EdgekitError] = {}
    for name, typed in models.items():
        try:
            made[name] = _made(typed, exported, program, recipe, first)
        except (UnsupportedModel, LoweringFailed) as cause:
            refusals[name] = cause
    if not made:
        raise next(iter(refusals.values()))
    if len(models) == 1:
        return exported, next(iter(made.values())), {}
    figures = _figures(exported, program, made)
    name = chosen(figures)
    best, rest = made[name], replace(settings, compute_capabilities=names[1:])
    if best.built:
        more = _engines(best.content, exported, program, rest)
        best = replace(best, built={**best.built, **more})
    variants = {"chosen": name, **figures, **{key: str(why) for key, why in refusals.items()}}
    return exported, best, variants


def _figures(
    exported: Exported, program: Program, made: Mapping[str, _Made]
) -> dict[str, dict[str, float | None]]:
    """What each variant is judged by: the plan for the first GPU, and the noise on real inputs."""
    assert program.calibration is not None
    samples = program.calibration.samples[:MOST_SAMPLES]
    exact = answers(serialized(exported.model), samples)
    return {
        name: figures_of(
            next((built.plan for built in each.built.values()), None),
            sqnr_db(exact, answers(each.content, samples)),
        )
        for name, each in made.items()
    }


def _made(
    typed: Typed, exported: Exported, program: Program, recipe: Recipe, settings: Settings
) -> _Made:
    if refused := _refused_by_version(typed.model, exported, settings.version):
        raise UnsupportedModel("tensorrt", refused)
    if recipe.switchable and typed.quantized:
        content, places = serialized_with_codes(typed.model, exported.origins, MAIN)
    else:
        content, places = serialized(typed.model), []
    parsed = parse_onnx(content)
    if parsed.errors:
        findings = [_finding(error, exported) for error in parsed.errors]
        raise UnsupportedModel("tensorrt", findings)
    # TensorRT proper builds for the GPU it runs on alone; there the session builds the engine.
    crosses = parsed.runtime.startswith("tensorrt_rtx")
    built = _engines(content, exported, program, settings) if crosses else {}
    return _Made(typed, content, places, parsed, built)


def _quantization(
    exported: Exported, made: _Made, recipe: Recipe, variants: Mapping[str, Any]
) -> dict[str, Any]:
    """What the provenance tells of it; raises where the plan has too little of it."""
    return {
        "quantized": len(made.typed.quantized),
        "islands": list(made.typed.islands),
        "notes": list(_left(exported, made, recipe).values()),
        **({"variants": dict(variants)} if variants else {}),
        **({"codes": places_to_json(made.places)} if made.places else {}),
    }


def _left(exported: Exported, made: _Made, recipe: Recipe) -> dict[str, str]:
    """A sentence for each GPU where layers are float though the file says integers.

    Raises ``LoweringFailed`` where that is most of them: the compiler says nothing, and the file
    would be called what it is not.
    """
    sentences = {}
    quantized, codes = made.typed.quantized, CODES.get(recipe.weights, "").lower()
    for name, left in _left_nodes(made, recipe).items():
        layers = [_layer(exported, node) for node in left]
        shown = ", ".join(layers[:_SHOWN]) + (" and others" if len(layers) > _SHOWN else "")
        sentence = (
            f"For {name}, NVIDIA's compiler runs {len(left)} of the {len(quantized)} layers that "
            f"are {codes} in the file in float: {shown}. Keep them in float (--keep-float), or "
            "build for another GPU (--tensorrt-compute-capability sm86)."
        )
        if 2 * len(left) > len(quantized):
            raise LoweringFailed(f"{sentence} Or use --precision fp16.")
        sentences[name] = sentence
    return sentences


_SHOWN = 5


def _layer(exported: Exported, name: str) -> str:
    origin = exported.origins.get(name)
    return name if origin is None else node_source(origin)[1] or origin.name


def _left_nodes(made: _Made, recipe: Recipe) -> dict[str, list[str]]:
    """By GPU, the ONNX nodes that its plan has float kernels for, though they hold integers."""
    if not made.typed.quantized:
        return {}
    codes = CODES[recipe.weights]
    found = {
        name: left_in_float(each.plan, made.typed.quantized, codes)
        for name, each in made.built.items()
    }
    return {name: nodes for name, nodes in found.items() if nodes}


def _outside(exported: Exported, made: _Made, recipe: Recipe) -> list[Finding]:
    findings = []
    for name, nodes in _left_nodes(made, recipe).items():
        for node in nodes:
            origin = exported.origins.get(node)
            source, module = node_source(origin) if origin is not None else ("", "")
            said = f"for {name} it runs in float; keep it in float, or build for another GPU"
            op = op_name(origin) if origin is not None else node
            findings.append(Finding(op, "outside", source, module, said))
    return findings


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
            # Types that the GPU lacks: float32 products on Turing, 4-bit integers.
            typed = any(words in str(cause) for words in ("FP32", "HW-specific datatypes"))
            said = f"for {name}, {cause}{' Try --precision fp16.' if typed else ''}"
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
    int4 = any(tensor.data_type == TensorProto.INT4 for tensor in model.graph.initializer)
    newest = parser.int4_opset or parser.opset if int4 else parser.opset
    if opset > newest:
        raise LoweringFailed(
            f"the model needs ONNX opset {opset}; TensorRT {version} takes {newest}."
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
