"""Rejection rules against exact probabilities on a toy vocabulary, and known wrong rules.

A rule is right where the first two tokens it writes have the joint probabilities of the model.
With n draws over c outcomes a right rule is further off than e in total variation with
probability at most ``2^c exp(-2 n e^2)`` (Weissman's bound): for 120,000 draws, 25 outcomes and
e = 0.012 that is 1 in 30 million; for 6 outcomes and e = 0.008, 1 in 70,000. The wrong rules are
off by 0.02 to 0.3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgekit.decode.rejection import accept_chain, accept_siblings, drawn, remaining
from edgekit.errors import BadInput
from edgekit.spec import Array

DRAWS = 120_000
CHAIN_BOUND, SIBLING_BOUND = 0.012, 0.008
Rule = Callable[[Array, Array, Array, Array], tuple[Array, Array]]

V = 5
RNG = np.random.default_rng(8)
P = RNG.dirichlet(np.full(V, 0.7), (V + 1, V + 1))  # after two tokens, V standing for none
Q = 0.5 * P + 0.5 * RNG.dirichlet(np.full(V, 0.7), (V + 1, V + 1))
Q[..., 4] = 0  # the drafter's vocabulary is trimmed
Q /= Q.sum(-1, keepdims=True)


def variation(found: Array, exact: Array) -> float:
    """Total variation between counts of outcomes and their probabilities."""
    return 0.5 * float(np.abs(found / found.sum() - exact).sum())


def chain_error(rule: Rule) -> float:
    """How far the joint of two tokens is off, drafts two long, drawn from Q along the way."""
    rng = np.random.default_rng(1)
    none = np.full(DRAWS, V)
    first = drawn(Q[none, none], rng.random(DRAWS))
    second = drawn(Q[none, first], rng.random(DRAWS))
    tokens = np.stack([first, second], -1)
    proposed = np.stack([Q[none, none], Q[none, first]], 1)
    target = np.stack([P[none, none], P[none, first], P[first, second]], 1)
    count, last = rule(tokens, proposed, target, rng.random((DRAWS, 3)))
    one = np.where(count == 0, last, first)
    # A text that stopped after one token goes on plainly; V is no token.
    plain = drawn(P[none, one], rng.random(DRAWS))
    two = np.where(count == 0, plain, np.where(count == 1, last, second))
    third = drawn(P[one, two], rng.random(DRAWS))
    three = np.where(count == 2, last, third)
    begun = np.bincount(one * V + two, minlength=V * V).reshape(V, V)
    later = np.bincount(two * V + three, minlength=V * V).reshape(V, V)
    exact = P[V, V][:, None] * P[V, :V]
    after = np.einsum("ab,abc->bc", exact, P[:V, :V])
    return max(variation(begun, exact), variation(later, after))


def test_a_chain_with_rejection_has_the_model_s_joint_probabilities() -> None:
    assert chain_error(accept_chain) < CHAIN_BOUND


def resampled(tokens: Array, proposed: Array, target: Array, uniforms: Array) -> tuple[Array, ...]:
    """In place of a rejected token, a draw of p."""
    count, _ = accept_chain(tokens, proposed, target, uniforms)
    return count, drawn(at(target, count), uniforms[:, -1])


def from_drafter(
    tokens: Array, proposed: Array, target: Array, uniforms: Array
) -> tuple[Array, ...]:
    """Behind a whole chain, a draw of the last q."""
    count, last = accept_chain(tokens, proposed, target, uniforms)
    return count, np.where(count == 2, drawn(proposed[:, 1], uniforms[:, -1]), last)


def softmaxed(tokens: Array, proposed: Array, target: Array, uniforms: Array) -> tuple[Array, ...]:
    """The softmax of what is left, as if those were logits."""
    count, last = accept_chain(tokens, proposed, target, uniforms)
    left = np.exp(np.maximum(at(target, count) - at(proposed, np.minimum(count, 1)), 0))
    return count, np.where(count < 2, drawn(left, uniforms[:, -1]), last)


def sharpened(tokens: Array, proposed: Array, target: Array, uniforms: Array) -> tuple[Array, ...]:
    """Temperature 0.7 on what has it already."""
    return accept_chain(tokens, proposed, target ** (1 / 0.7), uniforms)


def at(rows: Array, count: Array) -> Array:
    """Of each draft's rows, the one at its count."""
    return np.asarray(rows[np.arange(len(rows)), count])


