"""The command line: parse, call, print. Results on stdout, everything else on stderr.

One file of over 400 lines: each verb is its arguments, a call and what is printed.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

import edgekit
from edgekit import doctor
from edgekit.bundle import Bundle, open_bundle
from edgekit.classes import top_labels
from edgekit.diagnosis import deviations_of
from edgekit.errors import EdgekitError, RuntimeFailed, UsageError
from edgekit.export import Captures, check, export
from edgekit.files import write_whole
from edgekit.layers import LayerDeviation, first_divergence, sentence
from edgekit.profile import profile, unmeasurable
from edgekit.program import Reference
from edgekit.registry import backend, backend_names, backend_options, can_run, zoo_models
from edgekit.render import (
    Progress,
    bundle_rows,
    bundle_table,
    layer_table,
    measurement_table,
    op_table,
    table,
)
from edgekit.report import html_report
from edgekit.samples import read_sample
from edgekit.sarif import sarif_from_findings
from edgekit.source import resolve
from edgekit.spec import Array
from edgekit.verify import Proof, verify

Arguments = argparse.Namespace


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="edgekit", description="PyTorch models to proven edge artifacts.")
    parser.add_argument("--version", action="version", version=f"edgekit {edgekit.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    common.add_argument("--debug", action="store_true", help="show tracebacks")

    def verb(name: str, action: Callable[[Arguments], int], text: str) -> _Parser:
        added = verbs.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(action=action)
        return added

    listed = verb("list", _list, "what there is, what is installed, what is missing")
    listed.add_argument("what", nargs="?", choices=("models", "targets"))
    verb("doctor", _doctor, "versions, conflicts, and the line that repairs each")
    checked = verb("check", _check, "every op that a target would refuse or run slowly")
    _model_arguments(checked)
    checked.add_argument("--sarif", type=Path, metavar="FILE", help="also as SARIF, for reviews")
    exported = verb("export", _export, "make and prove artifacts")
    _model_arguments(exported)
    exported.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    exported.add_argument("--samples", type=Path, help="real inputs to prove on: .npz, or folder")
    exported.add_argument("--overwrite", action="store_true", help="replace the bundle DIR")
    exported.add_argument("--unproven-ok", action="store_true", help="keep what failed its proof")
    verified = verb("verify", _verify, "prove a bundle again, on this machine")
    _bundle_arguments(verified)
    verified.add_argument(
        "--layers", action="store_true", help="every module's distance from eager; the first off"
    )
    verified.add_argument(
        "--model", help="with --layers: the MODEL that was exported, for runtimes that hide layers"
    )
    verified.add_argument("--weights", type=Path, metavar="FILE", help="with --model: its weights")
    profiled = verb("profile", _profile, "latency, load time and memory; refuses a noisy run")
    _bundle_arguments(profiled)
    profiled.add_argument("--threads", type=_positive, help="default: all cores")
    profiled.add_argument("--runs", type=_positive, default=100)
    profiled.add_argument("--noisy-ok", action="store_true", help="keep a figure made in noise")
    ran = verb("run", _run, "run a bundle on images or .npz files")
    ran.add_argument("bundle", type=Path)
    ran.add_argument("inputs", type=Path, nargs="+", metavar="INPUT")
    ran.add_argument("--artifact", help="such as onnxruntime-fp32; default: the first")
    ran.add_argument("--top", type=_positive, default=3, help="labels to show")
    ran.add_argument("-o", "--output", type=Path, help="write the outputs of one INPUT as .npz")
    reported = verb("report", _report, "proofs and measurements of bundles")
    reported.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    reported.add_argument("-o", "--output", type=Path, metavar="FILE", help="write an HTML page")
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a zoo name, or path/to/file.py:factory")
    parser.add_argument(
        "--target", required=True, help=f"all, or of {', '.join(backend_names())} with commas"
    )
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16; several with commas")
    parser.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors, .pth or .pt")
    parser.add_argument(
        "--input",
        action="append",
        metavar="NAME=SHAPE",
        help="x=1x3x224x224, x=batch:1..8x3x224x224 or ids=1x16:int64; once for each input",
    )
    for name, option in backend_options().items():
        parser.add_argument(
            f"--{name}",
            metavar="VALUE",
            dest=f"option:{name}",
            help=f"{option.help} (default {option.default})",
        )


def _options(asked: Arguments) -> dict[str, str]:
    """The settings of targets that were given."""
    return {
        name.removeprefix("option:"): value
        for name, value in vars(asked).items()
        if name.startswith("option:") and value is not None
    }


def _bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--artifact", help="such as onnxruntime-fp32; default: all")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


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
        rows = [(t.name, ", ".join(t.precisions), t.state) for t in targets]
        texts.append(table(("target", "precisions", "state"), rows))
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
            options=_options(asked),
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
            options=_options(asked),
            report=progress,
        )
    for override in bundle.manifest.overrides:
        print(f"warning: {override}", file=sys.stderr)
    _warn_of_notes([bundle.proof(name) for name in bundle.artifacts])
    _print(asked, bundle_rows(bundle), f"{bundle_table(bundle)}\n\nwritten: {asked.output}")
    return 0


def _warn_of_notes(proofs: Sequence[Proof]) -> None:
    """A proof must not pass for more than it is: without numbers, or only on this runtime."""
    for proof in proofs:
        if proof.notes and proof.level in ("static", "executed"):
            print(f"warning: {proof.artifact}: {' '.join(proof.notes)}", file=sys.stderr)


def _verify(asked: Arguments) -> int:
    bundle = open_bundle(asked.bundle)
    reference = bundle.reference()
    proofs: list[Proof] = []
    for name in _runnable(bundle, asked.artifact):
        artifact = bundle.artifact(name)
        proofs.append(verify(backend(artifact.target), artifact, reference))
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
    if asked.output and len(asked.inputs) > 1:
        raise UsageError("-o takes the outputs of one INPUT; run them one by one.")
    artifact = bundle.artifact(asked.artifact)
    manifest = bundle.manifest
    samples = [read_sample(path, manifest.inputs, manifest.image) for path in asked.inputs]
    with backend(artifact.target).open(artifact) as session:
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
        {"bundle": str(path), "model": bundle.manifest.model, "artifacts": bundle_rows(bundle)}
        for path, bundle in zip(asked.bundles, bundles, strict=True)
    ]
    texts = [
        f"{bundle.manifest.model} ({path})\n{bundle_table(bundle)}"
        for path, bundle in zip(asked.bundles, bundles, strict=True)
    ]
    if asked.output:
        write_whole(asked.output, html_report(bundles).encode())
    _print(asked, values, "\n\n".join(texts))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every error is a sentence on stderr and an exit code."""
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        asked = _parser().parse_args(arguments)
        code: int = asked.action(asked)
        return code
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
