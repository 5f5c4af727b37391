"""Whether speculative decoding is exact for an artifact, and whether it pays on this machine.

Everything is measured: what passes cost, how often each drafter is right on the bundle's prompts,
and that speculative text is plain text, token for token. What was found lies in the bundle as
speculation.json; ``generate`` goes by it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from edgekit import host
from edgekit.bundle import Bundle
from edgekit.decode.draft import Drafter
from edgekit.decode.drafters import NAMES, drafter
from edgekit.decode.generate import generate
from edgekit.decode.paying import Costs, Switch
from edgekit.decode.sampling import GREEDY, Sampling
from edgekit.decode.speculate import Tally, speculate
from edgekit.decode.stepper import Rows, Stepper, feed
from edgekit.errors import DamagedFile, RuntimeFailed, UsageError
from edgekit.profile import unmeasurable
from edgekit.registry import language_backend

Grade = Literal["bitwise", "refused"]
Report = Callable[[str], None]

OFF = "off"
LENGTH = 256  # tokens cached while passes are timed
ROUNDS = 15
TIMED = (1, 2, 3, 4, 5, 6, 8, 12, 16)  # widths; wider ones were never the best on a CPU
TOKENS = 64  # of each answer that drafters are tried on
CERTIFIED = 48  # of each answer that is compared with plain decoding
PROMPTS = 50
WARM = Sampling(temperature=0.8)
_RESAMPLES = 500


@dataclass(frozen=True)
class Certificate:
    """Of ``texts``, one greedy and one sampled for each prompt, ``equal`` were plain text, token
    for token; ``tokens`` in all. ``grade`` is ``bitwise`` where all were, and the widths that
    passes keep to are ``exact_widths``, the narrowest and the widest."""

    grade: Grade
    prompts: int
    texts: int
    equal: int
    tokens: int
    drafted: int
    exact_widths: tuple[int, int]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Certificate:
        """Read what ``asdict`` made. Raises ``TypeError`` or ``KeyError``."""
        low, high = value["exact_widths"]
        return cls(**{**value, "exact_widths": (int(low), int(high))})


@dataclass(frozen=True)
class Candidate:
    """A drafter as tried: ``predicted`` is the speed-up that pass costs and counts give, over the
    fastest plain decoding, with the middle nine tenths over resampled prompts; ``measured`` is the
    clock's, of the same texts."""

    drafter: str
    acceptance: tuple[float, ...]
    tokens_per_pass: float
    drafting_seconds: float
    predicted: float
    low: float
    high: float
    measured: float

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Candidate:
        """Read what ``asdict`` made. Raises ``TypeError`` or ``KeyError``."""
        return cls(**{**value, "acceptance": tuple(map(float, value["acceptance"]))})


