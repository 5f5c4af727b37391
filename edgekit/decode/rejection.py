"""Rejection rules for drafters that bring probabilities: what is kept follows the model's own.

p is the model's distribution after temperature and filters, q the one a token was drawn from, as
it was drawn from: after the drafter's own temperature and trimming. All arrays are float64
probabilities over the vocabulary [V]; leading axes, where given, are independent drafts.
"""

from __future__ import annotations

import numpy as np

from edgekit.errors import BadInput
from edgekit.spec import Array

_ROUNDING = 1e-12  # less mass than this is left where p and q are equal


def accept_chain(
    tokens: Array, proposed: Array, target: Array, uniforms: Array
) -> tuple[Array, Array]:
    """How many of a chain's ``tokens`` are kept, and the token behind them (arXiv 2211.17192).

    ``tokens`` [..., depth] were drawn from ``proposed`` [..., depth, V]; ``target``
    [..., depth + 1, V] is the model's answer at each place, ``uniforms`` [..., depth + 1] are
    numbers in [0, 1). A token x is kept with probability ``min(1, p(x) / q(x))``; in place of the
    first that is not stands a draw of ``p - q``, cut at 0; behind a whole chain one of p. Raises
    ``BadInput`` where the shapes disagree.
    """
    depth, vocabulary = tokens.shape[-1], target.shape[-1]
    _check("proposed", proposed, (depth, vocabulary))
    _check("target", target, (depth + 1, vocabulary))
    _check("uniforms", uniforms, (depth + 1,))
    ids = tokens[..., None]
    wanted = np.take_along_axis(target[..., :depth, :], ids, -1)[..., 0]
    offered = np.take_along_axis(proposed, ids, -1)[..., 0]
    kept = uniforms[..., :depth] * offered < wanted
    count = np.cumprod(kept, axis=-1).sum(-1)
    place = count[..., None, None]
    answer = np.take_along_axis(target, place, -2)[..., 0, :]
    # Nothing was offered behind the whole chain, so all of p is left there.
    offers = np.concatenate([proposed, np.zeros_like(target[..., :1, :])], -2)
    left = _residual(answer, np.take_along_axis(offers, place, -2)[..., 0, :])
    return count, drawn(left, uniforms[..., depth])


def accept_siblings(
    candidates: Array, proposed: Array, target: Array, uniforms: Array
) -> tuple[Array, Array]:
    """Which of several ``candidates`` for one place is kept (-1: none), and the place's token.

    ``candidates`` [..., k] stand in the order they were drawn, each from its row of ``proposed``
    [..., k, V]: of one drafter without replacement, see ``remaining``, or of an expert each.
    ``target`` is p [..., V], ``uniforms`` [..., k + 1] are numbers in [0, 1). Recursive rejection
    (arXiv 2305.09781; without replacement, 2402.14160): each is tested in turn as a chain's
    token is, against what those before it have left of p; where none is kept, the token is
    drawn from what is left. Raises ``BadInput`` where the shapes disagree.
    """
    count, vocabulary = candidates.shape[-1], target.shape[-1]
    _check("proposed", proposed, (count, vocabulary))
    _check("target", target, (vocabulary,))
    _check("uniforms", uniforms, (count + 1,))
    left = target
    place = np.full(candidates.shape[:-1], -1)
    for turn in range(count):
        offers = proposed[..., turn, :]
        ids = candidates[..., turn, None]
        wanted = np.take_along_axis(left, ids, -1)[..., 0]
        offered = np.take_along_axis(offers, ids, -1)[..., 0]
        kept = uniforms[..., turn] * offered < wanted
        place = np.where((place < 0) & kept, turn, place)
        left = _residual(left, offers)
    chosen = np.take_along_axis(candidates, np.maximum(place, 0)[..., None], -1)[..., 0]
    return place, np.where(place < 0, drawn(left, uniforms[..., count]), chosen)


def remaining(candidates: Array, proposed: Array) -> Array:
    """What each candidate was drawn from where none is drawn twice: [..., k, V].

    ``proposed`` is q [..., V], or a row for each candidate [..., k, V], as for the experts of
    Jakiro (arXiv 2502.06282). Row j is q without the candidates before j, its sum 1 again.
    """
    count = candidates.shape[-1]
    single = proposed.ndim == candidates.ndim
    rows = np.repeat(proposed[..., None, :], count, -2) if single else proposed.copy()
    _check("proposed", rows, (count, proposed.shape[-1]))
    for turn in range(count - 1):
        np.put_along_axis(rows[..., turn + 1 :, :], candidates[..., turn, None, None], 0.0, -1)
    mass = rows.sum(-1, keepdims=True)
    return np.asarray(rows / np.where(mass > 0, mass, 1.0))


def drawn(probabilities: Array, uniforms: Array) -> Array:
    """The token [...] that each of ``uniforms`` [...] picks of ``probabilities`` [..., V]."""
    sums = np.cumsum(probabilities, -1)
    # Scaled by the last sum, so that rounding leaves no number beyond it.
    place = (sums <= uniforms[..., None] * sums[..., -1:]).sum(-1)
    return np.asarray(np.minimum(place, probabilities.shape[-1] - 1))


def _residual(answer: Array, offers: Array) -> Array:
    """``p - q`` cut at 0, its sum 1; p itself where nothing is left, since then p is q."""
    left = np.maximum(answer - offers, 0.0)
    mass = left.sum(-1, keepdims=True)
    return np.where(mass > _ROUNDING, left / np.maximum(mass, _ROUNDING), answer)


def _check(name: str, array: Array, shape: tuple[int, ...]) -> None:
    found = array.shape[array.ndim - len(shape) :] if array.ndim >= len(shape) else array.shape
    if found != shape:
        raise BadInput(f"{name} ends in the shape {found}; it should end in {shape}.")
