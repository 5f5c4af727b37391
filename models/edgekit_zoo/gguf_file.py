"""A GGUF file to a decoder's sizes and weights; what comes quantized keeps its codes and scales.

How the codes of each type lie is in ggml's source (ggml-quants.c); ``gguf.dequantize`` is what
the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.blocks import Blocks
from edgekit.decoder import DecoderSpec, Weight
from edgekit.errors import BadModel, UnknownName
from edgekit.spec import Array
from edgekit_zoo.decoder_fit import check_sizes, check_tensors
from edgekit_zoo.gguf_container import READ, Gguf, GgufTensor, read_gguf
from edgekit_zoo.rope import frequencies

FAMILIES = ("llama", "qwen2", "qwen3")
_MADE_FOR = "rope_freqs.weight"  # the llama3 scaling of positions, as divisors


def _halves(raw: Array) -> Array:
    """Two bytes each to float32."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """The low halves of the last dimension's bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _q4_0(raw: Array) -> Blocks:
    """``d * (q - 8)``: a float16 scale and 16 bytes for each 32 weights."""
    blocks = raw.reshape(len(raw), -1, 18)
    codes = _nibbles(blocks[..., 2:])
    return Blocks(codes.reshape(len(raw), -1), _halves(blocks[..., :2]), 4)


def _q4_1(raw: Array) -> Blocks:
    """``d * q + m``: a float16 scale, a float16 minimum and 16 bytes for each 32 weights."""
    blocks = raw.reshape(len(raw), -1, 20)
    scales, minimums = _halves(blocks[..., :2]), _halves(blocks[..., 2:4])
    codes = _nibbles(blocks[..., 4:])
    return Blocks(codes.reshape(len(raw), -1), scales, 4, minimums + 8 * scales)


def _q8_0(raw: Array) -> Blocks:
    """``d * q``: a float16 scale and 32 signed bytes for each 32 weights."""
    blocks = raw.reshape(len(raw), -1, 34)
    codes = blocks[..., 2:] ^ np.uint8(128)  # two's complement to an offset of 128
    return Blocks(codes.reshape(len(raw), -1), _halves(blocks[..., :2]), 8)


def _q4_k(raw: Array) -> Blocks:
    """``d * s * q - e * m``: for 256 weights two float16 d and e, eight s and m of 6 bits."""
    blocks = raw.reshape(len(raw), -1, 144)
    low, high, mixed = (blocks[..., at : at + 4] for at in (4, 8, 12))
    s = np.concatenate([low & 63, (mixed & 15) | ((low >> 2) & 48)], -1)
    m = np.concatenate([high & 63, (mixed >> 4) | ((high >> 2) & 48)], -1)
    scales = _halves(blocks[..., :2])[..., None] * s
    minimums = _halves(blocks[..., 2:4])[..., None] * m
    # Each 32 bytes hold two blocks: one in their low halves, one in their high ones.
    codes = _nibbles(blocks[..., 16:].reshape(len(raw), -1, 32))
    offsets = (8 * scales - minimums).reshape(len(raw), -1)
    return Blocks(codes.reshape(len(raw), -1), scales.reshape(len(raw), -1), 4, offsets)


def _q6_k(raw: Array) -> Blocks:
    """``d * s * (q - 32)``: for 256 weights a float16 d and sixteen signed bytes s.

    A half of 128 weights has 64 bytes of low four bits and 32 bytes of high two. Six bits have
    no form of their own here: they are written as the middle of eight, at the same scale.
    """
    halves = raw.reshape(len(raw), -1, 210)
    low = halves[..., :128].reshape(len(raw), -1, 2, 64)
    high = halves[..., 128:192].reshape(len(raw), -1, 2, 1, 32) >> _SHIFTS
    q = _nibbles(low).reshape(len(raw), -1, 2, 4, 32) | ((high & 3) << 4)
    scales = _halves(halves[..., 208:])[..., None] * halves[..., 192:208].view(np.int8)
    codes = (q + np.uint8(96)).reshape(len(raw), -1)
    return Blocks(codes, scales.reshape(len(raw), -1).astype(np.float32), 8)


_SHIFTS = np.array([[0], [2], [4], [6]], np.uint8)


def _bf16(raw: Array) -> Array:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


