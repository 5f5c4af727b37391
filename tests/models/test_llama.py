"""The eager module is causal, may be fed in any pieces, and computes the published arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.decoder import Decoder
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_zoo.llama import Cache, Llama, llama_from_weights, parameter_name, rotate

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tied": False, "head_dim": 24},
    {"qkv_bias": True, "kv_heads": 4},
    {"qk_norm": True, "kv_heads": 1},
]


def module_of(decoder: Decoder) -> Llama:
    return llama_from_weights(decoder.spec, decoder.weights)


def plainly(decoder: Decoder, tokens: list[int]) -> Array:
    """Logits [tokens, vocabulary] by one position, head and sum at a time, in float64."""
    spec = decoder.spec
    w = {name: decoder.floats(name).astype(np.float64) for name in spec.shapes()}
    angles = np.outer(np.arange(len(tokens)), spec.rope)

    def norm(x: Array, weight: Array) -> Array:
        scaled: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.epsilon) * weight
        return scaled

    def turned(x: Array, position: int) -> Array:
        pairs = x[: spec.head_dim // 2] + 1j * x[spec.head_dim // 2 :]
        pairs = pairs * np.exp(1j * angles[position])
        return np.concatenate([pairs.real, pairs.imag])

    def headed(x: Array, layer: str, name: str) -> Array:
        y = x @ w[f"{layer}.{name}"].T
        y = y + (w[f"{layer}.{name}_bias"] if spec.qkv_bias else 0)
        y = y.reshape(len(tokens), -1, spec.head_dim)
        if name == "v":
            return y
        y = norm(y, w[f"{layer}.{name}_norm"]) if spec.qk_norm else y
        return np.stack([[turned(head, at) for head in row] for at, row in enumerate(y)])

    x = w["embedding"][tokens]
    for index in range(spec.layers):
        layer = f"layers.{index}"
        h = norm(x, w[f"{layer}.attention_norm"])
        q, k, v = (headed(h, layer, name) for name in "qkv")
        mixed = np.zeros_like(q)
        for at in range(len(tokens)):
            for head in range(spec.heads):
                own = head * spec.kv_heads // spec.heads
                score = k[: at + 1, own] @ q[at, head] / np.sqrt(spec.head_dim)
                share = np.exp(score - score.max())
                mixed[at, head] = share / share.sum() @ v[: at + 1, own]
        x = x + mixed.reshape(len(tokens), -1) @ w[f"{layer}.o"].T
        h = norm(x, w[f"{layer}.ffn_norm"])
        gate = h @ w[f"{layer}.gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{layer}.up"].T)) @ w[f"{layer}.down"].T
    logits: Array = norm(x, w["norm"]) @ w[decoder.head].T
    return logits


@pytest.mark.parametrize("sizes", VARIANTS)
def test_logits_are_those_of_the_arithmetic_written_out(sizes: dict[str, Any]) -> None:
    decoder = tiny_decoder(**sizes)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = plainly(decoder, tokens)
    found = module_of(decoder)(torch.tensor([tokens]))[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", VARIANTS)
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 6], [11, 1], [1, 11]])
def test_pieces_give_what_the_whole_gives(sizes: dict[str, Any], cuts: list[int]) -> None:
    module = module_of(tiny_decoder(**sizes))
    tokens = torch.arange(12)[None] * 7 % 128
    cache: Cache = []
    parts = [module(part, cache) for part in torch.split(tokens, cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), module(tokens, []), atol=1e-4, rtol=1e-4)
    assert cache[0][0].shape == (1, module.spec.kv_heads, 12, module.spec.head_dim)


def test_a_token_is_no_news_to_those_before_it() -> None:
    module = module_of(tiny_decoder())
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 99]])
    assert torch.equal(module(one, [])[:, :3], module(other, [])[:, :3])
    assert not torch.equal(module(one, [])[:, 3], module(other, [])[:, 3])


def test_several_texts_run_side_by_side() -> None:
    module = module_of(tiny_decoder())
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    both = module(tokens, [])
    alone = torch.cat([module(row[None], []) for row in tokens])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)


def test_a_rotation_keeps_lengths_and_depends_on_the_distance_alone() -> None:
    spec = tiny_decoder().spec
    cos, sin = (torch.from_numpy(table) for table in spec.rotation(40))
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    products = [
        float(rotate(q, cos[at : at + 1], sin[at : at + 1])[0] @ rotate(k, cos[to], sin[to])[0])
        for at, to in ((9, slice(2, 3)), (30, slice(23, 24)))
    ]
    assert products[0] == pytest.approx(products[1], abs=1e-4)
    assert rotate(q, cos[5:6], sin[5:6]).norm() == pytest.approx(float(q.norm()), rel=1e-5)


@pytest.mark.parametrize("sizes", VARIANTS)
def test_every_parameter_has_a_name_of_the_decoder(sizes: dict[str, Any]) -> None:
    module = module_of(tiny_decoder(**sizes))
    names = {parameter_name(name) for name in module.spec.shapes()}
    assert names == {name for name, _ in module.named_parameters()}


def test_a_tied_head_is_the_embedding_itself() -> None:
    tied, apart = (module_of(tiny_decoder(tied=tied)) for tied in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert apart.head.weight is not apart.embedding.weight


def test_blocks_run_as_the_floats_they_stand_for() -> None:
    decoder = tiny_decoder(bits=4)
    floats = {name: decoder.floats(name) for name in decoder.spec.shapes()}
    tokens = torch.tensor([[1, 2, 3]])
    expected = llama_from_weights(decoder.spec, floats)(tokens, [])
    assert torch.equal(module_of(decoder)(tokens, []), expected)


def test_a_weight_too_few_is_refused() -> None:
    decoder = tiny_decoder()
    fewer = {name: weight for name, weight in decoder.weights.items() if name != "layers.1.up"}
    with pytest.raises(RuntimeError, match=r"layers\.1\.up"):
        llama_from_weights(decoder.spec, fewer)
