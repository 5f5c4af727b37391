"""The merged drafter: it learns which of its drafters to believe, and when to believe none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.decode.draft import Draft, Verified, chain
from edgekit.decode.merged import Merged, followed
from edgekit.decode.stepper import Rows

NO_ROWS = Rows(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))


class Seer:
    """Knows the text, and foresees it right in the rounds that ``rights`` says, in turn."""

    name = "seer"

    def __init__(self, text: Sequence[int], rights: Sequence[bool], situations: object = None):
        self._text, self._rights, self._situations = text, rights, situations
        self.done, self.round, self.situation = 0, 0, 0

    def start(self, prompt: Sequence[int]) -> None:
        self.done = self.round = 0

    def observe(self, verified: Verified) -> None:
        self.done += len(verified.emitted)
        self.round += 1

    def propose(self, budget: int) -> Draft:
        right = self._rights[self.round % len(self._rights)]
        if self._situations is not None:
            self.situation = 2 + 3 * right
        ahead = self._text[self.done : self.done + budget]
        return chain([token if right else token + 1000 for token in ahead])


def tokens_a_pass(drafts: Merged | Seer, text: Sequence[int], budget: int = 3) -> float:
    """Over a whole text, as a loop would use it."""
    drafts.start([0])
    done = passes = 0
    while done < len(text):
        hits, _ = followed(drafts.propose(budget), text[done:])
        emitted = tuple(text[done : done + hits + 1])
        drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), emitted))
        done, passes = done + len(emitted), passes + 1
    return len(text) / passes


TEXT = list(range(400))


@pytest.mark.parametrize("turned", [False, True])
def test_the_better_of_two_is_believed_wherever_it_stands(turned: bool) -> None:
    def pair() -> list[Seer]:
        two = [Seer(TEXT, [True, True, True, False]), Seer(TEXT, [False, False, False, True])]
        return two[::-1] if turned else two

    better = tokens_a_pass(Seer(TEXT, [True, True, True, False]), TEXT)
    assert tokens_a_pass(Merged(pair()), TEXT) > 0.97 * better


@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_two_together_do_no_worse_than_one_of_them_picked_by_chance(
    shares: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    first, second = ((rng.random(400) < share).tolist() for share in shares)
    alone = [tokens_a_pass(Seer(TEXT, rights), TEXT) for rights in (first, second)]
    together = tokens_a_pass(Merged([Seer(TEXT, first), Seer(TEXT, second)]), TEXT)
    assert together > 0.85 * sum(alone) / 2  # luck: each meets other tokens in other rounds
    if abs(shares[0] - shares[1]) > 0.3:
        assert together > 0.93 * max(alone)


def test_one_that_is_sure_only_of_long_matches_is_believed_only_there() -> None:
    sometimes = [True, False]
    modest = Merged([Seer(TEXT, sometimes), Seer(TEXT, [False, True])])
    honest = Merged(
        [Seer(TEXT, sometimes, situations=True), Seer(TEXT, [False, True], situations=True)]
    )
    assert tokens_a_pass(honest, TEXT) > 3.9
    assert tokens_a_pass(modest, TEXT) < 3


def test_a_better_one_is_found_when_the_text_changes() -> None:
    rights = [True] * 60 + [False] * 200
    both = Merged([Seer(TEXT, rights), Seer(TEXT, [not each for each in rights])])
    assert tokens_a_pass(both, TEXT) > 3
    assert tokens_a_pass(Seer(TEXT, rights), TEXT) < 2.5


def test_a_chain_says_how_often_such_tokens_were_right_at_each_depth() -> None:
    drafts = Merged([Seer(TEXT, [False] * 30 + [True] * 270)])
    assert drafts.propose(3).chances == (0.5, 0.5, 0.5)  # nothing is known yet
    chances = []
    for done in range(0, 380, 2):
        chances.append(drafts.propose(3).chances)
        drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), tuple(TEXT[done : done + 2])))
    assert max(chances[29]) == 0.5  # behind a wrong token nothing is learnt
    assert chances[29][0] < 0.1
    assert min(chances[-1][:2]) > 0.95
    assert chances[-1][2] == 0.5  # the text was never that far


def test_deep_tokens_are_as_sure_as_the_deepest_that_are_counted_alone() -> None:
    drafts = Merged([Seer(TEXT, [True])])
    for done in range(0, 300, 10):
        drafts.propose(9)
        drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), tuple(TEXT[done : done + 10])))
    chances = drafts.propose(9).chances
    assert len(set(chances[3:])) == 1
    assert chances[3] > chances[0] > 0.9


def test_drafts_are_compared_with_text_up_to_where_either_ends() -> None:
    assert followed(chain([1, 2, 3]), [1, 2, 9]) == (2, True)
    assert followed(chain([1, 2, 3]), [1, 2]) == (2, False)
    assert followed(chain([1, 2]), [1, 2, 9]) == (2, False)
    assert followed(chain([5]), [1, 2]) == (0, True)
    assert followed(Draft(), [1]) == (0, False)
    tree = Draft((1, 2, 3, 4), (-1, -1, 1, 2))
    assert followed(tree, [2, 3, 4, 5]) == (3, False)
    assert followed(tree, [2, 9]) == (1, True)
    assert followed(tree, [1, 3]) == (1, False)


class Tree(Seer):
    """One tree, always."""

    def propose(self, budget: int) -> Draft:
        return Draft((7, 8, 9, 5, 6, 4), (-1, 0, 1, -1, 3, 0))


def test_a_tree_is_cut_where_its_paths_are_no_longer_likely() -> None:
    drafts = Merged([Tree([], [True])])
    whole = Draft((7, 8, 9, 5, 6, 4), (-1, 0, 1, -1, 3, 0))
    drafts.start([0])
    assert drafts.propose(9) == Draft((7, 5), (-1, -1))  # a half of a half is not likely
    for _ in range(9):
        drafts.propose(9)
        drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), (7, 8, 9)))
    assert drafts.propose(9) == whole
    for _ in range(40):
        drafts.propose(9)
        drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), (7, 0)))
    assert drafts.propose(9) == Draft((7, 5), (-1, -1))


def test_a_tree_that_is_seldom_right_makes_room_for_a_chain() -> None:
    drafts = Merged([Seer([0] * 400, [True]), Tree([], [True])])
    drafts.start([0])
    for _ in range(60):
        drafts.propose(3)
        drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), (0,)))
    assert drafts.propose(3).is_chain


def test_a_draft_of_the_text_before_is_not_scored_by_the_next() -> None:
    drafts = Merged([Seer(TEXT, [True])])
    drafts.propose(3)
    drafts.start([0])
    drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), (999,)))  # the prompt's own pass
    drafts.start([0])
    assert drafts.propose(3).chances == (0.5, 0.5, 0.5)


def test_no_drafters_propose_nothing() -> None:
    drafts = Merged([])
    drafts.start([0])
    drafts.observe(Verified((0,), (-1,), NO_ROWS, (0,), (1,)))
    assert not drafts.propose(3)
