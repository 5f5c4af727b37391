"""Feeding tokens in passes, and the plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgekit.decode.generate import generate
from edgekit.decode.sampling import Sampling
from edgekit.decode.stepper import feed
from edgekit.errors import BadInput
from edgekit.testing import HashStepper

PROMPT = list(range(10))


@pytest.mark.parametrize("widths", [range(1, 65), (1, 4, 8), (2, 3), range(2, 5), (16,)])
def test_however_a_prompt_is_cut_the_last_row_is_the_same(widths: Sequence[int]) -> None:
    whole = HashStepper().step(PROMPT, rows=[9]).logits
    stepper = HashStepper(widths=widths)
    np.testing.assert_array_equal(feed(stepper, PROMPT).logits, whole)
    assert stepper.length == len(PROMPT)
    assert set(stepper.passes) <= set(widths)


def test_a_prompt_keeps_to_the_exact_widths() -> None:
    stepper = HashStepper(widths=range(1, 65), exact_widths=(4, 8))
    feed(stepper, PROMPT)
    assert stepper.passes == [8, 4]


def test_no_pass_is_wider_than_a_chunk() -> None:
    stepper = HashStepper(widths=range(1, 65))
    fed: list[int] = []
    feed(stepper, PROMPT, chunk=4, report=fed.append)
    assert stepper.passes == [4, 4, 2]
    assert fed == [4, 8, 10]


def test_where_padding_does_not_fit_narrower_passes_do() -> None:
    stepper = HashStepper(widths=(1, 8), exact_widths=(8,), capacity=10)
    feed(stepper, PROMPT)
    assert stepper.passes == [8, 1, 1]
    assert stepper.length == 10


def test_what_does_not_fit_is_refused_before_a_pass() -> None:
    stepper = HashStepper(capacity=9)
    with pytest.raises(BadInput, match="10 tokens do not fit the 9"):
        feed(stepper, PROMPT)
    assert not stepper.passes
    with pytest.raises(BadInput, match="no token to feed"):
        feed(stepper, [])


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens, each context fed afresh."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(HashStepper().step(tokens, rows=[len(tokens) - 1]).logits[0].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_feeding_everything_again() -> None:
    assert list(generate(HashStepper(), PROMPT, limit=12)) == greedy(PROMPT, 12)


def test_a_second_prompt_goes_on_behind_what_is_kept() -> None:
    stepper = HashStepper()
    stepper.step(PROMPT[:4])
    assert list(generate(stepper, PROMPT[4:], limit=3)) == greedy(PROMPT, 3)


def test_a_stop_token_is_the_last() -> None:
    wanted = greedy(PROMPT, 12)
    stop = wanted[5]
    assert (
        list(generate(HashStepper(), PROMPT, limit=12, stops=(stop,)))
        == wanted[: wanted.index(stop) + 1]
    )


def test_a_full_cache_ends_the_loop() -> None:
    stepper = HashStepper(capacity=12)
    assert list(generate(stepper, PROMPT, limit=50)) == greedy(PROMPT, 3)
    assert stepper.length == 12


def test_one_token_takes_one_pass() -> None:
    stepper = HashStepper()
    assert len(list(generate(stepper, PROMPT, limit=1))) == 1
    assert stepper.passes == [10]


def test_the_same_seed_gives_the_same_text() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    first = list(generate(HashStepper(), PROMPT, limit=20, sampling=sampling))
    assert first == list(generate(HashStepper(), PROMPT, limit=20, sampling=sampling))
    assert first != list(generate(HashStepper(), PROMPT, limit=20, sampling=Sampling(1.0, seed=4)))
