"""Replay: recorded answers come again, whatever is drafted, and no model runs."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.decode.draft import Draft, Verified, chain
from edgekit.decode.drafters import drafter
from edgekit.decode.generate import generate
from edgekit.decode.recycling import likeliest
from edgekit.decode.replay import RANKS, Recording, Replay, recorded
from edgekit.decode.speculate import Tally, speculate
from edgekit.testing import HashStepper

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def recording() -> Recording:
    stepper = HashStepper()
    answer = list(generate(stepper, PROMPT, limit=30))
    return recorded(stepper, PROMPT, answer)


def test_a_recording_holds_the_likeliest_of_every_row(recording: Recording) -> None:
    assert recording.ranks.shape == (30, RANKS)
    assert tuple(recording.ranks[:, 0]) == recording.answer
    stepper = HashStepper()
    row = stepper.step([*PROMPT, *recording.answer[:3]]).logits[-1:]
    np.testing.assert_array_equal(recording.ranks[3], likeliest(row, RANKS)[0])


def test_an_answer_that_the_rows_do_not_confirm_comes_again_all_the_same() -> None:
    other = [(token + 1) % 64 for token in generate(HashStepper(), PROMPT, limit=12)]
    recording = recorded(HashStepper(), PROMPT, other)
    assert recording.ranks[:, 0].tolist() == other
    assert all(len(set(row)) == RANKS for row in recording.ranks.tolist())
    replay = Replay(recording, 64, range(1, 65))
    assert list(generate(replay, PROMPT, limit=12)) == other


@pytest.mark.parametrize("name", ["lookup", "recycling"])
@pytest.mark.parametrize("trees", [False, True])
def test_the_answer_comes_again(recording: Recording, name: str, trees: bool) -> None:
    replay = Replay(recording, 64, range(1, 65))
    drafts = drafter(name, 64, trees=trees)
    for _ in range(2):  # the second time recycling knows it all
        replay.rewind(0)
        tally = Tally()
        words = {"limit": 30, "widths": [1, 4, 8], "tally": tally}
        assert tuple(speculate(replay, PROMPT, drafts, **words)) == recording.answer  # type: ignore[arg-type]
    assert replay.seconds > 0
    if name == "recycling":
        assert tally.passes < 29


class Sideways:
    """The right token, behind a wrong one, and then a wrong one."""

    name = "sideways"

    def __init__(self, answer: tuple[int, ...]) -> None:
        self._answer, self._done = answer, 0
        self.after_wrong: list[int] = []

    def start(self, prompt: object) -> None:
        self._done = 0

    def observe(self, verified: Verified) -> None:
        self._done += len(verified.emitted)
        if len(verified.tokens) == 4:
            self.after_wrong.append(int(verified.rows.logits[1].argmax()))

    def propose(self, budget: int) -> Draft:
        following = self._answer[self._done]
        if budget < 3:
            return chain([])
        return Draft((PROMPT[1], following, PROMPT[1]), (-1, -1, 1))


def test_behind_a_token_that_is_not_the_text_s_stands_what_was_said_last(
    recording: Recording,
) -> None:
    drafts = Sideways(recording.answer)
    words = {"limit": 12, "widths": range(1, 65)}
    replay = Replay(recording, 64, range(1, 65))
    assert tuple(speculate(replay, PROMPT, drafts, **words)) == recording.answer[:12]  # type: ignore[arg-type]
    # In the prompt, 5 followed the last 1; the answer may have said otherwise since.
    said = dict(zip(recording.answer, recording.answer[1:], strict=False))
    assert drafts.after_wrong
    assert set(drafts.after_wrong) <= {5, said.get(PROMPT[1], 5)}
