"""Captured program to the ONNX file that this runtime loads."""

from __future__ import annotations

from edgekit.artifact import Artifact
from edgekit.host import installed_version
from edgekit.onnx_export import onnx_from_program, opsets, serialized
from edgekit.onnx_quantize import serialized_with_codes
from edgekit.program import Program
from edgekit.recipe import Recipe
from edgekit.widths import places_to_json
from edgekit_ort.quantize import model_in_precision
from edgekit_ort.session import MAIN

_TOOLS = ("torch", "onnx", "onnxscript")


def artifact_from_program(program: Program, recipe: Recipe) -> Artifact:
    """Export, convert to the recipe's precision.

    Raises ``UnsupportedModel``, ``UsageError`` or ``LoweringFailed``.
    """
    exported = onnx_from_program(program, "onnxruntime")
    made = model_in_precision(exported, program, recipe)
    tools = (*_TOOLS, "onnxruntime") if recipe.quantized else _TOOLS
    provenance: dict[str, object] = {
        "opsets": opsets(made.model),
        "nodes": len(made.model.graph.node),
        "versions": {name: installed_version(name) for name in tools},
        **made.facts,
    }
    if recipe.switchable:
        content, places = serialized_with_codes(made.model, exported.origins, MAIN)
        provenance["codes"] = places_to_json(places)
    else:
        content = serialized(made.model)
    return Artifact(
        target="onnxruntime",
        recipe=recipe,
        main=MAIN,
        files={MAIN: content},
        inputs=program.inputs,
        outputs=program.outputs,
        provenance=provenance,
    )
