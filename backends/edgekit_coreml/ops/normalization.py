"""The normalizations, by their formulas. Source: the MIL op reference, group normalization.

An epsilon stands inside the square root. A parameter per channel lies along axis 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit_coreml.ops.arguments import Real, Whole, Wholes, along, integer, ints


def _standardized(x: Tensor, axes: list[int], epsilon: Real) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    variance = centered.square().mean(axes, keepdim=True)
    return centered / torch.sqrt(variance + epsilon)


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    y = x if gamma is None else x * gamma
    return y if beta is None else y + beta


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Real = 1e-5,
) -> Tensor:
    rank = x.dim()
    y = (x - along(mean, rank, 1)) / torch.sqrt(along(variance, rank, 1) + epsilon)
    return _scaled(y, *(None if p is None else along(p, rank, 1) for p in (gamma, beta)))


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Real = 1e-5
) -> Tensor:
    y = _standardized(x, list(range(2, x.dim())), epsilon)
    return _scaled(y, *(None if p is None else along(p, x.dim(), 1) for p in (gamma, beta)))


def l2_norm(x: Tensor, epsilon: Real = 1e-6) -> Tensor:
    """Over the last three axes, whatever stands before them."""
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def layer_norm(
    x: Tensor,
    axes: Wholes | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Real = 1e-5,
) -> Tensor:
    """The axes need be neither last nor adjacent; gamma and beta lie along them in rising order."""
    dims = [axis % x.dim() for axis in (range(x.dim()) if axes is None else ints(axes))]
    shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    y = _standardized(x, dims, epsilon)
    return _scaled(y, *(None if p is None else p.reshape(shape) for p in (gamma, beta)))


def local_response_norm(
    x: Tensor, size: Whole, alpha: Real = 1e-4, beta: Real = 0.75, k: Real = 1.0
) -> Tensor:
    """Over ``size`` neighbouring channels; an even size reaches one further back."""
    count = integer(size)
    flat = x.square().flatten(2)
    padded = F.pad(flat, [0, 0, count // 2, (count - 1) // 2])
    sums = padded.unfold(1, count, 1).sum(-1).reshape(x.shape)
    return x / torch.pow(k + alpha * sums / count, beta)


OPS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "local_response_norm": local_response_norm,
}
