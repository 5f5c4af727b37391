"""The delegates of a decoder: what XNNPACK computes between one writing of the cache and the next.

A pass is: the first delegate, ``queries`` of layer 0; for each layer its keys and values into the
cache, and one delegate from its attention to the next layer's queries; then the head's delegate.
Shapes, with N tokens, S visible slots, G query heads to a key head: hidden [N, hidden]; queries
[kv_heads, G * N, head_dim]; keys and values [kv_heads, N or S, head_dim]; mask [G * N, S].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgekit.blocks import Blocks, alike, joined
from edgekit.decoder import Decoder, Weight
from edgekit.spec import Array
from edgekit_executorch.xnnpack_graph import Graph

# Matrices in groups have a kernel for multiples of this many columns alone.
_GROUP = 32

Matrix = Callable[[Graph, int, Weight, "Array | None"], int]


def in_floats(graph: Graph, value: int, weight: Weight, bias: Array | None) -> int:
    """``value @ weight.T + bias`` in float32."""
    assert not isinstance(weight, Blocks)
    added = None if bias is None else graph.constant(bias)
    return graph.linear(value, graph.constant(weight), added)


def in_channels(graph: Graph, value: int, weight: Weight, bias: Array | None) -> int:
    """With 8-bit codes, a scale for each output channel, and 8-bit rows as they come."""
    floats = weight.floats() if isinstance(weight, Blocks) else weight
    scales = np.abs(floats).max(1) / np.float32(127)
    safe = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.rint(floats / safe[:, None]).astype(np.int8)
    added = None if bias is None else graph.constant(bias)
    return graph.linear(graph.in_bytes(value), graph.channels(codes, safe), added)


def in_groups(graph: Graph, value: int, weight: Weight, bias: Array | None) -> int:
    """With the 4-bit codes that ``weight`` has; as ``in_channels`` where it has others.

    ``scale * (code - 8) + offset`` is a product with the kernel's own symmetric codes, and the
    sums of the input's groups times the offsets, in float32.
    """
    if not isinstance(weight, Blocks) or weight.bits != 4 or weight.block % _GROUP:
        return in_channels(graph, value, weight, bias)
    scales, offsets = in_bfloat16(weight)
    matrix = graph.groups(weight.codes, scales)
    result = graph.linear(graph.in_bytes(value), matrix)
    sums = graph.once(("sums", value, weight.block), lambda: _group_sums(graph, value, weight))
    added = None if bias is None else graph.constant(bias)
    return graph.binary("Add", result, graph.linear(sums, graph.constant(offsets), added))


def in_bfloat16(weight: Blocks) -> tuple[Array, Array]:
    """Scales as the upper halves of float32, which is what the kernel takes, and the offsets that
    are best with them: the mean of what the rounding of a scale takes from its block is put
    back."""
    bits = np.ascontiguousarray(weight.scales, np.float32).view(np.uint32)
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = (upper.astype(np.uint32) << 16).view(np.float32)
    rows = weight.shape[0]
    means = weight.codes.reshape(rows, -1, weight.block).mean(-1, dtype=np.float32) - 8
    offsets = (weight.scales - rounded) * means
    if weight.offsets is not None:
        offsets = offsets + weight.offsets
    return upper, offsets.astype(np.float32)


def _group_sums(graph: Graph, value: int, weight: Blocks) -> int:
    parts = graph.reshape(value, (0, weight.block))
    ones = graph.constant(np.ones((1, weight.block), np.float32))
    return graph.reshape(graph.linear(parts, ones), (0, weight.scales.shape[1]))


class Delegates:
    """Writes the graphs of one decoder, with ``matrix`` for its products with weights."""

    def __init__(self, decoder: Decoder, matrix: Matrix) -> None:
        self._decoder, self._spec, self._matrix = decoder, decoder.spec, matrix

    def first(self) -> Graph:
        """Hidden, cosines, sines to queries, keys, values of layer 0."""
        graph = Graph()
        hidden, cos, sin = graph.input(2), graph.input(3), graph.input(3)
        for value in self._queries(graph, hidden, cos, sin, 0):
            graph.output(value)
        return graph

    def layer(self, index: int) -> Graph:
        """Hidden, queries, keys, values, mask, and cosines and sines but for the last layer; to
        hidden, and the next layer's queries, keys, values."""
        graph = Graph()
        hidden = graph.input(2)
        attended = self._attention(graph, [graph.input(rank) for rank in (3, 3, 3, 2)])
        last = index + 1 == self._spec.layers
        rotation = () if last else (graph.input(3), graph.input(3))
        hidden = graph.binary("Add", hidden, self._linear(graph, attended, index, "o"))
        hidden = graph.binary("Add", hidden, self._feed_forward(graph, hidden, index))
        graph.output(hidden)
        if rotation:
            for value in self._queries(graph, hidden, *rotation, index + 1):
                graph.output(value)
        return graph

    def head(self) -> Graph:
        """Hidden of the rows asked for, to the same after the last norm, and logits."""
        graph = Graph()
        hidden = self._norm(graph, graph.input(2), "norm")
        logits = self._matrix(graph, hidden, self._weight(self._decoder.head), None)
        graph.output(hidden)
        graph.output(logits)
        return graph

    def _weight(self, name: str) -> Weight:
        return self._decoder.weights[name]

    def _linear(self, graph: Graph, value: int, index: int, name: str) -> int:
        return self._matrix(graph, value, self._weight(f"layers.{index}.{name}"), None)

    def _norm(self, graph: Graph, value: int, name: str) -> int:
        weight = self._decoder.floats(name)
        return graph.binary(
            "Multiply", self._over_rms(graph, value, weight.size), graph.factor(weight)
        )

    def _over_rms(self, graph: Graph, value: int, size: int) -> int:
        """The mean of squares is a product with 1/size, as the delegate has no sum of rows."""
        mean = graph.constant(np.full((1, size), 1 / size, np.float32))
        epsilon = graph.constant(np.array([self._spec.epsilon], np.float32))
        power = graph.linear(graph.unary("Square", value), mean, epsilon)
        return graph.binary("Multiply", value, graph.unary("ReciprocalSquareRoot", power))

    def _queries(
        self, graph: Graph, hidden: int, cos: int, sin: int, index: int
    ) -> tuple[int, int, int]:
        spec, layer = self._spec, f"layers.{index}"
        normed = self._norm(graph, hidden, f"{layer}.attention_norm")
        weight, bias = self._queries_and_keys(layer)
        both = self._matrix(graph, normed, weight, bias)
        both = graph.reshape(both, (0, spec.heads + spec.kv_heads, spec.head_dim))
        if spec.qk_norm:
            both = self._head_norms(graph, both, layer)
        both = graph.transpose(self._rotated(graph, both, cos, sin), (1, 0, 2))
        queries = graph.slice(both, 0, spec.heads)
        queries = graph.reshape(queries, (spec.kv_heads, 0, spec.head_dim))
        keys = graph.slice(both, spec.heads, spec.kv_heads)
        added = self._decoder.floats(f"{layer}.v_bias") if spec.qkv_bias else None
        values = self._matrix(graph, normed, self._weight(f"{layer}.v"), added)
        values = graph.reshape(values, (0, spec.kv_heads, spec.head_dim))
        return queries, keys, graph.transpose(values, (1, 0, 2))

    def _queries_and_keys(self, layer: str) -> tuple[Weight, Array | None]:
        """One matrix for both, and its bias. Scores are divided by sqrt(head_dim): q is, here, or
        its norm where it has one."""
        spec = self._spec
        scale = np.float32(1 if spec.qk_norm else spec.head_dim**-0.5)
        q, k = self._weight(f"{layer}.q"), self._weight(f"{layer}.k")
        bias = None
        if spec.qkv_bias:
            biases = [self._decoder.floats(f"{layer}.{name}_bias") for name in "qk"]
            bias = np.concatenate([biases[0] * scale, biases[1]])
        if isinstance(q, Blocks) and isinstance(k, Blocks) and alike([q, k]):
            return joined([_scaled(q, scale), k]), bias
        floats = [self._decoder.floats(f"{layer}.{name}") for name in "qk"]
        return np.concatenate([floats[0] * scale, floats[1]]), bias

    def _head_norms(self, graph: Graph, both: int, layer: str) -> int:
        spec = self._spec
        scale = np.float32(spec.head_dim**-0.5)
        weights = np.concatenate(
            [
                np.tile(self._decoder.floats(f"{layer}.q_norm") * scale, (spec.heads, 1)),
                np.tile(self._decoder.floats(f"{layer}.k_norm"), (spec.kv_heads, 1)),
            ]
        )
        normed = self._over_rms(graph, both, spec.head_dim)
        return graph.binary("Multiply", normed, graph.factor(weights))

    def _rotated(self, graph: Graph, heads: int, cos: int, sin: int) -> int:
        """``x * cos + turned(x) * sin``; ``turned`` is (-second half, first half), a product with a
        matrix of 0, 1 and -1, which is exact and one node instead of four."""
        half = self._spec.head_dim // 2
        turn = np.zeros((2 * half, 2 * half), np.float32)
        turn[:half, half:], turn[half:, :half] = -np.eye(half), np.eye(half)
        turned = graph.linear(heads, graph.constant(turn))
        return graph.binary(
            "Add", graph.binary("Multiply", heads, cos), graph.binary("Multiply", turned, sin)
        )

    def _attention(self, graph: Graph, inputs: list[int]) -> int:
        queries, keys, values, mask = inputs
        spec = self._spec
        scores = graph.binary("Add", graph.product(queries, keys, transposed=True), mask)
        mixed = graph.product(graph.unary("Softmax", scores), values)
        mixed = graph.reshape(mixed, (spec.heads, 0, spec.head_dim))
        return graph.reshape(graph.transpose(mixed, (1, 0, 2)), (0, spec.heads * spec.head_dim))

    def _feed_forward(self, graph: Graph, hidden: int, index: int) -> int:
        normed = self._norm(graph, hidden, f"layers.{index}.ffn_norm")
        gate = self._linear(graph, normed, index, "gate")
        up = self._linear(graph, normed, index, "up")
        gate = graph.binary("Multiply", gate, graph.unary("Sigmoid", gate))
        return self._linear(graph, graph.binary("Multiply", gate, up), index, "down")


def _scaled(weight: Blocks, factor: np.float32) -> Blocks:
    offsets = None if weight.offsets is None else weight.offsets * factor
    return replace(weight, scales=weight.scales * factor, offsets=offsets)
