"""Reads a GGUF file: sizes, weights with their own codes and scales, tokenizer.

The container is read by the ``gguf`` package; how the codes of each type are laid out is in its
documentation and in ggml's source. A type that keeps its codes becomes ``Blocks``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgekit.blocks import Blocks
from edgekit.decoder import DecoderSpec, Weight
from edgekit.spec import Array

BLOCK = 32


def _halves(raw: Array) -> Array:
    """Two bytes each to float32."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """16 bytes to 32 codes: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _q4_0(raw: Array) -> Blocks:
    """``d * (q - 8)``: a float16 scale and 16 bytes for each 32 weights."""
    blocks = raw.reshape(raw.shape[0], -1, 18)
    codes = _nibbles(blocks[..., 2:])
    return Blocks(codes.reshape(len(raw), -1), _halves(blocks[..., :2]), 4)


def _q4_1(raw: Array) -> Blocks:
    """``d * q + m``: a float16 scale, a float16 minimum and 16 bytes for each 32 weights."""
    blocks = raw.reshape(raw.shape[0], -1, 20)
    scales, minimums = _halves(blocks[..., :2]), _halves(blocks[..., 2:4])
    codes = _nibbles(blocks[..., 4:])
    return Blocks(codes.reshape(len(raw), -1), scales, 4, minimums + 8 * scales)


def _q8_0(raw: Array) -> Blocks:
    """``d * q``: a float16 scale and 32 signed bytes for each 32 weights."""
    blocks = raw.reshape(raw.shape[0], -1, 34)
    codes = (blocks[..., 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    return Blocks(codes.reshape(len(raw), -1), _halves(blocks[..., :2]), 8)


_OWN_CODES: dict[str, Callable[[Array], Blocks]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}


def weights_from_gguf(path: Path) -> tuple[DecoderSpec, dict[str, Weight]]:
    """Sizes and weights of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = reader.fields

    def value(name: str, default: Any = None) -> Any:
        return fields[name].contents() if name in fields else default

    family = value("general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = value(f"{family}.attention.head_count")
    hidden = value(f"{family}.embedding_length")
    head_dim = value(f"{family}.attention.key_length", hidden // heads)
    frequencies = 1.0 / value(f"{family}.rope.freq_base", 10000.0) ** (
        np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    )
    if "rope_freqs.weight" in tensors:
        frequencies /= np.asarray(tensors["rope_freqs.weight"].data, np.float64)
    spec = DecoderSpec(
        layers=value(f"{family}.block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=value(f"{family}.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=value(f"{family}.feed_forward_length"),
        vocabulary=int(tensors["token_embd.weight"].shape[1]),
        context=value(f"{family}.context_length"),
        epsilon=value(f"{family}.attention.layer_norm_rms_epsilon"),
        rope=tuple(map(float, frequencies)),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tied="output.weight" not in tensors,
    )
    weights: dict[str, Weight] = {}
    for name in spec.shapes():
        weight = _weight(tensors[_gguf_name(name)])
        if family == "llama" and name.rpartition(".")[2] in ("q", "k", "q_bias", "k_bias"):
            rows = _half_rotation(len(_codes(weight)), head_dim)
            weight = weight.rows(rows) if isinstance(weight, Blocks) else weight[rows]
        weights[name] = weight
    return spec, weights


def _codes(weight: Weight) -> Array:
    return weight.codes if isinstance(weight, Blocks) else weight


def _half_rotation(rows: int, head_dim: int) -> Array:
    """The llama family's q and k lie there with the two of a rotated pair side by side."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)


def _weight(tensor: Any) -> Weight:
    own = _OWN_CODES.get(tensor.tensor_type.name)
    data = np.array(tensor.data)
    if own is not None:
        return own(data)
    return np.asarray(gguf.dequantize(data, tensor.tensor_type), np.float32)


_NAMES = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    **{name: f"attn_{name}.weight" for name in "qkv"},
    **{f"{name}_bias": f"attn_{name}.bias" for name in "qkv"},
    **{f"{name}_norm": f"attn_{name}_norm.weight" for name in "qk"},
    "o": "attn_output.weight",
    **{name: f"ffn_{name}.weight" for name in ("gate", "up", "down")},
}


def _gguf_name(name: str) -> str:
    *layer, last = name.split(".")
    return f"blk.{layer[1]}.{_NAMES[last]}" if layer else _NAMES[last]
