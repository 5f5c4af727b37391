"""ONNX Runtime on CPU, for users ``onnxruntime``. Importing this package loads no runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from edgekit.artifact import Artifact
from edgekit.contract import Finding, Option, Session
from edgekit.decode.stepper import Stepper
from edgekit.decoder import Decoder
from edgekit.errors import MissingRuntime, UsageError
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


_KERNELS = ("4", "8")


@dataclass(frozen=True)
class _Backend:
    kernel: str = "4"

    name = "onnxruntime"
    needs = ("onnxruntime",)
    recipes = SUPPORTED
    decoder_recipes = (PRECISIONS["int4"], PRECISIONS["int8-weights"], FP32, FP16)
    form = "concat"  # split and concat cost little here, more and smaller convolutions do

    @property
    def options(self) -> tuple[Option, ...]:
        help_ = (
            "bits of the kernel that runs a language model's 4-bit codes: 4 is faster token by "
            "token, 8 for several at once, and its results are equal to the bit at every width"
        )
        return (Option("kernel", "4", help_),)

    def with_options(self, values: Mapping[str, str]) -> _Backend:
        kernel = values.get("kernel", self.kernel)
        if kernel not in _KERNELS:
            raise UsageError(f"--onnxruntime-kernel is 4 or 8, not {kernel!r}.")
        return replace(self, kernel=kernel)

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

    def lower_decoder(
        self, decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None]
    ) -> Artifact:
        if find_spec("onnx") is None:
            raise MissingRuntime("making onnxruntime artifacts", "onnx", extra="export")
        from edgekit_ort.decoder_lower import artifact_from_decoder

        return artifact_from_decoder(decoder, recipe, folder, report, int(self.kernel))

    def open_decoder(self, artifact: Artifact, *, threads: int | None = None) -> Stepper:
        from edgekit_ort.stepper import OrtStepper

        return OrtStepper(artifact, threads=threads)


def _require_onnx() -> None:
    for module in ("onnx", "onnxscript"):
        if find_spec(module) is None:
            raise MissingRuntime("making onnxruntime artifacts", module, extra="export")


BACKEND = _Backend()
