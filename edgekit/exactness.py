"""Whether speculative text is plain text: measured, in two grades.

``bitwise``: token for token, since every row is equal to the bit. ``numerical``: rows differ in
their last digits, and are no farther from the eager model than those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgekit.decode.draft import Draft, Verified
from edgekit.decode.drafters import drafter
from edgekit.decode.generate import generate
from edgekit.decode.sampling import GREEDY, Sampling
from edgekit.decode.scoring import loss_of
from edgekit.decode.speculate import Tally, speculate
from edgekit.decode.stepper import Stepper
from edgekit.errors import UsageError
from edgekit.language_reference import LanguageReference
from edgekit.spec import Array

Grade = Literal["bitwise", "numerical"]
Report = Callable[[str], None]

GRADES: tuple[Grade, ...] = ("bitwise", "numerical")
CERTIFIED = 48  # tokens of each answer that is compared
WARM = 0.8  # temperature of the sampled answers
_DEPTH = 3  # of the trees that are measured against the eager model
# Speculative rows may be farther from eager by a tenth of what plain rows are, which is what
# another order of the same sums was measured to do, and by this many nats in a float artifact.
_FARTHER, _FLOAT = 1.1, 0.001


@dataclass(frozen=True)
class Distance:
    """Between two readings of a text: the share of places whose likeliest token is another, and
    by how many nats the log probabilities of its tokens differ, in the mean and at most."""

    flipped: float
    nats: float
    worst: float


@dataclass(frozen=True)
class Deviation:
    """The bundle's text, ``rows`` tokens of it, read in three ways: by the eager model, plainly in
    passes of one token, and by passes in which each token was a side branch of a tree."""

    rows: int
    from_plain: Distance
    from_eager: Distance
    plain_from_eager: Distance

    @property
    def is_small(self) -> bool:
        """Whether side branches are about as near to the eager model as plain rows are."""
        return self.from_eager.nats <= _FARTHER * self.plain_from_eager.nats + _FLOAT


@dataclass(frozen=True)
class Certificate:
    """Of ``texts``, one greedy and one sampled for each prompt, ``equal`` were plain text, token
    for token; ``tokens`` in all, and ``drafted`` in their passes, which kept to ``widths``, the
    narrowest and the widest. ``granted`` says whether ``grade`` was reached: ``bitwise`` where
    all texts are equal, ``numerical`` where ``deviation`` is small."""

    grade: Grade
    granted: bool
    prompts: int
    texts: int
    equal: int
    tokens: int
    drafted: int
    widths: tuple[int, int]
    deviation: Deviation | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Certificate:
        """Read what ``asdict`` made. Raises ``TypeError``, ``ValueError`` or ``KeyError``."""
        low, high = value["widths"]
        if value["grade"] not in GRADES:
            raise ValueError(f"no grade {value['grade']!r}")
        deviation = value["deviation"]
        if deviation is not None:
            names = ("from_plain", "from_eager", "plain_from_eager")
            distances = {name: Distance(**deviation[name]) for name in names}
            deviation = Deviation(**{**deviation, **distances})
        return cls(**{**value, "widths": (int(low), int(high)), "deviation": deviation})


def certify(
    stepper: Stepper,
    grade: Grade,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    reference: LanguageReference | None = None,
    report: Report = lambda _step: None,
) -> Certificate:
    """Compare speculative with plain text, greedy and sampled.

    ``bitwise`` at the same exact widths; ``numerical`` with trees and all widths, against passes
    of one token, and on ``reference``'s text against the eager model. Raises ``UsageError``
    where no pass is exact and that is what was asked.
    """
    exact = grade == "bitwise"
    widths = stepper.exact_widths if exact else stepper.widths
    if not widths:
        raise UsageError(
            "this artifact claims no widths whose rows are equal to the bit, so speculation would "
            "not be lossless; leave it off, or ask for --grade numerical."
        )
    learnt, tally = drafter("merged", stepper.vocabulary, trees=not exact), Tally()
    texts, equal, tokens = 0, 0, 0
    for index, prompt in enumerate(prompts):
        report(f"certifying on {len(prompts)} prompts: {index + 1}")
        for sampling in (GREEDY, Sampling(WARM, seed=index)):
            words: dict[str, Any] = {"limit": CERTIFIED, "stops": stops, "sampling": sampling}
            stepper.rewind(0)
            plain = list(generate(stepper, prompt, widths=widths if exact else None, **words))
            stepper.rewind(0)
            words |= {"widths": None if exact else widths, "tally": tally}
            fast = list(speculate(stepper, prompt, learnt, **words))
            texts, equal, tokens = texts + 1, equal + (plain == fast), tokens + len(plain)
    deviation = None
    if not exact and reference is not None:
        report("comparing with the eager model")
        deviation = measured_deviation(stepper, reference)
    return Certificate(
        grade=grade,
        granted=equal == texts if exact else deviation is not None and deviation.is_small,
        prompts=len(prompts),
        texts=texts,
        equal=equal,
        tokens=tokens,
        drafted=tally.drafted,
        widths=(int(widths[0]), int(widths[-1])),
        deviation=deviation,
    )


def measured_deviation(stepper: Stepper, reference: LanguageReference) -> Deviation:
    """Read the reference's text plainly and through trees, each token behind a decoy."""
    text = list(reference.text[: stepper.capacity])
    plain = _Reading(text)
    stepper.rewind(0)
    for _ in generate(stepper, text[:1], limit=len(text) - 1, sampling=plain):
        pass
    trees = _Reading(text)
    decoys = _Decoys(text, stepper.vocabulary)
    stepper.rewind(0)
    words: dict[str, Any] = {"limit": len(text) - 1, "widths": stepper.widths}
    for _ in speculate(stepper, text[:1], decoys, sampling=trees, **words):
        pass
    eager = list(zip(reference.losses.tolist(), reference.likeliest.tolist(), strict=True))
    return Deviation(
        rows=len(plain.said),
        from_plain=_distance(trees.said, plain.said),
        from_eager=_distance(trees.said, eager),
        plain_from_eager=_distance(plain.said, eager),
    )


