"""Core ML, for users ``coreml``. Importing this package loads no runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

from edgekit.artifact import Artifact
from edgekit.contract import Finding, Option, Session
from edgekit.errors import MissingRuntime, UsageError
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, Recipe

SUPPORTED = (FP16, FP32)
MINIMUMS = ("iOS16", "iOS17", "iOS18")


@dataclass(frozen=True)
class _Backend:
    minimum: str = "iOS17"

    name = "coreml"
    needs = ("coremltools", "torch")  # off a Mac, our interpreter runs the package with them
    recipes = SUPPORTED
    form = "concat"
    options = (
        Option("minimum", "iOS17", f"oldest system that must run it: {', '.join(MINIMUMS)}"),
    )
    emulation = "copy the bundle to a Mac and run predict_on_mac.py in the artifact's folder"

    def with_options(self, values: Mapping[str, str]) -> _Backend:
        minimum = values.get("minimum", self.minimum)
        if minimum not in MINIMUMS:
            raise UsageError(
                f"--coreml-minimum {minimum!r} is not one of {', '.join(MINIMUMS)}; each stands "
                "for the macOS, watchOS and tvOS of its year too."
            )
        return replace(self, minimum=minimum)

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        _require_coremltools()
        from edgekit_coreml.lower import findings_from_program

        return findings_from_program(program, recipe, self.minimum)

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        _require_coremltools()
        from edgekit_coreml.lower import artifact_from_program

        return artifact_from_program(program, recipe, self.minimum)

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        from edgekit_coreml.session import InterpreterSession

        return InterpreterSession(artifact)


def _require_coremltools() -> None:
    if find_spec("coremltools") is None:
        raise MissingRuntime("making coreml artifacts", "coremltools", extra="coreml")


BACKEND = _Backend()
