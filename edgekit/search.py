"""Finds a recipe that pays: makes candidates of one target, measures them, repairs what fails."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import ascii_lowercase
from typing import TYPE_CHECKING

from edgekit.accuracy import Classes, Labelled, accuracy, answers
from edgekit.artifact import Artifact
from edgekit.contract import Backend, Emulation, Quantizes
from edgekit.errors import DoesNotPay, EdgekitError
from edgekit.gate import Attempt, Budget, inaccurate, summary, unprofitable, worst_sqnr
from edgekit.making import Captures, Report, proven
from edgekit.recipe import WIDTHS, Recipe
from edgekit.registry import recipes_of
from edgekit.speed import race
from edgekit.verify import Proof, quantized_limits, verify
from edgekit.widths import Store

if TYPE_CHECKING:
    from edgekit.sensitivity import Sensitivity

# Where labelled data judges, the proof only has to tell the model from another one.
LABELLED_SQNR_DB = 10.0
MIXES = 3  # mixed recipes to try before giving up; each is a whole artifact
STEP_DB = 6.0  # one bit
SHOWN = 3  # guilty layers in a sentence
# What integer kernels are for; everything else may cost more to convert than it wins.
PRODUCTS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "addmm", "matmul", "bmm")


@dataclass(frozen=True)
class Evaluation:
    """Labelled data with what the eager model answers, (rows,)."""

    labelled: Labelled
    eager: Classes


@dataclass(frozen=True)
class Made:
    """A candidate: the artifact, its proof, what was measured."""

    artifact: Artifact
    proof: Proof
    attempt: Attempt


class Candidates:
    """The artifacts of one target, each made and measured once."""

    def __init__(
        self,
        adapter: Backend,
        captures: Captures,
        report: Report,
        *,
        budget: Budget,
        evaluation: Evaluation | None = None,
    ) -> None:
        self._adapter, self._captures, self._report = adapter, captures, report
        self._budget, self._evaluation = budget, evaluation
        self._made: dict[Recipe, Made] = {}
        self.attempts: list[Attempt] = []

    @cached_property
    def base(self) -> Made:
        """The float artifact that the target would have: what a quantized one must beat."""
        return self.make(recipes_of(self._adapter)[0])

    def make(self, recipe: Recipe) -> Made:
        """Lower, prove and measure ``recipe``."""
        if recipe in self._made:
            return self._made[recipe]
        begun = time.monotonic()
        least = self._budget.min_sqnr_db if self._evaluation is None else LABELLED_SQNR_DB
        limits = quantized_limits(least) if recipe.quantized else None
        artifact, proof = proven(self._adapter, recipe, self._captures, self._report, limits=limits)
        attempt = Attempt(
            artifact=artifact.name,
            recipe=artifact.recipe,
            level=proof.level,
            sqnr_db=worst_sqnr(proof.outputs),
            size_bytes=artifact.model_size,
        )
        # Float artifacts keep the eager model's numbers; an interpreter's minutes buy nothing.
        if recipe.quantized and self._evaluation is not None and proof.level != "static":
            attempt = self._evaluated(attempt, artifact, self._evaluation)
        made = Made(artifact, proof, replace(attempt, seconds=time.monotonic() - begun))
        self._made[recipe] = made
        return made

    def _evaluated(self, attempt: Attempt, artifact: Artifact, evaluation: Evaluation) -> Attempt:
        self._report(f"asking {artifact.name} {len(evaluation.labelled)} labelled inputs")
        with self._adapter.open(artifact) as session:
            given = answers(session, evaluation.labelled)
        return replace(attempt, accuracy=accuracy(given, evaluation.eager, evaluation.labelled))

    def judged(self, recipe: Recipe) -> tuple[Made, str]:
        """A candidate measured against the float artifact, and why it does not pay, or "".

        What is not accurate is not timed.
        """
        base, made = self.base, self.make(recipe)
        begun = time.monotonic()
        attempt = replace(made.attempt, float_bytes=base.attempt.size_bytes)
        why = inaccurate(attempt, made.proof, self._budget)
        if not why and not made.proof.passed:
            why = " ".join(made.proof.failures)
        if not why and self._runs_here(made.proof):
            self._report(f"timing {made.artifact.name} against {base.artifact.name}")
            sample = self._captures.reference.samples[0]
            attempt = replace(
                attempt, speed=race(self._adapter, base.artifact, made.artifact, sample)
            )
        why = why or unprofitable(attempt, self._budget)
        attempt = replace(attempt, seconds=attempt.seconds + time.monotonic() - begun)
        made = replace(made, attempt=attempt)
        self._made[recipe] = made
        return made, why

    def _runs_here(self, proof: Proof) -> bool:
        emulated = isinstance(self._adapter, Emulation) and bool(self._adapter.emulation)
        return proof.level == "executed" and not emulated

    def required(self, recipe: Recipe, *, keep_anyway: bool = False) -> tuple[Made, str]:
        """The artifact asked for, and the override's sentence where it was kept all the same.

        Raises ``DoesNotPay`` with the figures, the guilty layers and the remedy that was found.
        """
        made, why = self.judged(recipe)
        if not why:
            self.attempts.append(made.attempt.judged("kept", "as asked"))
            self._note_widths(made)
            return made, ""
        if keep_anyway:
            self.attempts.append(made.attempt.judged("kept", f"although {why}"))
            self._note_widths(made)
            return made, f"{made.artifact.name} was kept although {why}"
        guilty, remedy = self._remedy(recipe, made, why)
        raise DoesNotPay(f"{made.artifact.name} does not pay: {why} {guilty}{remedy}")

    def _note_widths(self, made: Made) -> None:
        """What the narrower widths of a switchable artifact cost, for the table."""
        if not made.artifact.recipe.switchable:
            return
        store = Store(made.artifact)
        for bits in WIDTHS[1:]:
            self._report(f"running {made.artifact.name} at {bits} bits")
            narrow = store.at(bits)
            proof = verify(self._adapter, narrow, self._captures.reference)
            attempt = replace(made.attempt, sqnr_db=worst_sqnr(proof.outputs), speed=None)
            if self._evaluation is not None and proof.level != "static":
                attempt = self._evaluated(attempt, narrow, self._evaluation)
            held = replace(attempt, artifact=f"{made.artifact.name} at {bits} bits", seconds=0.0)
            self.attempts.append(held.judged("held", "a width of the same file"))

    def _remedy(self, recipe: Recipe, made: Made, why: str) -> tuple[str, str]:
        """Who is guilty, and what was found to help, as sentences."""
        repaired = self._repaired(recipe, made)
        if repaired.made is not None:
            measured = summary(repaired.made.attempt)
            remedy = _arguments(recipe, repaired.made.artifact.recipe)
            return repaired.guilty, f"Remedy: {remedy} (tried: {measured})."
        plain = self.base.attempt.recipe.precision
        none = f"None of {repaired.tried} mixed recipes tried pays. " if repaired.tried else ""
        return repaired.guilty, f"{none}Remedy: --precision {plain}."

    def _repaired(self, recipe: Recipe, made: Made) -> _Repaired:
        """The first mixed recipe that pays; every one tried goes into the table."""
        tried, guilty = 0, ""
        for mixed, ranked in self._mixes(recipe, made):
            guilty = guilty or _guilty(ranked)
            tried += 1
            try:
                better, why = self.judged(mixed)
            except EdgekitError as cause:
                self._not_tried(mixed, cause)
                continue
            if not why:
                return _Repaired(better, guilty, tried)
            self.attempts.append(better.attempt.judged("refused", why))
        return _Repaired(None, guilty, tried)

    def _mixes(self, recipe: Recipe, made: Made) -> Iterator[tuple[Recipe, list[Sensitivity]]]:
        """Mixed recipes that may repair ``recipe``, with the layers that they keep float.

        None where it is too large: layers kept float only make it larger.
        """
        if not isinstance(self._adapter, Quantizes):
            return
        ops = self._adapter.quantized_ops(recipe)
        if not made.proof.passed or inaccurate(made.attempt, made.proof, self._budget):
            yield from self._accurate_mixes(recipe, ops)
        elif made.attempt.speed is not None and recipe.calibrated:
            yield from ((mix, []) for mix in self._fast_mixes(recipe, ops))

    def _accurate_mixes(
        self, recipe: Recipe, ops: frozenset[str]
    ) -> Iterator[tuple[Recipe, list[Sensitivity]]]:
        from edgekit.sensitivity import Simulation, names_of

        program = self._captures.program(self._adapter, recipe)
        self._report("looking for the layers that cost the accuracy")
        simulation = Simulation(program, ops, recipe)
        ranked = simulation.alone()
        wanted = max(simulation.sqnr(simulation.nodes), self._budget.min_sqnr_db) + STEP_DB / 2
        if recipe.calibrated and recipe.method == "min-max":
            # Ranges without their outliers cost no layer its speed, so they are tried first.
            yield replace(recipe, method="percentile"), simulation.fewest_kept(ranked, wanted)
        seen: set[tuple[str, ...]] = set()
        for _ in range(MIXES):
            kept = simulation.fewest_kept(ranked, wanted)
            names = names_of(program, {each.node for each in kept}, simulation.nodes)
            keep = tuple(dict.fromkeys((*recipe.keep_float, *names)))
            if kept and keep not in seen and len(kept) < len(ranked):
                seen.add(keep)
                yield replace(recipe, keep_float=keep), kept
            wanted += STEP_DB

    def _fast_mixes(self, recipe: Recipe, ops: frozenset[str]) -> Iterator[Recipe]:
        """First with products alone in integers, then without those of one channel each."""
        from edgekit.selection import node_entries, short_op

        program = self._captures.program(self._adapter, recipe)
        nodes = program.exported.graph.nodes
        present = {short_op(node) for node in nodes if node.op == "call_function"}
        light = sorted((present & ops) - set(PRODUCTS))
        depthwise = [
            node.name
            for node in nodes
            if node.op == "call_function"
            and short_op(node).startswith("conv")
            and len(node.args) > 6
            and isinstance(node.args[6], int)
            and node.args[6] > 1
        ]
        depthwise = node_entries(program, depthwise)
        for keep in dict.fromkeys((tuple(light), tuple(light + depthwise))):
            if keep:
                yield replace(recipe, keep_float=tuple(dict.fromkeys((*recipe.keep_float, *keep))))

    def best(self, recipes: Sequence[Recipe]) -> Made:
        """The fastest of float and ``recipes`` within the budget, or the smallest.

        ``attempts`` says of each what became of it, and why.

        Where time cannot be measured off the device, size decides. What fails for its accuracy
        or its time is tried again as a mixed recipe. Raises ``NotProven`` where not even the
        float artifact is proven.
        """
        self.base.proof.require()
        base = replace(
            self.base, attempt=replace(self.base.attempt, float_bytes=self.base.attempt.size_bytes)
        )
        by_time = self._runs_here(base.proof) and self._budget.prefer == "latency"
        passed = [base]
        for recipe in recipes if by_time else sorted(recipes, key=_bits):
            smaller = [each for each in passed if _holds_less(each.artifact.recipe, recipe)]
            if smaller and not by_time:
                name = smaller[-1].artifact.name
                self._not_tried(recipe, f"{name} has fewer bits and is within the budget")
            else:
                passed += self._candidate(recipe)
        chosen = max(passed, key=_ratio) if by_time else min(passed, key=_size)
        quality = "fastest" if by_time else "smallest"
        for made in passed:
            if made is chosen:
                others = "" if len(passed) > 1 else "; nothing else within it wins anything"
                reason = f"the {quality} within the budget{others}"
                self.attempts.append(made.attempt.judged("chosen", reason))
            else:
                comparative = "faster" if by_time else "smaller"
                reason = f"within the budget, but {chosen.artifact.name} is {comparative}"
                self.attempts.append(made.attempt.judged("beaten", reason))
        return chosen

    def _candidate(self, recipe: Recipe) -> list[Made]:
        """The candidate if it pays, else a mixed one that does, else none."""
        try:
            made, why = self.judged(recipe)
        except EdgekitError as cause:
            self._not_tried(recipe, cause)
            return []
        if not why:
            return [made]
        self.attempts.append(made.attempt.judged("refused", why))
        if not recipe.calibrated:
            return []
        repaired = self._repaired(recipe, made).made
        return [repaired] if repaired is not None else []

    def _not_tried(self, recipe: Recipe, cause: EdgekitError | str) -> None:
        name = f"{self._adapter.name}-{recipe.precision}"
        reason = str(cause).splitlines()[0]
        self.attempts.append(Attempt(name, recipe).judged("not tried", reason))


@dataclass(frozen=True)
class _Repaired:
    made: Made | None
    guilty: str
    tried: int


def _ratio(made: Made) -> float:
    return made.attempt.speed.ratio if made.attempt.speed is not None else 1.0


def _holds_less(recipe: Recipe, other: Recipe) -> bool:
    """Whether it is smaller by its bits alone; what else a target quantizes may differ."""
    alike = recipe.activations == other.activations or not other.quantized
    return alike and _bits(recipe) < _bits(other)


def _bits(recipe: Recipe) -> int:
    """Of a weight."""
    return int(recipe.weights.lstrip(ascii_lowercase))


def _size(made: Made) -> int:
    return made.attempt.size_bytes


def _arguments(asked: Recipe, found: Recipe) -> str:
    """What to add to the command line to get from one recipe to the other."""
    keep = [name for name in found.keep_float if name not in asked.keep_float]
    method = f"--calibration-method {found.method}" if found.method != asked.method else ""
    return " ".join(
        part for part in (method, f"--keep-float {','.join(keep)}" * bool(keep)) if part
    )


def _guilty(ranked: Sequence[Sensitivity]) -> str:
    if not ranked:
        return ""
    return f"It is lost in {', '.join(map(str, ranked[:SHOWN]))}. "
