"""Several drafters at once: each is scored on every pass, and the one that does best proposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Protocol, runtime_checkable

from edgekit.decode.draft import Draft, Drafter, Verified
from edgekit.decode.paying import FLOOR

_MEMORY = 0.98  # weight that a score keeps at each new one: about the last 50 count
_UNKNOWN = (2.0, 4.0)  # before anything is seen: two of four tokens were right
_LONGEST = 8  # a longer match than this is no surer
_DEEPEST = 3  # deeper tokens than this are as sure as those there


@runtime_checkable
class Situated(Protocol):
    """A drafter that says what its last proposal rested on: the longer a match, the higher."""

    situation: int


class Merged:
    """Takes the proposal from which the most accepted tokens are expected.

    What a drafter's tokens are worth is counted for each length of match and each depth by
    itself, from every pass, whoever's proposal was fed: one that was not taken is compared with
    the text that came. A chain says with its ``chances`` what was counted; a tree is cut at the
    depth where a path is no longer likely. Of equals, the earlier drafter proposes. Scores are
    kept from text to text.
    """

    name = "merged"

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = tuple((each, isinstance(each, Situated)) for each in drafters)
        # Of a drafter, a length of match and a depth: hits, tokens tried.
        self._scores: dict[tuple[int, int, int], tuple[float, float]] = {}
        self._pending: list[tuple[int, int, Draft]] = []

    def start(self, prompt: Sequence[int]) -> None:
        """A text begins, for each."""
        self._pending = []
        for drafter, _ in self._drafters:
            drafter.start(prompt)

    def observe(self, verified: Verified) -> None:
        """Score what each would have had accepted, then let each learn."""
        for index, situation, draft in self._pending:
            hits, missed = followed(draft, verified.emitted)
            for depth in range(hits + missed):
                key = index, situation, min(depth, _DEEPEST)
                right, tried = self._scores.get(key, _UNKNOWN)
                self._scores[key] = _MEMORY * right + (depth < hits), _MEMORY * tried + 1
        self._pending = []
        for drafter, _ in self._drafters:
            drafter.observe(verified)

    def propose(self, budget: int) -> Draft:
        """The best of all proposals."""
        self._pending = []
        best, most = Draft(), 0.0
        for index, (drafter, situated) in enumerate(self._drafters):
            draft = drafter.propose(budget)
            if not draft:
                continue
            situation = min(getattr(drafter, "situation", 0), _LONGEST) if situated else 0
            self._pending.append((index, situation, draft))
            chances = [self._chance(index, situation, d) for d in range(max(_depths(draft)))]
            reached = list(accumulate(chances, mul))
            if sum(reached) <= most:
                continue
            best, most = draft, sum(reached)
            if draft.is_chain:
                best = replace(draft, chances=tuple(chances))
            else:
                best = _shallow(draft, sum(chance >= FLOOR for chance in reached))
        return best

    def _chance(self, index: int, situation: int, depth: int) -> float:
        right, tried = self._scores.get((index, situation, min(depth, _DEEPEST)), _UNKNOWN)
        return right / tried


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
    """Of each token, how many there are from the root to it."""
    depths: list[int] = []
    for parent in draft.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def _shallow(draft: Draft, deepest: int) -> Draft:
    """The tokens down to a depth; parents, which are less deep, all stay."""
    kept = [index for index, depth in enumerate(_depths(draft)) if depth <= deepest]
    places = {-1: -1, **{index: place for place, index in enumerate(kept)}}
    tokens = tuple(draft.tokens[index] for index in kept)
    return Draft(tokens, tuple(places[draft.parents[index]] for index in kept))
