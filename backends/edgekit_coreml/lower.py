"""Captured program to a ``.mlpackage`` by coremltools: an ML Program, as Xcode wants it."""

from __future__ import annotations

import json
import tempfile
import traceback
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit import evidence, rounding
from edgekit.artifact import Artifact
from edgekit.contract import Finding
from edgekit.errors import EdgekitError, LoweringFailed, UnsupportedModel
from edgekit.graph import first_line, node_source, op_name, quiet
from edgekit.host import installed_version
from edgekit.image import ImageInput
from edgekit.program import Program
from edgekit.recipe import FP16, Recipe
from edgekit.selection import kept_nodes
from edgekit.spec import Dim
from edgekit.widths import places_to_json
from edgekit_coreml import predict_on_mac
from edgekit_coreml.codes import places
from edgekit_coreml.names import (
    LABEL,
    PROBABILITIES,
    Names,
    graph_name,
    kept_operations,
    names_of,
    nodes_by_variable,
)
from edgekit_coreml.prepare import (
    WRONG,
    classes,
    converter_program,
    image_of,
    is_supported,
    used_inputs,
)
from edgekit_coreml.quantize import (
    Quantized,
    compression_passes,
    compute_precision,
    conversion_passes,
    coremltools,
    oldest_that_holds,
    palette_mode,
    quantized_program,
)
from edgekit_coreml.scales import check_scales

PACKAGE = "model.mlpackage"
MAIN = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"
# Core ML's arrays are float32, float16 or int32; the session gives back what the model returns.
FEATURE_TYPES = {
    **{"float32": np.float32, "bool": np.int32},
    **dict.fromkeys(("int64", "int32", "int8", "uint8"), np.int32),
}


def findings_from_program(program: Program, recipe: Recipe, minimum: str) -> list[Finding]:
    """Every op the converter lacks or gets wrong; if there is none, what its conversion says.

    A quantized recipe adds no op that could be lacking, so it is checked as float16.
    """
    oldest_that_holds(recipe, minimum)
    recipe = FP16 if recipe.quantized else recipe
    exported = converter_program(program)
    if refused := _refused(exported):
        return refused
    try:
        _convert(program, exported, recipe, minimum, ())
    except Exception as cause:  # the converter raises whatever it trips over
        node = _failing_node(cause, exported)
        reason = f"coremltools fails on it ({first_line(cause)}); write it with other ops"
        return [
            _finding(node, reason)
            if node is not None
            else Finding("the graph", "refused", "", "", reason)
        ]
    return []


def _refused(exported: Any) -> list[Finding]:
    """Every op that the converter has no function for, or a wrong one."""
    with quiet():
        calls = [node for node in exported.graph.nodes if node.op == "call_function"]
        reasons = [
            "coremltools has no conversion for it; write it with simpler ops"
            if not is_supported(node)
            else WRONG.get(node.target, "")
            for node in calls
        ]
    return [_finding(node, reason) for node, reason in zip(calls, reasons, strict=True) if reason]


def _finding(node: torch.fx.Node, remedy: str) -> Finding:
    source, module = node_source(node)
    return Finding(op_name(node), "refused", source, module, remedy)


def _failing_node(cause: BaseException, exported: Any) -> torch.fx.Node | None:
    """The graph node that the converter was at, from the frames of its own traceback.

    A pass that runs after all nodes names the kind of op alone: then the first of that kind.
    """
    nodes = {node.name: node for node in exported.graph.nodes}
    for frame, _ in reversed(list(traceback.walk_tb(cause.__traceback__))):
        name = getattr(frame.f_locals.get("node"), "name", None)
        if name in nodes:
            found: torch.fx.Node = nodes[name]
            return found
    for node in exported.graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        kind = name.partition(".")[2].partition(".")[0].rstrip("123d")
        if len(kind) > 5 and kind in str(cause):  # "upsample_bilinear", not "add"
            return node  # type: ignore[no-any-return]
    return None


