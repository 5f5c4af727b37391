"""Captured program to a ``.mlpackage`` by coremltools: an ML Program, as Xcode wants it."""

from __future__ import annotations

import json
import tempfile
import traceback
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.contract import Finding
from edgekit.errors import LoweringFailed, UnsupportedModel
from edgekit.graph import first_line, node_source, op_name, quiet
from edgekit.host import installed_version
from edgekit.image import ImageInput
from edgekit.program import Program
from edgekit.recipe import FP32, Recipe
from edgekit.spec import Dim
from edgekit_coreml import predict_on_mac
from edgekit_coreml.names import LABEL, PROBABILITIES, Names, names_of, nodes_by_variable
from edgekit_coreml.prepare import (
    WRONG,
    classes,
    converter_program,
    image_of,
    is_supported,
    used_inputs,
)
from edgekit_coreml.quantize import compute_precision, coremltools

PACKAGE = "model.mlpackage"
MAIN = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"
# Core ML's arrays are float32, float16 or int32; the session gives back what the model returns.
FEATURE_TYPES = {
    **{"float32": np.float32, "bool": np.int32},
    **dict.fromkeys(("int64", "int32", "int8", "uint8"), np.int32),
}


def findings_from_program(program: Program, recipe: Recipe, minimum: str) -> list[Finding]:
    """Every op the converter lacks or gets wrong; if there is none, what its conversion says."""
    exported = converter_program(program)
    if refused := _refused(exported):
        return refused
    try:
        _convert(program, exported, recipe, minimum)
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
    """Convert, describe, save the same bytes each time.

    Raises ``UnsupportedModel`` or ``LoweringFailed``.
    """
    exported = converter_program(program)
    if refused := _refused(exported):
        raise UnsupportedModel("coreml", refused)
    try:
        model = _convert(program, exported, recipe, minimum)
    except Exception as cause:  # the converter raises whatever it trips over
        if refused := findings_from_program(program, recipe, minimum):
            raise UnsupportedModel("coreml", refused) from cause
        advice = "" if recipe == FP32 else " Try --precision fp32."
        raise LoweringFailed(
            f"coremltools could not convert the model: {first_line(cause)}{advice}"
        ) from cause
    spec = model.get_spec()
    features, image = _features(program, spec), image_of(program)
    _describe(spec, program)
    return Artifact(
        target="coreml",
        recipe=recipe,
        main=MAIN,
        files={**_package(model, spec), **_scripts()},
        inputs=program.inputs,
        outputs=program.outputs,
        provenance={
            "minimum": minimum,
            "specification": spec.specificationVersion,
            "features": features,
            "image": image.to_json() if image else None,
            "nodes": nodes_by_variable(spec, exported, names_of(program, exported).outputs),
            "used": used_inputs(exported, program.inputs),
            "versions": {name: installed_version(name) for name in ("torch", "coremltools")},
        },
    )


def _convert(program: Program, exported: Any, recipe: Recipe, minimum: str) -> Any:
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
            inputs=_input_types(program, names),
            outputs=outputs,
        )
        for function in internal.functions.values():
            function.output_types = None  # they are set; kept, they would count the label too
        return coremltools.convert(
            internal,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            pass_pipeline=coremltools.PassPipeline.EMPTY,
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
    """The package's files; identifiers are derived from names, where the tool draws them."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        saved = Path(folder) / PACKAGE
        model.save(str(saved))
        weights = saved / Path(WEIGHTS).relative_to(PACKAGE)
        files = {WEIGHTS: weights.read_bytes()} if weights.is_file() else {}
    files[MAIN] = spec.SerializeToString(deterministic=True)
    root = str(uuid.uuid5(uuid.NAMESPACE_URL, MAIN)).upper()
    items = {root: _item("model.mlmodel", "CoreML Model Specification")}
    if WEIGHTS in files:
        other = str(uuid.uuid5(uuid.NAMESPACE_URL, WEIGHTS)).upper()
        items[other] = _item("weights", "CoreML Model Weights")
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": root,
    }
    files[f"{PACKAGE}/Manifest.json"] = (json.dumps(manifest, indent=4) + "\n").encode()
    return files


def _item(name: str, description: str) -> dict[str, str]:
    return {
        "author": "com.apple.CoreML",
        "description": description,
        "name": name,
        "path": f"com.apple.CoreML/{name}",
    }


def _scripts() -> dict[str, bytes]:
    """What closes the loop on a Mac."""
    sources = {"predict_on_mac.py": predict_on_mac.__file__, "evidence.py": evidence.__file__}
    return {name: Path(str(path)).read_bytes() for name, path in sources.items()}
