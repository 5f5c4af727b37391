"""A decoder as a ML Program with states, built op by op: ``program_from_decoder``; start there.

One function for each number of tokens that a pass may have, all over the same weights and the
same states. Nothing is traced and no pass rewrites it: what stands here is what is saved.

N tokens of a pass   R rows wanted   S slots of the cache   H query heads   K key-value heads
G = H / K            D size of a head                       E size of the hidden state

Inputs are ``tokens`` [1, N], ``positions`` [N] and ``start`` [1] (the slot of the first token), all
int32; ``mask`` [1, 1, N, S], which is added to the scores; and ``rows`` [R], int32, the tokens
whose ``logits`` [1, R, vocabulary] and ``hidden`` [1, R, E] come out. Keys and values are states
[1, K, S, D], always float16: Core ML has no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.decoder import Decoder, DecoderSpec
from edgekit.graph import quiet
from edgekit_coreml.decoder_weights import Constants

with quiet():
    import coremltools
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import Function, Program, types

# A float32 number is a float16 and what that lacks, held 2048 times as large: 22 bits together.
_REST = np.float32(2048)


@dataclass(frozen=True)
class Size:
    """One function: how many tokens a pass has, and of how many rows it gives the logits."""

    width: int
    rows: int

    @property
    def name(self) -> str:
        return f"step_{self.width}" if self.rows == self.width else f"feed_{self.width}"


def program_from_decoder(
    decoder: Decoder,
    sizes: Sequence[Size],
    *,
    half: bool,
    coded: bool,
    report: Callable[[str], None],
) -> Any:
    """The program. ``half``: float16 throughout; ``coded``: matrices in blocks keep their codes."""
    constants = Constants(decoder, half=half, coded=coded)
    program = Program()
    for size in sizes:
        report(f"building {size.name}")
        with quiet():
            program.add_function(size.name, _function(decoder, size, constants))
    program.default_function_name = sizes[0].name
    return program


def state_names(layers: int, *, half: bool) -> list[str]:
    """The states in order: keys and values of each layer; in float32 each with its rest."""
    kinds = ("keys", "values") if half else ("keys", "keys_rest", "values", "values_rest")
    return [f"{kind}_{layer}" for layer in range(layers) for kind in kinds]


def _function(decoder: Decoder, size: Size, constants: Constants) -> Any:
    spec, half = decoder.spec, constants.dtype is np.float16
    floating = types.fp16 if half else types.fp32
    cache = (1, spec.kv_heads, decoder.capacity, spec.head_dim)
    inputs = {
        "tokens": mb.TensorSpec((1, size.width), types.int32),
        "positions": mb.TensorSpec((size.width,), types.int32),
        "start": mb.TensorSpec((1,), types.int32),
        "mask": mb.TensorSpec((1, 1, size.width, decoder.capacity), floating),
        "rows": mb.TensorSpec((size.rows,), types.int32),
        **{
            name: mb.StateTensorSpec(cache, types.fp16)
            for name in state_names(spec.layers, half=half)
        },
    }
    with Function(inputs, coremltools.target.iOS18) as function:
        graph = _Graph(decoder, size.width, constants, function.inputs)
        function.set_outputs(list(graph.outputs()))
    return function


class _Graph:
    """The ops of one function, in the order in which they run."""

    def __init__(
        self, decoder: Decoder, width: int, constants: Constants, inputs: dict[str, Any]
    ) -> None:
        self._spec: DecoderSpec = decoder.spec
        self._head, self._width = decoder.head, width
        self._constants, self._inputs = constants, inputs
        self._half = constants.dtype is np.float16
        self._cos, self._sin = self._rotation(decoder.capacity)
        # Query heads of one key head lie below one another: [1, K, G * N, S].
        group = self._spec.heads // self._spec.kv_heads
        self._mask = mb.tile(x=inputs["mask"], reps=[1, 1, group, 1])
        start, zero = inputs["start"], np.array([0], np.int32)
        end = mb.add(x=start, y=np.int32(width))
        self._begin = mb.concat(values=[zero, zero, start, zero], axis=0)
        sizes = [np.array([n], np.int32) for n in (1, self._spec.kv_heads, self._spec.head_dim)]
        self._end = mb.concat(values=[sizes[0], sizes[1], end, sizes[2]], axis=0)

    def outputs(self) -> tuple[Any, Any]:
        """``logits`` and ``hidden`` of the rows asked for."""
        embedding = self._constants.matrix(["embedding"])
        x = mb.gather(x=embedding, indices=self._inputs["tokens"], axis=0)
        for index in range(self._spec.layers):
            layer = f"layers.{index}"
            x = mb.add(x=x, y=self._attention(self._norm(x, f"{layer}.attention_norm"), index))
            x = mb.add(x=x, y=self._feed_forward(self._norm(x, f"{layer}.ffn_norm"), layer))
        # Before the head, which is a fifth of the work: only the rows that somebody reads.
        x = mb.gather(x=x, indices=self._inputs["rows"], axis=1)
        hidden = self._norm(x, "norm", name="hidden")
        head = embedding if self._spec.tied else self._constants.matrix([self._head])
        return mb.linear(x=hidden, weight=head, name="logits"), hidden

    def _norm(self, x: Any, weight: str, **name: str) -> Any:
        """RMSNorm of the last axis, in float32: the square of 256 is no float16."""
        return self._normed(x, self._constants.vector(weight), **name)

    def _normed(self, x: Any, weight: Any, **name: str) -> Any:
        wide = mb.cast(x=x, dtype="fp32") if self._half else x
        mean = mb.reduce_mean(x=mb.square(x=wide), axes=[-1], keep_dims=True)
        scale = mb.rsqrt(x=mean, epsilon=np.float32(self._spec.epsilon))
        unit = mb.mul(x=wide, y=scale)
        return mb.mul(x=mb.cast(x=unit, dtype="fp16") if self._half else unit, y=weight, **name)

    def _linear(self, x: Any, layer: str, names: Sequence[str], biased: bool = False) -> list[Any]:
        """``names`` of ``layer`` applied to ``x``, merged where they can be: [1, N, features]."""
        found = []
        for weight, merged in self._constants.matrices([f"{layer}.{name}" for name in names]):
            bias = None
            if biased:
                parts = [self._constants.floats(f"{name}_bias") for name in merged]
                bias = self._constants.values("+".join(merged) + "_bias", np.concatenate(parts))
            found.append(mb.linear(x=x, weight=weight, bias=bias))
        return found

    def _attention(self, x: Any, index: int) -> Any:
        spec, layer, n = self._spec, f"layers.{index}", self._width
        heads, both = spec.heads, spec.heads + spec.kv_heads
        qkv = _beside(self._linear(x, layer, "qkv", spec.qkv_bias))
        qkv = mb.reshape(x=qkv, shape=[1, n, both + spec.kv_heads, spec.head_dim])
        qkv = mb.transpose(x=qkv, perm=[0, 2, 1, 3])
        rotated, value = mb.split(x=qkv, split_sizes=[both, spec.kv_heads], axis=1)
        if spec.qk_norm:
            rotated = self._normed(rotated, self._head_norms(layer))
        query, key = mb.split(x=self._rotate(rotated), split_sizes=[heads, spec.kv_heads], axis=1)
        group = heads // spec.kv_heads
        y = mb.scaled_dot_product_attention(
            query=mb.reshape(x=query, shape=[1, spec.kv_heads, group * n, spec.head_dim]),
            key=self._kept(key, f"keys{{}}_{index}"),
            value=self._kept(value, f"values{{}}_{index}"),
            attn_mask=self._mask,
        )
        y = mb.reshape(x=y, shape=[1, heads, n, spec.head_dim])
        y = mb.reshape(x=mb.transpose(x=y, perm=[0, 2, 1, 3]), shape=[1, n, heads * spec.head_dim])
        return self._linear(y, layer, "o")[0]

    def _feed_forward(self, x: Any, layer: str) -> Any:
        found = self._linear(x, layer, ("gate", "up"))
        gate, up = mb.split(x=found[0], num_splits=2, axis=-1) if len(found) == 1 else found
        return self._linear(mb.mul(x=mb.silu(x=gate), y=up), layer, ("down",))[0]

    def _rotation(self, positions: int) -> tuple[Any, Any]:
        """Cosines, and sines negative in the first half: each [N, D], by the positions given."""
        cos, sin = self._spec.rotation(positions)
        tables = (
            self._constants.values("cos", np.concatenate([cos, cos], 1)),
            self._constants.values("sin", np.concatenate([-sin, sin], 1)),
        )
        where = self._inputs["positions"]
        return mb.gather(x=tables[0], indices=where, axis=0), mb.gather(
            x=tables[1], indices=where, axis=0
        )

    def _rotate(self, x: Any) -> Any:
        first, second = mb.split(x=x, num_splits=2, axis=-1)
        turned = mb.concat(values=[second, first], axis=-1)
        return mb.add(x=mb.mul(x=x, y=self._cos), y=mb.mul(x=turned, y=self._sin))

    def _head_norms(self, layer: str) -> Any:
        """The weights of q's heads and then of k's: [1, H + K, 1, D]."""
        parts = [
            np.tile(self._constants.floats(f"{layer}.{name}_norm"), (count, 1))
            for name, count in (("q", self._spec.heads), ("k", self._spec.kv_heads))
        ]
        return self._constants.values(f"{layer}.head_norms", np.concatenate(parts)[None, :, None])

    def _kept(self, new: Any, state: str) -> Any:
        """Writes [1, K, N, D] into the slots of this pass and reads all of them: [1, K, S, D]."""
        if self._half:
            return self._updated(new, state.format(""))
        near = mb.cast(x=new, dtype="fp16")
        rest = mb.sub(x=new, y=mb.cast(x=near, dtype="fp32"))
        far = mb.cast(x=mb.mul(x=rest, y=_REST), dtype="fp16")
        near = mb.cast(x=self._updated(near, state.format("")), dtype="fp32")
        far = mb.cast(x=self._updated(far, state.format("_rest")), dtype="fp32")
        return mb.add(x=near, y=mb.mul(x=far, y=1 / _REST))

    def _updated(self, new: Any, name: str) -> Any:
        state = self._inputs[name]
        whole = mb.slice_update(
            x=mb.read_state(input=state), update=new, begin=self._begin, end=self._end
        )
        return mb.coreml_update_state(state=state, value=whole)


def _beside(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else mb.concat(values=parts, axis=-1)