def artifact_from_program(program: Program, recipe: Recipe, minimum: str) -> Artifact:
    """Convert, quantize, describe, save the same bytes each time.

    Raises ``UnsupportedModel``, ``LoweringFailed`` or ``UsageError``.
    """
    oldest_that_holds(recipe, minimum)
    if refused := _refused(converter_program(program)):
        raise UnsupportedModel("coreml", refused)
    kept = kept_nodes(program, recipe)
    quantized = (
        quantized_program(program, recipe, kept) if recipe.calibrated else Quantized(program, {})
    )
    exported = converter_program(quantized.program)
    # What stays float is decided in the graph, or by the passes over the converted program.
    model = _converted(program, exported, recipe, minimum, () if recipe.calibrated else kept)
    spec = model.get_spec()
    if recipe.calibrated:
        check_scales(spec, recipe)
    features, image = _features(program, spec), image_of(program)
    _describe(spec, program)
    files = _package(model, spec)
    nodes = nodes_by_variable(spec, exported, names_of(program, exported).outputs)
    return Artifact(
        target="coreml",
        recipe=recipe,
        main=MAIN,
        files={**files, **_scripts(recipe)},
        inputs=program.inputs,
        outputs=program.outputs,
        provenance={
            "minimum": minimum,
            "specification": spec.specificationVersion,
            "features": features,
            "image": image.to_json() if image else None,
            "nodes": {**nodes, **_folded(spec, quantized, nodes)},
            "used": used_inputs(exported, program.inputs),
            "versions": {name: installed_version(name) for name in _tools(recipe)},
            **({"palette": palette_mode(program, recipe)} if recipe.form == "palette" else {}),
            **(_codes(spec, exported, files) if recipe.switchable else {}),
        },
    )


def _converted(
    program: Program, exported: Any, recipe: Recipe, minimum: str, kept: Collection[str]
) -> Any:
    try:
        return _convert(program, exported, recipe, minimum, kept)
    except EdgekitError:
        raise
    except Exception as cause:  # the converter raises whatever it trips over
        if refused := findings_from_program(program, recipe, minimum):
            raise UnsupportedModel("coreml", refused) from cause
        advice = "" if recipe.precision == "fp32" else " Try --precision fp32."
        raise LoweringFailed(
            f"coremltools could not convert the model: {first_line(cause)}{advice}"
        ) from cause


def _tools(recipe: Recipe) -> tuple[str, ...]:
    return ("torch", "coremltools", *(("torchao",) if recipe.calibrated else ()))


def _codes(spec: Any, exported: Any, files: dict[str, bytes]) -> dict[str, object]:
    weights = (WEIGHTS, files.get(WEIGHTS, b""))
    found = places(spec, exported, (MAIN, files[MAIN]), weights)
    if not found:
        raise LoweringFailed(
            "no layer of the model becomes int8 for coreml, so there is nothing to run at several "
            "bit-widths; keep fewer layers float, or choose --precision fp16."
        )
    return {"codes": places_to_json(found)}


def _folded(spec: Any, quantized: Quantized, nodes: Mapping[str, str]) -> dict[str, str]:
    """The batch norm that each variable stands for whose convolution took it in."""
    made_by = {
        output.name: nodes.get(output.name) or graph_name(output.name)
        for function in spec.mlProgram.functions.values()
        for operation in function.block_specializations[function.opset].operations
        for output in operation.outputs
    }
    return {
        variable: quantized.folded[node]
        for variable, node in made_by.items()
        if node in quantized.folded
    }


def _convert(
    program: Program, exported: Any, recipe: Recipe, minimum: str, kept: Collection[str]
) -> Any:
    """The MLModel. In two steps, since in one a classifier cannot have typed outputs."""
    target = getattr(coremltools.target, minimum)
    labelled = classes(program) is not None
    names = names_of(program, exported)
    outputs = [
        coremltools.TensorType(name=name, dtype=FEATURE_TYPES[spec.dtype])
        for name, spec in zip(names.outputs, program.outputs, strict=True)
    ]
    if labelled:
        outputs.append(coremltools.TensorType(name=PROBABILITIES, dtype=np.float32))
    with quiet():
        internal = coremltools.convert(
            exported,
            convert_to="milinternal",
            minimum_deployment_target=target,
            compute_precision=compute_precision(recipe),
            pass_pipeline=conversion_passes(recipe),
            inputs=_input_types(program, names),
            outputs=outputs,
        )
        for function in internal.functions.values():
            function.output_types = None  # they are set; kept, they would count the label too
        operations = kept_operations(internal, program, kept, names, exported)
        return coremltools.convert(
            internal,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            pass_pipeline=compression_passes(program, recipe, operations),
            classifier_config=coremltools.ClassifierConfig(
                list(program.labels),
                predicted_feature_name=LABEL,
                predicted_probabilities_output=PROBABILITIES,
            )
            if labelled
            else None,
        )


