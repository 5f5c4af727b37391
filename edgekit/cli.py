"""The command line: parse, call, print. Results on stdout, everything else on stderr.

Each verb is a call and what is printed; the arguments are in ``arguments.py``.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from edgekit import doctor, language_cli
from edgekit.arguments import Arguments, options, parser, quantization
from edgekit.bundle import Bundle, open_bundle
from edgekit.classes import top_labels
from edgekit.contract import Switchable
from edgekit.diagnosis import deviations_of
from edgekit.errors import EdgekitError, RuntimeFailed, UsageError
from edgekit.export import check, export
from edgekit.files import write_whole
from edgekit.layers import LayerDeviation, first_divergence, sentence
from edgekit.making import Captures
from edgekit.profile import profile, unmeasurable
from edgekit.program import Reference
from edgekit.registry import backend, can_run, zoo_models
from edgekit.render import (
    Progress,
    bundle_rows,
    bundle_table,
    layer_table,
    measurement_table,
    op_table,
    table,
    tried_table,
)
from edgekit.report import html_report
from edgekit.samples import read_sample
from edgekit.sarif import sarif_from_findings
from edgekit.source import resolve
from edgekit.spec import Array
from edgekit.verify import Proof, verify
from edgekit.widths import bits_from_text


def _print(asked: Arguments, value: object, text: str) -> None:
    print(json.dumps(value, indent=1) if asked.json else text)


def _list(asked: Arguments) -> int:
    listing: dict[str, object] = {}
    texts = []
    if asked.what in (None, "models"):
        models = zoo_models()
        listing["models"] = models
        texts.append(table(("model", "what it is"), list(models.items())))
    if asked.what in (None, "targets"):
        targets = doctor.targets()
        listing["targets"] = [target.to_json() for target in targets]
        rows = [(t.name, *map(", ".join, (t.precisions, t.language)), t.state) for t in targets]
        texts.append(table(("target", "precisions", "of language models", "state"), rows))
    _print(asked, listing, "\n\n".join(texts))
    return 0


def _doctor(asked: Arguments) -> int:
    checks, conflicts, targets = doctor.examine(), doctor.conflicts(), doctor.targets()
    rows = [(c.name, c.installed or "missing", c.wanted, c.repair or "ok") for c in checks]
    states = [(target.name, target.state, doctor.making(target)) for target in targets]
    texts = [
        table(("what", "installed", "tried with", "repair"), rows),
        table(("target", "to run it", "to make it"), states),
        *(f"why: {entry.name} {entry.wanted}: {entry.why}" for entry in checks if entry.conflicts),
        *(f"conflict: {conflict}" for conflict in conflicts),
    ]
    document = {
        "packages": [entry.to_json() for entry in checks],
        "targets": [target.to_json() for target in targets],
        "conflicts": [conflict.to_json() for conflict in conflicts],
    }
    _print(asked, document, "\n\n".join(texts))
    # What is missing may not be wanted here; a version that was not tried is trouble.
    wrong = bool(conflicts) or any(entry.conflicts for entry in checks)
    return 3 if wrong or not any(target.state == "ready" for target in targets) else 0


def _check(asked: Arguments) -> int:
    with Progress().shown() as progress:
        found = check(
            asked.model,
            asked.input,
            targets=asked.target.split(","),
            precision=asked.precision,
            weights=asked.weights,
            options=options(asked),
            report=progress,
        )
    lines = []
    for name, findings in found.items():
        lines.append(f"{name}: {len(findings) or 'no'} finding{'s' * (len(findings) != 1)}")
        lines += [f"  - {finding}" for finding in findings]
    if asked.sarif:
        text = json.dumps(sarif_from_findings(found), indent=1) + "\n"
        write_whole(asked.sarif, text.encode())
    listed = {name: [finding.to_json() for finding in found[name]] for name in found}
    _print(asked, listed, "\n".join(lines))
    refused = any(f.effect == "refused" for findings in found.values() for f in findings)
    return 3 if refused else 0


def _export(asked: Arguments) -> int:
    with Progress().shown() as progress:
        bundle = export(
            asked.model,
            asked.input,
            targets=asked.target.split(","),
            out=asked.output,
            precision=asked.precision,
            weights=asked.weights,
            samples=asked.samples,
            overwrite=asked.overwrite,
            unproven_ok=asked.unproven_ok,
            quantization=quantization(asked),
            options=options(asked),
            context=asked.context,
            report=progress,
        )
    for override in bundle.manifest.overrides:
        print(f"warning: {override}", file=sys.stderr)
    proofs = [bundle.proof(name) for name in bundle.artifacts]
    _warn_of_notes(proofs)
    texts = [bundle_table(bundle), language_cli.decoding_table(proofs)]
    texts += [tried_table(bundle.tried()), f"written: {asked.output}"]
    _print(asked, bundle_rows(bundle), "\n\n".join(text for text in texts if text))
    return 0


def _warn_of_notes(proofs: Sequence[Proof]) -> None:
    """A proof must not pass for more than it is: without numbers, or only on this runtime."""
    for proof in proofs:
        if proof.notes and proof.level in ("static", "executed"):
            print(f"warning: {proof.artifact}: {' '.join(proof.notes)}", file=sys.stderr)


def _generate(asked: Arguments) -> int:
    return language_cli.generate(asked)


def _spec(asked: Arguments) -> int:
    bundle = open_bundle(asked.bundle)
    _ = bundle.language  # raises where there is none
    return language_cli.plan(bundle, _measurable(bundle, asked.artifact), asked)


def _verify_language(asked: Arguments, bundle: Bundle) -> int:
    if asked.layers:
        raise UsageError("--layers is not of language models; leave it out.")
    proofs = language_cli.verify(bundle, _runnable(bundle, asked.artifact))
    _warn_of_notes(proofs)
    failures = [f"{proof.artifact}: {why}" for proof in proofs for why in proof.failures]
    text = "\n".join([language_cli.decoding_table(proofs), *failures])
    _print(asked, [proof.to_json() for proof in proofs], text)
    return 1 if failures else 0


def _verify(asked: Arguments) -> int:
    bundle = open_bundle(asked.bundle)
    if bundle.manifest.language:
        return _verify_language(asked, bundle)
    reference = bundle.reference()
    proofs: list[Proof] = []
    for name in _runnable(bundle, asked.artifact):
        artifact = bundle.artifact(name)
        made = bundle.proof(name)
        # Labelled data may have judged it instead; the bundle's own limits say so.
        limits = made.limits if artifact.recipe.quantized else None
        proofs.append(verify(backend(artifact.target), artifact, reference, limits=limits))
        _warn_of_processor(made, proofs[-1])
    rows = [
        (
            proof.artifact,
            proof.level if proof.passed else "not proven",
            proof.samples,
            *proof.errors(),
        )
        for proof in proofs
    ]
    text = table(("artifact", "proof", "samples", "max abs", "max rel"), rows)
    _warn_of_notes(proofs)
    failures = [f"{proof.artifact}: {why}" for proof in proofs for why in proof.failures]
    values = [proof.to_json() for proof in proofs]
    texts = ["\n".join([text, *failures])]
    if asked.layers:
        for proof, value in zip(proofs, values, strict=True):
            found, why = _layers(asked, bundle, proof.artifact, reference)
            value["layers"] = [deviation.to_json() for deviation in found]
            value["first_divergence"] = why
            texts.append(layer_table(proof.artifact, found, why))
    _print(asked, values, "\n\n".join(texts))
    return 1 if failures else 0


def _warn_of_processor(made: Proof, now: Proof) -> None:
    """Integer kernels differ in result: a proof made on one kind does not hold on another."""
    before, here = made.host.get("int8"), now.host.get("int8")
    if made.limits.max_rel_error is None and made.level == "executed" and before != here:
        print(
            f"warning: {made.artifact} was proven on a processor of kind {before!r}, and this one "
            f"is {here!r}, whose integer kernels are others: that proof does not carry over. What "
            "is shown is of this processor.",
            file=sys.stderr,
        )


def _layers(
    asked: Arguments, bundle: Bundle, name: str, reference: Reference
) -> tuple[list[LayerDeviation], str]:
    """Each layer's distance from eager, and a sentence on the first beyond the limit."""
    artifact, layers = bundle.artifact(name), bundle.layers(name)
    adapter = backend(artifact.target)
    if not layers:
        return [], "This bundle was made without the values of layers; export it again."
    try:
        found = deviations_of(adapter, artifact, layers, reference)
        source = asked.model or bundle.manifest.source
        if not found and (asked.model or source in zoo_models()):
            inputs = [str(spec) for spec in bundle.manifest.inputs]
            model = resolve(source, inputs, weights=asked.weights)
            # On the bundle's own samples: random ones may not be valid for the model.
            captures = Captures(model.with_samples(reference.samples, reference.source))
            program = captures.program(adapter)
            found = deviations_of(adapter, artifact, layers, reference, program=program)
    except EdgekitError as reason:
        return [], f"The layers cannot be shown: {reason}"
    if not found:
        return [], (
            f"{artifact.target} hides its layers; say which model was exported, "
            "--model path/to/file.py:factory, and it is lowered again with every layer returned."
        )
    first = first_divergence(found)
    return found, sentence(first, artifact.recipe.precision) if first else ""


