"""What passes cost and bring, and the switch that draws its conclusions."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edgekit.decode.draft import chain
from edgekit.decode.paying import Costs, Round, Switch, likely
from edgekit.errors import BadInput, DamagedFile

COSTS = Costs(((1, 0.010), (2, 0.012), (4, 0.015), (8, 0.022)), drafting=0.0001)
CLIFF = Costs(((1, 0.010), (2, 0.025), (4, 0.026), (8, 0.030)))
WIDTHS = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("width", "seconds"),
    [(1, 0.010), (2, 0.012), (3, 0.0135), (4, 0.015), (6, 0.0185), (8, 0.022), (12, 0.029)],
)
def test_between_measured_widths_seconds_lie_on_a_line(width: int, seconds: float) -> None:
    assert COSTS.seconds(width) == pytest.approx(seconds)


def test_one_measured_width_and_noisy_ones_give_no_cheaper_wide_pass() -> None:
    assert Costs(((2, 0.01),)).seconds(1) == Costs(((2, 0.01),)).seconds(64) == 0.01
    noisy = Costs(((1, 0.010), (2, 0.011), (4, 0.0105)))
    assert noisy.seconds(30) == 0.010


def test_costs_survive_json() -> None:
    assert Costs.from_json(json.loads(json.dumps(COSTS.to_json()))) == COSTS


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"passes": [], "drafting": 0},
        {"passes": {}, "drafting": 0},
        {"passes": {"a": 1}, "drafting": 0},
        {"passes": {"1": 1.0}, "drafting": "x"},
        {"passes": {"1": -1.0}, "drafting": 0},
    ],
)
def test_malformed_costs_are_refused(value: object) -> None:
    with pytest.raises(DamagedFile, match="the costs of passes are malformed"):
        Costs.from_json(value)


@pytest.mark.parametrize(
    ("passes", "drafting", "sentence"),
    [
        ((), 0.0, "give one or more widths, ascending"),
        (((2, 1.0), (1, 1.0)), 0.0, r"passes of \[2, 1\] tokens"),
        (((0, 1.0),), 0.0, "from 1"),
        (((1, 0.0),), 0.0, "each is a number above 0"),
        (((1, float("nan")),), 0.0, "each is a number above 0"),
        (((1, 1.0),), -1.0, "drafting takes -1 seconds"),
    ],
)
def test_costs_that_cannot_be_are_refused(
    passes: tuple[tuple[int, float], ...], drafting: float, sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        Costs(passes, drafting)


def best_speedup(share: float) -> float:
    """Of the best constant width, where each token is right with that probability."""
    rates = {
        width: (1 - share**width)
        / (1 - share)
        / (COSTS.seconds(width) + COSTS.drafting * (width > 1))
        for width in WIDTHS
    }
    return max(rates.values()) * COSTS.seconds(1)


def fed(switch: Switch, chances: tuple[float, ...] = ()) -> int:
    """How many tokens of a draft as long as may be are fed."""
    count = switch.budget()
    draft = replace(chain([0] * count), chances=chances[:count])
    return min(count, switch.worth(draft))


def rounds(switch: Switch, shares: list[float], tokens: int, seed: int = 0) -> list[Round]:
    """What the loop would tell, where tokens are right with these probabilities."""
    rng = np.random.default_rng(seed)
    done: list[Round] = []
    while sum(each.tokens for each in done) < tokens:
        drafted = fed(switch)
        width = next(width for width in WIDTHS if width > drafted)
        right = 0
        while right < drafted and rng.random() < shares[right]:
            right += 1
        tested = min(right + 1, drafted)
        done.append(Round(width, drafted, tested, right, right + 1))
        switch.note(done[-1])
    return done


def gain(done: list[Round]) -> float:
    """Speed against plain passes."""
    tokens = sum(each.tokens for each in done)
    spent = sum(COSTS.seconds(each.width) + COSTS.drafting * (each.drafted > 0) for each in done)
    return tokens * COSTS.seconds(1) / spent


def test_drafts_grow_where_they_are_right_and_shrink_where_they_are_not() -> None:
    switch = Switch(COSTS, WIDTHS, acceptance=(0.5,))
    assert fed(switch) == 3
    assert rounds(switch, [0.97] * 7, 200)[-1].drafted == 7
    assert rounds(switch, [0.45] * 7, 300)[-1].drafted in (1, 3)
    assert 0.2 < switch.acceptance[0] < 0.7


def test_a_draft_that_is_never_right_is_turned_off_and_tried_again_ever_more_rarely() -> None:
    switch = Switch(COSTS, WIDTHS, acceptance=(0.6,))
    done = rounds(switch, [0.0] * 7, 2000)
    tried = [place for place, each in enumerate(done) if each.drafted]
    pauses = [b - a for a, b in pairwise(tried) if b - a > 1]
    assert tried[0] == 0
    assert pauses[:5] == [33, 65, 129, 257, 513]
    first = tried[0 : [b - a > 1 for a, b in pairwise(tried)].index(True) + 1]
    assert len(tried) - len(first) <= 6 * 3  # a probe without a right token ends early
    assert gain(done) > 0.99
    assert not switch.is_on
    assert switch.speedup < 1


def test_after_a_pause_a_draft_that_pays_again_is_kept() -> None:
    switch = Switch(COSTS, WIDTHS, acceptance=(0.6,))
    rounds(switch, [0.0] * 7, 60)
    assert not switch.is_on
    done = rounds(switch, [0.9] * 7, 400)
    assert switch.is_on
    assert all(each.drafted for each in done[-20:])
    assert switch.speedup > 1.5


def test_a_probe_that_pays_halves_the_next_pause() -> None:
    switch = Switch(COSTS, WIDTHS, acceptance=(0.6,))

    def pause(tokens: int) -> int:
        done = rounds(switch, [0.0] * 7, tokens)
        plainly = [place for place, each in enumerate(done) if not each.drafted]
        return next(n for n, place in enumerate(plainly) if place != plainly[0] + n)

    assert pause(700) == 32
    rounds(switch, [0.95] * 7, 2500)
    assert switch.is_on
    assert pause(1500) == 512  # 1024 would have been next


def test_where_other_texts_foretell_a_loss_it_begins_plainly_and_probes() -> None:
    switch = Switch(CLIFF, WIDTHS, acceptance=(0.3,))
    done = rounds(switch, [0.3] * 7, 40)
    assert not any(each.drafted for each in done[:32])
    assert done[32].drafted


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_whatever_the_acceptance_little_is_lost_and_most_is_won(share: float) -> None:
    shares = [share] * 7
    found = np.mean([gain(rounds(Switch(COSTS, WIDTHS), shares, 256, seed)) for seed in range(20)])
    best = best_speedup(share)
    assert found > 0.97
    assert found - 1 > 0.7 * (best - 1) - 0.03


def test_a_text_without_drafts_changes_nothing_and_drafting_in_vain_counts() -> None:
    switch = Switch(COSTS, WIDTHS)
    before = switch.speedup
    for _ in range(9):
        switch.note(Round(1, 0, 0, 0, 1))
    assert switch.speedup == before
    dear = Switch(Costs(COSTS.passes, drafting=0.003), WIDTHS, acceptance=(0.7,))
    assert dear.is_on
    for _ in range(60):
        dear.note(Round(1, 0, 0, 0, 1))
    assert dear.speedup < 1


def test_what_it_decides_is_a_function_of_counts_alone() -> None:
    one = rounds(Switch(COSTS, WIDTHS), [0.5] * 7, 500, seed=3)
    assert one == rounds(Switch(COSTS, WIDTHS), [0.5] * 7, 500, seed=3)


def test_no_draft_is_longer_than_the_longest_and_widths_without_room_are_refused() -> None:
    switch = Switch(COSTS, WIDTHS, acceptance=(0.99,), longest=2)
    assert {each.drafted for each in rounds(switch, [0.99] * 7, 300)} <= {0, 1, 2}
    with pytest.raises(BadInput, match=r"no pass of \[1\] tokens holds a draft of 1 to 16"):
        Switch(COSTS, (1,))
    with pytest.raises(BadInput, match="a longest draft of 1 or more"):
        Switch(COSTS, WIDTHS, longest=0)


def test_a_draft_that_knows_its_chances_is_fed_as_far_as_they_pay() -> None:
    switch = Switch(COSTS, WIDTHS)
    assert fed(switch, (0.99,) * 7) == 7
    assert fed(switch, (0.05,) * 7) == 0
    assert 0 < fed(switch, (0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9)) < 3
    # In passes that cost so much more than one token nothing but certainty is worth it.
    assert fed(Switch(CLIFF, WIDTHS, acceptance=(0.9,)), (0.6,) * 7) == 0


def test_the_faster_a_text_goes_the_surer_a_token_must_be() -> None:
    slow, fast = Switch(COSTS, WIDTHS), Switch(COSTS, WIDTHS)
    for _ in range(20):
        slow.note(Round(1, 0, 0, 0, 1))
        fast.note(Round(8, 7, 7, 7, 8))
    unsure = (0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)
    assert fed(fast, unsure) < fed(slow, unsure)


def test_where_the_narrowest_pass_holds_a_draft_one_token_is_always_fed() -> None:
    switch = Switch(Costs(((2, 0.012), (4, 0.017))), (2, 4))
    assert fed(switch, (0.01, 0.01, 0.01)) == 1


def test_without_costs_a_chain_is_fed_while_it_is_likely() -> None:
    known = replace(chain([1, 2, 3]), chances=(0.9, 0.5, 0.5))
    assert likely(known) == 2
    assert likely(replace(known, chances=(0.2, 1.0, 1.0))) == 0
    assert likely(chain([1, 2, 3])) == 3
