"""Proves an artifact: runs it on the samples and compares every number with the eager model's.

What is measured, and how, is in ``evidence.py``; what a proof demands, and why, is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.contract import AsWritten, Backend, Evidence
from edgekit.errors import DamagedFile, NotProven
from edgekit.evidence import Deviation, Limits, compare
from edgekit.program import Reference
from edgekit.spec import Arrays

# What the proof of a bundle can be worth, from the least to the most.
LEVELS = {
    "static": "checked op by op and not run; it says nothing of the numbers",
    "emulated": "run by edgekit's own interpreter of the very file, on the machine that made the "
    "bundle; the device itself may round otherwise",
    "executed": "run by the vendor's runtime, on the machine that made the bundle",
    "on-device": "run by the artifact's own script on the device itself, after the export",
}
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
        smallest_normal=6.1e-5,
    ),
}
# Of anything quantized, where labelled data does not decide: noise of a tenth of the signal, in
# the worst sample. Measured on the trained PartialNet, the worst of 32 samples had 18 to 29 dB in
# 8 bits and 16 to 24 with 4-bit weights, all answers kept, and under 5 with 2-bit ones, some lost.
MIN_SQNR_DB = 20.0
MIN_EQUAL = 0.95  # of integer outputs, such as classes, which have no SQNR


def quantized_limits(min_sqnr_db: float = MIN_SQNR_DB) -> Limits:
    """What a proof of integers demands: one measure over all elements, and no single one."""
    return Limits(
        max_rel_error=None,
        cosine=None,
        sqnr_db=min_sqnr_db,
        agreement=None,
        reason="integers round at a share of the largest value, so small values lose most; what "
        "that costs in answers is measured on labelled data",
        undecided=10 ** (-min_sqnr_db / 20),
        equal=MIN_EQUAL,
    )


@dataclass(frozen=True)
class Decoding:
    """What a language artifact's proof measured.

    Of ``tokens`` that eager decodes greedily after ``prompts`` prompts, ``agreed`` are the
    likeliest here too, ``ties`` are not but lie within rounding. Decoded one by one, ``decoded``
    of ``compared`` are eager's. Both perplexities are of the same ``text_tokens``;
    ``text_agreement`` is the share of them after which both find the same token likeliest. Among
    passes of ``exact_widths`` tokens, rows were equal to the bit; () where nothing ran or none.
    """

    prompts: int
    tokens: int
    agreed: int
    ties: int
    decoded: int
    compared: int
    text_tokens: int
    perplexity: float
    eager_perplexity: float
    text_agreement: float
    exact_widths: tuple[int, ...]

    @property
    def rise(self) -> float:
        """Of perplexity against eager, in percent."""
        return 100 * (self.perplexity / self.eager_perplexity - 1)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Decoding:
        """Read what ``asdict`` made of it. Raises ``TypeError`` or ``KeyError``."""
        return cls(**{**value, "exact_widths": tuple(value["exact_widths"])})


@dataclass(frozen=True)
class Proof:
    """The outcome of verification: the level, what was measured, the limits, the reasons.

    ``level`` is ``static``, ``emulated``, ``executed`` or ``on-device``; ``failures`` is empty
    where the proof holds. ``host`` names the processor, since kernels differ in result;
    ``notes`` are for the reader, what a ``static`` proof could not run among them.
    ``as_written_db`` is the worst output's SQNR by the unfused arithmetic that the file says,
    None where the runtime's integer kernels cannot differ from it by saturation.
    """

    artifact: str
    level: str
    samples: int
    samples_source: str
    outputs: tuple[Deviation, ...]
    limits: Limits
    failures: tuple[str, ...]
    host: dict[str, object]
    notes: tuple[str, ...] = ()
    as_written_db: float | None = None
    decoding: Decoding | None = None  # of a language model

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

    def errors(self, digits: int = 1) -> tuple[str, str]:
        """Both as people read them; ``-`` where nothing was compared."""
        if not self.outputs:
            return "-", "-"
        return f"{self.max_abs_error:.{digits}e}", f"{self.max_rel_error:.{digits}e}"

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
            fields["notes"] = tuple(fields.get("notes", ()))
            if fields.get("decoding") is not None:
                fields["decoding"] = Decoding.from_json(fields["decoding"])
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as cause:
            raise DamagedFile(f"a proof in the bundle is malformed: {cause!r}") from cause


def limits_of(artifact: Artifact) -> Limits:
    """What a proof of ``artifact`` demands. Raises ``NotProven`` where nothing is known."""
    if artifact.recipe.quantized:
        return quantized_limits()
    if artifact.recipe.precision not in LIMITS:
        raise NotProven(
            f"{artifact.name} cannot be proven: this version has limits for {', '.join(LIMITS)}."
        )
    return LIMITS[artifact.recipe.precision]


def verify(
    backend: Backend, artifact: Artifact, reference: Reference, *, limits: Limits | None = None
) -> Proof:
    """Run ``artifact`` on every sample and compare; ``executed`` unless its session says otherwise.

    ``limits`` are those of the precision, unless given: a bundle's own, where labelled data set
    them. The session may say that an interpreter runs it (``emulated``), that the interpreter does
    not have every op (then nothing is run, and the proof is ``static``), or that the artifact has
    a fault whatever its numbers (then the proof fails).
    """
    limits = limits or limits_of(artifact)
    with backend.open(artifact) as session:
        evidence = session if isinstance(session, Evidence) else None
        if evidence and evidence.level == "static":
            faults, notes = evidence.faults, evidence.notes
            count, source = len(reference.samples), reference.source
            return proof_of(artifact, source, count, limits, "static", [], faults, notes)
        got = [session.run(sample) for sample in reference.samples]
        outputs = [spec.name for spec in artifact.outputs]
        deviations, failures = compare(outputs, reference.expected, got, limits)
        if evidence is None:
            level, notes = "executed", ()
        else:
            level, notes = evidence.level, evidence.notes
            failures += [evidence.cause] if failures and evidence.cause else []
            failures += evidence.faults
        written = None
        if artifact.recipe.quantized and isinstance(session, AsWritten) and session.saturation:
            written, lost = _as_written(session, reference, outputs, deviations, limits)
            failures += lost
        count, source = len(reference.samples), reference.source
        proof = proof_of(artifact, source, count, limits, level, deviations, failures, notes)
        return replace(proof, as_written_db=written)


# Fused and unfused integer kernels round otherwise, which costs either way; measured, that was
# under 1 dB against the eager model, and saturating sums cost 3.4 dB.
MOST_SATURATION_DB = 2.0


def _as_written(
    session: AsWritten,
    reference: Reference,
    outputs: Sequence[str],
    deviations: Sequence[Deviation],
    limits: Limits,
) -> tuple[float | None, list[str]]:
    """The worst SQNR of the file's own arithmetic, and why the run is not that, if it is not."""
    written = [session.run_as_written(sample) for sample in reference.samples]
    exact, _ = compare(outputs, reference.expected, written, limits)
    for run, file in zip(deviations, exact, strict=False):
        if run.sqnr_db is None or file.sqnr_db is None:
            continue
        if file.sqnr_db - run.sqnr_db > MOST_SATURATION_DB:
            text = (
                f"Output {run.output!r}: as run, SQNR is {run.sqnr_db:.1f} dB from eager; by the "
                f"arithmetic that the file says, {file.sqnr_db:.1f} dB. {session.saturation}"
            )
            return file.sqnr_db, [text.strip()]
    finite = [each.sqnr_db for each in exact if each.sqnr_db is not None]
    return min((each for each in finite if math.isfinite(each)), default=None), []


def prove(
    artifact: Artifact, outputs: Sequence[str], reference: Reference, got: Sequence[Arrays]
) -> Proof:
    """An ``executed`` proof: what was run on this host compared with what is expected."""
    limits = limits_of(artifact)
    deviations, failures = compare(outputs, reference.expected, got, limits)
    count, source = len(reference.samples), reference.source
    return proof_of(artifact, source, count, limits, "executed", deviations, failures, ())


def proof_of(
    artifact: Artifact,
    source: str,
    samples: int,
    limits: Limits,
    level: str,
    deviations: Sequence[Deviation],
    failures: Sequence[str],
    notes: Sequence[str],
) -> Proof:
    """What was found on ``samples`` samples of ``source``, on this host."""
    return Proof(
        artifact=artifact.name,
        level=level,
        samples=samples,
        samples_source=source,
        outputs=tuple(deviations),
        limits=limits,
        failures=tuple(failures),
        host=host.describe(),
        notes=tuple(notes),
    )
