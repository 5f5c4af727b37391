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

# exp(-50) of the likeliest, times any vocabulary, is less than float64 rounds away.
_NEGLIGIBLE = 50.0


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
        """Ids, the likeliest first, and their float64 probabilities, of one row of logits."""
        scaled = logits.astype(np.float64) / self.temperature
        highest = scaled.max()
        ids = np.flatnonzero(scaled >= highest - _NEGLIGIBLE)
        ids = ids[np.argsort(-scaled[ids], kind="stable")]
        if self.top_k:
            ids = ids[: self.top_k]
        weights = np.exp(scaled[ids] - highest)
        probabilities = weights / weights.sum()
        if self.top_p < 1:
            count = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
            ids, probabilities = ids[:count], probabilities[:count]
        if self.min_p:
            kept = probabilities >= self.min_p * probabilities[0]
            ids, probabilities = ids[kept], probabilities[kept]
        return ids, probabilities / probabilities.sum()

    def choose(self, logits: Array, index: int) -> int:
        """The token after ``index`` others, of one row of float32 logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = self.distribution(logits)
        noise = np.random.Generator(np.random.Philox(key=self.seed, counter=index)).random()
        place = int(np.searchsorted(np.cumsum(probabilities), noise, side="right"))
        return int(ids[min(place, len(ids) - 1)])


def _check(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise BadInput(f"{name} is {value:g}; it is a number from {low:g} to {high:g}; {hint}.")


GREEDY = Sampling()
