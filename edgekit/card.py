"""The README.md of a bundle: what it is, what was proven, how to run it. Markdown, in words."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.errors import DISTRIBUTION
from edgekit.gate import Attempt, summary
from edgekit.manifest import Manifest
from edgekit.registry import distance
from edgekit.verify import LEVELS, Proof

_RUN = "edgekit run . INPUT     # an image, or an .npz of named arrays"
_GENERATE = 'edgekit generate . --chat --prompt "a question"'


def readme(
    manifest: Manifest, proofs: Sequence[Proof], card: str, attempts: Sequence[Attempt] = ()
) -> str:
    """The whole text, ending in a newline."""
    first = min(manifest.artifacts, key=lambda entry: distance(entry.target))
    lines = [
        f"# {manifest.model}",
        "",
        f"A bundle made by edgekit from `{manifest.source}`. Licence: "
        f"{manifest.licence or 'not stated'}.",
        "",
        *(_tensors(manifest, proofs) if manifest.language is None else _words(manifest, proofs)),
        *(
            f"\n`{level}` means: {meaning}."
            for level, meaning in LEVELS.items()
            if level in {proof.level for proof in proofs}
        ),
        *(
            ["", "Overrides:", *(f"- {text}" for text in manifest.overrides)]
            * bool(manifest.overrides)
        ),
        *_kernels(proofs),
        *_tried(manifest, attempts),
        "",
        "## Run it",
        "",
        "```sh",
        f"pip install '{DISTRIBUTION}[{first.target}{',language' * bool(manifest.language)}]'",
        "edgekit verify .        # prove it again, on this machine",
        _RUN if manifest.language is None else _GENERATE,
        "```",
    ]
    if card:
        lines += ["", "## Model card", "", card.strip()]
    return "\n".join(lines) + "\n"


def _tensors(manifest: Manifest, proofs: Sequence[Proof]) -> list[str]:
    """What goes in and out, and how far each artifact's numbers are from eager's."""
    return [
        f"Inputs: {', '.join(f'`{spec}`' for spec in manifest.inputs)}. "
        f"Outputs: {', '.join(f'`{spec}`' for spec in manifest.outputs)}.",
        "",
        "## Proofs",
        "",
        f"Every artifact was compared with the eager PyTorch model, in float32, on "
        f"{len(manifest.samples)} samples ({manifest.samples_source}).",
        "",
        "| artifact | level | holds | max abs error | max rel error |",
        "|---|---|---|---|---|",
        *(
            f"| {proof.artifact} | {proof.level} | {'yes' if proof.passed else '**no**'} | "
            f"{' | '.join(proof.errors(2))} |"
            for proof in proofs
        ),
    ]


def _words(manifest: Manifest, proofs: Sequence[Proof]) -> list[str]:
    """The same of a language model: what it foresees of eager's words, and its perplexity."""
    assert manifest.language is not None
    rows = [
        f"| {proof.artifact} | {proof.level} | {'yes' if proof.passed else '**no**'} | "
        f"{d.agreed:,} of {d.tokens:,} | {f'{d.decoded:,} of {d.compared:,}' * bool(d.compared)} | "
        f"{d.perplexity:.3f} | {d.eager_perplexity:.3f} |"
        for proof in proofs
        if (d := proof.decoding) is not None
    ]
    return [
        f"A language model: conversations of up to {manifest.language.context:,} tokens, the "
        "answer included.",
        "",
        "## Proofs",
        "",
        f"Every artifact was compared with the eager PyTorch model, in float32, on "
        f"{manifest.samples_source}: how many tokens of eager's greedy answers it finds the "
        "likeliest too; of float artifacts, how many of those it decodes one by one; and what each "
        "loses, as perplexity, on the same text.",
        "",
        "| artifact | level | holds | foreseen | decoded | perplexity | eager |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _kernels(proofs: Sequence[Proof]) -> list[str]:
    """On what kind of processor integers were run: kernels of another kind differ in result."""
    kinds = {
        (str(proof.host.get("processor")), str(proof.host.get("int8")))
        for proof in proofs
        if proof.level == "executed" and proof.limits.max_rel_error is None
    }
    unfused = [
        f"\nBy the unfused arithmetic that its file says, {proof.artifact} is "
        f"{proof.as_written_db:.1f} dB from eager."
        for proof in proofs
        if proof.as_written_db is not None
    ]
    return [
        f"\nIntegers were run on {processor} with {kind} kernels. Those of another kind of "
        "processor give other results: verify again there."
        for processor, kind in sorted(kinds)
    ] + unfused


def _tried(manifest: Manifest, attempts: Sequence[Attempt]) -> list[str]:
    """What was quantized, on what data, and everything that was measured for it."""
    if not attempts:
        return []
    data = manifest.calibration
    ranges = (
        f" Ranges were measured on {data['samples']} inputs of {data['source']}." if data else ""
    )
    return [
        "",
        "## Quantization",
        "",
        f"Everything that was tried, against the float artifact of the same target.{ranges}",
        "",
        "| tried | verdict | measured | why |",
        "|---|---|---|---|",
        *(
            f"| {each.artifact} | {each.verdict} | {_cell(summary(each))} | {_cell(each.reason)} |"
            for each in attempts
        ),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "-"
