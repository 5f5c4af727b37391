"""Drafters tried on an artifact: predicted from what passes cost, and measured by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edgekit.decode.draft import Drafter
from edgekit.decode.drafters import NAMES, TREES, drafter
from edgekit.decode.generate import generate
from edgekit.decode.paying import Costs, Switch
from edgekit.decode.replay import Recording, Replay, recorded
from edgekit.decode.speculate import Tally, speculate
from edgekit.decode.stepper import Stepper
from edgekit.exactness import Grade

TOKENS = 64  # of each answer that drafters are tried on
_WIDEST = 64  # tokens of a pass that is replayed
_DEEPEST = 16  # acceptance is kept of so many depths
_RESAMPLES = 500


@dataclass(frozen=True)
class Prediction:
    """The speed-up over the fastest plain decoding that pass costs and counts give, with the
    middle nine tenths over resampled prompts."""

    speedup: float
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """A drafter as tried. Predicted from the costs of passes and from recorded plain answers,
    without speculating: ``fixed`` for passes of each width, full wherever there is a draft, and
    ``predicted`` where the switch takes of ``widths`` what pays. ``measured`` is the clock's, of
    speculating on the same prompts. ``round_seconds`` is what a round takes beside its pass, all
    Python and numpy; ``drafting_seconds`` the drafter's part of it."""

    drafter: str
    widths: tuple[int, ...]
    acceptance: tuple[float, ...]
    tokens_per_pass: float
    round_seconds: float
    drafting_seconds: float
    fixed: Mapping[int, Prediction]
    predicted: Prediction
    measured: float = 0.0

    def to_json(self) -> dict[str, object]:
        """All fields as JSON values; widths are keys, as text."""
        return {**asdict(self), "fixed": {str(w): asdict(each) for w, each in self.fixed.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Candidate:
        """Read what ``to_json`` made. Raises ``TypeError``, ``ValueError`` or ``KeyError``."""
        fields = {
            "widths": tuple(map(int, value["widths"])),
            "acceptance": tuple(map(float, value["acceptance"])),
            "fixed": {int(width): Prediction(**each) for width, each in value["fixed"].items()},
            "predicted": Prediction(**value["predicted"]),
        }
        return cls(**{**value, **fields})

    def switch(self, costs: Costs) -> Switch | None:
        """A fresh one for a text with this drafter; None where no width holds a draft."""
        if self.widths[-1] < 2:
            return None
        whole = replace(costs, drafting=self.drafting_seconds)
        return Switch(whole, self.widths, acceptance=self.acceptance)


def tried(
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    grade: Grade,
    single: float,
    costs: Costs,
    report: Callable[[str], None] = lambda _step: None,
) -> list[Candidate]:
    """Every drafter on every prompt, greedy; ``single`` are the seconds of a pass of one token."""
    # What is recorded is the loop's own text. Plain text is the same only where rows are equal to
    # the bit, and one that repeats itself more, or less, is foreseen more often, or less.
    trees = grade == "numerical"
    learnt = drafter("merged", stepper.vocabulary, trees=trees)
    words: dict[str, Any] = {"limit": TOKENS, "stops": stops}
    words["widths"] = stepper.widths if trees else None
    recordings = []
    for index, prompt in enumerate(prompts):
        report(f"recording answers to {len(prompts)} prompts: {index + 1}")
        stepper.rewind(0)
        answer = list(speculate(stepper, prompt, learnt, **words))
        recordings.append(recorded(stepper, prompt, answer))
    report("predicting")
    candidates = [
        foreseen(name, recordings, stepper.vocabulary, grade, single, costs) for name in NAMES
    ]
    return _measured(stepper, prompts, stops, grade, costs, candidates, report)


def foreseen(
    name: str,
    recordings: Sequence[Recording],
    vocabulary: int,
    grade: Grade,
    single: float,
    costs: Costs,
) -> Candidate:
    """What a drafter would bring, each prompt in turn, from a replay of the recordings."""
    trees = grade == "numerical" and name in TREES
    known = [width for width, _ in costs.passes]

    def replayed(widths: Sequence[int], candidate: Candidate | None = None) -> _Replayed:
        drafts = drafter(name, vocabulary, trees=trees)
        outcome = _Replayed()
        for each in recordings:
            switch = candidate.switch(costs) if candidate else None
            outcome.add(each, drafts, vocabulary, widths, switch, costs)
        return outcome

    fixed = {width: replayed(sorted({known[0], width})) for width in known if width > 1}
    predictions = {width: each.prediction(single) for width, each in fixed.items()}
    widths, acceptance = tuple(known), tuple[float, ...]()
    if fixed:
        acceptance = fixed[known[-1]].tally.acceptance[:_DEEPEST]
    if fixed and trees:  # a tree is cut for a width
        best = max(predictions, key=lambda width: predictions[width].speedup)
        widths, acceptance = (known[0], best), fixed[best].tally.acceptance[:_DEEPEST]
    nothing = Prediction(1.0, 1.0, 1.0)
    draft = Candidate(name, widths, acceptance, 1.0, 0.0, 0.0, predictions, nothing)
    outcome = replayed(range(known[0], _WIDEST + 1), draft)
    tally = outcome.tally
    return replace(
        draft,
        tokens_per_pass=tally.tokens_per_pass,
        round_seconds=outcome.beside / max(tally.passes, 1),
        drafting_seconds=tally.drafting_seconds / max(tally.passes, 1),
        predicted=outcome.prediction(single),
    )


class _Replayed:
    """For each prompt, predicted seconds and tokens behind the first."""

    def __init__(self) -> None:
        self.tally, self.beside = Tally(), 0.0
        self._seconds: list[float] = []
        self._tokens: list[int] = []

    def add(
        self,
        recording: Recording,
        drafts: Drafter,
        vocabulary: int,
        widths: Sequence[int],
        switch: Switch | None,
        costs: Costs,
    ) -> None:
        """Speculate along one recording."""
        replay = Replay(recording, vocabulary, range(1, _WIDEST + 1))
        before, passes = self.tally.tokens, self.tally.widths.copy()
        decoded = speculate(
            replay,
            recording.prompt,
            drafts,
            limit=len(recording.answer),
            widths=widths,
            switch=switch,
            tally=self.tally,
        )
        next(decoded)
        replay.seconds = 0.0
        start = time.perf_counter()
        for _ in decoded:
            pass
        beside = time.perf_counter() - start - replay.seconds
        taken = self.tally.widths - passes
        passing = sum(costs.seconds(width) * count for width, count in taken.items())
        self.beside += beside
        self._seconds.append(passing + beside)
        self._tokens.append(self.tally.tokens - before)

    def prediction(self, single: float) -> Prediction:
        """Over passes of one token that take ``single`` seconds."""
        plain, fast = np.array(self._tokens) * single, np.array(self._seconds)
        picks = np.random.default_rng(0).integers(0, len(plain), (_RESAMPLES, len(plain)))
        ratios = plain[picks].sum(1) / np.maximum(fast[picks].sum(1), 1e-12)
        low, high = np.percentile(ratios, [5, 95])
        return Prediction(float(plain.sum() / max(fast.sum(), 1e-12)), float(low), float(high))


def _measured(
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    grade: Grade,
    costs: Costs,
    candidates: Sequence[Candidate],
    report: Callable[[str], None],
) -> list[Candidate]:
    """Each drafter by the clock, as ``generate`` would use it, and beside it, prompt for prompt,
    plain decoding by single tokens."""
    trees = grade == "numerical"
    drafts = [drafter(each.drafter, stepper.vocabulary, trees=trees) for each in candidates]
    plain = [0.0] * len(candidates)  # what plain decoding would take for as many tokens
    fast = [0.0] * len(candidates)
    for index, prompt in enumerate(prompts):
        report(f"trying drafters on {len(prompts)} prompts: {index + 1}")
        stepper.rewind(0)
        count, seconds = _timed(generate(stepper, prompt, limit=TOKENS, stops=stops))
        for place, candidate in enumerate(candidates):
            stepper.rewind(0)
            decoded = speculate(
                stepper,
                prompt,
                drafts[place],
                limit=TOKENS,
                stops=stops,
                widths=stepper.widths if trees else None,
                switch=candidate.switch(costs),
            )
            tokens, spent = _timed(decoded)
            plain[place] += tokens * seconds / max(count, 1)
            fast[place] += spent
    return [
        replace(candidate, measured=plain[place] / max(fast[place], 1e-12))
        for place, candidate in enumerate(candidates)
    ]


def _timed(decoded: Iterator[int]) -> tuple[int, float]:
    """Tokens behind the first, and their seconds."""
    next(decoded)
    start = time.perf_counter()
    count = sum(1 for _ in decoded)
    return count, time.perf_counter() - start
