"""Captured program to the ONNX file that this runtime loads."""

from __future__ import annotations

from edgekit.artifact import Artifact
from edgekit.host import installed_version
from edgekit.onnx_export import onnx_from_program, opsets, serialized
from edgekit.program import Program
from edgekit.recipe import Recipe
from edgekit_ort.quantize import model_in_precision

MAIN = "model.onnx"


def artifact_from_program(program: Program, recipe: Recipe) -> Artifact:
    """Export, convert to the recipe's precision.

    Raises ``UnsupportedModel`` or ``LoweringFailed``.
    """
    model = model_in_precision(onnx_from_program(program, "onnxruntime").model, recipe)
    versions = {name: installed_version(name) for name in ("torch", "onnx", "onnxscript")}
    return Artifact(
        target="onnxruntime",
        recipe=recipe,
        main=MAIN,
        files={MAIN: serialized(model)},
        inputs=program.inputs,
        outputs=program.outputs,
        provenance={
            "opsets": opsets(model),
            "nodes": len(model.graph.node),
            "versions": versions,
        },
    )
