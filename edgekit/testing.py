"""Fakes for tests, ours and a third party's: a backend without a runtime, a bundle in a second.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgekit.artifact import Artifact
from edgekit.blocks import Blocks
from edgekit.bundle import Bundle, write_bundle
from edgekit.contract import Finding
from edgekit.decode.stepper import Rows
from edgekit.decoder import Decoder, DecoderSpec
from edgekit.errors import BadInput, LoweringFailed
from edgekit.manifest import ArtifactEntry, Manifest
from edgekit.program import Program, Reference
from edgekit.recipe import FP32, INT8, Recipe
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit.verify import prove
from edgekit.widths import Bits, Store, places_to_json


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


@dataclass(frozen=True)
class Outcome:
    """What a recipe comes to when ``QuantizingBackend`` makes it.

    ``drift`` is noise as a share of the outputs' own size: 0.1 is 20 dB. ``size`` is in bytes.
    ``milliseconds`` is written into the provenance, for a race that believes it. An input whose
    first value is above ``fails_above`` is answered with another class. ``refusal`` says why it
    cannot be made, "" where it can.
    """

    drift: float = 0.0
    size: int = 4000
    milliseconds: float = 4.0
    fails_above: float = math.inf
    refusal: str = ""


def _as_float(recipe: Recipe) -> Outcome:
    return Outcome()


@dataclass
class QuantizingBackend:
    """Drifts, weighs and takes as long as ``told`` for each recipe; quantizes nothing.

    ``eager`` answers what is no sample of the model, such as labelled inputs. An artifact made
    with ``any`` holds real int8 codes, of two layers ``first`` and ``head``, which its answers
    depend on: a session can switch their widths.
    """

    told: Callable[[Recipe], Outcome] = _as_float
    recipes: tuple[Recipe, ...] = (FP32, INT8)
    eager: Callable[[Arrays], Mapping[str, Array]] | None = None
    ops: frozenset[str] = frozenset({"linear"})
    emulation: str = ""
    name: str = "quantizing"
    needs: tuple[str, ...] = ()
    form: str = "concat"

    def check(self, program: Program, recipe: Recipe) -> list[Finding]:
        return []

    def quantized_ops(self, recipe: Recipe) -> frozenset[str]:
        return self.ops

    def lower(self, program: Program, recipe: Recipe) -> Artifact:
        """Raises ``LoweringFailed`` where it was told to."""
        told = self.told(recipe)
        if told.refusal:
            raise LoweringFailed(told.refusal)
        if recipe.width is not None:
            raise LoweringFailed(f"{recipe.precision} is made from any, and not lowered to.")
        codes = np.random.default_rng(0).integers(-127, 128, told.size).astype(np.int8)
        files = {
            "replay.npz": replay_file(program.reference),
            "codes.bin": codes.tobytes(),
            "told.json": json.dumps({**asdict(told), "sum": _weighted(codes)}).encode(),
        }
        provenance: dict[str, object] = {"milliseconds": told.milliseconds}
        if recipe.switchable:
            half = told.size // 2
            places = [("first", 0, half), ("head", half, told.size - half)]
            provenance["codes"] = places_to_json(
                [
                    {"layer": layer, "file": "codes.bin", "offset": offset, "count": count}
                    for layer, offset, count in places
                ]
            )
        ends = program.inputs, program.outputs
        return Artifact(self.name, recipe, "replay.npz", files, *ends, provenance)

    def open(self, artifact: Artifact, *, threads: int | None = None) -> QuantizingSession:
        return QuantizingSession(artifact, self.eager)


def _weighted(codes: Array) -> float:
    """A sum that every code counts in, at its place."""
    return float((codes.astype(np.float64) ** 2 * np.linspace(1, 2, len(codes))).sum())


class QuantizingSession(ReplaySession):
    """Answers as the eager model would, but for what it was told to get wrong."""

    def __init__(
        self, artifact: Artifact, eager: Callable[[Arrays], Mapping[str, Array]] | None
    ) -> None:
        super().__init__(artifact)
        self._eager = eager
        self._store: Store | None = None

    def set_bits(self, bits: Bits) -> None:
        """Derive the codes anew. Raises ``UsageError``."""
        self._store = self._store or Store(self._artifact)
        self._artifact = self._store.at(bits)

    def _content(self, name: str) -> bytes:
        content = self._artifact.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name. Raises ``BadInput``."""
        feeds = check_arrays(self.inputs, arrays)
        right = super().run(feeds) if self._eager is None else self._eager(feeds)
        told = json.loads(self._content("told.json"))
        codes = np.frombuffer(self._content("codes.bin"), np.int8)
        kept = _weighted(codes) / told["sum"] if len(codes) else 1.0
        noise = np.random.default_rng(1)
        answers: dict[str, Array] = {}
        for name, array in right.items():
            size = math.sqrt(float((array**2).mean())) * told["drift"]
            drifted = array * kept + size * noise.standard_normal(array.shape)
            wrong = next(iter(feeds.values())).flat[0] > told["fails_above"]
            answers[name] = (np.roll(drifted, 1, -1) if wrong else drifted).astype(array.dtype)
        return answers


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