_OWN_CODES: dict[str, Callable[[Array], Blocks]] = {
    **{"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
}
_FLOATS: dict[str, Callable[[Array], Array]] = {
    "F32": lambda raw: raw.view("<f4").astype(np.float32),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": _bf16,
}


def weights_from_gguf(source: Path | Gguf) -> tuple[DecoderSpec, dict[str, Weight]]:
    """Sizes and weights of a GGUF file, by the names of ``DecoderSpec.shapes``.

    Raises ``BadModel``, ``DamagedFile``, or ``UnknownName`` for an architecture or a type of
    weights that is not read.
    """
    file = source if isinstance(source, Gguf) else read_gguf(source)
    spec = spec_from_gguf(file)
    shapes = {_gguf_name(name): shape for name, shape in spec.shapes().items()}
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    check_tensors(shapes, found, file.path, ignored={_MADE_FOR})
    for name in shapes:
        kind = file.tensors[name].kind
        if kind not in READ:
            hint = f"The tensor {name} in {file.path} has it."
            raise UnknownName("type of quantization", kind, READ, hint=hint)
    paired = file.fields["general.architecture"] == "llama"
    weights: dict[str, Weight] = {}
    for name in spec.shapes():
        weight = _weight(file.tensors[_gguf_name(name)])
        if paired and name.rpartition(".")[2] in ("q", "k", "q_bias", "k_bias"):
            rows = _half_rotation(len(_codes(weight)), spec.head_dim)
            weight = weight.rows(rows) if isinstance(weight, Blocks) else weight[rows]
        weights[name] = weight
    return spec, weights


def spec_from_gguf(file: Gguf) -> DecoderSpec:
    """The sizes that a file's fields announce. Raises ``BadModel`` or ``UnknownName``."""
    family = str(file.fields.get("general.architecture"))
    if family not in FAMILIES:
        hint = f"It is what {file.path} was made for."
        raise UnknownName("architecture", family, FAMILIES, hint=hint)

    def value(name: str, default: Any = None) -> Any:
        found = file.fields.get(f"{family}.{name}", default)
        if found is None:
            raise BadModel(f"{file.path} does not say its {family}.{name}; convert it again.")
        if not isinstance(found, int | float):
            raise BadModel(f"{file.path}: {family}.{name} is {found!r}, and one number is read.")
        return found

    if value("attention.sliding_window", 0) or value("expert_count", 0):
        what = "experts" if value("expert_count", 0) else "attention through a sliding window"
        raise BadModel(f"{file.path} uses {what}, which is not built here; choose another model.")
    heads, embedding = value("attention.head_count"), file.tensors.get("token_embd.weight")
    head_dim = value("attention.key_length", value("embedding_length") // max(heads, 1))
    if embedding is None or len(embedding.shape) != 2:
        raise BadModel(f"{file.path} has no matrix token_embd.weight: it is no language model.")
    if value("rope.dimension_count", head_dim) != head_dim:
        raise BadModel(f"{file.path} rotates only a part of each head, which is not built here.")
    spec = DecoderSpec(
        layers=value("block_count"),
        hidden=value("embedding_length"),
        heads=heads,
        kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=value("feed_forward_length"),
        vocabulary=embedding.shape[0],
        context=value("context_length"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
        rope=(),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        tied="output.weight" not in file.tensors,
    )
    check_sizes(spec, file.path)
    rope = _frequencies(file, family, head_dim, value("rope.freq_base", 10000.0))
    return DecoderSpec(**{**spec.__dict__, "rope": rope})


def _frequencies(file: Gguf, family: str, head_dim: int, base: float) -> tuple[float, ...]:
    kind = file.fields.get(f"{family}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise BadModel(
            f"{file.path} scales its positions by {kind!r}; known are: none, linear, llama3."
        )
    factor = file.fields.get(f"{family}.rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    plain = frequencies(head_dim, base, {"rope_type": "linear", "factor": factor})
    if _MADE_FOR not in file.tensors:
        return plain
    divisors = file.tensors[_MADE_FOR]
    check_tensors({_MADE_FOR: (head_dim // 2,)}, {_MADE_FOR: divisors.shape}, file.path)
    numbers = np.asarray(_weight(divisors), np.float64)
    if not (np.isfinite(numbers) & (numbers > 0)).all():
        raise BadModel(f"{file.path} has a {_MADE_FOR} that gives no numbers; convert it again.")
    return tuple(map(float, plain / numbers))


def _codes(weight: Weight) -> Array:
    return weight.codes if isinstance(weight, Blocks) else weight


def _half_rotation(rows: int, head_dim: int) -> Array:
    """The llama family's q and k lie there with the two of a rotated pair side by side."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)


def _weight(tensor: GgufTensor) -> Weight:
    data = np.array(tensor.data)
    if tensor.kind in _FLOATS:
        return _FLOATS[tensor.kind](data).reshape(tensor.shape)
    blocks = _OWN_CODES[tensor.kind](data)
    return blocks if len(tensor.shape) == 2 else blocks.floats().reshape(tensor.shape)


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
