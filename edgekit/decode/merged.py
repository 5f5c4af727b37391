"""Several drafters at once: each is scored on every pass, and the one that does best proposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from edgekit.decode.draft import Draft, Drafter, Verified

# A token that is accepted less often costs more time in its pass than it saves: fed beside
# others, one takes 0.1 to 0.2 of a plain pass, and a pass brings some 1.5 tokens. From 0.2 to
# 0.4 the time is flat; at 0 it is up to a quarter worse, since some drafter always has a guess.
FLOOR = 0.3

_MEMORY = 0.98  # weight that a score keeps at each new one: about the last 50 count
_LONGEST = 8  # a longer match than this is no surer


@runtime_checkable
class Situated(Protocol):
    """A drafter that says what its last proposal rested on: the longer a match, the higher."""

    situation: int


class Merged:
    """Takes the proposal from which the most accepted tokens are expected.

    What a drafter's tokens are worth is counted for each length of match by itself, from every
    pass, whoever's proposal was fed: a proposal that was not taken is compared with the text
    that came. Where a share ``a`` of tokens was accepted, a proposal of depth d is worth
    ``a + a^2 + ... + a^d``, and is cut where ``a^d`` falls below ``floor``, maybe to nothing.
    Of equals, the earlier drafter proposes. Scores are kept from text to text.
    """

    name = "merged"

    def __init__(self, drafters: Sequence[Drafter], *, floor: float = FLOOR) -> None:
        self._drafters = tuple((each, isinstance(each, Situated)) for each in drafters)
        self._floor = floor
        self._scores: dict[tuple[int, int], tuple[float, float]] = {}  # hits, tokens tried
        self._pending: list[tuple[tuple[int, int], Draft]] = []

    def start(self, prompt: Sequence[int]) -> None:
        """A text begins, for each."""
        self._pending = []
        for drafter, _ in self._drafters:
            drafter.start(prompt)

    def observe(self, verified: Verified) -> None:
        """Score what each would have had accepted, then let each learn."""
        for key, draft in self._pending:
            hits, missed = followed(draft, verified.emitted)
            right, tried = self._score(key)
            tried = _MEMORY * tried + hits + missed
            self._scores[key] = _MEMORY * right + hits, tried
        self._pending = []
        for drafter, _ in self._drafters:
            drafter.observe(verified)

    def propose(self, budget: int) -> Draft:
        """The best of all proposals, as far as it is worth its time."""
        self._pending = []
        best, most = Draft(), 0.0
        for index, (drafter, situated) in enumerate(self._drafters):
            draft = drafter.propose(budget)
            if not draft:
                continue
            situation = getattr(drafter, "situation", 0) if situated else 0
            key = (index, min(situation, _LONGEST))
            self._pending.append((key, draft))
            right, tried = self._score(key)
            depth, worth = self._worth(right / tried, max(_depths(draft)))
            if worth > most:
                best, most = _shallow(draft, depth), worth
        return best

    def _score(self, key: tuple[int, int]) -> tuple[float, float]:
        """Before anything is known, one of two tokens is right."""
        return self._scores.get(key, (1.0, 2.0))

    def _worth(self, share: float, deepest: int) -> tuple[int, float]:
        """How deep a proposal pays, and the tokens expected of it."""
        depth, chance, worth = 0, share, 0.0
        while depth < deepest and chance >= self._floor:
            depth, worth, chance = depth + 1, worth + chance, chance * share
        return depth, worth


def followed(draft: Draft, text: Sequence[int]) -> tuple[int, bool]:
    """How many tokens of ``text`` the draft foresaw, and whether it then was wrong.

    It was not where the draft, or the text, came to its end.
    """
    node, hits = -1, 0
    for token in text:
        children = [index for index, parent in enumerate(draft.parents) if parent == node]
        if not children:
            return hits, False
        found = [index for index in children if draft.tokens[index] == token]
        if not found:
            return hits, True
        node = found[0]
        hits += 1
    return hits, False


def _depths(draft: Draft) -> list[int]:
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def _shallow(draft: Draft, deepest: int) -> Draft:
    """The nodes down to a depth; parents, which are less deep, all stay."""
    kept = [index for index, depth in enumerate(_depths(draft)) if depth <= deepest]
    places = {-1: -1, **{index: place for place, index in enumerate(kept)}}
    tokens = tuple(draft.tokens[index] for index in kept)
    return Draft(tokens, tuple(places[draft.parents[index]] for index in kept))
