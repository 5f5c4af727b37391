"""From logits to the next token: temperature, top-k, top-p and min-p, with a seed.

The noise of a token depends on the seed and on how many tokens came before it, and on nothing
else: two ways of decoding that see the same logits draw the same text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgekit.errors import BadInput
from edgekit.spec import Array

_HEAD = 1024  # top-p sorts so many of the likeliest, and all where those are too few
_CHUNK = 256  # weights that are summed before the token is looked for among them


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    ``temperature`` 0 takes the likeliest (of equals, the lowest id). Above 0: logits are divided
    by it, then ``top_k`` keeps the k likeliest (0: all), ``top_p`` the fewest whose probabilities
    reach p (nucleus sampling, arXiv 1904.09751), ``min_p`` those of at least p times the
    likeliest's probability (arXiv 2407.01082). Raises ``BadInput`` for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100, "0 takes the likeliest token")
        _check("top-k", self.top_k, 0, 1 << 31, "0 keeps all tokens")
        _check("top-p", self.top_p, 0, 1, "1 keeps all tokens")
        _check("min-p", self.min_p, 0, 1, "0 keeps all tokens")
        _check("seed", self.seed, 0, (1 << 63) - 1, "any whole number will do")
        if self.top_p == 0:
            raise BadInput("top-p is 0, which keeps no token; 1 keeps all of them.")

    def distribution(self, logits: Array) -> tuple[Array, Array]:
        """Ids, ascending, and their float64 probabilities, of one row of logits."""
        ids, weights = self._kept(logits)
        exact = weights.astype(np.float64)
        return ids, exact / exact.sum()

    def choose(self, logits: Array, index: int) -> int:
        """The token after ``index`` others, of one row of float32 logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        ids, weights = self._kept(logits)
        noise = np.random.Generator(np.random.Philox(key=self.seed, counter=index)).random()
        return int(ids[_drawn(weights, noise)])

    def _kept(self, logits: Array) -> tuple[Array, Array]:
        """Ids, ascending, and float32 weights: probabilities but for a factor."""
        weights = np.exp((logits - logits.max()) / np.float32(self.temperature))
        if self.top_k and self.top_k < len(weights):
            ids = _likeliest(weights, self.top_k)
        else:
            ids = np.arange(len(weights))
        if self.top_p < 1:
            ids = ids[_nucleus(weights[ids], self.top_p)]
        if self.min_p:
            ids = ids[weights[ids] >= self.min_p * weights[ids].max()]
        # All of them need no copy.
        return ids, weights if len(ids) == len(weights) else weights[ids]


def _likeliest(weights: Array, count: int) -> Array:
    """Indices, ascending, of the ``count`` largest; of equals, the lowest."""
    least = np.partition(weights, -count)[-count]
    above = np.flatnonzero(weights > least)
    equal = np.flatnonzero(weights == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(weights: Array, share: float) -> Array:
    """Indices, ascending, of the fewest largest that reach ``share`` of the sum."""
    total = weights.sum(dtype=np.float64)
    head = _likeliest(weights, min(_HEAD, len(weights)))
    if weights[head].sum(dtype=np.float64) < share * total:
        head = np.arange(len(weights))
    order = head[np.argsort(-weights[head], kind="stable")]
    reached = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: int(np.searchsorted(reached, share * total)) + 1])


def _drawn(weights: Array, noise: float) -> int:
    """The index where the running sum passes ``noise``, in [0, 1), of the whole.

    Chunk by chunk first: a running sum over a whole vocabulary takes longer than all the rest.
    """
    starts = np.arange(0, len(weights), _CHUNK)
    reached = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    wanted = noise * reached[-1]
    chunk = min(int(np.searchsorted(reached, wanted, side="right")), len(starts) - 1)
    before = reached[chunk - 1] if chunk else 0.0
    part = weights[starts[chunk] : starts[chunk] + _CHUNK]
    place = int(np.searchsorted(np.cumsum(part, dtype=np.float64), wanted - before, side="right"))
    # Rounding may carry the search beyond the last that has a weight.
    return int(starts[chunk]) + min(place, int(np.flatnonzero(part)[-1]))


def _check(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise BadInput(f"{name} is {value:g}; it is a number from {low:g} to {high:g}; {hint}.")


GREEDY = Sampling()
