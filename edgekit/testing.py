"""Fakes for tests, ours and a third party's: a backend without a runtime, a bundle in a second.

Nothing here imports torch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, write_bundle
from edgekit.contract import Finding
from edgekit.manifest import ArtifactEntry, Manifest
from edgekit.program import Program, Reference
from edgekit.recipe import FP32, Recipe
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit.verify import prove


@dataclass
class ReplayBackend:
    """Plays back the eager outputs it saw when it lowered, plus ``drift``.

    It runs anything and computes nothing: for testing what is built on backends.
    """

    name: str = "replay"
    needs: tuple[str, ...] = ()
    drift: float = 0.0
    findings: tuple[Finding, ...] = ()

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        return list(self.findings)

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        content = replay_file(program.reference, self.drift)
        return Artifact(
            self.name,
            recipe,
            "replay.npz",
            {"replay.npz": content},
            program.inputs,
            program.outputs,
        )

    def open(self, artifact: Artifact, *, threads: int | None = None) -> ReplaySession:
        return ReplaySession(artifact)


def replay_file(reference: Reference, drift: float = 0.0) -> bytes:
    """The artifact of ``ReplayBackend``: each sample beside the outputs to answer with."""
    arrays: dict[str, Array] = {}
    for index, (sample, expected) in enumerate(
        zip(reference.samples, reference.expected, strict=True)
    ):
        arrays |= {f"{index} in {name}": array for name, array in sample.items()}
        arrays |= {
            f"{index} out {name}": array + array.dtype.type(drift) if drift else array
            for name, array in expected.items()
        }
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # its stub takes the flag first
    return content.getvalue()


class ReplaySession:
    """Answers a sample it knows; zeros for any other input."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._known: dict[str, Array] = {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.outputs

    def __enter__(self) -> Self:
        source = self._artifact.source
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source) as content:
            self._known = {name: content[name] for name in content.files}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._known = {}

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name. Raises ``BadInput``."""
        feeds = check_arrays(self.inputs, arrays)
        count = len({name.split()[0] for name in self._known})
        for index in range(count):
            if all(
                np.array_equal(self._known[f"{index} in {name}"], array)
                for name, array in feeds.items()
            ):
                return {
                    spec.name: self._known[f"{index} out {spec.name}"].copy()
                    for spec in self.outputs
                }
        return {spec.name: np.zeros(spec.sizes(), spec.dtype) for spec in self.outputs}


def example_reference(count: int = 3) -> Reference:
    """Samples of ``x=1x4`` with what ``scores = 2 x`` answers."""
    generator = np.random.default_rng(0)
    samples = [{"x": generator.standard_normal((1, 4), dtype=np.float32)} for _ in range(count)]
    expected = [{"scores": 2 * sample["x"]} for sample in samples]
    return Reference(tuple(samples), tuple(expected), "random, seed 0")


def example_bundle(
    folder: Path, *, labels: Sequence[str] = ("a", "b", "c", "d"), overwrite: bool = False
) -> Bundle:
    """A small whole bundle of a ``replay`` artifact, written to ``folder``."""
    reference = example_reference()
    inputs = (TensorSpec("x", (1, 4), "float32"),)
    outputs = (TensorSpec("scores", (1, 4), "float32"),)
    files = {"replay.npz": replay_file(reference)}
    artifact = Artifact("replay", FP32, "replay.npz", files, inputs, outputs)
    manifest = Manifest(
        model="double",
        source="double",
        licence="Apache-2.0",
        inputs=inputs,
        outputs=outputs,
        image=None,
        labels=tuple(labels),
        artifacts=(ArtifactEntry("replay", FP32, "replay.npz", ("replay.npz",), {}),),
        samples=tuple(f"samples/{index:04}.npz" for index in range(len(reference.samples))),
        samples_source=reference.source,
        versions={},
    )
    proof = prove(artifact, ["scores"], reference, reference.expected)
    return write_bundle(
        folder,
        manifest,
        artifacts=[artifact],
        proofs=[proof],
        reference=reference,
        readme="x\n",
        overwrite=overwrite,
    )