def _runnable(bundle: Bundle, name: str | None) -> list[str]:
    """The artifact asked for, or all whose runtime is here; the others are named on stderr."""
    if name:
        return [bundle.artifact(name).name]
    able = [each for each in bundle.artifacts if can_run(bundle.artifact(each).target)]
    for each in bundle.artifacts:
        try:
            backend(bundle.artifact(each).target)
        except EdgekitError as reason:
            if not able:
                raise
            print(f"warning: {each} was left out: {reason}", file=sys.stderr)
    return able


def _measurable(bundle: Bundle, name: str | None) -> list[str]:
    """The artifacts whose own runtime is here: the time of an interpreter says nothing."""
    able, reasons = [], []
    for each in _runnable(bundle, name):
        if reason := unmeasurable(bundle.artifact(each)):
            reasons.append(reason)
        else:
            able.append(each)
    if not able:
        raise RuntimeFailed(" ".join(reasons))
    for reason in reasons:
        print(f"warning: {reason}", file=sys.stderr)
    return able


def _profile(asked: Arguments) -> int:
    bundle = open_bundle(asked.bundle)
    if bundle.manifest.language:
        return language_cli.profile(bundle, _measurable(bundle, asked.artifact), asked)
    measurements = []
    for name in _measurable(bundle, asked.artifact):
        with Progress().shown() as progress:
            progress(f"timing {name}")
            measured = profile(
                bundle, name, threads=asked.threads, runs=asked.runs, noisy_ok=asked.noisy_ok
            )
        measurements.append(measured)
    texts = [measurement_table(measurements)]
    texts += [f"{m.artifact}, by node:\n{op_table(m.ops)}" for m in measurements if m.ops]
    _print(asked, [m.to_json() for m in measurements], "\n\n".join(texts))
    return 0


