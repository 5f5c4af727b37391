"""Whether speculative decoding is exact for an artifact, and whether it pays on this machine.

Everything is measured: what passes cost, how often each drafter is right on the bundle's prompts,
and how far speculative text is from plain text (``exactness.py``). What was found lies in the
bundle as speculation.json, a plan for each grade of exactness; ``generate`` goes by it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgekit import host
from edgekit.bundle import Bundle
from edgekit.decode.paying import Costs
from edgekit.decode.stepper import Stepper, feed
from edgekit.errors import BadInput, DamagedFile, RuntimeFailed
from edgekit.exactness import Certificate, Grade, certify
from edgekit.profile import unmeasurable
from edgekit.registry import language_backend
from edgekit.trials import TOKENS, Candidate, tried

Report = Callable[[str], None]

OFF = "off"
LENGTH = 256  # tokens cached while passes are timed
ROUNDS = 15
TIMED = (1, 2, 3, 4, 5, 6, 8, 12, 16)  # widths; wider ones were never the best on a CPU
PROMPTS = 50
WORTH = 1.05  # a smaller speed-up than this is not worth what texts unlike these may lose


@dataclass(frozen=True)
class SpeculationPlan:
    """What to do with an artifact on the machine ``host`` with ``threads``.

    ``single_seconds`` is a pass of one token, ``exact_seconds`` one of the narrowest width kept
    to: their ratio is the price of exactness. ``chosen`` is a drafter's name, or ``off``.
    """

    artifact: str
    threads: int
    host: Mapping[str, Any]
    costs: Costs
    single_seconds: float
    exact_seconds: float
    candidates: tuple[Candidate, ...]
    chosen: str
    certificate: Certificate

    @property
    def candidate(self) -> Candidate | None:
        """That which was chosen."""
        return self.of(self.chosen)

    def of(self, drafter: str) -> Candidate | None:
        """What was found of a drafter."""
        return next((each for each in self.candidates if each.drafter == drafter), None)

    def holds_here(self, threads: int) -> bool:
        """Whether this machine and this number of threads are those it was measured on."""
        here = host.describe()
        same = all(self.host.get(key) == here[key] for key in ("processor", "features", "cores"))
        return same and threads == self.threads

    def to_json(self) -> dict[str, object]:
        """All fields as JSON values."""
        return {
            **{key: getattr(self, key) for key in self.__dataclass_fields__},
            "host": dict(self.host),
            "costs": self.costs.to_json(),
            "candidates": [each.to_json() for each in self.candidates],
            "certificate": asdict(self.certificate),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SpeculationPlan:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        try:
            fields = {
                **value,
                "costs": Costs.from_json(value["costs"]),
                "candidates": tuple(map(Candidate.from_json, value["candidates"])),
                "certificate": Certificate.from_json(value["certificate"]),
            }
            return cls(**fields)
        except (TypeError, KeyError, ValueError, AttributeError) as cause:
            raise DamagedFile(
                f"a plan of speculation is malformed: {cause!r}; run edgekit spec plan again."
            ) from cause


def plans(bundle: Bundle, name: str) -> dict[str, SpeculationPlan]:
    """The artifact's plans by grade, as far as they were made. Raises ``DamagedFile``."""
    found = bundle.speculation(name) or {}
    return {grade: SpeculationPlan.from_json(value) for grade, value in found.items()}  # type: ignore[arg-type]


def plan_speculation(
    bundle: Bundle,
    name: str | None = None,
    *,
    grade: Grade = "bitwise",
    threads: int | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    report: Report = lambda _step: None,
) -> SpeculationPlan:
    """Measure, certify, choose, and keep the plan in the bundle beside that of the other grade.

    ``prompts`` are token ids to try drafters on, the bundle's own by default. Raises
    ``RuntimeFailed`` where an interpreter would be timed, ``BadInput`` where every prompt is too
    long, ``UsageError`` where no pass is exact and that is what was asked.
    """
    artifact = bundle.artifact(name)
    if reason := unmeasurable(artifact):
        raise RuntimeFailed(reason)
    adapter = language_backend(artifact.target)
    threads, context = threads or host.cores(), bundle.language.context
    reference = bundle.language_reference()
    wanted = prompts or reference.prompts
    given = [list(prompt) for prompt in wanted if len(prompt) + TOKENS < context]
    if not given:
        raise BadInput(
            f"none of {len(wanted)} prompts leaves room for an answer of {TOKENS} tokens in a "
            f"context of {context}; give shorter ones, or export with a larger --context."
        )
    stops = bundle.language.stops
    with adapter.open_decoder(artifact, threads=threads) as stepper:
        certificate = certify(
            stepper, grade, _many(given, reference.text), stops, reference, report
        )
        widths = stepper.exact_widths if grade == "bitwise" else stepper.widths
        single, costs = measured_costs(stepper, widths, min(LENGTH, context // 2), report)
        candidates: list[Candidate] = []
        if certificate.granted:
            candidates = tried(stepper, given, stops, grade, single, costs, report)
    # Prediction and clock must both say that it pays.
    worth = [
        c
        for c in candidates
        if c.predicted.low > 1 and min(c.predicted.speedup, c.measured) >= WORTH
    ]
    best = max(worth, key=lambda each: each.predicted.speedup, default=None)
    plan = SpeculationPlan(
        artifact=artifact.name,
        threads=threads,
        host=host.describe(),
        costs=costs,
        single_seconds=single,
        exact_seconds=costs.seconds(costs.passes[0][0]),
        candidates=tuple(candidates),
        chosen=best.drafter if best else OFF,
        certificate=certificate,
    )
    _keep(bundle, plan)
    return plan


def _keep(bundle: Bundle, plan: SpeculationPlan) -> None:
    try:
        kept = {grade: each.to_json() for grade, each in plans(bundle, plan.artifact).items()}
    except DamagedFile:
        kept = {}  # a file of an earlier edgekit: this one takes its place
    kept[plan.certificate.grade] = plan.to_json()
    bundle.write_speculation(plan.artifact, kept)


def _many(prompts: Sequence[Sequence[int]], text: Sequence[int]) -> list[list[int]]:
    """``PROMPTS`` of them: those given, then passages of the text, which may copy themselves."""
    many = [list(prompt) for prompt in prompts][:PROMPTS]
    missing = PROMPTS - len(many)
    step = max(1, (len(text) - 48) // max(missing, 1))
    passages = [list(text[i * step : i * step + 48]) for i in range(missing)]
    return many + [passage for passage in passages if passage]


def measured_costs(
    stepper: Stepper,
    kept: Sequence[int],
    length: int,
    report: Report = lambda _step: None,
) -> tuple[float, Costs]:
    """Seconds of a pass of one token, and of passes of ``kept`` widths, behind ``length`` tokens.

    Medians of interleaved rounds, after one to warm up.
    """
    report("timing passes")
    stepper.rewind(0)
    feed(stepper, [(7 * index + 3) % stepper.vocabulary for index in range(length)])
    widths = [width for width in TIMED if width in kept] or [int(kept[0])]
    times: dict[int, list[float]] = {width: [] for width in sorted({1, *widths})}
    for round_ in range(ROUNDS + 1):
        for width, spent in times.items():
            tokens = [(11 * round_ + index) % stepper.vocabulary for index in range(width)]
            stepper.rewind(length)
            start = time.perf_counter()
            stepper.step(tokens)
            if round_:
                spent.append(time.perf_counter() - start)
    medians = {width: statistics.median(spent) for width, spent in times.items()}
    return medians[1], Costs(tuple((width, medians[width]) for width in widths))
