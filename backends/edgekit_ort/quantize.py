"""Recipes to this runtime's own conversions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx

from edgekit.artifact import Artifact
from edgekit.calibration import Calibration
from edgekit.errors import LoweringFailed, UsageError
from edgekit.evidence import sqnr_db
from edgekit.onnx_export import Exported, float16_from_float32, serialized
from edgekit.onnx_quantize import Measured, Style, measured, rewritten
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, Recipe
from edgekit.selection import kept_nodes
from edgekit.spec import Array
from edgekit_ort.nodes import OPS, WEIGHTED, float_nodes, with_firm_floats
from edgekit_ort.session import FOLD_WEIGHTS, MAIN, OrtSession
from edgekit_ort.weights import with_integer_weights

_OPTIONS: Mapping[str, object] = MappingProxyType({"MatMulConstBOnly": True})


def _style(activations: str, weights: str = "S8", **other: bool) -> Style:
    types = {"U8": "uint8", "S8": "int8"}
    return Style(types[activations], types[weights], ops=OPS, options=_OPTIONS, **other)  # type: ignore[arg-type]


# The styles for each kind of processor, the preferred one first. Activations keep a zero point
# of their own: those behind a ReLU would lose a bit without.
STYLES: Mapping[str, Mapping[str, Style]] = {
    # Products are added up in 32 bits at once.
    "vnni": {"U8S8": _style("U8")},
    # Two products of U8S8 are added in 16 bits that saturate. Weights of 7 bits cannot reach that,
    # and U8U8 goes by wider, slower kernels.
    "avx2": {
        "U8S8 reduce_range": _style("U8", reduce_range=True),
        "U8U8": _style("U8", "U8", per_channel=False),
    },
    # Not measured. quantize_static's own advice for ARM is signed on both sides: its kernels for
    # convolutions of symmetric weights multiply signed by signed (SDOT), and they add in 32 bits.
    "arm64": {"S8S8": _style("S8")},
}
# reduce_range is the faster one, so U8U8 must be worth it.
_WORTH_DB = 3.0
_COMPARED = 32  # samples


@dataclass(frozen=True)
class Made:
    """A model in a precision, and what its provenance says of how."""

    model: onnx.ModelProto
    facts: Mapping[str, object] = field(default_factory=dict)


def model_in_precision(exported: Exported, program: Program, recipe: Recipe) -> Made:
    """The program's ONNX model in ``recipe``.

    In fp16 it is float32 at the edge. The CPU provider turns float16 back into float32 kernels
    when it loads: what it buys on this target is half the download, not speed (see README.md
    here). Raises ``UsageError`` where calibration data is missing, or ``LoweringFailed``.
    """
    if not recipe.quantized:
        return Made(float16_from_float32(exported.model) if recipe == FP16 else exported.model)
    names = kept_nodes(program, recipe)
    kept = {node for node, origin in exported.origins.items() if origin.name in names}
    if not recipe.calibrated:
        model = with_integer_weights(exported.model, kept, int(recipe.weights[-1]))
        return Made(model, {"session_options": dict(FOLD_WEIGHTS)})
    if program.calibration is None:
        raise UsageError(
            f"{recipe.precision} on onnxruntime needs calibration data, the inputs on which ranges "
            "of activations are measured; give --calibration."
        )
    return _integers(exported, program, program.calibration, recipe, kept)


def _integers(
    exported: Exported,
    program: Program,
    calibration: Calibration,
    recipe: Recipe,
    kept: Collection[str],
) -> Made:
    ready = measured(
        exported.model,
        calibration,
        method=recipe.method,
        keep_float=kept,
        doing=f"calibrating onnxruntime {recipe.precision}",
    )
    floats = float_nodes(ready.model, kept)
    if all(node.name in floats for node in ready.model.graph.node if node.op_type in WEIGHTED):
        raise LoweringFailed(
            f"{recipe.precision} would quantize nothing on onnxruntime: there is no convolution or "
            "matrix product with constant weights that is not kept in float. Use --precision fp32."
        )
    styles = STYLES[recipe.cpu or "vnni"]
    if recipe.switchable:  # a narrower width is derived from signed codes without a zero point
        styles = {name: style for name, style in styles.items() if style.weights == "int8"}
    models = {
        name: with_firm_floats(rewritten(ready, style, keep_float=floats))
        for name, style in styles.items()
    }
    if len(models) == 1:
        ((name, model),) = models.items()
        return Made(model, {"style": name})
    found = _sqnr_of(models, ready, program, calibration)
    best, *others = models
    for name in others:
        if found[name] > found[best] + _WORTH_DB:
            best = name
    variants = {name: round(value, 2) for name, value in found.items()}
    return Made(models[best], {"style": best, "variants": variants})


def _sqnr_of(
    models: Mapping[str, onnx.ModelProto],
    ready: Measured,
    program: Program,
    calibration: Calibration,
) -> dict[str, float]:
    """How far each model is from the float one by the arithmetic that its file says, in dB."""
    expected = _answers(ready.model, program, calibration)
    found = {}
    for name, model in models.items():
        given = _answers(model, program, calibration)
        found[name] = min(
            (sqnr_db(expected[output], given[output]) for output in expected), default=np.inf
        )
    return found


def _answers(
    model: onnx.ModelProto, program: Program, calibration: Calibration
) -> dict[str, Array]:
    """The outputs in floating point, those of some samples joined, computed without fusion."""
    content = {MAIN: serialized(model)}
    artifact = Artifact("onnxruntime", FP32, MAIN, content, program.inputs, program.outputs)
    step = max(1, len(calibration.samples) // _COMPARED)
    with OrtSession(artifact) as session:
        answers = [
            session.run_as_written(sample)
            for sample in calibration.samples[: step * _COMPARED : step]
        ]
    return {
        spec.name: np.concatenate([answer[spec.name].reshape(-1) for answer in answers])
        for spec in program.outputs
        if spec.dtype == "float32"
    }