@dataclass(frozen=True)
class SpeculationPlan:
    """What to do with an artifact on the machine ``host`` with ``threads``.

    ``single_seconds`` is a pass of one token, ``exact_seconds`` one of the narrowest exact width:
    their ratio is the price of exactness. ``chosen`` is a drafter's name, or ``off``.
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
        return next((each for each in self.candidates if each.drafter == self.chosen), None)

    def holds_here(self, threads: int) -> bool:
        """Whether this machine and this number of threads are those it was measured on."""
        here = host.describe()
        same = all(self.host.get(key) == here[key] for key in ("processor", "features", "cores"))
        return same and threads == self.threads

    def to_json(self) -> dict[str, object]:
        """All fields as JSON values."""
        return {
            "artifact": self.artifact,
            "threads": self.threads,
            "host": dict(self.host),
            "costs": self.costs.to_json(),
            "single_seconds": self.single_seconds,
            "exact_seconds": self.exact_seconds,
            "candidates": [asdict(each) for each in self.candidates],
            "chosen": self.chosen,
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
        except (TypeError, KeyError, ValueError) as cause:
            raise DamagedFile(f"a plan of speculation is malformed: {cause!r}.") from cause


def plan_speculation(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    report: Report = lambda _step: None,
) -> SpeculationPlan:
    """Measure, certify, choose, and keep the plan in the bundle.

    ``prompts`` are token ids to try drafters on, the bundle's own by default. Raises
    ``RuntimeFailed`` where an interpreter would be timed, ``UsageError`` where no pass is exact.
    """
    artifact = bundle.artifact(name)
    if reason := unmeasurable(artifact):
        raise RuntimeFailed(reason)
    adapter = language_backend(artifact.target)
    threads, context = threads or host.cores(), bundle.language.context
    reference = bundle.language_reference()
    given = [list(p) for p in (prompts or reference.prompts) if len(p) + TOKENS < context]
    stops = bundle.language.stops
    with adapter.open_decoder(artifact, threads=threads) as stepper:
        if not stepper.exact_widths:
            raise UsageError(
                f"{artifact.name} claims no widths whose rows are equal to the bit, so speculation "
                "would not be lossless; leave it off."
            )
        certificate = certify(stepper, _many(given, reference.text), stops, report)
        single, costs = measured_costs(stepper, min(LENGTH, context // 2), report)
        exact = costs.seconds(costs.passes[0][0])
        tried: list[Candidate] = []
        if certificate.grade == "bitwise":
            tried = _tried(stepper, given, stops, single, costs, report)
    # Prediction and clock must both say that it pays.
    worth = [each for each in tried if each.low > 1 and each.measured > 1]
    chosen = max(worth, key=lambda each: each.predicted).drafter if worth else OFF
    plan = SpeculationPlan(
        artifact=artifact.name,
        threads=threads,
        host=host.describe(),
        costs=costs,
        single_seconds=single,
        exact_seconds=exact,
        candidates=tuple(tried),
        chosen=chosen,
        certificate=certificate,
    )
    bundle.write_speculation(artifact.name, plan.to_json())
    return plan


def _many(prompts: Sequence[Sequence[int]], text: Sequence[int]) -> list[list[int]]:
    """``PROMPTS`` of them: those given, then passages of the text, which may copy themselves."""
    many = [list(prompt) for prompt in prompts][:PROMPTS]
    missing = PROMPTS - len(many)
    step = max(1, (len(text) - 48) // max(missing, 1))
    passages = [list(text[i * step : i * step + 48]) for i in range(missing)]
    return many + [passage for passage in passages if passage]


def certify(
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    report: Report = lambda _step: None,
) -> Certificate:
    """Compare speculative with plain text at the same exact widths, greedy and sampled."""
    exact = stepper.exact_widths
    learnt = drafter("merged", stepper.vocabulary)
    texts, equal, tokens, tally = 0, 0, 0, Tally()
    for index, prompt in enumerate(prompts):
        report(f"certifying on {len(prompts)} prompts: {index + 1}")
        for sampling in (GREEDY, Sampling(WARM.temperature, seed=index)):
            words = {"limit": CERTIFIED, "stops": stops, "sampling": sampling}
            stepper.rewind(0)
            plain = list(generate(stepper, prompt, widths=exact, **words))  # type: ignore[arg-type]
            stepper.rewind(0)
            fast = list(speculate(stepper, prompt, learnt, tally=tally, **words))  # type: ignore[arg-type]
            texts, equal, tokens = texts + 1, equal + (plain == fast), tokens + len(plain)
    grade: Grade = "bitwise" if equal == texts else "refused"
    widths = (int(exact[0]), int(exact[-1]))
    return Certificate(grade, len(prompts), texts, equal, tokens, tally.drafted, widths)


def measured_costs(
    stepper: Stepper, length: int, report: Report = lambda _step: None
) -> tuple[float, Costs]:
    """Seconds of a pass of one token, and of passes of exact widths, behind ``length`` tokens.

    Medians of interleaved rounds, after one to warm up.
    """
    report("timing passes")
    stepper.rewind(0)
    feed(stepper, [(7 * index + 3) % stepper.vocabulary for index in range(length)])
    widths = [width for width in TIMED if width in stepper.exact_widths]
    widths = widths or [int(stepper.exact_widths[0])]
    times: dict[int, list[float]] = {width: [] for width in {1, *widths}}
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


def switch_for(costs: Costs, tried: Candidate) -> Switch | None:
    """A fresh switch for a text with that drafter; None where no width holds a draft."""
    widths = [width for width, _ in costs.passes]
    if widths[-1] < 2:
        return None
    whole = replace(costs, drafting=tried.drafting_seconds)
    return Switch(whole, widths, acceptance=tried.acceptance)


class _Counted:
    """A stepper that keeps the width and the seconds of every pass."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self.passes: list[tuple[int, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stepper, name)

    def step(self, tokens: Sequence[int], **words: Any) -> Rows:
        start = time.perf_counter()
        rows = self._stepper.step(tokens, **words)
        self.passes.append((len(tokens), time.perf_counter() - start))
        return rows


