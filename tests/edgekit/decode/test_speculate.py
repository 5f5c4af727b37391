"""The speculative loop: the plain loop's text whatever is drafted, and each classic mistake seen.

``HashStepper`` answers each row by all that the row may see, so one wrong token, position or
ancestor anywhere changes the text from there on. One file, since each test is the same equality
under other drafts, mistakes and ends, and all read the same scripts of drafts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

import edgekit.decode.speculate as loop
from edgekit.decode.draft import Draft, Verified, chain
from edgekit.decode.generate import generate
from edgekit.decode.paying import Costs, Switch
from edgekit.decode.sampling import GREEDY, Sampling
from edgekit.decode.speculate import Tally, speculate
from edgekit.decode.stepper import Rows
from edgekit.errors import BadInput, UsageError
from edgekit.spec import Array
from edgekit.testing import HashStepper

PROMPT = list(range(10))
LIMIT = 40
SAMPLINGS = [
    GREEDY,
    Sampling(0.7, seed=1),
    Sampling(1.0, seed=2),
    Sampling(1.0, top_p=0.9, seed=3),
]
NAMES = ["greedy", "0.7", "1.0", "top-p"]


def plain(sampling: Sampling = GREEDY, limit: int = LIMIT) -> list[int]:
    """What the plain loop writes."""
    return list(generate(HashStepper(), PROMPT, limit=limit, sampling=sampling))


class Scripted:
    """Knows the text; ``plan`` makes a draft of the tokens that are to come."""

    name = "scripted"

    def __init__(self, text: Sequence[int], plan: Callable[[list[int], int], Draft]) -> None:
        self._text, self._plan = list(text), plan
        self.told: list[int] = []
        self.seen: list[Verified] = []
        self.budgets: list[int] = []
        self._prompt = 0

    def start(self, prompt: Sequence[int]) -> None:
        self.told = list(prompt)
        self._prompt = len(prompt)

    def observe(self, verified: Verified) -> None:
        self.seen.append(verified)
        self.told += verified.emitted

    def propose(self, budget: int) -> Draft:
        self.budgets.append(budget)
        done = len(self.told) - self._prompt
        return self._plan([*self._text[done:], *[0] * 99], budget)


def right(depth: int) -> Callable[[list[int], int], Draft]:
    return lambda ahead, budget: chain(ahead[: min(depth, budget)])


def wrong(ahead: list[int], budget: int) -> Draft:
    return chain([(token + 1) % 64 for token in ahead[: min(4, budget)]])


def nothing(ahead: list[int], budget: int) -> Draft:
    return Draft()


def half(ahead: list[int], budget: int) -> Draft:
    """Right up to a place that wanders, now and then to its end."""
    count = min(5, budget)
    good = (ahead[0] * 7 + ahead[1]) % 6
    return chain([*ahead[:good], *[(token + 1) % 64 for token in ahead[good:count]]][:count])


def shaken(ahead: list[int], budget: int) -> Draft:
    """Any tokens on any tree."""
    rng = np.random.default_rng(ahead[0])
    count = min(6, budget)
    parents = [int(rng.integers(-1, place)) if place else -1 for place in range(count)]
    return Draft(tuple(int(token) for token in rng.integers(0, 64, count)), tuple(parents))


def sides(ahead: list[int], budget: int) -> Draft:
    """A tree: a first path that is right for a while, and side branches that are right further.

    Nodes: 0 1 2 first path; 3 behind the root, 4 5 behind it; 6 behind 0, 7 behind 6.
    """
    a, b, c = ahead[:3]
    off = [(token + 1) % 64 for token in (a, b, c)]
    kind = (a + b) % 4
    first = [[a, b, c], [a, off[1], c], [off[0], b, c], [off[0], off[1], off[2]]][kind]
    side = [a, b, c] if kind == 2 else [off[0] + 1 if kind == 3 else off[0], b, c]
    low = [b if kind == 1 else off[1] - 1, c]
    tokens = tuple(token % 64 for token in (*first, *side, *low))[:budget]
    return Draft(tokens, (-1, 0, 1, -1, 3, 4, 0, 6)[:budget])


PLANS = {
    "oracle": right(4),
    "adversary": wrong,
    "empty": nothing,
    "half": half,
    "random tree": shaken,
    "tree": sides,
}


def speculated(
    plan: Callable[[list[int], int], Draft],
    sampling: Sampling = GREEDY,
    stepper: HashStepper | None = None,
    **options: object,
) -> list[int]:
    text = plain(sampling, 90)
    stepper = stepper or HashStepper()
    options = {"limit": LIMIT, "widths": stepper.widths, **options}
    return list(
        speculate(stepper, PROMPT, Scripted(text, plan), sampling=sampling, **options)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("widths", [range(1, 65), (1, 4, 8), (2, 4, 16)], ids=str)
def test_the_text_is_the_plain_loop_s_whatever_is_drafted(
    plan: Callable[[list[int], int], Draft], sampling: Sampling, widths: Sequence[int]
) -> None:
    stepper = HashStepper(widths=widths)
    assert speculated(plan, sampling, stepper) == plain(sampling)
    assert set(stepper.passes) <= set(widths)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_by_default_passes_are_exact_and_only_a_tree_s_first_path_is_fed(
    plan: Callable[[list[int], int], Draft],
) -> None:
    class Chains(HashStepper):
        def step(self, tokens: Sequence[int], **options: Any) -> Rows:
            assert options.get("parents") is None
            return super().step(tokens, **options)

    stepper = Chains(exact_widths=(2, 4, 8))
    assert speculated(plan, stepper=stepper, widths=None) == plain()
    assert set(stepper.passes) <= {2, 4, 8}


def test_a_tree_s_first_path_is_found_wherever_its_tokens_stand() -> None:
    def wide(ahead: list[int], budget: int) -> Draft:
        a, b, c = ahead[:3]
        return Draft((a, 99, b, 98, c), (-1, -1, 0, 0, 2))

    tally = Tally()
    assert speculated(wide, widths=None, limit=13, tally=tally) == plain(limit=13)
    assert (tally.passes, tally.drafted) == (3, 9)


@pytest.mark.parametrize("width", [1, 4])
def test_without_exact_widths_nothing_is_drafted(width: int) -> None:
    stepper = HashStepper(widths=(width, 8), exact_widths=())
    drafter = Scripted(plain(), right(4))
    assert list(speculate(stepper, PROMPT, drafter, limit=LIMIT)) == plain()
    assert drafter.budgets == []
    assert stepper.passes[2:] == [width] * (LIMIT - 1)


def test_where_one_row_is_not_exact_no_pass_answers_one_row_alone() -> None:
    asked: list[int] = []

    class Asked(HashStepper):
        def step(self, tokens: Sequence[int], **options: Any) -> Rows:
            asked.append(len(options.get("rows") or tokens))
            return super().step(tokens, **options)

    for plan in (half, nothing):
        asked.clear()
        speculated(plan, stepper=Asked(exact_widths=(2, 4, 8)), widths=None)
        assert min(asked[2:]) >= 2  # behind the prompt's passes
    asked.clear()
    speculated(nothing, stepper=Asked(exact_widths=(1, 2, 4, 8)), widths=None)
    assert set(asked[2:]) == {1}


def test_of_siblings_that_hold_the_same_token_the_first_is_followed() -> None:
    drafter = Scripted(plain(), lambda ahead, _: Draft((ahead[0], ahead[0], ahead[1]), (-1, -1, 0)))
    next(stream := speculate(HashStepper(), PROMPT, drafter, limit=LIMIT, widths=range(1, 65)))
    next(stream)
    assert drafter.seen[-1].accepted == (0, 1, 3)


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_an_oracle_brings_its_depth_and_one_token_a_pass(depth: int) -> None:
    tally = Tally()
    count = 1 + 5 * (depth + 1)
    assert speculated(right(depth), limit=count, tally=tally) == plain(limit=count)
    assert tally.passes == 5
    assert tally.tokens_per_pass == depth + 1
    assert tally.acceptance == (1.0,) * depth
    assert tally.drafted == 5 * depth
    assert tally.widths == {depth + 1: 5}


def test_an_adversary_costs_no_text_and_an_empty_draft_is_a_single_pass() -> None:
    tally, stepper = Tally(), HashStepper()
    speculated(wrong, tally=tally)
    assert tally.tokens_per_pass == 1
    assert tally.acceptance == (0.0,)
    assert tally.tested[0] == LIMIT - 2  # the last has no room for a draft
    speculated(nothing, stepper=stepper)
    assert stepper.passes == [10, *[1] * (LIMIT - 1)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_cache_is_left_as_the_plain_loop_leaves_it(
    plan: Callable[[list[int], int], Draft],
) -> None:
    stepper, other = HashStepper(), HashStepper()
    text = speculated(plan, stepper=stepper)
    list(generate(other, PROMPT, limit=LIMIT))
    kept = stepper.length
    assert stepper._kept == other._kept[:kept]
    if plan not in (sides, shaken):
        assert kept == other.length
    rest = [*PROMPT, *text][kept:]
    going_on = list(generate(stepper, rest, limit=9))
    assert going_on == list(generate(other, text[-1:], limit=9))


@pytest.mark.parametrize("widths", [(1, 2, 4, 8), (2, 4, 8)], ids=str)
def test_the_drafter_hears_the_whole_text_and_every_row(widths: Sequence[int]) -> None:
    stepper = HashStepper(exact_widths=widths)
    stepper.step([7, 7])
    text = plain()
    drafter = Scripted(text, half)
    wanted = list(generate_behind([7, 7]))
    got = list(speculate(stepper, PROMPT, drafter, limit=20, before=[7, 7]))
    assert got == wanted
    assert drafter.told == [7, 7, *PROMPT, *wanted]
    for verified in drafter.seen:
        assert len(verified.rows.logits) == len(verified.tokens) == len(verified.parents)
        path = [verified.tokens[place] for place in verified.accepted]
        assert [*path[1:], verified.emitted[-1]] == list(verified.emitted)
        assert verified.accepted[0] == 0


def generate_behind(kept: list[int]) -> Iterator[int]:
    other = HashStepper()
    other.step(kept)
    return generate(other, PROMPT, limit=20)


def test_a_side_branch_is_fed_again_as_a_chain() -> None:
    """The first path is wrong and two side tokens are right: they head the next pass."""
    text = plain()

    def side(ahead: list[int], budget: int) -> Draft:
        if budget < 3:
            return Draft()
        return Draft(((ahead[0] + 1) % 64, ahead[0], ahead[1]), (-1, -1, 1))

    fed: list[tuple[int, ...]] = []

    class Watched(HashStepper):
        def step(self, tokens: Sequence[int], **options: Any) -> Rows:
            fed.append(tuple(tokens))
            return super().step(tokens, **options)

    stepper, tally = Watched(), Tally()
    stream = speculate(
        stepper, PROMPT, Scripted(text, side), limit=30, widths=range(1, 65), tally=tally
    )
    assert [next(stream) for _ in range(10)] == text[:10]
    assert fed[1] == (text[0], (text[1] + 1) % 64, text[1], text[2])
    assert fed[2][:3] == (text[1], text[2], text[3])  # pending, pending, root
    assert (tally.passes, tally.tokens_per_pass) == (3, 3)


# Mistakes. Each is a loop or a stepper with one line wrong.


class NoRewind(loop._Text):
    def _settle(self) -> None:
        self.kept = self._stepper.length


class StaleBranch(loop._Text):
    """Keeps as many rows as were accepted, and not those that were."""

    def _keep(self, verified: Verified) -> None:
        super()._keep(replace(verified, accepted=tuple(range(len(verified.accepted)))))


class Resampling(loop._Text):
    """Where the draft is wrong, draws another token of the model's."""

    def _walk(self, root: int, draft: Draft, rows: Rows) -> tuple[Verified, int, int]:
        verified, tested, hit = super()._walk(root, draft, rows)
        if tested == hit:
            return verified, tested, hit
        row = rows.logits[verified.accepted[-1]]
        last = self._sampling.choose(row, self._index + len(verified.emitted) + 1000)
        return replace(verified, emitted=(*verified.emitted[:-1], last)), tested, hit