@pytest.mark.parametrize("rule", [resampled, from_drafter, softmaxed, sharpened])
def test_the_known_wrong_rules_for_chains_are_seen(rule: Rule) -> None:
    assert chain_error(rule) > 1.5 * CHAIN_BOUND


W = 6
TARGET = np.array([0.35, 0.25, 0.15, 0.12, 0.08, 0.05])
EXPERTS = np.array(
    [[0.05, 0.3, 0.3, 0.2, 0.1, 0.05], [0.5, 0.1, 0.05, 0.05, 0.1, 0.2], [1 / 6] * 6]
)


def siblings(proposed: Array, rng: np.random.Generator) -> Array:
    """Three tokens for each draw, none twice: the highest of log q and Gumbel noise, or from a
    row of ``proposed`` each, without those before."""
    if proposed.ndim == 1:
        with np.errstate(divide="ignore"):
            keys = np.log(proposed) - np.log(-np.log(rng.random((DRAWS, W))))
        return np.argsort(-keys, -1)[:, :3]
    candidates = np.zeros((DRAWS, 3), int)
    for turn in range(3):
        rows = remaining(candidates, np.broadcast_to(proposed, (DRAWS, 3, W)))
        candidates[:, turn] = drawn(rows[:, turn], rng.random(DRAWS))
    return candidates


def sibling_error(rule: Rule, proposed: Array) -> float:
    """How far the place's token is off."""
    rng = np.random.default_rng(2)
    candidates = siblings(proposed, rng)
    offers = remaining(candidates, np.broadcast_to(proposed, (DRAWS, *proposed.shape)))
    _, tokens = rule(candidates, offers, np.tile(TARGET, (DRAWS, 1)), rng.random((DRAWS, 4)))
    return variation(np.bincount(tokens, minlength=W), TARGET)


TRIMMED = np.array([0.4, 0.1, 0.2, 0.3, 0, 0])


@pytest.mark.parametrize("proposed", [EXPERTS[0], TRIMMED, EXPERTS], ids=["one", "trimmed", "many"])
def test_siblings_with_rejection_have_the_model_s_probabilities(proposed: Array) -> None:
    assert sibling_error(accept_siblings, proposed) < SIBLING_BOUND


def test_experts_that_know_nothing_of_each_other_may_propose_a_token_twice() -> None:
    rng = np.random.default_rng(3)
    offers = np.broadcast_to(EXPERTS, (DRAWS, 3, W))
    candidates = drawn(offers, rng.random((DRAWS, 3)))
    assert (candidates[:, 0] == candidates[:, 1]).any()
    target = np.tile(TARGET, (DRAWS, 1))
    _, tokens = accept_siblings(candidates, offers, target, rng.random((DRAWS, 4)))
    assert variation(np.bincount(tokens, minlength=W), TARGET) < SIBLING_BOUND


def one_expert(
    candidates: Array, offers: Array, target: Array, uniforms: Array
) -> tuple[Array, ...]:
    """Every candidate tested by the last expert's probabilities, whoever drew it."""
    wrong = np.broadcast_to(EXPERTS[2], offers.shape)
    return accept_siblings(candidates, wrong, target, uniforms)


def replaced(candidates: Array, offers: Array, target: Array, uniforms: Array) -> tuple[Array, ...]:
    """Drawn without replacement, tested as if with."""
    return accept_siblings(candidates, np.repeat(offers[:, :1], 3, 1), target, uniforms)


