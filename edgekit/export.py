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
from edgekit.errors import RuntimeFailed, UnknownName, UsageError
from edgekit.host import installed_version
from edgekit.manifest import ArtifactEntry, Manifest
from edgekit.model import Model
from edgekit.program import Program, Reference
from edgekit.recipe import FP32, Recipe, recipe_from_precision
from edgekit.registry import backend_names, backend_options, configured, supported_recipe
from edgekit.source import Inputs, resolve
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
    backends = [configured(name, options) if isinstance(name, str) else name for name in names]
    plans = [Plan(each, supported_recipe(each, recipe)) for each in backends for recipe in asked]
    return list({(p.backend.name, p.recipe.precision): p for p in plans}.values())


class Captures:
    """The model captured once for each form that a target prefers."""

    def __init__(self, model: Model, report: Report = _silent) -> None:
        from edgekit.capture import reference_from

        self.model, self._report = model, report
        report("running the eager model on its samples")
        self.reference: Reference = reference_from(model)
        self._programs: dict[str | None, Program] = {}

    def program(self, adapter: Backend) -> Program:
        """The program in the form that ``adapter`` is fast on."""
        from edgekit.capture import capture

        has_forms = self.model.deploy is not None
        form = adapter.form if has_forms and isinstance(adapter, Preferences) else None
        if form not in self._programs:
            self._report("capturing the model" + (f" in {form} form" if form else ""))
            self._programs[form] = capture(self.model, self.reference, form=form)
        return self._programs[form]


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
    for artifact, proof in made:
        if not proof.passed and unproven_ok:
            overrides.append(f"{artifact.name} was kept unproven: {' '.join(proof.failures)}")
        else:
            proof.require()
    artifacts, proofs = [artifact for artifact, _ in made], [proof for _, proof in made]
    source = model if isinstance(model, str) else "a module passed from Python"
    manifest = _manifest(resolved, source, captures.reference, artifacts, overrides)
    report(f"writing {out}")
    return write_bundle(
        out,
        manifest,
        artifacts=artifacts,
        proofs=proofs,
        reference=captures.reference,
        readme=readme(manifest, proofs, resolved.card),
        overwrite=overwrite,
    )


def _make(each: Plan, captures: Captures, report: Report) -> tuple[Artifact, Proof]:
    name = f"{each.backend.name} {each.recipe.precision}"
    program = captures.program(each.backend)
    report(f"lowering to {name}")
    artifact = each.backend.lower(program, each.recipe)
    report(f"proving {name} on {len(captures.reference.samples)} samples")
    try:
        return artifact, verify(each.backend, artifact, captures.reference)
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
    artifacts: Sequence[Artifact],
    overrides: Sequence[str],
) -> Manifest:
    versions = {tool: installed_version(tool) for tool in _TOOLS}
    return Manifest(
        model=model.name,
        source=Path(source).name,  # the folders of the maker's machine are nobody's business
        licence=model.licence,
        inputs=artifacts[0].inputs,
        outputs=artifacts[0].outputs,
        image=model.image,
        labels=model.labels,
        artifacts=tuple(
            ArtifactEntry(a.target, a.recipe, a.main, tuple(a.files), a.provenance)
            for a in artifacts
        ),
        samples=tuple(f"samples/{index:04}.npz" for index in range(len(reference.samples))),
        samples_source=reference.source,
        versions={tool: version for tool, version in versions.items() if version},
        overrides=tuple(overrides),
    )
