"""The main verb: one model to proven artifacts in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, check_destination, write_bundle
from edgekit.card import readme
from edgekit.contract import Backend, Finding, Inside, Preferences
from edgekit.errors import EdgekitError, RuntimeFailed, UnknownName, UsageError
from edgekit.host import installed_version
from edgekit.layers import (
    Layer,
    LayerDeviation,
    compare_layers,
    first_divergence,
    layers_to_bytes,
    sentence,
)
from edgekit.manifest import ArtifactEntry, Manifest
from edgekit.model import Model
from edgekit.program import Program, Reference
from edgekit.recipe import FP32, Recipe, recipe_from_precision
from edgekit.registry import backend_names, backend_options, configured, supported_recipe
from edgekit.source import Inputs, resolve
from edgekit.spec import TensorSpec
from edgekit.verify import Proof, limits_of, verify

if TYPE_CHECKING:
    from torch import nn

Report = Callable[[str], None]
_TOOLS = (
    *("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "executorch", "coremltools"),
    *("onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
)


def _silent(_step: str) -> None:
    return


@dataclass(frozen=True)
class Plan:
    """What to make: each backend with the recipe to make it in."""

    backend: Backend
    recipe: Recipe


def plan(
    targets: Sequence[str | Backend], precision: str, options: Mapping[str, str] | None = None
) -> list[Plan]:
    """Every target in every precision asked for: ``auto``, or names joined by commas.

    Raises ``UnknownName``, ``MissingRuntime``, ``UnsupportedRecipe`` or ``UsageError``, before
    any work.
    """
    options = options or {}
    known = backend_options()
    for name in options:
        if name not in known:
            raise UnknownName("option", name, known)
    names = list(backend_names()) if list(targets) == ["all"] else list(targets)
    if not names:
        raise UsageError("no target was named; see edgekit list targets.")
    asked = [
        None if name == "auto" else recipe_from_precision(name) for name in precision.split(",")
    ]
    backends = [configured(name, options) if isinstance(name, str) else name for name in names]
    plans = [Plan(each, supported_recipe(each, recipe)) for each in backends for recipe in asked]
    return list({(p.backend.name, p.recipe.precision): p for p in plans}.values())


class Captures:
    """The model captured once for each form that a target prefers, and run node by node."""

    def __init__(self, model: Model, report: Report = _silent) -> None:
        from edgekit.capture import reference_from

        self.model, self._report = model, report
        report("running the eager model on its samples")
        self.reference: Reference = reference_from(model)
        self._programs: dict[str | None, Program] = {}
        self._layers: dict[str | None, list[Layer]] = {}

    def program(self, adapter: Backend) -> Program:
        """The program in the form that ``adapter`` is fast on."""
        from edgekit.capture import capture

        form = self._form(adapter)
        if form not in self._programs:
            self._report("capturing the model" + (f" in {form} form" if form else ""))
            self._programs[form] = capture(self.model, self.reference, form=form)
        return self._programs[form]

    def _form(self, adapter: Backend) -> str | None:
        has_forms = self.model.deploy is not None
        return adapter.form if has_forms and isinstance(adapter, Preferences) else None

    def layers(self, adapter: Backend) -> list[Layer]:
        """The eager values of every node of that program."""
        from edgekit.trace import layers_from_program

        form = self._form(adapter)
        if form not in self._layers:
            self._layers[form] = layers_from_program(self.program(adapter))
        return self._layers[form]

    def layers_file(self, adapter: Backend) -> str:
        """Where a bundle keeps them."""
        return f"layers/{self._form(adapter) or 'model'}.npz"


def export(
    model: str | nn.Module | Model,
    inputs: Inputs = None,
    *,
    targets: Sequence[str | Backend],
    out: str | Path,
    precision: str = "auto",
    weights: Path | None = None,
    samples: Path | None = None,
    overwrite: bool = False,
    unproven_ok: bool = False,
    options: Mapping[str, str] | None = None,
    report: Report = _silent,
) -> Bundle:
    """Capture, lower, run and prove ``model`` for every target, and write the bundle ``out``.

    ``model`` is a module, an ``edgekit.Model``, a zoo name or ``path/to/file.py:factory``.
    ``inputs`` are example tensors (one, a sequence, or a mapping by name), or texts such as
    ``"x=batch:1..8x3x224x224"``. Every artifact is compared with the eager float32 module on
    the samples; one that drifts raises ``NotProven`` and nothing is written, unless
    ``unproven_ok``, which the manifest then records. ``options`` are settings of targets, such
    as ``{"coreml-minimum": "iOS18"}``. ``report`` hears of each step.
    """
    out = Path(out)
    check_destination(out, overwrite=overwrite)
    plans = plan(targets, precision, options)
    resolved = resolve(model, inputs, weights=weights, samples=samples)
    captures = Captures(resolved, report)
    made = [_make(each, captures, report) for each in plans]
    overrides = []
    report("keeping the eager values of every layer")
    layers = {
        captures.layers_file(each.backend): layers_to_bytes(captures.layers(each.backend))
        for each in plans
    }
    for artifact, proof in made:
        if not proof.passed and unproven_ok:
            overrides.append(f"{artifact.name} was kept unproven: {' '.join(proof.failures)}")
        else:
            proof.require()
    artifacts, proofs = [artifact for artifact, _ in made], [proof for _, proof in made]
    source = model if isinstance(model, str) else "a module passed from Python"
    entries = [
        ArtifactEntry(
            artifact.target,
            artifact.recipe,
            artifact.main,
            tuple(artifact.files),
            artifact.provenance,
            captures.layers_file(each.backend),
        )
        for artifact, each in zip(artifacts, plans, strict=True)
    ]
    manifest = _manifest(
        resolved, source, captures.reference, artifacts[0].outputs, entries, overrides
    )
    report(f"writing {out}")
    return write_bundle(
        out,
        manifest,
        artifacts=artifacts,
        proofs=proofs,
        reference=captures.reference,
        readme=readme(manifest, proofs, resolved.card),
        extra=layers,
        overwrite=overwrite,
    )


def _make(each: Plan, captures: Captures, report: Report) -> tuple[Artifact, Proof]:
    name = f"{each.backend.name} {each.recipe.precision}"
    program = captures.program(each.backend)
    report(f"lowering to {name}")
    artifact = each.backend.lower(program, each.recipe)
    report(f"proving {name} on {len(captures.reference.samples)} samples")
    try:
        proof = verify(each.backend, artifact, captures.reference)
        looked_into = _warned if proof.passed else _explained
        return artifact, looked_into(proof, each, artifact, captures)
    except RuntimeFailed as cause:
        advice = "" if each.recipe == FP32 else " Try --precision fp32."
        raise RuntimeFailed(
            f"{name} was made, but its runtime refuses it: {cause}{advice}"
        ) from cause


def _explained(proof: Proof, each: Plan, artifact: Artifact, captures: Captures) -> Proof:
    """A proof that failed, with the first layer that differs, where the session can show it."""
    from edgekit.trace import source_of

    program, layers = captures.program(each.backend), captures.layers(each.backend)
    try:
        found = deviations_of(each.backend, artifact, layers, captures.reference, program=program)
    except EdgekitError:  # a failed search for the reason must not hide what was found
        return proof
    first = first_divergence(found)
    if first is None:
        return proof
    why = sentence(first, artifact.recipe.precision, source_of(program, first.node))
    return replace(proof, failures=(*proof.failures, why))


def _warned(proof: Proof, each: Plan, artifact: Artifact, captures: Captures) -> Proof:
    """A proof that holds here, and would not where the file's float16 is computed as such.

    ONNX Runtime's CPU kernels compute float16 in float32: what overflows on the way to a right
    result is infinite only where each value is looked at.
    """
    if artifact.recipe == FP32 or proof.level != "executed":
        return proof  # an interpreter rounds every value itself
    try:
        layers = captures.layers(each.backend)
        found = deviations_of(each.backend, artifact, layers, captures.reference)
    except EdgekitError:  # the proof stands without it
        return proof
    lost = next((layer for layer in found if not layer.finite), None)
    if lost is None:
        return proof
    note = (
        f"Node {lost.node!r} ({lost.op}) of module {lost.module or 'the model itself'!r} is beyond "
        "float16. The runtime here computes it in float32; one that computes in float16 gives "
        "infinity. For such devices export with --precision fp32."
    )
    return replace(proof, notes=(*proof.notes, note))


def deviations_of(
    backend: Backend,
    artifact: Artifact,
    layers: Sequence[Layer],
    reference: Reference,
    *,
    program: Program | None = None,
) -> list[LayerDeviation]:
    """How far each layer of ``artifact`` is from the eager one, on the first sample.

    A runtime that shows nothing of its inside needs ``program``: the same program is lowered
    again, with every layer among its outputs. Without it there is nothing to compare: [].
    """
    if not layers:
        return []
    sample, names = reference.samples[0], [layer.node for layer in layers]
    with backend.open(artifact) as session:
        if isinstance(session, Inside):
            found = session.layers(sample)
        elif program is None:
            return []
        else:
            from edgekit.trace import revealing

            shown = backend.lower(revealing(program, names), artifact.recipe)
            with backend.open(shown) as other:
                found = other.run(sample)
    return compare_layers(layers, found, limits_of(artifact).sqnr_db)


def check(
    model: str | nn.Module | Model,
    inputs: Inputs = None,
    *,
    targets: Sequence[str | Backend],
    precision: str = "auto",
    weights: Path | None = None,
    options: Mapping[str, str] | None = None,
    report: Report = _silent,
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
    model: Model,
    source: str,
    reference: Reference,
    outputs: tuple[TensorSpec, ...],
    entries: Sequence[ArtifactEntry],
    overrides: Sequence[str],
) -> Manifest:
    versions = {tool: installed_version(tool) for tool in _TOOLS}
    return Manifest(
        model=model.name,
        source=Path(source).name,  # the folders of the maker's machine are nobody's business
        licence=model.licence,
        inputs=model.inputs,
        outputs=outputs,
        image=model.image,
        labels=model.labels,
        artifacts=tuple(entries),
        samples=tuple(f"samples/{index:04}.npz" for index in range(len(reference.samples))),
        samples_source=reference.source,
        versions={tool: version for tool, version in versions.items() if version},
        overrides=tuple(overrides),
    )
