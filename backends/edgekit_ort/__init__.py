"""ONNX Runtime on CPU, for users ``onnxruntime``. Importing this package loads no runtime."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from edgekit.artifact import Artifact
from edgekit.contract import Finding, Session
from edgekit.errors import MissingRuntime
from edgekit.program import Program
from edgekit.recipe import ANY, FP16, FP32, INT8, PRECISIONS, Recipe

# What is right in integers depends on the processor; "vnni" says so, and --cpu chooses.
_SMALLER = (FP16, PRECISIONS["int8-weights"], PRECISIONS["int4"])
SUPPORTED = (
    FP32,
    replace(INT8, cpu="vnni"),
    *_SMALLER,
    *(replace(recipe, cpu="vnni") for recipe in ANY),
)
_PRODUCTS = frozenset({"conv1d", "conv2d", "conv3d", "linear", "addmm"})
_LIGHT = frozenset({"relu", "relu6", "hardtanh", "add", "cat", "max_pool2d", "avg_pool2d"})


class _Backend:
    name = "onnxruntime"
    needs = ("onnxruntime",)
    recipes = SUPPORTED
    form = "concat"  # split and concat cost little here, more and smaller convolutions do

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        _require_onnx()
        from edgekit.onnx_export import findings_from_program

        return findings_from_program(program)

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        _require_onnx()
        from edgekit_ort.lower import artifact_from_program

        return artifact_from_program(program, recipe)

    def quantized_ops(self, recipe: Recipe) -> frozenset[str]:
        if not recipe.quantized:
            return frozenset()
        return _PRODUCTS | _LIGHT if recipe.calibrated else _PRODUCTS

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        from edgekit_ort.session import OrtSession

        return OrtSession(artifact, threads=threads)


def _require_onnx() -> None:
    for module in ("onnx", "onnxscript"):
        if find_spec(module) is None:
            raise MissingRuntime("making onnxruntime artifacts", module, extra="export")


BACKEND = _Backend()
