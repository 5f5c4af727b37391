"""From a model to one proven artifact: captured once for each form, lowered, run, compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgekit.artifact import Artifact
from edgekit.calibration import Calibration, checked_calibration
from edgekit.contract import Backend, Preferences
from edgekit.diagnosis import explained, warned
from edgekit.errors import BadInput, RuntimeFailed
from edgekit.evidence import Limits
from edgekit.layers import Layer
from edgekit.model import Model
from edgekit.program import Program, Reference
from edgekit.recipe import FP32, Recipe
from edgekit.verify import Proof, verify
from edgekit.widths import Store

Report = Callable[[str], None]
FEWEST_LAYERS = 2  # with no more, to leave the ends float would leave everything float


def silent(_step: str) -> None:
    """Reports to nobody."""


class Captures:
    """The model captured once for each form that a target prefers, and run node by node."""

    def __init__(
        self, model: Model, report: Report = silent, *, calibration: Calibration | None = None
    ) -> None:
        from edgekit.capture import reference_from

        self.model, self._report = model, report
        self._calibration = calibration
        report("running the eager model on its samples")
        self.reference: Reference = reference_from(model)
        self._programs: dict[str | None, Program] = {}
        self._layers: dict[str | None, list[Layer]] = {}

    @property
    def calibration(self) -> Calibration:
        """The data given, else the model's own real samples. Raises ``BadInput`` for neither."""
        if self._calibration is None:
            if self.model.samples_drawn or not self.model.samples:
                raise BadInput(
                    f"{self.model.name} has no real inputs of its own, and int8 needs the ranges "
                    "that real inputs give; say --calibration FOLDER, or an .npz of stacked inputs."
                )
            source = f"the model's own samples: {self.model.samples_source}"
            self._calibration = checked_calibration(self.model.samples, source)
        return self._calibration

    def program(self, adapter: Backend, recipe: Recipe = FP32) -> Program:
        """The program in the form that ``adapter`` is fast on, with what ``recipe`` needs."""
        from edgekit.capture import capture

        form = self._form(adapter)
        if form not in self._programs:
            self._report("capturing the model" + (f" in {form} form" if form else ""))
            self._programs[form] = capture(self.model, self.reference, form=form)
        program = self._programs[form]
        if not recipe.calibrated:
            return program
        return replace(program, calibration=self.calibration.reporting(self._report))

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


def lowered(adapter: Backend, recipe: Recipe, program: Program) -> Artifact:
    """The artifact; one fixed at a width is derived from that which holds all of them."""
    if recipe.weights.startswith("any"):
        recipe = replace(recipe, keep_float=_with_ends(recipe, program))
    if recipe.width is None:
        return adapter.lower(program, recipe)
    every = replace(recipe, weights="any")
    return Store(adapter.lower(program, every)).fixed(recipe.width)


def _with_ends(recipe: Recipe, program: Program) -> tuple[str, ...]:
    """The first and the last weighted layer stay float, as in the paper."""
    from edgekit.selection import node_entries
    from edgekit.sensitivity import weighted_nodes

    nodes = weighted_nodes(program)
    ends = [nodes[0], nodes[-1]] if len(nodes) > FEWEST_LAYERS else []
    ends = node_entries(program, ends)
    return tuple(dict.fromkeys((*recipe.keep_float, *ends)))


def proven(
    adapter: Backend,
    recipe: Recipe,
    captures: Captures,
    report: Report,
    *,
    limits: Limits | None = None,
) -> tuple[Artifact, Proof]:
    """Lower to ``recipe``, run on the samples, compare; ``limits`` are those of the precision."""
    name = f"{adapter.name} {recipe.precision}"
    program = captures.program(adapter, recipe)
    report(f"lowering to {name}")
    artifact = lowered(adapter, recipe, program)
    report(f"proving {name} on {len(captures.reference.samples)} samples")
    try:
        proof = verify(adapter, artifact, captures.reference, limits=limits)
        if recipe.quantized:  # rounding is everywhere; the search of the guilty is the gate's
            return artifact, proof
        look_into = warned if proof.passed else explained
        return artifact, look_into(proof, adapter, artifact, program, captures.layers)
    except RuntimeFailed as cause:
        advice = "" if recipe == FP32 else " Try --precision fp32."
        raise RuntimeFailed(
            f"{name} was made, but its runtime refuses it: {cause}{advice}"
        ) from cause
