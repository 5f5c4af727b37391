"""Drafters tried: predictions from recordings and costs, and the clock beside them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgekit.decode.drafters import NAMES, TREES
from edgekit.decode.paying import Costs
from edgekit.decode.replay import RANKS, Recording
from edgekit.exactness import GRADES, Grade
from edgekit.testing import HashStepper
from edgekit.trials import TOKENS, Candidate, foreseen, tried

# So much dearer than Python that its own time, which is measured, does not count.
COSTS = Costs(((1, 1.0), (2, 1.1), (4, 1.3), (8, 1.8)))
PROMPTS = [[(7 * i * j + 3) % 64 for i in range(12)] for j in range(1, 4)]


def recording(answer: list[int], prompt: list[int]) -> Recording:
    ranks = np.array([[(token + rank) % 64 for rank in range(RANKS)] for token in answer])
    return Recording(tuple(prompt), tuple(answer), ranks)


COPY = [recording([*range(20, 50)], [*range(64)]), recording([*range(5, 35)], [*range(64)])]
NEWS = [recording([(token * token * 7 + token) % 61 for token in range(40)], [62, 63])]


def test_what_copies_is_foreseen_to_pay_and_more_so_in_wide_passes() -> None:
    found = foreseen("lookup", COPY, 64, "bitwise", 1.0, COSTS)
    assert list(found.fixed) == [2, 4, 8]
    two, four, eight = (found.fixed[width].speedup for width in (2, 4, 8))
    assert 1.3 < two < 2 / 1.1
    assert two < four < eight < 8 / 1.8
    assert found.predicted.speedup > 2
    assert found.predicted.low <= found.predicted.speedup <= found.predicted.high
    assert found.tokens_per_pass > 3
    assert found.acceptance[0] == 1


def test_what_does_not_copy_costs_nothing_with_the_switch() -> None:
    found = foreseen("lookup", NEWS, 64, "bitwise", 1.0, COSTS)
    assert found.predicted.speedup == pytest.approx(1.0, abs=0.02)


def test_dear_passes_are_foreseen_not_to_pay() -> None:
    cliff = Costs(((1, 1.0), (2, 2.6), (4, 4.5), (8, 9.0)))
    found = foreseen("lookup", COPY, 64, "bitwise", 1.0, cliff)
    assert all(each.speedup < 1 for each in found.fixed.values())
    assert found.predicted.speedup > 0.9  # the switch draws its conclusion


@pytest.mark.parametrize("name", NAMES)
def test_trees_are_cut_for_one_width_and_chains_for_any(name: str) -> None:
    chains = foreseen(name, COPY, 64, "bitwise", 1.0, COSTS)
    assert chains.widths == (1, 2, 4, 8)
    trees = foreseen(name, COPY, 64, "numerical", 1.0, COSTS)
    assert len(trees.widths) == (2 if name in TREES else 4)


@pytest.mark.parametrize("grade", GRADES)
def test_every_drafter_is_tried_by_the_clock_too(grade: Grade) -> None:
    stepper = HashStepper()
    found = tried(stepper, PROMPTS, (), grade, 0.001, COSTS)
    assert tuple(each.drafter for each in found) == NAMES
    assert all(each.measured > 0 for each in found)
    assert all(0 < each.drafting_seconds < each.round_seconds for each in found)
    assert max(stepper.passes) <= TOKENS


@pytest.mark.parametrize("grade", GRADES)
def test_by_the_clock_passes_keep_to_the_grade_and_the_switch_is_there(grade: Grade) -> None:
    narrow = 1 if grade == "numerical" else 2
    dear = Costs(((narrow, 1.0), (narrow + 1, 3.0), (8, 9.0)))
    stepper = HashStepper(exact_widths=range(2, 65))
    prompts = [[5, 6, 7, 8] * 6]
    tried(stepper, prompts, (), grade, 0.001, dear)
    passes = stepper.passes[-TOKENS // 2 :]  # of the last drafter; a probe may be among them
    assert passes.count(narrow) > 0.8 * len(passes)


def test_a_candidate_survives_json() -> None:
    found = foreseen("merged", COPY, 64, "numerical", 1.0, COSTS)
    assert Candidate.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_where_passes_hold_no_draft_there_is_no_switch() -> None:
    narrow = Costs(((1, 1.0),))
    found = foreseen("lookup", COPY, 64, "bitwise", 1.0, narrow)
    assert found.switch(narrow) is None
    assert found.fixed == {}