@dataclass
class _Trial:
    """One drafter: what it learnt, and for each prompt predicted and clock seconds, and tokens."""

    drafter: Drafter
    tally: Tally
    predicted: list[float]
    clock: list[float]
    tokens: list[int]


def _tried(
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    single: float,
    costs: Costs,
    report: Report,
) -> list[Candidate]:
    """Every drafter on every prompt, with the switch, as ``generate`` would use it; and plain
    decoding by single tokens beside them, since a pass takes longer the more is cached."""
    trials = {n: _Trial(drafter(n, stepper.vocabulary), Tally(), [], [], []) for n in NAMES}
    plain = []
    for index, prompt in enumerate(prompts):
        report(f"trying drafters on {len(prompts)} prompts: {index + 1}")
        plain.append(_plain(stepper, prompt, stops))
        for trial in trials.values():
            _try(trial, stepper, prompt, stops, costs)
    return [_candidate(n, trial, plain, single) for n, trial in trials.items()]


def _plain(stepper: Stepper, prompt: Sequence[int], stops: Sequence[int]) -> float:
    """Seconds a token, behind the prompt."""
    stepper.rewind(0)
    decoded = generate(stepper, prompt, limit=TOKENS, stops=stops)
    next(decoded)
    start = time.perf_counter()
    count = sum(1 for _ in decoded)
    return (time.perf_counter() - start) / max(count, 1)


def _try(
    trial: _Trial, stepper: Stepper, prompt: Sequence[int], stops: Sequence[int], costs: Costs
) -> None:
    counted = _Counted(stepper)
    stepper.rewind(0)
    before = trial.tally.tokens
    decoded = speculate(
        counted,
        prompt,
        trial.drafter,
        limit=TOKENS,
        stops=stops,
        switch=Switch(costs, [w for w, _ in costs.passes]) if costs.passes[-1][0] > 1 else None,
        tally=trial.tally,
    )
    next(decoded)
    counted.passes.clear()
    start = time.perf_counter()
    for _ in decoded:
        pass
    clock = time.perf_counter() - start
    # What is not the model's own time (drafting, choosing, Python) is taken as it was.
    beside = max(0.0, clock - sum(seconds for _, seconds in counted.passes))
    trial.predicted.append(sum(costs.seconds(width) for width, _ in counted.passes) + beside)
    trial.clock.append(clock)
    trial.tokens.append(trial.tally.tokens - before)


def _candidate(name: str, trial: _Trial, plain: Sequence[float], single: float) -> Candidate:
    tokens, predicted = np.array(trial.tokens), np.array(trial.predicted)
    low, high = _interval(tokens * single, predicted)
    return Candidate(
        drafter=name,
        acceptance=tuple(round(share, 4) for share in trial.tally.acceptance[: TIMED[-1]]),
        tokens_per_pass=trial.tally.tokens_per_pass,
        drafting_seconds=trial.tally.drafting_seconds / max(trial.tally.passes, 1),
        predicted=float(tokens.sum() * single / max(predicted.sum(), 1e-12)),
        low=low,
        high=high,
        measured=float((tokens * np.array(plain)).sum() / max(sum(trial.clock), 1e-12)),
    )


def _interval(plain: Any, fast: Any) -> tuple[float, float]:
    """The middle nine tenths of the ratio of sums, over resampled prompts."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(plain), (_RESAMPLES, len(plain)))
    ratios = plain[picks].sum(1) / np.maximum(fast[picks].sum(1), 1e-12)
    low, high = np.percentile(ratios, [5, 95])
    return float(low), float(high)
