"""The ops that treat each element alone: arithmetic, comparison, logic, cast, select.

Source: the MIL op reference, groups elementwise_unary, elementwise_binary and control_flow.select.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Real, as_dtype

Unary: TypeAlias = Callable[[Tensor], Tensor]
Binary: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _unary(function: Unary) -> Callable[..., Tensor]:
    return lambda x: function(x)


def _binary(function: Binary) -> Callable[..., Tensor]:
    return lambda x, y: function(x, y)


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    # Between integers the result has an integer type, so the fraction is cut off.
    integers = not (x.is_floating_point() or y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc") if integers else torch.div(x, y)


def _floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


# The epsilons: a file states its own; these are what an op without one gets.
def inverse(x: Tensor, epsilon: Real = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


def log(x: Tensor, epsilon: Real = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: Real = 1e-12) -> Tensor:
    # Not torch.rsqrt: its vectorized kernel approximates.
    return 1.0 / torch.sqrt(x + epsilon)


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, alpha), beta)


def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.maximum(x, alpha)


def cast(x: Tensor, dtype: str) -> Tensor:
    return as_dtype(x, dtype)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


OPS: dict[str, Callable[..., Tensor]] = {
    "abs": _unary(torch.abs),
    "acos": _unary(torch.acos),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "cast": cast,
    "ceil": _unary(torch.ceil),
    "clip": clip,
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "inverse": inverse,
    "log": log,
    "logical_not": _unary(torch.logical_not),
    "round": _unary(torch.round),  # halves go to the even neighbour, as in MIL
    "rsqrt": rsqrt,
    "sign": _unary(torch.sign),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "threshold": threshold,
    "add": _binary(torch.add),
    "equal": _binary(torch.eq),
    "floor_div": _binary(_floor_div),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),  # the sign of the divisor
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "real_div": _binary(_real_div),
    "select": select,
    "sub": _binary(torch.sub),
}
