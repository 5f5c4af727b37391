"""MIL op types and the torch functions that carry them out: ``OPS``.

A function is called with MIL's input names and defaults. Floats arrive and leave as float32, also
those that the program holds in float16: whoever runs the program rounds each result to the type
that the op declares. Integers are int32 or narrower, strings are ``str``, scalars 0-d tensors, and
variadic inputs tuples. Constants, states, lists and control flow are the runner's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edgekit_coreml.ops import (
    activation,
    convolution,
    creation,
    elementwise,
    indexing,
    normalization,
    product,
    quantization,
    random,
    recurrent,
    reduction,
    resizing,
    shaping,
    slicing,
    suppression,
)
from edgekit_coreml.ops.random import NONDETERMINISTIC

__all__ = ["NONDETERMINISTIC", "OPS"]

_GROUPS = (
    activation,
    convolution,
    creation,
    elementwise,
    indexing,
    normalization,
    product,
    quantization,
    random,
    recurrent,
    reduction,
    resizing,
    shaping,
    slicing,
    suppression,
)


def _merged() -> dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]:
    merged: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {}
    for group in _GROUPS:
        twice = merged.keys() & group.OPS.keys()
        assert not twice, f"two groups define {sorted(twice)}"
        merged.update(group.OPS)
    return merged


OPS = _merged()
