"""Certificates of speculation: granted where text is plain text, refused where rows are not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from edgekit.decode.scoring import read
from edgekit.decode.stepper import Rows
from edgekit.errors import UsageError
from edgekit.exactness import Certificate, Deviation, Distance, certify, measured_deviation
from edgekit.language_reference import LanguageReference
from edgekit.testing import HashStepper

PROMPTS = [[(7 * i * j + 3) % 64 for i in range(12)] for j in range(1, 5)]
TEXT = tuple(int(token) for token in np.random.default_rng(1).integers(0, 64, 80))


def eager(noise: float) -> LanguageReference:
    """What an eager model would say that is ``noise`` nats away from ``HashStepper``."""
    reading = read(HashStepper(), TEXT)
    signs = np.where(np.arange(len(TEXT) - 1) % 2, noise, -noise)
    nothing = np.zeros((0, 64), np.float32)
    return LanguageReference(
        (), (), (), nothing, TEXT, reading.losses + signs, reading.likeliest, "a test"
    )


class Neighbourly(HashStepper):
    """Rows share a scale: what the last token of a pass is changes every row."""

    def step(self, tokens: Sequence[int], **words: Any) -> Rows:
        answer = super().step(tokens, **words)
        return Rows(np.roll(answer.logits, tokens[-1] % 7, axis=1), answer.hidden)


class Rounded(HashStepper):
    """Rows of trees are off by a little."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self._error = error

    def step(self, tokens: Sequence[int], **words: Any) -> Rows:
        answer = super().step(tokens, **words)
        if words.get("parents") is None:
            return answer
        noise = np.random.default_rng(len(tokens)).standard_normal(64).astype(np.float32)
        return Rows(answer.logits + np.float32(self._error) * noise, answer.hidden)


class Unmasked(HashStepper):
    """Siblings see each other: each token of a tree sees all before it in the pass."""

    def step(self, tokens: Sequence[int], **words: Any) -> Rows:
        return super().step(tokens, **{**words, "parents": None})


def test_equal_rows_are_certified_bitwise() -> None:
    found = certify(HashStepper(), "bitwise", PROMPTS, ())
    assert found.granted
    assert found.equal == found.texts == 8
    assert found.deviation is None


def test_rows_that_depend_on_their_neighbours_are_refused() -> None:
    found = certify(Neighbourly(), "bitwise", PROMPTS, ())
    assert not found.granted
    assert found.equal < found.texts


def test_without_exact_widths_bitwise_is_no_grade() -> None:
    with pytest.raises(UsageError, match="ask for --grade numerical"):
        certify(HashStepper(exact_widths=()), "bitwise", PROMPTS, ())


def test_trees_that_are_exact_have_no_deviation() -> None:
    found = certify(HashStepper(), "numerical", PROMPTS, (), eager(0.1))
    assert found.granted
    assert found.equal == found.texts == 8
    assert found.deviation is not None
    assert found.deviation.rows == len(TEXT) - 1
    assert found.deviation.from_plain == Distance(0.0, 0.0, 0.0)
    assert found.deviation.plain_from_eager.nats == pytest.approx(0.1)
    assert found.deviation.from_eager.nats == pytest.approx(0.1)


def test_trees_that_round_otherwise_are_numerical_and_not_bitwise() -> None:
    found = measured_deviation(Rounded(0.02), eager(0.1))
    assert 0.001 < found.from_plain.nats < 0.05
    assert found.from_plain.worst > found.from_plain.nats
    assert found.is_small


@pytest.mark.parametrize("stepper", [Rounded(1.0), Unmasked()])
def test_trees_whose_rows_are_wrong_are_refused(stepper: HashStepper) -> None:
    found = certify(stepper, "numerical", PROMPTS, (), eager(0.1))
    assert not found.granted
    assert found.deviation is not None
    assert found.deviation.from_eager.nats > 0.2


def test_numerical_is_not_granted_unmeasured() -> None:
    assert not certify(HashStepper(), "numerical", PROMPTS, ()).granted


@pytest.mark.parametrize(
    ("drafted", "plain", "small"), [(0.0, 0.0, True), (0.109, 0.1, True), (0.12, 0.1, False)]
)
def test_side_branches_may_be_a_tenth_farther(drafted: float, plain: float, small: bool) -> None:
    near = Distance(0.0, 0.0, 0.0)
    found = Deviation(9, near, replace(near, nats=drafted), replace(near, nats=plain))
    assert found.is_small == small


@pytest.mark.parametrize("grade", ["bitwise", "numerical"])
def test_a_certificate_survives_json(grade: Any) -> None:
    found = certify(HashStepper(), grade, PROMPTS[:1], (), eager(0.1))
    kept = json.loads(json.dumps(asdict(found)))
    assert Certificate.from_json(kept) == found
    with pytest.raises(ValueError, match="no grade 'exact'"):
        Certificate.from_json({**kept, "grade": "exact"})
