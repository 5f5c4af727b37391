"""Proves an artifact: runs it on the samples and compares every number with the eager model's.

What is measured, for each output, over all samples (a the artifact's value, b the eager one):

- ``max_abs_error``: the largest abs(a - b), in the output's own unit.
- ``max_rel_error``: the largest abs(a - b) / max(abs(b), typical), where ``typical`` is the
  median of the sample's non-zero abs(b), and no less than the smallest normal number of the
  precision. An element is compared with itself, unless it is a near-zero among larger ones;
  a few huge elements cannot hide the errors of the rest, as they do when one divides by the
  largest.
- ``cosine`` of the angle between a and b; ``sqnr_db`` = 10 log10(sum(b**2) / sum((a - b)**2)).
  Both are the worst sample's.
- ``top1_agreement``: for class scores (batch, classes), the share of rows whose argmax is the
  same. Rows in which the eager model itself is undecided (the two scores differ by less than
  the allowed error) are left out.
- ``equal``: for integer and boolean outputs, the share of equal elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.contract import Backend
from edgekit.errors import DamagedFile, NotProven
from edgekit.program import Reference
from edgekit.spec import Array, Arrays

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a proof demands. ``agreement`` bounds ``top1_agreement`` and ``equal``."""

    max_rel_error: float
    cosine: float
    sqnr_db: float
    agreement: float
    reason: str


# SQNR is the sharp one. Measured on PartialNet, FasterNet, a ResNet, a ViT, a transformer, an
# LSTM and a U-Net on both runtimes, an honest lowering gave 113 to 143 dB in float32 and 54 to
# 78 dB in float16. A near miss, exact GELU replaced by its tanh form, gave 61 dB on the trained
# PartialNet: it must not pass as float32, and a test holds that.
LIMITS: dict[str, Limits] = {
    "fp32": Limits(
        max_rel_error=1e-3,
        cosine=0.999999,
        sqnr_db=80.0,
        agreement=1.0,
        reason="float32 rounds at 6e-8; reordered sums and fused ops cost two or three digits "
        "of it, an op replaced by an approximation costs more",
    ),
    "fp16": Limits(
        max_rel_error=1e-1,
        cosine=0.999,
        sqnr_db=35.0,
        agreement=0.99,
        reason="float16 rounds at 5e-4, once for each op in a row, and a sum that overflows "
        "65504 or loses its small terms costs more than that",
    ),
}

WORST_SQNR_DB = -999.0  # noise where there should be nothing; JSON has no infinity
_SMALLEST_NORMAL = {"fp32": 1.2e-38, "fp16": 6.1e-5}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one output is from the eager one; None where a measure does not apply."""

    output: str
    max_abs_error: float
    max_rel_error: float | None
    cosine: float | None
    sqnr_db: float | None
    top1_agreement: float | None
    equal: float | None


@dataclass(frozen=True)
class Proof:
    """The outcome of verification: the level, what was measured, the limits, the reasons.

    ``level`` is ``static``, ``emulated``, ``executed`` or ``on-device``; ``failures`` is empty
    where the proof holds. ``host`` names the processor, since kernels differ in result.
    """

    artifact: str
    level: str
    samples: int
    samples_source: str
    outputs: tuple[Deviation, ...]
    limits: Limits
    failures: tuple[str, ...]
    host: dict[str, object]

    @property
    def passed(self) -> bool:
        """Whether every output kept every limit."""
        return not self.failures

    @property
    def max_abs_error(self) -> float:
        """The largest of all outputs."""
        return max((output.max_abs_error for output in self.outputs), default=0.0)

    @property
    def max_rel_error(self) -> float:
        """The largest of all floating-point outputs; 0 where there is none."""
        return max((output.max_rel_error or 0.0 for output in self.outputs), default=0.0)

    def require(self) -> Proof:
        """Return self, or raise ``NotProven`` with every reason."""
        if self.failures:
            raise NotProven(f"{self.artifact} is not proven: {' '.join(self.failures)}")
        return self

    def to_json(self) -> dict[str, object]:
        """All fields, and whether it passed. Infinite SQNR (equal to the bit) becomes null."""
        fields = {**asdict(self), "passed": self.passed}
        for output in fields["outputs"]:
            if output["sqnr_db"] is not None and math.isinf(output["sqnr_db"]):
                output["sqnr_db"] = None
        return fields

    @classmethod
    def from_json(cls, value: object) -> Proof:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        try:
            fields = dict(value)  # type: ignore[call-overload]
            fields.pop("passed")
            fields["outputs"] = tuple(Deviation(**output) for output in fields["outputs"])
            fields["limits"] = Limits(**fields["limits"])
            fields["failures"] = tuple(fields["failures"])
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as cause:
            raise DamagedFile(f"a proof in the bundle is malformed: {cause!r}") from cause


def verify(backend: Backend, artifact: Artifact, reference: Reference) -> Proof:
    """Open ``artifact`` with its runtime, run every sample, compare. Never raises for drift."""
    with backend.open(artifact) as session:
        got = [session.run(sample) for sample in reference.samples]
    outputs = [spec.name for spec in artifact.outputs]
    return prove(artifact, outputs, reference, got)


def prove(
    artifact: Artifact, outputs: Sequence[str], reference: Reference, got: Sequence[Arrays]
) -> Proof:
    """Compare what was run with what is expected; see the module's text for the measures."""
    precision = artifact.recipe.precision
    if precision not in LIMITS:
        raise NotProven(
            f"{artifact.name} cannot be proven: this version has limits for {', '.join(LIMITS)}."
        )
    limits = LIMITS[precision]
    deviations, failures = [], []
    for name in outputs:
        expected = [sample[name] for sample in reference.expected]
        problem = _incomparable(name, expected, [answer.get(name) for answer in got])
        if problem:
            failures.append(problem)
            continue
        deviation = _deviation(name, expected, [answer[name] for answer in got], precision)
        deviations.append(deviation)
        failures += _failures(deviation, limits)
    if not reference.samples:
        failures.append("There is no sample to compare on.")
    if not outputs:
        failures.append("There is no output to compare.")
    return Proof(
        artifact=artifact.name,
        level="executed",
        samples=len(reference.samples),
        samples_source=reference.source,
        outputs=tuple(deviations),
        limits=limits,
        failures=tuple(failures),
        host=host.describe(),
    )


