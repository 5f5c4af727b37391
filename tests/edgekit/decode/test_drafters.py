"""What every drafter promises, and drafters by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.decode.draft import Draft, Drafter, Verified, chain
from edgekit.decode.drafters import NAMES, drafter
from edgekit.decode.stepper import Rows
from edgekit.errors import UnknownName

VOCABULARY = 12
FORMS = [*((name, False) for name in NAMES), ("merged", True), ("recycling", True)]
TEXTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)


def verified(
    tokens: Sequence[int], emitted: Sequence[int], *, accepted: Sequence[int] = (0,), seed: int = 0
) -> Verified:
    """A pass over a chain, with random rows."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(tokens), VOCABULARY)).astype(np.float32)
    rows = Rows(logits, logits[:, :1])
    return Verified(tuple(tokens), chain(tokens).parents, rows, tuple(accepted), tuple(emitted))


def drafts_along(drafts: Drafter, prompt: Sequence[int], text: Sequence[int]) -> list[Draft]:
    """All proposals of a text that is told token by token, with budgets in turn."""
    drafts.start(prompt)
    proposed, last = [], prompt[-1]
    for index, token in enumerate(text):
        draft = drafts.propose(index % 18)
        proposed.append(draft)
        fed = (last, *draft.tokens)
        rng = np.random.default_rng(index)
        logits = rng.standard_normal((len(fed), VOCABULARY)).astype(np.float32)
        parents = (-1, *(parent + 1 for parent in draft.parents))
        drafts.observe(Verified(fed, parents, Rows(logits, logits[:, :1]), (0,), (token,)))
        last = token
    return proposed


@pytest.mark.parametrize(("name", "trees"), FORMS)
@given(prompt=TEXTS, text=TEXTS)
@settings(max_examples=40, deadline=None)
def test_every_draft_is_a_tree_of_known_tokens_within_the_budget(
    name: str, trees: bool, prompt: list[int], text: list[int]
) -> None:
    for index, draft in enumerate(
        drafts_along(drafter(name, VOCABULARY, trees=trees), prompt, text)
    ):
        assert len(draft) == len(draft.parents) <= index % 18
        assert all(0 <= token < VOCABULARY for token in draft.tokens)
        assert all(-1 <= parent < node for node, parent in enumerate(draft.parents))
        siblings = list(zip(draft.parents, draft.tokens, strict=True))
        assert len(set(siblings)) == len(siblings)
        assert trees or draft.is_chain


@pytest.mark.parametrize(("name", "trees"), FORMS)
def test_what_is_told_alone_decides_what_is_proposed(name: str, trees: bool) -> None:
    prompt, text = [1, 2, 3, 1, 2], [3, 1, 2, 3, 4, 5, 4, 5, 1, 2, 3, 1] * 4
    first = drafts_along(drafter(name, VOCABULARY, trees=trees), prompt, text)
    assert first == drafts_along(drafter(name, VOCABULARY, trees=trees), prompt, text)
    assert sum(map(bool, first)) > 5


@pytest.mark.parametrize(("name", "trees"), FORMS)
def test_nothing_is_proposed_before_anything_is_known_or_with_no_budget(
    name: str, trees: bool
) -> None:
    drafts = drafter(name, VOCABULARY, trees=trees)
    assert not drafts.propose(4)  # not even a prompt
    drafts.start([1])
    assert not drafts.propose(4)
    drafts.start([1, 2, 3, 1, 2])
    drafts.observe(verified([2], [3]))
    drafts.observe(verified([3], [2]))
    assert not drafts.propose(0)


@pytest.mark.parametrize("name", ["lookup", "automaton"])
def test_the_start_of_a_text_forgets_the_one_before(name: str) -> None:
    drafts = drafter(name, VOCABULARY)
    drafts.start([1, 2, 3, 4, 1, 2])
    assert drafts.propose(2) == chain([3, 4])
    drafts.start([7, 8, 1, 2])
    assert not drafts.propose(2)
    drafts.start([7, 8, 9, 7, 8])
    assert drafts.propose(1) == chain([9])


@pytest.mark.parametrize("name", ["lookup", "automaton", "merged"])
def test_a_text_in_a_loop_is_foreseen_further_than_it_has_come(name: str) -> None:
    drafts = drafter(name, VOCABULARY)
    drafts.start([5, 1, 2, 3, 1, 2])
    drafts.observe(verified([2], [3]))
    tokens = drafts.propose(8).tokens
    assert tokens
    assert tokens == (1, 2, 3, 1, 2, 3, 1, 2)[: len(tokens)]
    assert name == "merged" or len(tokens) == 8


@pytest.mark.parametrize("name", ["merged", "recycling"])
def test_side_branches_are_proposed_where_they_are_asked_for(name: str) -> None:
    for trees in (False, True):
        drafts = drafter(name, VOCABULARY, trees=trees)
        drafts.start([1])
        drafts.observe(verified([1], [1]))
        assert drafts.propose(15)
        assert drafts.propose(15).is_chain is not trees


def test_an_unknown_drafter_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UnknownName, match=r"drafter 'lokup'; did you mean 'lookup'.*recycling"):
        drafter("lokup", VOCABULARY)
    assert NAMES == ("automaton", "lookup", "merged", "recycling")
    assert [drafter(name, VOCABULARY).name for name in NAMES] == list(NAMES)