def _input_types(program: Program, names: Names) -> list[Any]:
    ranges = {
        dim.name: coremltools.RangeDim(dim.minimum, dim.maximum, default=dim.minimum)
        for spec in program.inputs
        for dim in spec.dims
    }
    types, image = [], image_of(program)
    for name, spec in zip(names.inputs, program.inputs, strict=True):
        shape = tuple(ranges[d.name] if isinstance(d, Dim) else d for d in spec.shape)
        if image is not None and spec.name == image.name:
            types.append(_image_type(name, image, shape))
        else:
            dtype = FEATURE_TYPES[spec.dtype]
            types.append(coremltools.TensorType(name=name, shape=shape, dtype=dtype))
    return types


def _image_type(name: str, image: ImageInput, shape: tuple[Any, ...]) -> Any:
    layout = coremltools.colorlayout
    colours = layout.GRAYSCALE if image.channels == 1 else layout.RGB
    return coremltools.ImageType(name=name, shape=shape, color_layout=colours)


def _features(program: Program, spec: Any) -> dict[str, str]:
    """edgekit's name of each input and output to the package's. Raises ``LoweringFailed``."""
    given = [feature.name for feature in spec.description.input]
    returned = [
        feature.name
        for feature in spec.description.output
        if feature.name not in (LABEL, f"{LABEL}_probs")
    ]
    names = [*given, *returned]
    wanted = [each.name for each in (*program.inputs, *program.outputs)]
    if len(set(names)) != len(names) or len(names) != len(wanted):
        raise LoweringFailed(
            "Core ML cannot return an input as it is, or one tensor under two names; return "
            f"each of {', '.join(each.name for each in program.outputs)} once, computed."
        )
    inputs = {f"input.{ours.name}": name for ours, name in zip(program.inputs, given, strict=True)}
    outputs = {
        f"output.{ours.name}": name for ours, name in zip(program.outputs, returned, strict=True)
    }
    return {**inputs, **outputs}


def _describe(spec: Any, program: Program) -> None:
    """What Xcode shows. Nothing in it depends on the time or the place of the conversion."""
    metadata = spec.description.metadata
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    metadata.shortDescription = f"{program.name}, exported by edgekit"
    metadata.license = program.licence or "not stated"
    if classes(program) is not None and image_of(program) is not None:
        metadata.userDefined["com.apple.coreml.model.preview.type"] = "imageClassifier"
    for feature in spec.description.input:
        picture = feature.type.WhichOneof("Type") == "imageType"
        feature.shortDescription = (
            "a picture; the model normalises it itself" if picture else feature.name
        )
    for feature in spec.description.output:
        feature.shortDescription = {
            LABEL: "the most likely label",
            f"{LABEL}_probs": "the probability of each label",
        }.get(feature.name, feature.name)


def _package(model: Any, spec: Any) -> dict[str, bytes]:
    """The package's files, the same each time."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        saved = Path(folder) / PACKAGE
        model.save(str(saved))
        weights = saved / Path(WEIGHTS).relative_to(PACKAGE)
        files = {WEIGHTS: weights.read_bytes()} if weights.is_file() else {}
    files[MAIN] = spec.SerializeToString(deterministic=True)
    files[f"{PACKAGE}/Manifest.json"] = manifest(weights=WEIGHTS in files)
    return files


def manifest(*, weights: bool) -> bytes:
    """A package's table of contents, with identifiers that are no longer drawn."""
    root = str(uuid.uuid5(uuid.NAMESPACE_URL, MAIN)).upper()
    items = {root: _item("model.mlmodel", "CoreML Model Specification")}
    if weights:
        other = str(uuid.uuid5(uuid.NAMESPACE_URL, WEIGHTS)).upper()
        items[other] = _item("weights", "CoreML Model Weights")
    content = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": root,
    }
    return (json.dumps(content, indent=4) + "\n").encode()


def _item(name: str, description: str) -> dict[str, str]:
    return {
        "author": "com.apple.CoreML",
        "description": description,
        "name": name,
        "path": f"com.apple.CoreML/{name}",
    }


def _scripts(recipe: Recipe) -> dict[str, bytes]:
    """What closes the loop on a Mac."""
    sources = {"predict_on_mac.py": predict_on_mac.__file__, "evidence.py": evidence.__file__}
    if recipe.switchable:
        sources["rounding.py"] = rounding.__file__
    return {name: Path(str(path)).read_bytes() for name, path in sources.items()}