class BonusFromDrafter(loop._Text):
    """Where the whole draft is right, the drafter says what comes behind it."""

    def _walk(self, root: int, draft: Draft, rows: Rows) -> tuple[Verified, int, int]:
        verified, tested, hit = super()._walk(root, draft, rows)
        if not hit or tested != hit:
            return verified, tested, hit
        last = self._drafter.propose(8).tokens[-1]
        return replace(verified, emitted=(*verified.emitted[:-1], last)), tested, hit


class NextRow(loop._Text):
    """Reads each token's answer from the row before."""

    def _walk(self, root: int, draft: Draft, rows: Rows) -> tuple[Verified, int, int]:
        return super()._walk(root, draft, Rows(np.roll(rows.logits, 1, 0), rows.hidden))


class NextNoise(loop._Text):
    """Counts a round as one token, where noise is drawn by a token's index."""

    def _keep(self, verified: Verified) -> None:
        super()._keep(verified)
        self._index -= len(verified.emitted) - 1


class Blind(HashStepper):
    """Siblings see each other: a row sees all before it in its pass."""

    def step(self, tokens: Sequence[int], **options: Any) -> Rows:
        return super().step(tokens, rows=options.get("rows"))


class Shifted(HashStepper):
    """What stands behind the first token of a pass, the prompt's apart, is one position too far."""

    _first = 0

    def step(self, tokens: Sequence[int], **options: Any) -> Rows:
        self._first = self.length + 1 if self.length else len(tokens)
        answer = super().step(tokens, **options)
        self._kept = list(self._moved(self._kept))
        return answer

    def _moved(self, seen: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        far = [(token, place + 1) for token, place in seen[self._first :]]
        return (*seen[: self._first], *far)

    def _row(self, seen: tuple[tuple[int, int], ...]) -> Array:
        return super()._row(self._moved(seen))


class Unforgetting(HashStepper):
    """Rewinds its length, and still sees the first row behind it."""

    _stale: tuple[tuple[int, int], ...] = ()

    def rewind(self, length: int) -> None:
        self._stale = tuple(self._kept[length : length + 1])
        super().rewind(length)

    def _row(self, seen: tuple[tuple[int, int], ...]) -> Array:
        return super()._row((*self._stale, *seen))


class Twice(Sampling):
    """Divides by the temperature what is divided already."""

    def choose(self, logits: Array, index: int) -> int:
        return Sampling.choose(self, logits / np.float32(self.temperature or 1), index)


LOOPS = [NoRewind, StaleBranch, Resampling, BonusFromDrafter, NextRow, NextNoise]
STEPPERS: list[type[HashStepper]] = [Blind, Shifted, Unforgetting]
ONLY_TREES = (StaleBranch, Blind)
ONLY_SAMPLED = (Resampling, NextNoise)


@pytest.mark.parametrize(
    ("broken", "sampling"),
    [
        (broken, sampling)
        for broken in LOOPS
        for sampling in SAMPLINGS
        if not (broken in ONLY_SAMPLED and sampling is GREEDY)
    ],
)
def test_a_broken_loop_writes_another_text(
    broken: type[loop._Text], sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_Text", broken)
    plan = sides if broken in ONLY_TREES else half
    assert speculated(plan, sampling) != plain(sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
@pytest.mark.parametrize("broken", STEPPERS)
def test_a_broken_stepper_writes_another_text_and_the_plain_loop_does_not_see_it(
    broken: type[HashStepper], sampling: Sampling
) -> None:
    plan = sides if broken in ONLY_TREES else half
    unseen = list(generate(broken(), PROMPT, limit=LIMIT, sampling=sampling))
    assert unseen == plain(sampling)
    assert speculated(plan, sampling, broken()) != unseen


def test_sharpening_twice_writes_another_text() -> None:
    text = plain(SAMPLINGS[1])
    broken = Twice(0.7, seed=1)
    drafter = Scripted(text, half)
    assert list(speculate(HashStepper(), PROMPT, drafter, limit=LIMIT, sampling=broken)) != text


# Ends and edges.


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 6, 7])
def test_every_small_budget_is_kept(plan: Callable[[list[int], int], Draft], limit: int) -> None:
    stepper, other = HashStepper(), HashStepper()
    wanted = list(generate(other, PROMPT, limit=limit))
    assert speculated(plan, stepper=stepper, limit=limit) == wanted
    assert stepper.length <= other.length


def test_a_budget_of_one_token_asks_for_no_draft() -> None:
    drafter = Scripted(plain(), right(4))
    stepper = HashStepper()
    assert len(list(speculate(stepper, PROMPT, drafter, limit=1))) == 1
    assert stepper.passes == [10]
    assert drafter.budgets == []
    assert len(list(speculate(HashStepper(), PROMPT, drafter, limit=2))) == 2
    assert drafter.budgets == []


@pytest.mark.parametrize("place", range(1, 12))
def test_nothing_behind_a_stop_token_in_a_draft_is_yielded_kept_or_counted(place: int) -> None:
    text = plain()
    stop = text[place]
    end = text.index(stop) + 1
    stepper, tally = HashStepper(), Tally()
    got = speculated(right(4), stepper=stepper, stops={stop}, tally=tally)
    assert got == text[:end]
    assert stepper.length == len(PROMPT) + end - 1  # the stop token is not fed
    assert tally.tokens == end - 1
    assert sum(tally.accepted) <= end - 1
    assert stepper._kept == [*zip([*PROMPT, *text][: stepper.length], range(99), strict=False)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("widths", [range(1, 65), (1, 2, 8), (1, 4)], ids=str)
@pytest.mark.parametrize("room", [0, 1, 2, 3, 7, 8])
def test_a_full_cache_ends_the_text_where_the_plain_loop_does(
    plan: Callable[[list[int], int], Draft], widths: Sequence[int], room: int
) -> None:
    stepper = HashStepper(capacity=10 + room, widths=widths)
    wanted = list(generate(HashStepper(capacity=10 + room), PROMPT, limit=LIMIT))
    assert len(wanted) == room + 1
    assert speculated(plan, stepper=stepper) == wanted


@pytest.mark.parametrize("plan", [right(4), half, nothing])
@pytest.mark.parametrize("room", range(10))
def test_near_the_end_each_token_takes_the_width_it_takes_without_drafts(
    plan: Callable[[list[int], int], Draft], room: int
) -> None:
    """One row is not exact here: those that must be single are so with and without drafts."""

    class Odd(HashStepper):
        def step(self, tokens: Sequence[int], **options: Any) -> Rows:
            answer = super().step(tokens, **options)
            if len(tokens) > 1:
                return answer
            return Rows(np.roll(answer.logits, 1, -1), answer.hidden)

    def written(plan: Callable[[list[int], int], Draft]) -> list[int]:
        stepper = Odd(capacity=12 + room, exact_widths=(2, 4, 8))
        return speculated(plan, stepper=stepper, widths=None)

    stepper = Odd(capacity=12 + room, exact_widths=(2, 4, 8))
    at_the_same_widths = list(generate(stepper, PROMPT, limit=LIMIT, widths=(2, 4, 8)))
    assert len(at_the_same_widths) == 3 + room
    assert written(plan) == at_the_same_widths


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="10 tokens do not fit the 9"):
        speculated(right(4), stepper=HashStepper(capacity=9))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_where_no_width_fits_any_more_the_text_ends(
    plan: Callable[[list[int], int], Draft],
) -> None:
    """The only width is 8: the last pass begins behind the 16th of 24 tokens."""
    stepper = HashStepper(capacity=24, widths=(8,))
    got = speculated(plan, stepper=stepper)
    assert got == plain()[: len(got)]
    assert len(got) == 8 or plan in (sides, shaken)


@pytest.mark.parametrize("plan", [right(4), half, sides])
@pytest.mark.parametrize("taken", range(1, 14))
def test_closed_early_the_cache_holds_what_was_yielded_but_the_last(
    plan: Callable[[list[int], int], Draft], taken: int
) -> None:
    text, stepper = plain(), HashStepper()
    stream = speculate(stepper, PROMPT, Scripted(text, plan), limit=LIMIT, widths=stepper.widths)
    got = [next(stream) for _ in range(taken)]
    stream.close()  # type: ignore[attr-defined]
    assert got == text[:taken]
    kept = stepper.length
    assert kept <= len(PROMPT) + taken - 1
    if plan is not sides:
        assert kept == len(PROMPT) + taken - 1
    rest = [*PROMPT, *got][kept:]
    assert list(generate(stepper, rest, limit=10)) == text[taken : taken + 10]


class Interrupted(HashStepper):
    """Ctrl-C comes in the pass of number ``at``, before or after its rows are kept."""

    at: ClassVar[int] = 0
    late: ClassVar[bool] = False

    def step(self, tokens: Sequence[int], **options: Any) -> Rows:
        if len(self.passes) == self.at and not self.late:
            self.passes.append(0)
            raise KeyboardInterrupt
        answer = super().step(tokens, **options)
        if len(self.passes) == self.at + 1 and self.late:
            raise KeyboardInterrupt
        return answer


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("plan", [right(4), half, sides])
def test_after_an_interrupt_in_a_pass_the_next_call_goes_on(
    plan: Callable[[list[int], int], Draft], at: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interrupted, "at", at)
    monkeypatch.setattr(Interrupted, "late", late)
    text, stepper = plain(), Interrupted(widths=(1, 4, 8))
    got: list[int] = []
    stream = speculate(stepper, PROMPT, Scripted(text, plan), limit=LIMIT, widths=stepper.widths)
    with pytest.raises(KeyboardInterrupt):
        got.extend(stream)
    assert got == text[: len(got)]
    kept = stepper.length
    fed = [*PROMPT, *got]
    assert [token for token, _ in stepper._kept] == fed[:kept]
    assert kept < len(fed)
    assert list(generate(stepper, fed[kept:], limit=10)) == text[len(got) : len(got) + 10]


def test_a_text_whose_stepper_was_moved_is_refused() -> None:
    stepper = HashStepper()
    text = plain()
    first = speculate(stepper, PROMPT, Scripted(text, wrong), limit=LIMIT)
    next(first)
    stepper.rewind(0)
    second = speculate(stepper, PROMPT[:4], Scripted(text, wrong), limit=LIMIT)
    next(second)
    with pytest.raises(UsageError, match="one text at a time"):
        next(first)
    assert stepper.length == 4  # and the other text is left alone
    next(second)


def test_a_text_that_is_closed_late_leaves_the_next_one_alone() -> None:
    stepper = HashStepper()
    first = speculate(stepper, PROMPT, Scripted(plain(), right(4)), limit=LIMIT)
    assert [next(first) for _ in range(2)] == plain()[:2]  # within a round
    stepper.rewind(0)
    list(generate(stepper, range(30), limit=1))
    first.close()  # type: ignore[attr-defined]
    assert stepper.length == 30


def test_a_draft_longer_than_was_asked_for_is_cut() -> None:
    stepper = HashStepper(widths=(1, 2, 4))
    assert speculated(lambda ahead, _: chain(ahead[:30]), stepper=stepper) == plain()
    assert set(stepper.passes) == {2, 4}


def test_a_switch_turns_drafting_off_and_the_text_and_its_passes_stay_the_same() -> None:
    costs = Costs(((1, 1.0), (8, 1.7)))

    def passes(plan: Callable[[list[int], int], Draft], limit: int = 160) -> list[int]:
        stepper = HashStepper(widths=(1, 2, 4, 8))
        switch = Switch(costs, stepper.widths, acceptance=(0.6,))
        assert speculated(plan, stepper=stepper, switch=switch, limit=limit) == plain(limit=limit)
        return stepper.passes

    assert passes(wrong) == passes(wrong)
    assert passes(wrong).count(1) > 110
    assert passes(right(7), 44)[-3:] == [8, 8, 8]


class Instant(HashStepper):
    """Answers the same rows at once, to time all else."""

    _rows = Rows(np.random.default_rng(0).random((8, 49_152), np.float32), np.zeros((8, 576)))

    def step(self, tokens: Sequence[int], **options: Any) -> Rows:
        self._kept += [(0, 0)] * len(tokens)
        return self._rows


def test_a_round_takes_far_less_than_a_pass() -> None:
    class Free(Scripted):
        def propose(self, budget: int) -> Draft:
            return DRAFT

        def observe(self, verified: Verified) -> None: ...

    DRAFT = chain([1, 2, 3])  # noqa: N806
    best = 1.0
    for _ in range(5):
        stepper = Instant(capacity=5000, widths=(1, 2, 4, 8))
        tally = Tally()
        start = time.perf_counter()
        list(speculate(stepper, PROMPT, Free([], nothing), limit=300, tally=tally))
        best = min(best, (time.perf_counter() - start) / tally.passes)
    assert best < 300e-6  # measured: 10 to 20; the bound allows for a busy machine
