"""The README.md of a bundle: what it is, what was proven, how to run it. Markdown, in words."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.errors import DISTRIBUTION
from edgekit.gate import Attempt, summary
from edgekit.manifest import Manifest
from edgekit.registry import distance
from edgekit.verify import LEVELS, Proof


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
        f"pip install '{DISTRIBUTION}[{first.target}]'",
        "edgekit verify .        # prove it again, on this machine",
        "edgekit run . INPUT     # an image, or an .npz of named arrays",
        "```",
    ]
    if card:
        lines += ["", "## Model card", "", card.strip()]
    return "\n".join(lines) + "\n"


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
