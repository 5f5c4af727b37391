"""Prompt lookup and the suffix automaton, against a naive search through the text."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.decode.automaton import Automaton
from edgekit.decode.draft import Verified, chain
from edgekit.decode.lookup import Lookup
from edgekit.decode.stepper import Rows

NO_ROWS = Rows(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
# Few different tokens, so that long repeats and overlaps are common.
TEXTS = st.integers(1, 4).flatmap(
    lambda most: st.lists(st.integers(0, most), min_size=0, max_size=60)
)


def told(*tokens: int) -> Verified:
    """A pass that brings ``tokens``."""
    return Verified((0,), (-1,), NO_ROWS, (0,), tokens)


def earlier_ends(text: Sequence[int], size: int) -> list[int]:
    """Where the last ``size`` tokens end in the text before its end; the most recent first."""
    suffix = list(text[len(text) - size :])
    return [
        end for end in range(len(text) - 1, size - 1, -1) if list(text[end - size : end]) == suffix
    ]


def longest_repeat(text: Sequence[int]) -> int:
    """Tokens of the longest suffix that also ends earlier."""
    size = 0
    while size + 1 < len(text) and earlier_ends(text, size + 1):
        size += 1
    return size


def continued(text: Sequence[int], end: int, count: int) -> tuple[int, ...]:
    """What follows ``end``, the copied tokens being text themselves."""
    grown = list(text)
    for place in range(end, end + count):
        grown.append(grown[place])
    return tuple(grown[len(text) :])


@given(prompt=TEXTS, output=TEXTS, budget=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_lookup_finds_what_a_naive_search_finds(
    prompt: list[int], output: list[int], budget: int
) -> None:
    drafts, text = Lookup(), list(prompt)
    drafts.start(prompt)
    for token in [None, *output]:
        if token is not None:
            drafts.observe(told(token))
            text.append(token)
        found = next(
            ((n, ends[0]) for n in (4, 3, 2) if n <= len(text) and (ends := earlier_ends(text, n))),
            None,
        )
        draft = drafts.propose(budget)
        assert drafts.situation == (found[0] if found else 0)
        assert draft.tokens == (continued(text, found[1], budget) if found else ())


@given(prompt=TEXTS, output=TEXTS, budget=st.integers(1, 9), minimum=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_the_automaton_finds_the_longest_repeat_and_what_followed_it(
    prompt: list[int], output: list[int], budget: int, minimum: int
) -> None:
    drafts, text = Automaton(minimum), list(prompt)
    drafts.start(prompt)
    for token in [None, *output]:
        if token is not None:
            drafts.observe(told(token))
            text.append(token)
        size = longest_repeat(text)
        assert drafts.match == size
        tokens = drafts.propose(budget).tokens
        if size < minimum:
            assert not tokens
            continue
        ends = earlier_ends(text, size)
        assert tokens in {continued(text, end, budget) for end in ends}
        if len(text) <= 16:  # no text of so few tokens has more suffixes than are marked
            assert tokens == continued(text, ends[0], budget)


def test_the_most_recent_of_equal_matches_decides() -> None:
    text = [1, 2, 3, 9, 1, 2, 4, 9, 8, 1, 2]
    for drafts in (Lookup(), Automaton()):
        drafts.start(text)
        assert drafts.propose(1) == chain([4])


def test_a_longer_match_goes_before_a_more_recent_one() -> None:
    text = [6, 1, 2, 3, 9, 7, 1, 2, 4, 9, 6, 1, 2]
    for drafts in (Lookup(), Automaton()):
        drafts.start(text)
        assert drafts.propose(1) == chain([3])


def test_the_automaton_looks_further_back_than_the_longest_n_gram() -> None:
    text = [0, 1, 2, 3, 4, 5, 7, 8, 9, 1, 2, 3, 4, 6, 7, 0, 1, 2, 3, 4]
    automaton, lookup = Automaton(), Lookup()
    automaton.start(text)
    lookup.start(text)
    assert (automaton.match, automaton.propose(2)) == (5, chain([5, 7]))
    assert lookup.propose(2) == chain([6, 7])


def test_no_repeat_is_no_match_however_short_a_match_may_be() -> None:
    for minimum in (0, 1):
        drafts = Automaton(minimum)
        drafts.start([1, 2, 3])
        assert drafts.match == 0
        assert not drafts.propose(2)


def test_several_tokens_at_once_are_the_same_as_one_by_one() -> None:
    text = [int(token) for token in np.random.default_rng(3).integers(0, 4, 300)]
    for kind in (Lookup, Automaton):
        whole, parts, single = kind(), kind(), kind()
        whole.start(text)
        parts.start(text[:100])
        parts.observe(told(*text[100:]))
        single.start(())
        for token in text:
            single.observe(told(token))
        assert whole.propose(9) == parts.propose(9) == single.propose(9)
        assert len(whole.propose(9)) == 9


def test_an_automaton_stays_linear_where_a_text_repeats_itself() -> None:
    # At most 2 n - 1 states and 3 n - 4 transitions (Blumer et al.).
    size = 20_000
    for text in ([0] * size, [0, 1] * (size // 2), [0] * (size // 2) + [1] * (size // 2)):
        drafts = Automaton()
        start = time.perf_counter()
        drafts.start(text)
        assert time.perf_counter() - start < 1  # 20 ms; to mark every suffix, 2 to 4 s
        assert len(drafts._length) < 2 * size
        assert sum(map(len, drafts._next)) < 3 * size
