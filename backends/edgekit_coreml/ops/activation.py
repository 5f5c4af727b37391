"""The activations. Source: the MIL op reference, group activation.

Where the reference gives one parameter per channel, channels are axis 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit_coreml.ops.arguments import Whole, along, integer


def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.where(x >= 0, x, alpha * x), beta)


def elu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"gelu has no mode {mode!r}")


def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x * alpha + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, along(alpha, x.dim(), 1) * x)


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * torch.tanh(beta * x)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    # Not F.softplus: it becomes the identity above a threshold.
    return torch.logaddexp(x, torch.zeros_like(x))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return along(alpha, x.dim(), 1) * softplus(x * along(beta, x.dim(), 1))


def softmax(x: Tensor, axis: Whole = -1) -> Tensor:
    return torch.softmax(x, integer(axis))


def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


OPS: dict[str, Callable[..., Tensor]] = {
    "clamped_relu": clamped_relu,
    "elu": elu,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "linear_activation": linear_activation,
    "prelu": prelu,
    "relu": relu,
    "relu6": relu6,
    "scaled_tanh": scaled_tanh,
    "sigmoid": sigmoid,
    "sigmoid_hard": sigmoid_hard,
    "silu": silu,
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "softmax": softmax,
    "softsign": softsign,
    "thresholded_relu": thresholded_relu,
}
