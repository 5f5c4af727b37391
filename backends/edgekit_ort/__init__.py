"""ONNX Runtime on CPU, for users ``onnxruntime``. Importing this package loads no runtime."""

from __future__ import annotations

from importlib.util import find_spec

from edgekit.artifact import Artifact
from edgekit.contract import Finding, Session
from edgekit.errors import MissingRuntime
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, Recipe

SUPPORTED = (FP32, FP16)


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

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        from edgekit_ort.session import OrtSession

        return OrtSession(artifact, threads=threads)


def _require_onnx() -> None:
    for module in ("onnx", "onnxscript"):
        if find_spec(module) is None:
            raise MissingRuntime("making onnxruntime artifacts", module, extra="export")


BACKEND = _Backend()
