"""The main verb: one model to proven artifacts in a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import host
from edgekit.accuracy import METRICS, Labelled, check_labelled, read_labelled
from edgekit.bundle import Bundle, check_destination, write_bundle
from edgekit.calibration import Calibration, read_calibration
from edgekit.card import readme
from edgekit.contract import Backend, Finding
from edgekit.errors import BadInput, UnknownName, UsageError
from edgekit.gate import PREFERENCES, TRIED, Attempt
from edgekit.language import LanguageModel
from edgekit.language_export import CONTEXT, export_language
from edgekit.layers import layers_to_bytes
from edgekit.making import Captures, Report, silent
from edgekit.manifest import ArtifactEntry, Manifest
from edgekit.model import Model
from edgekit.planning import AUTO, Plan, Quantization, plan
from edgekit.search import Candidates, Evaluation, Made
from edgekit.source import Inputs, find_language, resolve
from edgekit.spec import TensorSpec, check_arrays

if TYPE_CHECKING:
    from torch import nn


def export(
    model: str | nn.Module | Model | LanguageModel,
    inputs: Inputs = None,
    *,
    targets: Sequence[str | Backend],
    out: str | Path,
    precision: str = AUTO,
    quantization: Quantization | None = None,
    weights: Path | None = None,
    samples: Path | None = None,
    overwrite: bool = False,
    unproven_ok: bool = False,
    options: Mapping[str, str] | None = None,
    context: int | None = None,
    report: Report = silent,
) -> Bundle:
    """Capture, lower, run and prove ``model`` for every target, and write the bundle ``out``.

    ``model`` is a module, an ``edgekit.Model``, a zoo name or ``path/to/file.py:factory``.
    ``inputs`` are example tensors (one, a sequence, or a mapping by name), or texts such as
    ``"x=batch:1..8x3x224x224"``. Every artifact is compared with the eager float32 module on
    the samples; one that drifts raises ``NotProven``, a quantized one that does not pay
    ``DoesNotPay``, and nothing is written, unless ``unproven_ok``, which the manifest then
    records. ``precision`` ``auto`` searches where ``quantization`` has calibration data, and is
    the target's float one where not. ``options`` are settings of targets, such as
    ``{"coreml-minimum": "iOS18"}``. ``report`` hears of each step.

    A language model is a zoo name, a Hugging Face folder, a GGUF file, or a ``LanguageModel``:
    ``context`` is the most tokens of its conversations, ``samples`` a text to prove it on.
    """
    out, quantization = Path(out), quantization or Quantization()
    check_destination(out, overwrite=overwrite)
    language = find_language(model, weights=weights)
    if language is not None:
        _refuse_vision(inputs, quantization)
        return export_language(
            language,
            source=model if isinstance(model, str) else "a model passed from Python",
            targets=targets,
            out=out,
            precision=precision,
            context=context or min(CONTEXT, language.spec.context),
            text=samples,
            max_rise=quantization.budget.max_rise,
            overwrite=overwrite,
            unproven_ok=unproven_ok,
            options=options,
            report=report,
        )
    if context is not None:
        raise UsageError("--context is of language models, and this is none; leave it out.")
    assert not isinstance(model, LanguageModel)
    plans = plan(targets, precision, options, quantization)
    resolved = resolve(model, inputs, weights=weights, samples=samples)
    captures = Captures(resolved, report, calibration=_calibration(quantization, resolved))
    evaluation = _evaluation(quantization, resolved, report)
    if any(each.recipe.calibrated for each in plans):
        _ = captures.calibration  # refused here, before anything is lowered
    searches = {
        each.backend.name: Candidates(
            each.backend, captures, report, budget=quantization.budget, evaluation=evaluation
        )
        for each in plans
    }
    made: dict[str, Made] = {}
    overrides: list[str] = []
    for each in sorted(plans, key=lambda each: not each.candidates):
        # What auto found comes first; it may be what was asked for by name too.
        if not each.candidates and f"{each.backend.name}-{each.recipe.precision}" in made:
            continue
        candidate, override = _make(each, searches[each.backend.name], unproven_ok=unproven_ok)
        made[candidate.artifact.name] = candidate
        overrides += [override] if override else []
    layers = _layers(plans, captures, report)
    attempts = [attempt for search in searches.values() for attempt in search.attempts]
    source = model if isinstance(model, str) else "a module passed from Python"
    kept = list(made.values())
    manifest = _manifest(captures, source, plans, kept, overrides)
    report(f"writing {out}")
    return write_bundle(
        out,
        manifest,
        artifacts=[each.artifact for each in kept],
        proofs=[each.proof for each in kept],
        reference=captures.reference,
        readme=readme(manifest, [each.proof for each in kept], resolved.card, attempts),
        extra={**layers, **_tried_file(attempts)},
        overwrite=overwrite,
    )


def _refuse_vision(inputs: Inputs, quantization: Quantization) -> None:
    """Raise ``UsageError`` for what was said that means nothing for a language model."""
    said = {
        "--input": inputs,
        "--calibration": quantization.calibration,
        "--calibration-method": quantization.method,
        "--labels": quantization.labelled,
        "--keep-float": quantization.keep_float,
        "--recipe": quantization.recipe,
    }
    for name, value in said.items():
        if value is not None and value != ():
            raise UsageError(
                f"{name} means nothing for a language model, whose inputs are tokens and whose "
                "weights alone are quantized; leave it out. --samples FILE.txt is what it is "
                "proven on."
            )


def _make(each: Plan, search: Candidates, *, unproven_ok: bool) -> tuple[Made, str]:
    """One artifact of the plan, and the sentence of its override or ""."""
    if each.candidates:
        return search.best(each.candidates), ""
    if each.recipe.quantized:
        return search.required(each.recipe, keep_anyway=unproven_ok)
    made = search.make(each.recipe)
    if not made.proof.passed and unproven_ok:
        return made, f"{made.artifact.name} was kept unproven: {' '.join(made.proof.failures)}"
    made.proof.require()
    return made, ""


def _calibration(quantization: Quantization, model: Model) -> Calibration | None:
    given = quantization.calibration
    if isinstance(given, str | Path):
        return read_calibration(Path(given), model.inputs, model.image)
    for sample in given.samples if given is not None else ():
        check_arrays(model.inputs, sample)
    return given


def _evaluation(quantization: Quantization, model: Model, report: Report) -> Evaluation | None:
    """The labelled data with the eager answers, where accuracy is what judges."""
    metric, given = quantization.metric, quantization.labelled
    if metric not in METRICS:
        raise UnknownName("metric", metric, METRICS)
    if quantization.budget.prefer not in PREFERENCES:
        raise UnknownName("preference", quantization.budget.prefer, PREFERENCES)
    if metric == "sqnr" or (metric == "auto" and given is None):
        return None
    if given is None:
        raise BadInput(
            f"--metric {metric} needs labelled data; give --labels FOLDER with a folder a class, "
            "or an .npz with an array 'labels', or judge by --metric sqnr."
        )
    if not isinstance(given, Labelled):
        given = read_labelled(Path(given), model.inputs, model.image, model.labels)
    from edgekit.capture import eager_outputs

    report(f"asking the eager model {len(given)} labelled inputs")
    outputs = eager_outputs(model, given.samples)
    return Evaluation(given, check_labelled(given, outputs, quantization.budget.max_drop))


def _layers(plans: Sequence[Plan], captures: Captures, report: Report) -> dict[str, bytes]:
    report("keeping the eager values of every layer")
    return {
        captures.layers_file(each.backend): layers_to_bytes(captures.layers(each.backend))
        for each in plans
    }


def _tried_file(attempts: Sequence[Attempt]) -> dict[str, bytes]:
    if not attempts:
        return {}
    text = json.dumps([attempt.to_json() for attempt in attempts], indent=1, allow_nan=False)
    return {TRIED: f"{text}\n".encode()}


def check(
    model: str | nn.Module | Model,
    inputs: Inputs = None,
    *,
    targets: Sequence[str | Backend],
    precision: str = AUTO,
    weights: Path | None = None,
    options: Mapping[str, str] | None = None,
    report: Report = silent,
) -> dict[str, list[Finding]]:
    """What each target would refuse or leave outside its delegate, by artifact name."""
    plans = plan(targets, precision, options)
    captures = Captures(resolve(model, inputs, weights=weights), report)
    found = {}
    for each in plans:
        report(f"checking every op for {each.backend.name} {each.recipe.precision}")
        program = captures.program(each.backend)
        name = f"{each.backend.name}-{each.recipe.precision}"
        found[name] = each.backend.check(program, each.recipe)
    return found


def _manifest(
    captures: Captures,
    source: str,
    plans: Sequence[Plan],
    made: Sequence[Made],
    overrides: Sequence[str],
) -> Manifest:
    model, reference = captures.model, captures.reference
    artifacts = [each.artifact for each in made]
    adapters = {each.backend.name: each.backend for each in plans}
    calibrated = any(artifact.recipe.calibrated for artifact in artifacts)
    outputs: tuple[TensorSpec, ...] = artifacts[0].outputs
    return Manifest(
        model=model.name,
        source=Path(source).name,  # the folders of the maker's machine are nobody's business
        licence=model.licence,
        inputs=model.inputs,
        outputs=outputs,
        image=model.image,
        labels=model.labels,
        artifacts=tuple(
            ArtifactEntry(
                artifact.target,
                artifact.recipe,
                artifact.main,
                tuple(artifact.files),
                artifact.provenance,
                captures.layers_file(adapters[artifact.target]),
            )
            for artifact in artifacts
        ),
        samples=tuple(f"samples/{index:04}.npz" for index in range(len(reference.samples))),
        samples_source=reference.source,
        versions=host.tool_versions(),
        overrides=tuple(overrides),
        calibration=captures.calibration.to_json() if calibrated else None,
    )
