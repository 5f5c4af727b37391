"""The main verb: one model to proven artifacts in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, check_destination, write_bundle
from edgekit.card import readme
from edgekit.contract import Backend, Finding, Preferences
from edgekit.diagnosis import explained, warned
from edgekit.errors import RuntimeFailed, UnknownName, UsageError
from edgekit.host import installed_version
from edgekit.layers import Layer, layers_to_bytes
from edgekit.manifest import ArtifactEntry, Manifest
from edgekit.model import Model
from edgekit.program import Program, Reference
from edgekit.recipe import FP32, Recipe, recipe_from_precision
from edgekit.registry import backend_names, backend_options, configured, supported_recipe
from edgekit.source import Inputs, resolve
from edgekit.spec import TensorSpec
from edgekit.verify import Proof, verify

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
    for option in options:
        if not any(isinstance(name, str) and option.startswith(f"{name}-") for name in names):
            listed = ", ".join(name for name in names if isinstance(name, str))
            raise UsageError(
                f"--{option} is a setting of a target that was not asked for; asked for: "
                f"{listed or 'backends that were passed ready-made'}. Add it to --target, or "
                "leave the setting out."
            )
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
        look_into = warned if proof.passed else explained
        return artifact, look_into(proof, each.backend, artifact, program, captures.layers)
    except RuntimeFailed as cause:
        advice = "" if each.recipe == FP32 else " Try --precision fp32."
        raise RuntimeFailed(
            f"{name} was made, but its runtime refuses it: {cause}{advice}"
        ) from cause


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
