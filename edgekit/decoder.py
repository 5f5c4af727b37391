"""A decoder-only language model as plain data: what every target builds its own graph from.

Needs numpy alone. The graph is that of the Llama family (Touvron et al., arXiv 2302.13971): in
each layer ``x += o(attention(norm(x)))`` and ``x += down(silu(gate(norm(x))) * up(norm(x)))``,
with rotary positions (RoPE, arXiv 2104.09864, the two halves of a head rotated against each
other) and grouped queries; then a norm and the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgekit.blocks import Blocks
from edgekit.errors import DamagedFile
from edgekit.spec import Array

Weight = Array | Blocks  # float32, or codes with scales

# The matrices of a layer, in the order of their use: [output features, input features].
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class DecoderSpec:
    """The sizes of a decoder. ``rope`` holds ``head_dim / 2`` inverse frequencies, in radians a
    position, with whatever scaling the model has; ``context`` is how many positions it knows.

    ``qkv_bias``: q, k and v add a bias (Qwen2.5). ``qk_norm``: each head of q and of k is
    normalized before it is rotated (Qwen3). ``tied``: the head is the embedding.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    epsilon: float
    rope: tuple[float, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

    def rotation(self, positions: int) -> tuple[Array, Array]:
        """Cosines and sines, float32 [positions, head_dim / 2]."""
        angles = np.outer(np.arange(positions, dtype=np.float64), np.asarray(self.rope))
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and the shape of every weight, in the order of their use."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "q": (wide, self.hidden),
            "k": (narrow, self.hidden),
            "v": (narrow, self.hidden),
            "o": (self.hidden, wide),
            "gate": (self.ffn, self.hidden),
            "up": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            layer = f"layers.{index}"
            shapes[f"{layer}.attention_norm"] = shapes[f"{layer}.ffn_norm"] = (self.hidden,)
            shapes |= {f"{layer}.{name}": size for name, size in sizes.items()}
            if self.qkv_bias:
                shapes |= {f"{layer}.{name}_bias": sizes[name][:1] for name in "qkv"}
            if self.qk_norm:
                shapes |= {f"{layer}.{name}_norm": (self.head_dim,) for name in "qk"}
        shapes["norm"] = (self.hidden,)
        if not self.tied:
            shapes["head"] = shapes["embedding"]
        return shapes

    def to_json(self) -> dict[str, object]:
        """Every field."""
        return {**asdict(self), "rope": list(self.rope)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DecoderSpec:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        try:
            return cls(**{**value, "rope": tuple(map(float, value["rope"]))})
        except (TypeError, KeyError, ValueError) as cause:
            raise DamagedFile(f"a decoder's sizes are malformed: {cause!r}") from cause


@dataclass(frozen=True)
class Decoder:
    """What an adapter lowers: sizes, weights by the names of ``DecoderSpec.shapes``, and how many
    tokens its key-value cache holds.

    Norms and biases are float32 arrays; a matrix, the embedding among them, may be ``Blocks``.
    """

    spec: DecoderSpec
    weights: Mapping[str, Weight]
    capacity: int

    def floats(self, name: str) -> Array:
        """The weight called ``name``, float32."""
        weight = self.weights[name]
        return weight.floats() if isinstance(weight, Blocks) else weight

    @property
    def head(self) -> str:
        """The name of the matrix that gives logits."""
        return "embedding" if self.spec.tied else "head"
