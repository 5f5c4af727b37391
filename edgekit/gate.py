"""The gate: whether a quantized artifact pays, what was measured to say so, and the table of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgekit.accuracy import Accuracy
from edgekit.errors import DamagedFile
from edgekit.evidence import Deviation
from edgekit.recipe import Recipe
from edgekit.speed import Speed
from edgekit.verify import MIN_SQNR_DB, Proof

Prefer = Literal["latency", "size"]
TRIED = "tried.json"  # in a bundle: the table of everything tried
PREFERENCES: tuple[Prefer, ...] = ("latency", "size")


@dataclass(frozen=True)
class Budget:
    """What a quantized artifact may cost: points of top-1, or SQNR where nothing is labelled.

    ``prefer`` says what it must win where the vendor's runtime runs: time, or size. ``max_rise``
    is of a language model, whose cost is perplexity, in percent.
    """

    max_drop: float = 0.5
    min_sqnr_db: float = MIN_SQNR_DB
    prefer: Prefer = "latency"
    max_rise: float = 10.0


@dataclass(frozen=True)
class Attempt:
    """One candidate, as it was measured. ``verdict`` says what became of it.

    It is ``chosen``, ``beaten``, ``kept``, ``held`` (a width of what was kept), ``refused`` or
    ``not tried``.

    ``sqnr_db`` is the worst output's, None where nothing ran; sizes are in bytes, without what a
    device makes again; ``float_bytes`` is the float artifact's of the same target.
    """

    artifact: str
    recipe: Recipe
    level: str = ""
    sqnr_db: float | None = None
    accuracy: Accuracy | None = None
    speed: Speed | None = None
    size_bytes: int = 0
    float_bytes: int = 0
    seconds: float = 0.0
    verdict: str = ""
    reason: str = ""

    def _checked(self) -> Attempt:
        """Self, if every text is a text and every number a number; else ``TypeError``."""
        numbers: list[object] = [self.sqnr_db or 0, self.size_bytes, self.float_bytes, self.seconds]
        if self.accuracy is not None:
            numbers += (self.accuracy.percent, self.accuracy.float_percent, self.accuracy.images)
        if self.speed is not None:
            numbers += self.speed.to_json().values()
        texts = (self.artifact, self.level, self.verdict, self.reason)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{texts} are not all texts")
        if not all(type(number) in (int, float) for number in numbers):
            raise TypeError(f"{numbers} are not all numbers")
        return self

    def judged(self, verdict: str, reason: str) -> Attempt:
        """The same attempt with what became of it, and why."""
        return replace(self, verdict=verdict, reason=reason)

    def to_json(self) -> dict[str, object]:
        """Every field as JSON values; an infinite SQNR becomes null."""
        finite = self.sqnr_db is not None and math.isfinite(self.sqnr_db)
        return {
            "artifact": self.artifact,
            "recipe": self.recipe.to_json(),
            "level": self.level,
            "sqnr_db": self.sqnr_db if finite else None,
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "speed": self.speed.to_json() if self.speed else None,
            "size_bytes": self.size_bytes,
            "float_bytes": self.float_bytes,
            "seconds": round(self.seconds, 1),
            "verdict": self.verdict,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, value: object) -> Attempt:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        try:
            fields: dict[str, Any] = dict(value)  # type: ignore[call-overload]
            fields["recipe"] = Recipe.from_json(fields["recipe"])
            if fields["accuracy"] is not None:
                measured = {key: each for key, each in fields["accuracy"].items() if key != "drop"}
                fields["accuracy"] = Accuracy(**measured)
            if fields["speed"] is not None:
                fields["speed"] = Speed(**fields["speed"])
            return cls(**fields)._checked()
        except (TypeError, KeyError, ValueError, AttributeError) as cause:
            raise DamagedFile(f"an attempt in the bundle is malformed: {cause!r}") from cause


def worst_sqnr(outputs: Sequence[Deviation]) -> float | None:
    """That of the worst output, in dB; None where no output has one."""
    return min((each.sqnr_db for each in outputs if each.sqnr_db is not None), default=None)


def inaccurate(attempt: Attempt, proof: Proof, budget: Budget) -> str:
    """Why the accuracy is out of budget, with the figures, or ""."""
    if attempt.accuracy is not None:
        lost = attempt.accuracy.drop
        if not lost <= budget.max_drop:  # so that a budget of NaN lets nothing pass
            return (
                f"top-1 falls from {attempt.accuracy.float_percent:.2f} % to "
                f"{attempt.accuracy.percent:.2f} % on {attempt.accuracy.images} images of "
                f"{attempt.accuracy.source}, {lost:.2f} points, the budget is {budget.max_drop:g}."
            )
        return ""
    if attempt.sqnr_db is not None and not attempt.sqnr_db >= budget.min_sqnr_db:
        return (
            f"the outputs are {attempt.sqnr_db:.1f} dB from the float model's, the budget is "
            f"{budget.min_sqnr_db:g} dB (no labelled data was given)."
        )
    return "" if proof.passed else " ".join(proof.failures)


def unprofitable(attempt: Attempt, budget: Budget) -> str:
    """Why it wins nothing that was asked for, with the figures, or ""."""
    if attempt.speed is not None and budget.prefer == "latency":
        if attempt.speed.faster:
            return ""
        noise = "" if attempt.speed.ratio <= 1 else " by more than the noise"
        return (
            f"it is not faster than float here{noise}: {attempt.speed.ms:.3f} ms against "
            f"{attempt.speed.float_ms:.3f} ms, {attempt.speed}, {attempt.speed.threads} threads."
        )
    if attempt.size_bytes < attempt.float_bytes:
        return ""
    sizes = f"{attempt.size_bytes:,} bytes against {attempt.float_bytes:,}"
    return f"it is not smaller than float: {sizes}."


def summary(attempt: Attempt) -> str:
    """What was measured, in one line."""
    parts = []
    if attempt.accuracy is not None:
        parts.append(
            f"top-1 {attempt.accuracy.percent:.2f} % (float {attempt.accuracy.float_percent:.2f} %)"
        )
    if attempt.sqnr_db is not None and math.isfinite(attempt.sqnr_db):
        parts.append(f"{attempt.sqnr_db:.1f} dB")
    if attempt.speed is not None:
        parts.append(f"{attempt.speed} of float's speed")
    if attempt.float_bytes:
        parts.append(f"{attempt.size_bytes / attempt.float_bytes:.0%} of float's size")
    return ", ".join(parts)
