"""Proves an artifact of a language model: decodes, reads, and compares with eager's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from edgekit.artifact import Artifact
from edgekit.contract import Decodes, Evidence
from edgekit.decode.generate import generate
from edgekit.decode.scoring import foreseen, measured_exact_widths, read
from edgekit.decode.stepper import Stepper, feed
from edgekit.evidence import Deviation, Limits, compare
from edgekit.language_reference import LanguageReference
from edgekit.verify import LIMITS, Decoding, Proof, proof_of, quantized_limits

Report = Callable[[str], None]

# Percent of perplexity that float artifacts may differ by: reordered sums and float16 weights.
FLOAT_RISE = 1.0
# Where eager's two likeliest tokens are nearer than this in logits, either may come first: ten
# times what reordered float32 sums were measured to move a logit by.
TIE = {"fp32": 1e-3, "fp16": 0.1}
STEPS_EMULATED = 8  # tokens decoded one by one where an interpreter runs, at seconds a token
PROBE = 40  # tokens of the text that exact widths are measured on


def prove_language(
    adapter: Decodes,
    artifact: Artifact,
    reference: LanguageReference,
    *,
    max_rise: float,
    threads: int | None = None,
    report: Report = lambda _step: None,
) -> Proof:
    """Run ``artifact`` on the prompts and the text of ``reference``.

    Floats must foresee every token of eager's greedy continuations, but for ties, and decode the
    same; integers may cost ``max_rise`` percent of perplexity. Every pass of ``exact_widths`` must
    give rows equal to the bit.
    """
    quantized, precision = artifact.recipe.quantized, artifact.recipe.precision
    limits = quantized_limits() if quantized else LIMITS[precision]
    with adapter.open_decoder(artifact, threads=threads) as stepper:
        evidence = stepper if isinstance(stepper, Evidence) else None
        level = evidence.level if evidence else "executed"
        notes = list(evidence.notes) if evidence else []
        if level == "static":
            assert evidence is not None
            return proof_of(
                artifact, reference.source, 0, limits, level, (), evidence.faults, notes
            )
        deviations, failures = _logits(stepper, reference, limits)
        decoding = _decoding(stepper, reference, precision, level, quantized, report)
        failures = [] if quantized else failures
        failures += _failures(decoding, max_rise if quantized else FLOAT_RISE, limits)
        failures += _inexact(stepper, decoding)
        if evidence:
            failures += [evidence.cause] if failures and evidence.cause else []
            failures += evidence.faults
    count = len(reference.prompts)
    proof = proof_of(artifact, reference.source, count, limits, level, deviations, failures, notes)
    return replace(proof, decoding=decoding)


def _logits(
    stepper: Stepper, reference: LanguageReference, limits: Limits
) -> tuple[list[Deviation], list[str]]:
    """The logits after each prompt against eager's."""
    got = []
    for prompt in reference.prompts:
        stepper.rewind(0)
        got.append({"logits": feed(stepper, prompt).logits.copy()})
    expected = [{"logits": row[None]} for row in reference.logits]
    return compare(["logits"], expected, got, limits)


def _decoding(
    stepper: Stepper,
    reference: LanguageReference,
    precision: str,
    level: str,
    quantized: bool,
    report: Report,
) -> Decoding:
    pairs = list(zip(reference.prompts, reference.continuations, strict=True))
    agreed, ties = 0, 0
    for index, (prompt, continuation) in enumerate(pairs):
        report(f"checking {len(pairs)} continuations: {index + 1}")
        same = foreseen(stepper, prompt, continuation)
        gaps = reference.margins[index]
        agreed += sum(same)
        ties += sum(
            not s and gap < TIE.get(precision, 0.0) for s, gap in zip(same, gaps, strict=True)
        )
    decoded, compared = 0, 0
    if not quantized:
        whole = level == "executed"
        for index, (prompt, continuation) in enumerate(pairs if whole else pairs[:1]):
            report(f"decoding {len(pairs)} continuations: {index + 1}")
            wanted = continuation if whole else continuation[:STEPS_EMULATED]
            equal, total = _decode(stepper, prompt, wanted, reference.margins[index], precision)
            decoded, compared = decoded + equal, compared + total
    reading = read(stepper, reference.text, lambda at: report(f"reading the text: token {at + 1}"))
    read_tokens = len(reading.losses)
    return Decoding(
        prompts=len(pairs),
        tokens=sum(len(continuation) for _, continuation in pairs),
        agreed=agreed,
        ties=ties,
        decoded=decoded,
        compared=compared,
        text_tokens=read_tokens,
        perplexity=reading.perplexity,
        eager_perplexity=replace(reference, losses=reference.losses[:read_tokens]).perplexity,
        text_agreement=float((reading.likeliest == reference.likeliest[:read_tokens]).mean()),
        exact_widths=_exact(stepper, reference) if level == "executed" else (),
    )


def _decode(
    stepper: Stepper,
    prompt: Sequence[int],
    wanted: Sequence[int],
    margins: Sequence[float],
    precision: str,
) -> tuple[int, int]:
    """How many tokens of plain greedy decoding are eager's, and how many were compared.

    What comes after another token is not compared; nor, after a tie, is anything wrong.
    """
    stepper.rewind(0)
    equal = 0
    for token in generate(stepper, prompt, limit=len(wanted)):
        if token != wanted[equal]:
            tie = margins[equal] < TIE.get(precision, 0.0)
            return equal, equal if tie else len(wanted)
        equal += 1
    return equal, len(wanted)


def _exact(stepper: Stepper, reference: LanguageReference) -> tuple[int, ...]:
    tokens = reference.text[:PROBE]
    probed = [w for w in (1, 2, 3, 4, 8, 16, 32) if w in stepper.widths and w <= len(tokens)]
    return measured_exact_widths(stepper, tokens, probed)


def _inexact(stepper: Stepper, decoding: Decoding) -> list[str]:
    """A sentence where a width that the stepper calls exact was measured not to be."""
    probed = {w for w in (1, 2, 3, 4, 8, 16, 32) if w in stepper.exact_widths}
    if not decoding.exact_widths or probed <= set(decoding.exact_widths):
        return []
    wrong = sorted(probed - set(decoding.exact_widths))
    return [
        f"Passes of {', '.join(map(str, wrong))} tokens give other rows than passes of "
        f"{', '.join(map(str, decoding.exact_widths))} on this processor, which the adapter did "
        "not expect: speculative decoding would not be lossless here. Please report it."
    ]


def _failures(decoding: Decoding, max_rise: float, limits: Limits) -> list[str]:
    found = []
    if not decoding.rise <= max_rise:  # so that NaN fails
        found.append(
            f"Perplexity rises from {decoding.eager_perplexity:.3f} to {decoding.perplexity:.3f}, "
            f"by {decoding.rise:.1f} %, on {decoding.text_tokens} tokens; the limit is "
            f"{max_rise:g} %."
        )
    if limits.agreement is not None:
        share = (decoding.agreed + decoding.ties) / max(decoding.tokens, 1)
        if share < limits.agreement:
            found.append(
                f"Of {decoding.tokens} tokens that eager decodes greedily, {decoding.agreed} are "
                f"the likeliest here too, {share:.1%}; the limit is {limits.agreement:.1%}."
            )
        if decoding.compared and decoding.decoded / decoding.compared < limits.agreement:
            found.append(
                f"Decoded one by one, {decoding.decoded} of {decoding.compared} tokens are eager's."
            )
    return found
