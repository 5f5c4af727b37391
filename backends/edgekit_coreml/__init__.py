"""Core ML, for users ``coreml``. Importing this package loads no runtime."""

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

# int8 alone computes in integers; the others are only smaller, in the order of what they keep.
_SMALLER = ("int8-weights", "palette8", "palette6", "int4", "palette4", "palette2")
SUPPORTED = (FP16, INT8, *(PRECISIONS[name] for name in _SMALLER), *ANY, FP32)
# Of language models; weights that come quantized keep their own codes in the first two.
DECODER_RECIPES = (PRECISIONS["int4"], PRECISIONS["int8-weights"], FP16, FP32)
MINIMUMS = ("iOS16", "iOS17", "iOS18")


@dataclass(frozen=True)
class _Backend:
    minimum: str = "iOS17"

    name = "coreml"
    needs = ("coremltools", "torch")  # off a Mac, our interpreter runs the package with them
    recipes = SUPPORTED
    decoder_recipes = DECODER_RECIPES
    form = "concat"
    options = (
        Option("minimum", "iOS17", f"oldest system that must run it: {', '.join(MINIMUMS)}"),
    )
    emulation = (
        "copy the bundle to a Mac and run predict_on_mac.py in the artifact's folder; "
        "generate_on_mac.py for a language model"
    )

    def with_options(self, values: Mapping[str, str]) -> _Backend:
        minimum = values.get("minimum", self.minimum)
        if minimum not in MINIMUMS:
            raise UsageError(
                f"--coreml-minimum {minimum!r} is not one of {', '.join(MINIMUMS)}; each stands "
                "for the macOS, watchOS and tvOS of its year too."
            )
        return replace(self, minimum=minimum)

    def quantized_ops(self, recipe: Recipe) -> frozenset[str]:
        """Ops of the captured graph whose inputs become integers; weights alone are not it."""
        if not recipe.calibrated:
            return frozenset()
        from edgekit_coreml.quantizer import OPS

        return OPS

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        _require_coremltools()
        from edgekit_coreml.lower import findings_from_program

        return findings_from_program(program, recipe, self.minimum)

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        _require_coremltools()
        # coremltools finds the palettes of smaller weights with scikit-learn.
        more = "torchao" if recipe.calibrated else "sklearn" if recipe.form == "palette" else ""
        if more and find_spec(more) is None:
            raise MissingRuntime(f"making coreml {recipe.precision}", more, extra="export")
        from edgekit_coreml.lower import artifact_from_program

        return artifact_from_program(program, recipe, self.minimum)

    def lower_decoder(
        self, decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None]
    ) -> Artifact:
        _require_coremltools()
        from edgekit_coreml.decoder_lower import artifact_from_decoder

        return artifact_from_decoder(decoder, recipe, folder, report)

    def open_decoder(self, artifact: Artifact, *, threads: int | None = None) -> Stepper:
        from edgekit_coreml.stepper import InterpreterStepper

        return InterpreterStepper(artifact)

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        from edgekit_coreml.session import InterpreterSession

        return InterpreterSession(artifact)


def _require_coremltools() -> None:
    if find_spec("coremltools") is None:
        raise MissingRuntime("making coreml artifacts", "coremltools", extra="coreml")


BACKEND = _Backend()