def tiny_decoder(
    *, seed: int = 0, bits: int | None = None, capacity: int = 96, **sizes: Any
) -> Decoder:
    """A random decoder of two layers; ``sizes`` are fields of ``DecoderSpec``.

    With ``bits``, every matrix comes in blocks of 32 with offsets, as a file's own would.
    """
    head_dim = int(sizes.get("head_dim", 16))
    given: dict[str, Any] = {
        **{"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": head_dim},
        **{"ffn": 96, "vocabulary": 128, "context": 512, "epsilon": 1e-5},
        "rope": tuple(float(1e4 ** (-i / head_dim)) for i in range(0, head_dim, 2)),
    }
    spec = DecoderSpec(**{**given, **sizes})
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for name, shape in spec.shapes().items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            weights[name] = 1 + 0.1 * values if name.endswith("norm") else 0.1 * values
        elif bits is None:
            weights[name] = values * np.float32(shape[1] ** -0.5)
        else:
            weights[name] = _random_blocks(rng, shape, bits)
    return Decoder(spec, weights, capacity)


def _random_blocks(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Blocks:
    blocks = (shape[0], shape[1] // 32)
    # Scales and offsets are float16 numbers, as in files.
    unit = shape[1] ** -0.5 / 2 ** (bits - 2)
    scales = (unit * rng.uniform(0.5, 1.0, blocks)).astype(np.float16).astype(np.float32)
    offsets = (unit * rng.uniform(-1.0, 1.0, blocks)).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    return Blocks(codes, scales, bits, offsets)


class HashStepper:
    """A language model without a runtime: each row's logits depend on all that the row may see.

    Equal contexts give equal rows, to the bit; any token, position or ancestor that differs
    gives others. ``sharpness`` spreads the logits; ``widths`` are its buckets.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 64,
        capacity: int = 256,
        widths: Sequence[int] = range(1, 65),
        exact_widths: Sequence[int] | None = None,
        sharpness: float = 3.0,
    ) -> None:
        self.vocabulary, self.capacity, self.widths = vocabulary, capacity, widths
        self.exact_widths = widths if exact_widths is None else exact_widths
        self.passes: list[int] = []  # the width of every pass so far
        self._sharpness = sharpness
        self._kept: list[tuple[int, int]] = []  # token and position

    @property
    def length(self) -> int:
        return len(self._kept)

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """The rows asked for. Raises ``BadInput`` for what a real stepper refuses too."""
        if len(tokens) not in self.widths or len(self._kept) + len(tokens) > self.capacity:
            raise BadInput(f"a pass of {len(tokens)} tokens does not fit after {self.length}.")
        parents = range(-1, len(tokens) - 1) if parents is None else parents
        kept, start = tuple(self._kept), len(self._kept)
        paths: list[tuple[tuple[int, int], ...]] = []
        for token, parent in zip(tokens, parents, strict=True):
            path = paths[parent] if parent >= 0 else ()
            paths.append((*path, (token, start + len(path))))
        self._kept += [path[-1] for path in paths]
        self.passes.append(len(tokens))
        wanted = range(len(tokens)) if rows is None else rows
        logits = np.stack([self._row((*kept, *paths[row])) for row in wanted])
        return Rows(logits, logits[:, :8])

    def _row(self, seen: tuple[tuple[int, int], ...]) -> Array:
        digest = hashlib.sha256(repr(seen).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return (self._sharpness * rng.standard_normal(self.vocabulary)).astype(np.float32)

    def rewind(self, length: int) -> None:
        del self._kept[length:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None