def _run(asked: Arguments) -> int:
    bundle = open_bundle(asked.bundle)
    if bundle.manifest.language:
        raise UsageError(f"{asked.bundle} holds a language model; use edgekit generate for it.")
    if asked.output and len(asked.inputs) > 1:
        raise UsageError("-o takes the outputs of one INPUT; run them one by one.")
    artifact = bundle.artifact(asked.artifact)
    manifest = bundle.manifest
    samples = [read_sample(path, manifest.inputs, manifest.image) for path in asked.inputs]
    with backend(artifact.target).open(artifact) as session:
        if asked.bits is not None:
            if not isinstance(session, Switchable):
                raise UsageError(f"{artifact.target} has no artifacts of several bit-widths.")
            session.set_bits(bits_from_text(asked.bits))
        answers = [session.run(sample) for sample in samples]
    if asked.output:
        _save(asked.output, answers[0])
    values, texts = [], []
    for path, answer in zip(asked.inputs, answers, strict=True):
        best = top_labels(answer, manifest.labels, asked.top)
        shown = ", ".join(f"{label} {score:.1%}" for label, score in best)
        values.append({"input": str(path), "labels": dict(best), "outputs": _as_json(answer)})
        texts.append(f"{path}: {shown or _summary(answer)}")
    _print(asked, values, "\n".join(texts))
    return 0


def _as_json(answer: dict[str, Array]) -> dict[str, object]:
    return {name: array.tolist() for name, array in answer.items()}


def _summary(answer: dict[str, Array]) -> str:
    return "; ".join(
        f"{name} {array.dtype} {'x'.join(map(str, array.shape)) or 'scalar'}: "
        f"{np.array2string(array, threshold=8, precision=4)}"
        for name, array in answer.items()
    )


def _save(path: Path, answer: dict[str, Array]) -> None:
    content = io.BytesIO()
    np.savez(content, **answer)  # type: ignore[arg-type]  # its stub takes the flag first
    write_whole(path, content.getvalue())


def _report(asked: Arguments) -> int:
    bundles = [open_bundle(path) for path in asked.bundles]
    values = [
        {
            "bundle": str(path),
            "model": bundle.manifest.model,
            "artifacts": bundle_rows(bundle),
            "tried": [attempt.to_json() for attempt in bundle.tried()],
        }
        for path, bundle in zip(asked.bundles, bundles, strict=True)
    ]
    texts = [
        f"{bundle.manifest.model} ({path})\n{bundle_table(bundle)}"
        + f"\n\n{tried_table(bundle.tried())}" * bool(bundle.tried())
        for path, bundle in zip(asked.bundles, bundles, strict=True)
    ]
    if asked.output:
        write_whole(asked.output, html_report(bundles).encode())
    _print(asked, values, "\n\n".join(texts))
    return 0


VERBS: dict[str, Callable[[Arguments], int]] = {
    "list": _list,
    "doctor": _doctor,
    "check": _check,
    "export": _export,
    "verify": _verify,
    "profile": _profile,
    "run": _run,
    "generate": _generate,
    "spec": _spec,
    "report": _report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every error is a sentence on stderr and an exit code."""
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        asked = parser().parse_args(arguments)
        return VERBS[asked.verb](asked)
    except EdgekitError as error:
        if debug:
            traceback.print_exc()
        print(f"edgekit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("edgekit: stopped; what was there before is unchanged.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (| head): not an error, and nothing more can be said.
        sys.stdout = None
        return 0
    except Exception as error:  # the last resort: a sentence for what we did not foresee
        if debug:
            traceback.print_exc()
        print(
            f"edgekit: internal error, {type(error).__name__}: {error}. Run the command again "
            "with --debug and report what it prints.",
            file=sys.stderr,
        )
        return 1


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
