"""Token Recycling: the exact top of a row, what a pass teaches, and the shape of its trees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.decode.draft import Draft, Verified, chain
from edgekit.decode.recycling import TREE, Recycling, likeliest
from edgekit.decode.stepper import Rows
from edgekit.spec import Array

VOCABULARY = 32


def row(*best: int) -> Array:
    """Logits [32] whose highest are ``best``, in that order."""
    logits = -np.arange(100, 100 + VOCABULARY, dtype=np.float32)
    logits[list(best)] = np.arange(len(best), 0, -1)
    return logits


def passed(
    tokens: Sequence[int],
    rows: Sequence[Array],
    *,
    accepted: Sequence[int] = (0,),
    emitted: Sequence[int] = (),
) -> Verified:
    logits = np.stack(rows)
    parents = chain(tokens).parents
    rows_ = Rows(logits, logits[:, :1])
    return Verified(tuple(tokens), parents, rows_, tuple(accepted), tuple(emitted))


@pytest.mark.parametrize("vocabulary", [8, 100, 2047, 2048, 2049, 5000, 49_152])
@pytest.mark.parametrize("levels", [0, 3, 40])
def test_the_top_of_a_row_is_exact_whatever_its_length_and_its_ties(
    vocabulary: int, levels: int
) -> None:
    rng = np.random.default_rng(vocabulary + levels)
    logits = rng.standard_normal((5, vocabulary)).astype(np.float32)
    if levels:
        logits = np.round(logits * levels).astype(np.float32)
    logits[3] = np.sort(logits[3])  # the best lie side by side, at the very end
    logits[4] = np.sort(logits[4])[::-1]
    sorted_ = np.argsort(-logits, axis=1, kind="stable")
    for count in (1, 2, 8):
        np.testing.assert_array_equal(likeliest(logits, count), sorted_[:, :count])


@given(
    places=st.lists(st.integers(0, 4999), min_size=8, max_size=8, unique=True),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_the_best_are_found_wherever_they_lie(places: list[int], seed: int) -> None:
    logits = np.random.default_rng(seed).random((2, 5000)).astype(np.float32)
    logits[1, places] = np.arange(10, 2, -1)
    assert likeliest(logits, 8)[1].tolist() == places


@pytest.mark.parametrize("vocabulary", [4096, 5000])
def test_rows_that_are_not_numbers_bring_no_error(vocabulary: int) -> None:
    logits = np.zeros((4, vocabulary), np.float32)
    logits[[1, 3]] = np.nan
    logits[2] = -np.inf
    logits[2, 7] = 1
    best = likeliest(logits, 8)
    assert best[0].tolist() == list(range(8))
    assert ((best >= 0) & (best < vocabulary)).all()
    assert best[2, 0] == 7


def test_a_chain_follows_the_last_seen_best_successors() -> None:
    drafts = Recycling(VOCABULARY)
    drafts.start([1])
    drafts.observe(passed([1], [row(2)], emitted=[2]))
    assert not drafts.propose(4)  # of token 2 nothing is known
    drafts.observe(passed([2, 5, 6], [row(3), row(9), row(1)], emitted=[3]))
    drafts.observe(passed([3], [row(1)], emitted=[5]))
    assert drafts.propose(4) == chain([9])
    drafts.observe(passed([5], [row(6)], emitted=[6]))
    assert drafts.propose(6) == chain([1, 2, 3, 1, 2, 3])
    drafts.observe(passed([6, 2], [row(2), row(6)], accepted=[0, 1], emitted=[2, 6]))
    assert drafts.propose(3) == chain([2, 6, 2])


def test_rejected_tokens_teach_too() -> None:
    drafts = Recycling(VOCABULARY)
    drafts.start([1])
    drafts.observe(passed([1, 4, 5], [row(7), row(8), row(9)], accepted=[0], emitted=[4]))
    assert drafts.propose(1) == chain([8])


@pytest.mark.parametrize(
    ("accepted", "learnt"),
    [([0], 11), ([0, 2], 12), ([0, 1, 2, 3], 13), ([0, 1], 11)],
)
def test_of_a_token_fed_twice_the_deepest_accepted_counts_else_the_first(
    accepted: list[int], learnt: int
) -> None:
    drafts = Recycling(VOCABULARY)
    rows = [row(10), row(11), row(12), row(13)]
    drafts.observe(passed([1, 5, 5, 5], rows, accepted=accepted, emitted=[5]))
    assert drafts.propose(1) == chain([learnt])


def test_what_was_learnt_is_kept_from_text_to_text() -> None:
    drafts = Recycling(VOCABULARY)
    drafts.start([1])
    drafts.observe(passed([1], [row(2)], emitted=[2]))
    drafts.start([9, 1])
    assert drafts.propose(3) == chain([2])


def test_behind_no_text_nothing_is_proposed() -> None:
    drafts = filled()
    drafts.start([])
    assert not drafts.propose(3)


def test_a_matrix_holds_the_eight_best_of_each_token() -> None:
    drafts = Recycling(VOCABULARY, trees=True)
    best = [9, 3, 7, 1, 30, 12, 0, 4]
    drafts.observe(passed([6], [row(*best, 5)], emitted=[9]))
    assert drafts.successors.shape == (VOCABULARY, 8)
    assert drafts.successors[6].tolist() == best
    assert (np.delete(drafts.successors, 6, axis=0) == -1).all()


def filled(trees: bool = True) -> Recycling:
    """Each token's successors are the eight behind it, round the vocabulary."""
    drafts = Recycling(VOCABULARY, trees=trees)
    for token in range(VOCABULARY):
        best = [(token + step) % VOCABULARY for step in range(1, 9)]
        drafts.observe(passed([token], [row(*best)], emitted=[0]))
    return drafts