def _incomparable(name: str, expected: Sequence[Array], got: Sequence[Array | None]) -> str:
    """Why the two cannot be compared as numbers, or ""."""
    for index, (wanted, answer) in enumerate(zip(expected, got, strict=True)):
        if answer is None:
            return f"Output {name!r} is missing."
        if answer.shape != wanted.shape or answer.dtype != wanted.dtype:
            return (
                f"Output {name!r} on sample {index} is {answer.dtype} {answer.shape}, "
                f"eager gives {wanted.dtype} {wanted.shape}."
            )
        if not np.isfinite(wanted).all():
            return f"The eager output {name!r} on sample {index} holds NaN or infinity."
        if not np.isfinite(answer).all():
            return f"Output {name!r} on sample {index} holds NaN or infinity; eager does not."
    return ""


def _deviation(
    name: str, expected: Sequence[Array], got: Sequence[Array], precision: str
) -> Deviation:
    pairs = [
        (wanted.astype(np.float64), answer.astype(np.float64))
        for wanted, answer in zip(expected, got, strict=True)
    ]
    largest = max((float(np.abs(b - a).max(initial=0)) for b, a in pairs), default=0.0)
    if expected and expected[0].dtype.kind != "f":
        # Not from the pairs: float64 cannot tell large integers apart.
        same = np.concatenate([(b == a).ravel() for b, a in zip(expected, got, strict=True)])
        equal = float(same.mean()) if same.size else 1.0
        return Deviation(name, largest, None, None, None, None, equal)
    floor = _SMALLEST_NORMAL[precision]
    return Deviation(
        output=name,
        max_abs_error=largest,
        max_rel_error=max((_max_rel_error(b, a, floor) for b, a in pairs), default=0.0),
        cosine=min((_cosine(b, a) for b, a in pairs), default=1.0),
        sqnr_db=min((_sqnr_db(b, a) for b, a in pairs), default=math.inf),
        top1_agreement=_top1_agreement(pairs, LIMITS[precision].max_rel_error),
        equal=None,
    )


def _typical(b: Floats, floor: float) -> float:
    nonzero = np.abs(b[b != 0])
    return max(float(np.median(nonzero)) if nonzero.size else 0.0, floor)


def _max_rel_error(b: Floats, a: Floats, floor: float) -> float:
    scale = np.maximum(np.abs(b), _typical(b, floor))
    return float((np.abs(a - b) / scale).max(initial=0))


def _cosine(b: Floats, a: Floats) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    if length == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return min(1.0, float((a * b).sum()) / length)


def _sqnr_db(b: Floats, a: Floats) -> float:
    noise, signal = float(((a - b) ** 2).sum()), float((b**2).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else WORST_SQNR_DB


def _top1_agreement(pairs: Sequence[tuple[Floats, Floats]], allowed: float) -> float | None:
    """Share of rows with one argmax, ties of the eager model aside; None if not class scores."""
    if not pairs or any(b.ndim != 2 or b.shape[1] < 2 for b, _ in pairs):
        return None
    agree: list[bool] = []
    for b, a in pairs:
        rows = np.arange(len(b))
        best, chosen = b.argmax(axis=1), a.argmax(axis=1)
        margin = b[rows, best] - b[rows, chosen]
        # Against the spread, not the size: an offset common to all classes decides nothing.
        undecided = (best != chosen) & (margin <= allowed * np.ptp(b, axis=1))
        agree += list((best == chosen)[~undecided])
    return float(np.mean(agree)) if agree else None


def _failures(deviation: Deviation, limits: Limits) -> list[str]:
    checks = (
        ("maximum relative error", deviation.max_rel_error, limits.max_rel_error, False),
        ("cosine", deviation.cosine, limits.cosine, True),
        ("SQNR in dB", deviation.sqnr_db, limits.sqnr_db, True),
        ("top-1 agreement", deviation.top1_agreement, limits.agreement, True),
        ("share of equal elements", deviation.equal, limits.agreement, True),
    )
    return [
        f"Output {deviation.output!r}: {what} is {value:.6g}, the limit is {limit:.6g}."
        for what, value, limit, at_least in checks
        # Written so that a NaN fails too.
        if value is not None and not (value >= limit if at_least else value <= limit)
    ]
