"""Rotary positions: the inverse frequencies of a model, with the scalings that models come with.

A frequency is in radians a position (arXiv 2104.09864). ``linear`` divides all of them by a
factor (arXiv 2306.15595); ``llama3`` divides the slow ones, leaves the fast ones, and blends in
between (as in Meta's code for Llama 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekit.errors import BadModel
from edgekit.spec import Array

SCALINGS = ("default", "linear", "llama3")


def frequencies(head_dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """The frequencies of a ``config.json``'s ``rope_scaling`` or ``rope_parameters``; {} for none.

    Raises ``BadModel`` for a scaling that is not known here, or without its numbers.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not 1 < base < math.inf:
        raise BadModel(f"the base of the model's positions is {base}; it is above 1, as 10000.")
    plain: Array = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    try:
        if kind == "default":
            scaled = plain
        elif kind == "linear":
            scaled = plain / _above(0, scaling["factor"])
        elif kind == "llama3":
            scaled = _llama3(plain, scaling)
        else:
            raise BadModel(
                f"the model scales its positions by {kind!r}; known are: {', '.join(SCALINGS)}. "
                "Choose a model with one of these."
            )
    except BadModel:
        raise
    except (KeyError, TypeError, ValueError) as cause:
        raise BadModel(
            f"the model's {kind} scaling of positions is incomplete: {dict(scaling)}."
        ) from cause
    return tuple(map(float, scaled))


def _above(least: float, value: Any) -> float:
    if not least < float(value) < math.inf:
        raise ValueError(f"{value} is not above {least}")
    return float(value)


def _llama3(plain: Array, scaling: Mapping[str, Any]) -> Array:
    factor = _above(0, scaling["factor"])
    old = _above(0, scaling["original_max_position_embeddings"])
    low = _above(0, scaling["low_freq_factor"])
    high = _above(low, scaling["high_freq_factor"])
    turns = old * plain / (2 * math.pi)  # how often each pair turns within the old context
    blend = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow, divided; 1: fast, left alone
    return (1 - blend) * plain / factor + blend * plain