def ranks(draft: Draft) -> set[tuple[int, ...]]:
    """Each node as the ranks on the way to it, by the successors of ``filled``."""
    ways: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        above, way = (draft.tokens[parent], ways[parent]) if parent >= 0 else (0, ())
        ways.append((*way, (token - above) % VOCABULARY - 1))
    return set(ways)


@pytest.mark.parametrize("budget", range(len(TREE) + 3))
def test_a_tree_is_the_template_cut_to_the_budget(budget: int) -> None:
    draft = filled().propose(budget)
    wanted: list[tuple[int, ...]] = []
    for parent, rank in TREE[:budget]:
        wanted.append((*(wanted[parent] if parent >= 0 else ()), rank))
    assert ranks(draft) == set(wanted)
    assert len(draft) == min(budget, len(TREE))


@pytest.mark.parametrize("budget", [3, 7, 15])
def test_a_tree_begins_with_its_path_of_best_successors(budget: int) -> None:
    draft = filled().propose(budget)
    depth = max(len(way) for way in ranks(draft) if not any(way))
    assert draft.tokens[:depth] == filled(trees=False).propose(depth).tokens
    assert draft.parents[:depth] == tuple(range(-1, depth - 1))


@pytest.mark.parametrize("budget", [3, 7, 15])
def test_of_siblings_the_likelier_stands_first(budget: int) -> None:
    draft = filled().propose(budget)
    for above in {-1, *range(len(draft))}:
        holder = draft.tokens[above] if above >= 0 else 0
        children = [
            (token - holder) % VOCABULARY
            for token, parent in zip(draft.tokens, draft.parents, strict=True)
            if parent == above
        ]
        assert children == list(range(1, len(children) + 1))


def test_nodes_without_a_token_have_no_children() -> None:
    drafts = Recycling(VOCABULARY, trees=True)
    drafts.observe(passed([1], [row(2, 3, 4, 5, 6, 7, 8, 9)], emitted=[1]))
    draft = drafts.propose(15)
    roots = [token for token, parent in zip(draft.tokens, draft.parents, strict=True) if parent < 0]
    assert roots == list(draft.tokens) == [2, 3, 4, 5]


def test_of_a_wide_tree_the_first_nodes_teach_and_all_that_was_accepted() -> None:
    drafts = Recycling(VOCABULARY, trees=True)
    rows = [row((token + 1) % VOCABULARY) for token in range(16)]
    drafts.observe(passed(range(16), rows, accepted=[0, 12], emitted=[13]))
    taught = np.flatnonzero(drafts.successors[:, 0] >= 0).tolist()
    assert taught == [*range(6), 12]
    assert drafts.successors[12, 0] == 13


def test_fewer_tokens_than_the_matrix_is_wide_are_enough() -> None:
    drafts = Recycling(4, trees=True)
    logits = np.array([[0, 3, 2, 1]], np.float32)
    drafts.observe(Verified((0,), (-1,), Rows(logits, logits), (0,), (0,)))
    assert drafts.successors[0].tolist() == [1, 2, 3, 0]
    assert set(drafts.propose(15).tokens) <= {0, 1, 2, 3}
