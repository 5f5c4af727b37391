"""ExecuTorch with the XNNPACK delegate, for users ``executorch``. Importing it loads no runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgekit.artifact import Artifact
from edgekit.contract import Finding, Session
from edgekit.decode.stepper import Stepper
from edgekit.decoder import Decoder
from edgekit.program import Program
from edgekit.recipe import ANY, FP16, FP32, INT8, PRECISIONS, Recipe

SUPPORTED = (FP32, INT8, *ANY, PRECISIONS["int4"], FP16)


class _Backend:
    name = "executorch"
    needs = ("executorch", "torch")
    recipes = SUPPORTED
    decoder_recipes = (PRECISIONS["int8-weights"], PRECISIONS["int4"], FP32)
    form = "two-stream"  # a split or concat between convolutions would break the delegate in two

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        from edgekit_executorch.lower import findings_from_program

        return findings_from_program(program, recipe)

    def quantized_ops(self, recipe: Recipe) -> frozenset[str]:
        from edgekit_executorch.annotate import INTEGER_OPS

        if recipe.weights == "int4":
            return frozenset({"linear"})
        return INTEGER_OPS if recipe.calibrated else frozenset()

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        from edgekit_executorch.lower import artifact_from_program

        return artifact_from_program(program, recipe)

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        from edgekit_executorch.session import ExecutorchSession

        return ExecutorchSession(artifact, threads=threads)

    def lower_decoder(
        self, decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None]
    ) -> Artifact:
        from edgekit_executorch.decoder_lower import artifact_from_decoder

        return artifact_from_decoder(decoder, recipe, folder, report)

    def open_decoder(self, artifact: Artifact, *, threads: int | None = None) -> Stepper:
        from edgekit_executorch.stepper import ExecutorchStepper

        return ExecutorchStepper(artifact, threads=threads)


BACKEND = _Backend()