def _distance(one: Sequence[tuple[float, int]], other: Sequence[tuple[float, int]]) -> Distance:
    """As far as both go: a cache that is full ends a reading a little early."""
    pairs = list(zip(one, other, strict=False))
    nats = [abs(a - b) for (a, _), (b, _) in pairs]
    flipped = [a != b for (_, a), (_, b) in pairs]
    return Distance(float(np.mean(flipped)), float(np.mean(nats)), float(np.max(nats)))


class _Reading(Sampling):
    """Chooses the tokens of a text whatever the rows say, and keeps what they said."""

    text: Sequence[int]
    said: list[tuple[float, int]]  # nats lost at the text's token, and the likeliest one

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__()
        object.__setattr__(self, "text", text)  # the base is frozen
        object.__setattr__(self, "said", [])

    def choose(self, logits: Array, index: int) -> int:
        token = self.text[index + 1]
        self.said.append((loss_of(logits, token), int(logits.argmax())))
        return token


class _Decoys:
    """Proposes the text that will come, each token as the second child beside a wrong one."""

    name = "decoys"

    def __init__(self, text: Sequence[int], vocabulary: int) -> None:
        self._text, self._vocabulary, self._at = text, vocabulary, 0

    def start(self, prompt: Sequence[int]) -> None:
        self._at = len(prompt)

    def observe(self, verified: Verified) -> None:
        self._at += len(verified.emitted)

    def propose(self, budget: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        for token in self._text[self._at : self._at + min(_DEPTH, budget // 2)]:
            above = len(tokens) - 1  # the right one of the pair before, or the root
            tokens += [(token + 1) % self._vocabulary, token]
            parents += [above, above]
        return Draft(tuple(tokens), tuple(parents))
