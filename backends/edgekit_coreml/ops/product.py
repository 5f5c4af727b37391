"""Matrix products and attention. Source: the MIL op reference, groups linear and transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Flag, flag


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = matmul(x, weight, transpose_y=True)
    return y if bias is None else y + bias


def matmul(x: Tensor, y: Tensor, transpose_x: Flag = False, transpose_y: Flag = False) -> Tensor:
    """A vector is not transposed. Mixed types, allowed next to a constant, are promoted."""
    left = x.mT if flag(transpose_x) and x.dim() > 1 else x
    right = y.mT if flag(transpose_y) and y.dim() > 1 else y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return torch.matmul(left.to(dtype), right.to(dtype))


def einsum(values: tuple[Tensor, ...], equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *values)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """A boolean mask says what takes part; any other is added to the scores."""
    scores = torch.matmul(query, key.mT) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


OPS: dict[str, Callable[..., Tensor]] = {
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