def from_target(
    candidates: Array, offers: Array, target: Array, uniforms: Array
) -> tuple[Array, ...]:
    """Where all are rejected, a draw of p."""
    place, tokens = accept_siblings(candidates, offers, target, uniforms)
    return place, np.where(place < 0, drawn(target, uniforms[:, -1]), tokens)


def not_left(candidates: Array, offers: Array, target: Array, uniforms: Array) -> tuple[Array, ...]:
    """Each tested against the whole of p."""
    place, tokens = accept_siblings(candidates, offers, target, uniforms)
    p = np.take_along_axis(target, candidates, -1)
    q = np.take_along_axis(offers, candidates[..., None], -1)[..., 0]
    kept = uniforms[:, :3] * q < p
    first = np.argmax(kept, -1)
    return place, np.where(kept.any(-1), at(candidates, first), tokens)


@pytest.mark.parametrize(
    ("rule", "proposed"),
    [
        (one_expert, EXPERTS),
        (replaced, TRIMMED),
        (from_target, TRIMMED),
        (not_left, EXPERTS[0]),
        (not_left, EXPERTS),
    ],
)
def test_the_known_wrong_rules_for_siblings_are_seen(rule: Rule, proposed: Array) -> None:
    assert sibling_error(rule, proposed) > 1.5 * SIBLING_BOUND


def test_a_drafter_that_is_the_model_is_never_rejected() -> None:
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(50), (3,))
    tokens = drawn(p, rng.random((1000, 3)))
    many = np.broadcast_to(p, (1000, 3, 50))
    target = np.concatenate([many, many[:, :1]], 1)
    count, _ = accept_chain(tokens, many, target, rng.random((1000, 4)))
    assert (count == 3).all()


def test_the_share_accepted_is_one_minus_the_total_variation() -> None:
    rng = np.random.default_rng(5)
    p, q = TARGET, EXPERTS[0]
    tokens = drawn(np.tile(q, (DRAWS, 1, 1)), rng.random((DRAWS, 1)))
    count, _ = accept_chain(
        tokens, np.tile(q, (DRAWS, 1, 1)), np.tile(p, (DRAWS, 2, 1)), rng.random((DRAWS, 2))
    )
    assert count.mean() == pytest.approx(np.minimum(p, q).sum(), abs=0.006)  # four sigmas


def test_one_draft_needs_no_leading_axis_and_an_empty_one_is_a_draw_of_the_model() -> None:
    one = np.eye(W)
    count, token = accept_chain(np.array([2]), one[[2]], one[[2, 4]], np.array([0.5, 0.9]))
    assert (int(count), int(token)) == (1, 4)
    none = np.zeros((0,), int)
    count, token = accept_chain(none, np.zeros((0, W)), one[[3]], np.array([0.1]))
    assert (int(count), int(token)) == (0, 3)
    place, token = accept_siblings(np.array([1, 2]), one[[1, 2]], one[2], np.array([0.5, 0.5, 0.5]))
    assert (int(place), int(token)) == (1, 2)


def test_what_is_left_to_draw_from_forgets_what_was_drawn() -> None:
    rows = remaining(np.array([3, 0, 1]), TRIMMED)
    np.testing.assert_allclose(rows[0], TRIMMED)
    np.testing.assert_allclose(rows[1], [4 / 7, 1 / 7, 2 / 7, 0, 0, 0])
    np.testing.assert_allclose(rows[2], [0, 1 / 3, 2 / 3, 0, 0, 0])


def test_shapes_that_disagree_are_refused() -> None:
    one = np.eye(W)
    with pytest.raises(BadInput, match=r"target ends in the shape \(1, 6\); it should end in \(2"):
        accept_chain(np.array([2]), one[[2]], one[[2]], np.zeros(2))
    with pytest.raises(BadInput, match=r"uniforms ends in the shape \(2,\)"):
        accept_siblings(np.array([1, 2]), one[[1, 2]], one[2], np.zeros(2))
