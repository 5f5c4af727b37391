"""From logits to tokens: the order of the filters, the noise, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.decode.sampling import GREEDY, Sampling
from edgekit.errors import BadInput

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    assert GREEDY.choose(np.array([1.0, 3.0, 3.0], np.float32), 0) == 1


def test_a_distribution_is_the_softmax_of_the_logits_by_temperature() -> None:
    ids, probabilities = Sampling(temperature=0.5).distribution(LOGITS)
    squares = np.array([0.16, 0.09, 0.04, 0.01])
    assert ids.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(probabilities, squares / squares.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 0.71}, [0, 1, 2]),
        ({"min_p": 0.6}, [0, 1]),
        ({"top_k": 3, "min_p": 0.7}, [0, 1]),
        ({"top_k": 2, "top_p": 0.56}, [0]),  # top-k first: 0.4 of 0.7 is 0.571
    ],
)
def test_each_filter_keeps_what_its_paper_says(filters: dict[str, float], kept: list[int]) -> None:
    ids, probabilities = Sampling(temperature=1.0, **filters).distribution(LOGITS)  # type: ignore[arg-type]
    assert ids.tolist() == kept
    assert probabilities.sum() == pytest.approx(1)
    expected = np.exp(LOGITS.astype(np.float64))[kept]
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-6)


def test_the_same_seed_and_place_draw_the_same_token_and_others_do_not() -> None:
    flat = np.zeros(1000, np.float32)
    first, second = Sampling(temperature=1.0, seed=5), Sampling(temperature=1.0, seed=6)
    drawn = [first.choose(flat, index) for index in range(20)]
    assert drawn == [first.choose(flat, index) for index in range(20)]
    assert len(set(drawn)) > 15
    assert drawn != [second.choose(flat, index) for index in range(20)]


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, seed=1)
    drawn = [sampling.choose(LOGITS, index) for index in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.4, 0.3, 0.2, 0.1], atol=0.03)


def test_a_token_far_below_the_likeliest_is_never_drawn_and_changes_nothing() -> None:
    ids, probabilities = Sampling(temperature=1.0).distribution(
        np.array([0.0, -1e4, -1.0], np.float32)
    )
    assert ids.tolist() == [0, 1, 2]
    assert probabilities[1] == 0
    np.testing.assert_allclose(probabilities[0], 1 / (1 + np.exp(-1)), rtol=1e-6)
    row = np.array([0.0] * 300 + [-1e4] * 300, np.float32)
    drawn = [Sampling(temperature=1.0, seed=2).choose(row, index) for index in range(300)]
    assert max(drawn) < 300
    assert len(set(drawn)) > 150


def test_a_large_vocabulary_is_drawn_from_as_a_small_one_is() -> None:
    rng = np.random.default_rng(0)
    row = (4 * rng.standard_normal(5000)).astype(np.float32)
    weights = np.exp(row.astype(np.float64) - row.max())
    reached = np.cumsum(weights) / weights.sum()
    for index in range(200):
        noise = np.random.Generator(np.random.Philox(key=9, counter=index)).random()
        token = Sampling(temperature=1.0, seed=9).choose(row, index)
        assert reached[token] > noise - 1e-6
        assert token == 0 or reached[token - 1] < noise + 1e-6


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_full_sort(share: float) -> None:
    for spread in (0.01, 1.0, 6.0):  # flat rows need more than the head
        row = (spread * np.random.default_rng(1).standard_normal(4000)).astype(np.float32)
        ids, _ = Sampling(temperature=1.0, top_p=share).distribution(row)
        weights = np.exp(row - row.max())
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order], dtype=np.float64)
        count = int(np.searchsorted(reached, share * weights.sum(dtype=np.float64))) + 1
        assert ids.tolist() == sorted(order[:count].tolist())


def test_of_equally_likely_tokens_top_k_keeps_the_lowest_ids() -> None:
    ids, _ = Sampling(temperature=1.0, top_k=3).distribution(np.ones(9, np.float32))
    assert ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -1}, "temperature is -1; it is a number from 0 to 100; 0 takes"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -3}, "top-k is -3"),
        ({"top_p": 0}, "top-p is 0, which keeps no token"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"min_p": 2}, "min-p is 2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        Sampling(**values)  # type: ignore[arg-type]
