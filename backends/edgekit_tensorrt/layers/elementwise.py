"""Layers that compute each element from the elements at its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Lacks, Run
from edgekit_tensorrt.layers.values import converted
from edgekit_tensorrt.network import Layer


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Integers divide towards zero, as in C."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": _quotient,
    "POW": torch.pow,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "AND": torch.bitwise_and,
    "OR": torch.bitwise_or,
    "XOR": torch.bitwise_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "ASINH": torch.asinh,
    "ACOSH": torch.acosh,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}


def _softplus(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.logaddexp(beta * x, torch.zeros(()))


def _selu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return beta * torch.where(x > 0, x, alpha * torch.expm1(x))


ACTIVATION: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, alpha, beta: torch.relu(x),
    "SIGMOID": lambda x, alpha, beta: torch.sigmoid(x),
    "TANH": lambda x, alpha, beta: torch.tanh(x),
    "LEAKY_RELU": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x),
    "ELU": lambda x, alpha, beta: torch.where(x >= 0, x, alpha * torch.expm1(x)),
    "SELU": _selu,
    "SOFTSIGN": lambda x, alpha, beta: F.softsign(x),
    "SOFTPLUS": _softplus,
    "CLIP": lambda x, alpha, beta: x.clamp(alpha, beta),
    "HARD_SIGMOID": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "SCALED_TANH": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "THRESHOLDED_RELU": lambda x, alpha, beta: torch.where(x > alpha, x, torch.zeros(())),
    "GELU_ERF": lambda x, alpha, beta: F.gelu(x),
    "GELU_TANH": lambda x, alpha, beta: F.gelu(x, approximate="tanh"),
}


def _elementwise(call: Call) -> Tensor:
    return ELEMENTWISE[call["op"]](call.value(0), call.value(1))


def _unary(call: Call) -> Tensor:
    return UNARY[call["op"]](call.value(0))


def _activation(call: Call) -> Tensor:
    return ACTIVATION[call["type"]](call.value(0), call["alpha"], call["beta"])


def _parametric_relu(call: Call) -> Tensor:
    x = call.value(0)
    return torch.where(x < 0, x * call.value(1), x)


def _scale(call: Call) -> Tensor:
    """(x * scale + shift) ** power, each one number, one per channel, or one per element."""
    x = call.value(0)
    shape = {
        "UNIFORM": [],
        "CHANNEL": [-1 if axis == call["channel_axis"] else 1 for axis in range(x.ndim)],
        "ELEMENTWISE": [1, *x.shape[1:]],
    }[call["mode"]]
    scale, shift, power = (call.weights(role) for role in ("scale", "shift", "power"))
    x = x if scale is None else x * scale.reshape(shape)
    x = x if shift is None else x + shift.reshape(shape)
    return x if power is None else x.pow(power.reshape(shape))


def _select(call: Call) -> Tensor:
    return torch.where(call.value(0), call.value(1), call.value(2))


def _cast(call: Call) -> Tensor:
    return converted(call.value(0), call.dtypes[0])


def _lacks(attribute: str, known: dict[str, Callable[..., Tensor]]) -> Lacks:
    def lacks(layer: Layer) -> str:
        mode = str(layer.attributes[attribute])
        return "" if mode in known else mode

    return lacks


RUN: dict[str, Run] = {
    "ACTIVATION": _activation,
    "CAST": _cast,
    "ELEMENTWISE": _elementwise,
    "IDENTITY": _cast,
    "PARAMETRIC_RELU": _parametric_relu,
    "SCALE": _scale,
    "SELECT": _select,
    "UNARY": _unary,
}
LACKS: dict[str, Lacks] = {
    "ACTIVATION": _lacks("type", ACTIVATION),
    "ELEMENTWISE": _lacks("op", ELEMENTWISE),
    "UNARY": _lacks("op", UNARY),
}
