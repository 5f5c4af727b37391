"""Products of matrices, and attention, which is two of them with a softmax between."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekit_tensorrt.layers.call import Call, Lacks, Run
from edgekit_tensorrt.network import Layer


def _matrix_multiply(call: Call) -> Tensor:
    """A vector is a row on the left and a column on the right, and leaves no axis."""
    a, b = call.value(0), call.value(1)
    op0, op1 = call["op0"], call["op1"]
    a = {"NONE": a, "TRANSPOSE": a.mT if a.ndim > 1 else a, "VECTOR": a.unsqueeze(-2)}[op0]
    b = {"NONE": b, "TRANSPOSE": b.mT if b.ndim > 1 else b, "VECTOR": b.unsqueeze(-1)}[op1]
    result = torch.matmul(a, b)
    result = result.squeeze(-1) if op1 == "VECTOR" else result
    return result.squeeze(-1 if op1 == "VECTOR" else -2) if op0 == "VECTOR" else result


def _einsum(call: Call) -> Tensor:
    values = [call.value(index) for index in range(len(call.inputs))]
    return torch.einsum(call["equation"], *values)


def _attention(call: Call) -> Tensor:
    """The scale is in the query and the key already. Heads of keys serve several of queries."""
    query, key, value = call.value(0), call.value(1), call.value(2)
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    scores = query @ key.mT
    mask = call.optional(3)
    if mask is not None:
        masked = mask.dtype == torch.bool
        scores = torch.where(mask, scores, -torch.inf) if masked else scores + mask
    kind = call["causal_kind"]
    if kind != "NONE":
        rows, columns = scores.shape[-2:]
        last = columns - rows if kind == "LOWER_RIGHT" else 0
        allowed = torch.ones(rows, columns, dtype=torch.bool).tril(last)
        scores = torch.where(allowed, scores, -torch.inf)
    if call["norm_op"] == "SOFTMAX":
        scores = torch.softmax(scores, -1)
    return scores @ value


def _attention_end(call: Call) -> Tensor:
    return call.value(0)


def _lacks_attention(layer: Layer) -> str:
    """The kind of causal mask has a name in later versions only; before there was one."""
    if layer.attributes.get("normalization_quantize_scale") is not None:
        return "quantized"
    return "" if "causal_kind" in layer.attributes else "without a kind of causal mask"


def _rotary(call: Call) -> Tensor:
    """Turns pairs of numbers by an angle that depends on the position."""
    x, cosine, sine = call.value(0), call.value(1), call.value(2)
    positions = call.optional(3)
    if positions is not None:
        cosine, sine = cosine[positions.to(torch.int64)], sine[positions.to(torch.int64)]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    width = call["rotary_embedding_dim"] or x.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    if call["interleaved"]:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    pair = (first * cosine - second * sine, first * sine + second * cosine)
    joined = torch.stack(pair, -1).flatten(-2) if call["interleaved"] else torch.cat(pair, -1)
    return torch.cat([joined, kept], -1)


RUN: dict[str, Run] = {
    "ATTENTION_INPUT": _attention,
    "ATTENTION_OUTPUT": _attention_end,
    "EINSUM": _einsum,
    "MATRIX_MULTIPLY": _matrix_multiply,
    "ROTARY_EMBEDDING": _rotary,
}
LACKS: dict[str, Lacks] = {"ATTENTION_INPUT": _lacks_attention}
