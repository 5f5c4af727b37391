"""A decoder as an ONNX graph, written node by node: no tracing, no exporter.

Attention is ``GroupQueryAttention``, which turns q and k by their positions and appends k and v
to the key-value buffers in place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.decoder import Decoder, DecoderSpec, Weight
from edgekit.spec import Array
from edgekit_ort.decoder_layout import Expanded
from edgekit_ort.decoder_products import MICROSOFT, Draft, Form
from edgekit_ort.decoder_weights import WeightFile

_OPSET = 21


def graph_from_decoder(
    decoder: Decoder, form: Form, file: WeightFile, report: Callable[[str], None]
) -> tuple[onnx.ModelProto, tuple[Expanded, ...]]:
    """The graph, its weights written to ``file``, and which codes to expand when it is opened.

    Inputs: ``tokens`` int64 [n], ``rows`` int64 [r] (whose results are wanted), ``last`` int32 [1]
    and ``total`` int32 [1] (tokens kept and new, less one and in all), ``positions`` int64 [1, n],
    ``mask`` float32 [1, 1, n, total] (0, or a large negative number where a token does not see),
    and buffers ``past_key.i``, ``past_value.i`` [1, kv_heads, slots, head_dim]. Outputs:
    ``logits`` [r, vocabulary], ``hidden`` [r, hidden], and the buffers again. A padded graph
    has ``pad`` float32 [p, features of q, k and v] and ``count`` int64 [1], which is n; positions
    and mask are then of n + p rows.
    """
    spec = decoder.spec
    draft = Draft(file, form)
    slots = decoder.capacity + form.padded
    for name, values in zip(("cos", "sin"), spec.rotation(slots), strict=True):
        draft.constant(name, values)
    residual = draft.embedded("tokens", decoder.weights["embedding"], "embedded")
    normed = draft.node(
        "SimplifiedLayerNormalization",
        [residual, _vector(draft, decoder, "layers.0.attention_norm")],
        "layers.0.normed",
        axis=-1,
        epsilon=spec.epsilon,
    )
    for index in range(spec.layers):
        report(f"layer {index + 1} of {spec.layers}")
        normed, residual = _layer(draft, decoder, index, normed, residual)
    report("head")
    draft.product(normed, _weights(decoder, decoder.head), "logits")
    graph = helper.make_graph(
        draft.nodes,
        "decoder",
        _inputs(spec, form, slots),
        _outputs(spec, slots),
        list(draft.initializers.values()),
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model, tuple(draft.expand)


def _weights(decoder: Decoder, *names: str) -> dict[str, Weight]:
    return {name: decoder.weights[name] for name in names}


def _vector(draft: Draft, decoder: Decoder, name: str) -> str:
    return draft.constant(name, decoder.floats(name))


def _layer(
    draft: Draft, decoder: Decoder, index: int, normed: str, residual: str
) -> tuple[str, str]:
    """Attention and feed-forward; what the next layer, or the head, gets: normed, and the sum."""
    spec, layer = decoder.spec, f"layers.{index}"
    attended = _attention(draft, decoder, layer, index, normed)
    last = index + 1 == spec.layers
    if last:  # nothing behind needs the other rows
        attended = draft.node("Gather", [attended, "rows"], f"{layer}.attended_rows")
        residual = draft.node("Gather", [residual, "rows"], f"{layer}.residual_rows")
    out = draft.product(attended, _weights(decoder, f"{layer}.o"), f"{layer}.out")
    normed, residual = _added(draft, decoder, out, residual, f"{layer}.ffn_norm", f"{layer}.middle")
    parts = _weights(decoder, f"{layer}.gate", f"{layer}.up")
    both = draft.product(normed, parts, f"{layer}.both")
    gate, up = f"{layer}.gate", f"{layer}.up"
    draft.node("Split", [both, draft.integers(spec.ffn, spec.ffn)], [gate, up], axis=-1)
    silu = draft.node("QuickGelu", [gate], f"{layer}.silu", domain=MICROSOFT, alpha=1.0)
    product = draft.node("Mul", [silu, up], f"{layer}.product")
    down = draft.product(product, _weights(decoder, f"{layer}.down"), f"{layer}.down")
    if last:
        return _added(draft, decoder, down, residual, "norm", "", "hidden")
    norm = f"layers.{index + 1}.attention_norm"
    return _added(draft, decoder, down, residual, norm, f"{layer}.end")


def _added(
    draft: Draft,
    decoder: Decoder,
    x: str,
    residual: str,
    norm: str,
    total: str,
    output: str = "",
) -> tuple[str, str]:
    """``residual + x``, called ``total``, and the norm of it."""
    outputs = [output or f"{total}.normed"] + (["", "", total] if total else [])
    draft.node(
        "SkipSimplifiedLayerNormalization",
        [residual, x, _vector(draft, decoder, norm)],
        outputs,
        domain=MICROSOFT,
        epsilon=decoder.spec.epsilon,
    )
    return outputs[0], total


def _attention(draft: Draft, decoder: Decoder, layer: str, index: int, normed: str) -> str:
    """What the heads see, [tokens, heads * head_dim]."""
    spec = decoder.spec
    parts = _weights(decoder, *(f"{layer}.{name}" for name in "qkv"))
    bias: Array | None = None
    if spec.qkv_bias:
        bias = np.concatenate([decoder.floats(f"{layer}.{name}_bias") for name in "qkv"])
    packed = draft.product(normed, parts, f"{layer}.qkv", bias)
    if draft.form.padded:
        packed = draft.node("Concat", [packed, "pad"], f"{layer}.padded", axis=0)
    if spec.qk_norm:
        inputs = _normed_heads(draft, decoder, layer, packed)
    else:
        inputs = [draft.node("Unsqueeze", [packed, draft.integers(0)], f"{layer}.packed"), "", ""]
    past = [f"past_key.{index}", f"past_value.{index}"]
    attended = draft.node(
        "GroupQueryAttention",
        [*inputs, *past, "last", "total", "cos", "sin", "positions", "mask"],
        [f"{layer}.attention", f"key.{index}", f"value.{index}"],
        domain=MICROSOFT,
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        do_rotary=1,
        scale=spec.head_dim**-0.5,
    )
    attended = draft.node("Squeeze", [attended, draft.integers(0)], f"{layer}.attended")
    if draft.form.padded:
        ends = [draft.integers(0), "count", draft.integers(0)]
        attended = draft.node("Slice", [attended, *ends], f"{layer}.own")
    return attended


def _normed_heads(draft: Draft, decoder: Decoder, layer: str, packed: str) -> list[str]:
    """q and k with each head normalized, and v: [1, tokens, features] each."""
    spec = decoder.spec
    narrow = spec.kv_heads * spec.head_dim
    sizes = (spec.heads * spec.head_dim, narrow, narrow)
    outputs = [f"{layer}.{name}" for name in ("q_part", "k_part", "v_part")]
    draft.node("Split", [packed, draft.integers(*sizes)], outputs, axis=-1)
    inputs = []
    for name, part, size in zip("qk", outputs, sizes, strict=False):
        shape = draft.integers(-1, spec.head_dim)
        heads = draft.node("Reshape", [part, shape], f"{layer}.{name}_heads")
        scaled = draft.node(
            "SimplifiedLayerNormalization",
            [heads, _vector(draft, decoder, f"{layer}.{name}_norm")],
            f"{layer}.{name}_normed",
            axis=-1,
            epsilon=spec.epsilon,
        )
        inputs.append(
            draft.node("Reshape", [scaled, draft.integers(1, -1, size)], f"{layer}.{name}_in")
        )
    v = draft.node("Unsqueeze", [outputs[2], draft.integers(0)], f"{layer}.v_in")
    return [*inputs, v]


def _value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _buffers(spec: DecoderSpec, slots: int, prefix: str) -> list[onnx.ValueInfoProto]:
    shape = (1, spec.kv_heads, slots, spec.head_dim)
    names = (f"{prefix}{kind}.{i}" for kind in ("key", "value") for i in range(spec.layers))
    return [_value(name, TensorProto.FLOAT, *shape) for name in names]


def _inputs(spec: DecoderSpec, form: Form, slots: int) -> list[onnx.ValueInfoProto]:
    rows = "attended" if form.padded else "tokens"
    values = [
        _value("tokens", TensorProto.INT64, "tokens"),
        _value("rows", TensorProto.INT64, "rows"),
        _value("last", TensorProto.INT32, 1),
        _value("total", TensorProto.INT32, 1),
        _value("positions", TensorProto.INT64, 1, rows),
        _value("mask", TensorProto.FLOAT, 1, 1, rows, "total"),
    ]
    if form.padded:
        features = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        values += [
            _value("pad", TensorProto.FLOAT, "padding", features),
            _value("count", TensorProto.INT64, 1),
        ]
    return values + _buffers(spec, slots, "past_")


def _outputs(spec: DecoderSpec, slots: int) -> list[onnx.ValueInfoProto]:
    return [
        _value("logits", TensorProto.FLOAT, "rows", spec.vocabulary),
        _value("hidden", TensorProto.FLOAT, "rows", spec.hidden),
        *_buffers(spec, slots, ""),
    ]
