"""The Llama family in PyTorch, eager: the truth that every artifact of a language model is held to.

One module for Llama, SmolLM2, Qwen2.5 (biases) and Qwen3 (query and key norms), by the sizes of
``DecoderSpec``: RMSNorm (arXiv 1910.07467), rotary positions (arXiv 2104.09864, the two halves of a
head rotated against each other), grouped queries (arXiv 2305.13245), SwiGLU (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.blocks import Blocks
from edgekit.decoder import DecoderSpec, Weight

Cache = list[tuple[Tensor, Tensor]]  # for each layer keys and values, [batch, heads, tokens, dim]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.epsilon))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair ``(x[i], x[i + dim / 2])`` of a head: x [..., tokens, dim], cos and sin
    [tokens, dim / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """Causal attention with grouped queries and a cache that grows by concatenation."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q = nn.Linear(spec.hidden, wide, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.hidden, narrow, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.hidden, narrow, bias=spec.qkv_bias)
        self.o = nn.Linear(wide, spec.hidden, bias=False)
        self.q_norm = RMSNorm(spec.head_dim, spec.epsilon) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_dim, spec.epsilon) if spec.qk_norm else nn.Identity()

    def _split(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads * dim] to [batch, heads, tokens, dim]."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = rotate(self.q_norm(self._split(self.q(x))), cos, sin)
        k = rotate(self.k_norm(self._split(self.k(x))), cos, sin)
        v = self._split(self.v(x))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        tokens, seen = q.shape[2], k.shape[2]
        mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2)), (k, v)


class Layer(nn.Module):
    """Attention, then SwiGLU, each after a norm and added to its input."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden, spec.epsilon)
        self.attention = Attention(spec)
        self.ffn_norm = RMSNorm(spec.hidden, spec.epsilon)
        self.gate = nn.Linear(spec.hidden, spec.ffn, bias=False)
        self.up = nn.Linear(spec.hidden, spec.ffn, bias=False)
        self.down = nn.Linear(spec.ffn, spec.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, seen = self.attention(self.attention_norm(x), cos, sin, past)
        x = x + attended
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), seen


class Llama(nn.Module):
    """The whole model: int64 tokens [batch, n] to float32 logits [batch, n, vocabulary].

    ``cache`` is a list that the call fills and grows in place: pass an empty one to start, and
    the same one to go on.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.hidden)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = RMSNorm(spec.hidden, spec.epsilon)
        self.head = nn.Linear(spec.hidden, spec.vocabulary, bias=False)
        if spec.tied:
            self.head.weight = self.embedding.weight
        cos, sin = spec.rotation(spec.context)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """What the head multiplies: float32 [batch, n, hidden]."""
        seen = cache[0][0].shape[2] if cache else 0
        here = slice(seen, seen + tokens.shape[1])
        cos, sin = self.cos[here], self.sin[here]
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x, grown = layer(x, cos, sin, cache[index] if cache and seen else None)
            if cache is not None:
                cache[index : index + 1] = [grown]
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        logits: Tensor = self.head(self.hidden(tokens, cache))
        return logits


def llama_from_weights(spec: DecoderSpec, weights: Mapping[str, Weight]) -> Llama:
    """The module with ``weights`` by the names of ``DecoderSpec.shapes``, in eval mode."""
    with torch.device("meta"):
        module = Llama(spec)
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = weight.floats() if isinstance(weight, Blocks) else weight
        state[parameter_name(name)] = torch.from_numpy(values)
    if spec.tied:
        state["head.weight"] = state["embedding.weight"]
    module.load_state_dict(state, strict=True, assign=True)
    if spec.tied:
        module.head.weight = module.embedding.weight
    cos, sin = spec.rotation(spec.context)
    module.cos, module.sin = torch.from_numpy(cos), torch.from_numpy(sin)
    return module.eval().requires_grad_(False)


def parameter_name(name: str) -> str:
    """``layers.0.q_bias`` to ``layers.0.attention.q.bias``."""
    *layer, last = name.split(".")
    stem, _, kind = last.rpartition("_")
    if kind == "bias":
        last = f"attention.{stem}.bias"
    elif last in ("q", "k", "v", "o", "q_norm", "k_norm"):
        last = f"attention.{last}.weight"
    else:
        last = f"{last}.weight"
    return ".".join([*layer, last])
