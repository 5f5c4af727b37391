"""Perplexity, agreement and exact widths of steppers whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgekit.decode.generate import generate
from edgekit.decode.scoring import foreseen, logits_of, loss_of, measured_exact_widths, read
from edgekit.decode.stepper import Rows
from edgekit.testing import HashStepper

TEXT = [(5 * i * i + 3) % 64 for i in range(90)]


def test_a_text_is_read_token_by_token_whatever_the_passes() -> None:
    whole = HashStepper(widths=range(1, 128))
    rows = whole.step(TEXT).logits
    losses = [loss_of(rows[i], TEXT[i + 1]) for i in range(len(TEXT) - 1)]
    for widths in (range(1, 65), (8,), (2, 16)):
        reading = read(HashStepper(widths=widths), TEXT)
        np.testing.assert_array_equal(reading.losses, losses)
        np.testing.assert_array_equal(reading.likeliest, rows[:-1].argmax(-1))
        assert reading.perplexity == pytest.approx(np.exp(np.mean(losses)))


def test_a_loss_is_minus_the_log_of_the_softmax() -> None:
    logits = np.array([1.0, 2.0, 1000.0], np.float32)
    assert loss_of(logits, 2) == 0
    assert loss_of(logits, 1) == pytest.approx(998)


def test_rows_before_the_start_are_not_computed() -> None:
    rows = list(logits_of(HashStepper(widths=(8,)), TEXT[:20], start=13))
    assert [index for index, _ in rows] == list(range(13, 20))


def test_a_greedy_continuation_is_foreseen_and_another_is_not() -> None:
    wanted = list(generate(HashStepper(), TEXT[:7], limit=30))
    assert all(foreseen(HashStepper(), TEXT[:7], wanted))
    wrong = [*wanted[:10], (wanted[10] + 1) % 64, *wanted[11:]]
    seen = foreseen(HashStepper(), TEXT[:7], wrong)
    assert seen[:11] == [True] * 10 + [False]


class Off(HashStepper):
    """Passes of ``narrow`` tokens round otherwise."""

    narrow: tuple[int, ...] = (1,)

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        answer = super().step(tokens, parents=parents, rows=rows)
        if len(tokens) in self.narrow:
            return Rows(np.nextafter(answer.logits, np.float32(9)), answer.hidden)
        return answer


class Neighbourly(HashStepper):
    """Rows share a scale: each depends on the last token of its pass."""

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        answer = super().step(tokens, parents=parents, rows=rows)
        return Rows(answer.logits + np.float32(tokens[-1]), answer.hidden)


def test_every_width_is_exact_where_rows_are_equal() -> None:
    assert measured_exact_widths(HashStepper(), TEXT, (1, 2, 4, 8)) == (1, 2, 4, 8)


def test_the_width_that_rounds_otherwise_is_left_out() -> None:
    assert measured_exact_widths(Off(), TEXT, (1, 2, 4, 8)) == (2, 4, 8)


def test_no_width_is_exact_where_rows_depend_on_their_neighbours() -> None:
    assert measured_exact_widths(Neighbourly(), TEXT, (2, 4, 8)) == ()
