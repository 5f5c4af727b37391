"""TensorRT and TensorRT-RTX, for users ``tensorrt``. Importing this package loads neither."""

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

SUPPORTED = (FP16, INT8, PRECISIONS["int4"], *ANY, FP32)
DECODER_RECIPES = (PRECISIONS["int4"], FP16, PRECISIONS["int8-weights"], FP32)
# 10.3 is JetPack 6's. What each takes is in versions.py.
VERSIONS = ("10.3", "10.13", "11", "rtx")


@dataclass(frozen=True)
class Settings:
    """What users can choose: ``--tensorrt-version`` and so on."""

    version: str = "10.3"
    compute_capabilities: tuple[str, ...] = ("sm86",)
    named: bool = False  # whether the user chose them; a language model's engines are kept then
    build_seconds: float = 600.0
    build_memory_gb: float = 8.0


@dataclass(frozen=True)
class _Backend:
    settings: Settings = Settings()

    name = "tensorrt"
    recipes = SUPPORTED
    decoder_recipes = DECODER_RECIPES
    form = "concat"
    options = (
        Option("version", "10.3", f"TensorRT of the device: {', '.join(VERSIONS)}"),
        Option("compute-capability", "sm86", "GPUs to build TensorRT-RTX engines for, by commas"),
        Option("build-seconds", "600", "the longest that building one engine may take"),
        Option("build-memory", "8", "GB that building one engine may use"),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        """TensorRT proper where it is, else the libraries in ONNX Runtime's provider for RTX."""
        for module in ("tensorrt", "tensorrt_rtx"):
            if find_spec(module) is not None:
                return (module,)
        return ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings")

    @property
    def emulation(self) -> str:
        from edgekit_tensorrt.native import has_gpu

        how = (
            "copy the bundle to the device and run build_engine.py in the artifact's folder (of a "
            "language model: generate_on_jetson.py)"
        )
        return "" if has_gpu() else how

    def with_options(self, values: Mapping[str, str]) -> _Backend:
        return replace(self, settings=_settings(self.settings, values))

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        _require_onnx()
        from edgekit_tensorrt.lower import findings_from_program

        return findings_from_program(program, recipe, self.settings)

    def quantized_ops(self, recipe: Recipe) -> frozenset[str]:
        """Those with constant weights; of attention neither product is quantized."""
        products = frozenset({"linear", "matmul", "mm", "addmm"})
        convolutions = frozenset({"conv1d", "conv2d", "conv3d"})
        return products | convolutions if recipe.calibrated else products

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        _require_onnx()
        from edgekit_tensorrt.lower import artifact_from_program

        return artifact_from_program(program, recipe, self.settings)

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        from edgekit_tensorrt.native import has_gpu

        if has_gpu():
            from edgekit_tensorrt.native import EngineSession

            return EngineSession(artifact)
        from edgekit_tensorrt.session import NetworkSession

        return NetworkSession(artifact)

    def lower_decoder(
        self, decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None]
    ) -> Artifact:
        _require_onnx()
        from edgekit_tensorrt.decoder_lower import artifact_from_decoder

        return artifact_from_decoder(decoder, recipe, folder, self.settings, report)

    def open_decoder(self, artifact: Artifact, *, threads: int | None = None) -> Stepper:
        from edgekit_tensorrt.native import has_gpu

        if has_gpu():
            from edgekit_tensorrt.native_stepper import EngineStepper

            return EngineStepper(artifact)
        from edgekit_tensorrt.stepper import NetworkStepper

        return NetworkStepper(artifact)


def _settings(before: Settings, values: Mapping[str, str]) -> Settings:
    version = values.get("version", before.version)
    if version not in VERSIONS:
        raise UsageError(
            f"--tensorrt-version {version!r} is not one of {', '.join(VERSIONS)}; 10.3 is that of "
            "JetPack 6, rtx that of RTX desktops."
        )
    capabilities = values.get("compute-capability")
    numbers = {
        name: _positive(name, values[name])
        for name in ("build-seconds", "build-memory")
        if name in values
    }
    settings = replace(
        before,
        version=version,
        build_seconds=numbers.get("build-seconds", before.build_seconds),
        build_memory_gb=numbers.get("build-memory", before.build_memory_gb),
    )
    if capabilities is None:
        return settings
    from edgekit_tensorrt.processes import check_compute_capabilities

    names = check_compute_capabilities([name.strip() for name in capabilities.split(",")])
    return replace(settings, compute_capabilities=tuple(names), named=True)


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise UsageError(f"--tensorrt-{name} {text!r} is not a number above 0.")
    return value


def _require_onnx() -> None:
    for module in ("onnx", "onnxscript"):
        if find_spec(module) is None:
            raise MissingRuntime("making tensorrt artifacts", module, extra="export")


BACKEND = _Backend()
