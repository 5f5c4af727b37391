"""Random draws: of the right shape, type and distribution, and never the device's own numbers.

Source: the MIL op reference, group random. The device's generator is not documented, so a program
with one of these ops cannot be compared value by value: see ``NONDETERMINISTIC``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Real, Whole, Wholes, integer, ints, real


def _generator(seed: Whole) -> torch.Generator:
    """A seed that is not negative gives the same draws each time."""
    generator = torch.Generator()
    if integer(seed) >= 0:
        generator.manual_seed(integer(seed))
    else:
        generator.seed()
    return generator


def random_uniform(shape: Wholes, low: Real = 0.0, high: Real = 1.0, seed: Whole = -1) -> Tensor:
    drawn = torch.rand(ints(shape), generator=_generator(seed))
    return drawn * (real(high) - real(low)) + real(low)


def random_normal(shape: Wholes, mean: Real = 0.0, stddev: Real = 1.0, seed: Whole = -1) -> Tensor:
    drawn = torch.randn(ints(shape), generator=_generator(seed))
    return drawn * real(stddev) + real(mean)


def random_bernoulli(shape: Wholes, prob: Real = 0.5, seed: Whole = -1) -> Tensor:
    return (torch.rand(ints(shape), generator=_generator(seed)) < real(prob)).float()


def random_categorical(
    x: Tensor, mode: str = "logits", size: Whole = 1, seed: Whole = -1
) -> Tensor:
    """Indices, in the float type of ``x``, drawn with replacement along a new last axis."""
    chances = torch.softmax(x, -1) if mode == "logits" else x
    rows = chances.reshape(-1, x.shape[-1])
    drawn = torch.multinomial(rows, integer(size), replacement=True, generator=_generator(seed))
    return drawn.reshape(*x.shape[:-1], integer(size)).float()


OPS: dict[str, Callable[..., Tensor]] = {
    "random_bernoulli": random_bernoulli,
    "random_categorical": random_categorical,
    "random_normal": random_normal,
    "random_uniform": random_uniform,
}
NONDETERMINISTIC = frozenset(OPS)
