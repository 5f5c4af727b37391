"""A decoder as ONNX of plain ops that TensorRT 10.3 takes, with the keys and values outside.

N new tokens   P kept tokens   T = P + N   R wanted rows
L layers       H heads         G kv heads  D head size

In: ``tokens``, ``positions`` [N] and ``rows`` [R] int32; ``mask`` [N, T], added to the scores;
``past_keys`` and ``past_values`` [P, L, G, D]. Out: ``logits`` [R, vocabulary] and ``hidden``
[R, hidden], float32; ``keys`` and ``values`` [N, L, G, D], of the new tokens alone. Who calls keeps
the cache: tokens come first there, so what is kept is one piece, and new rows go right behind it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from edgekit.blocks import Blocks
from edgekit.decoder import Decoder
from edgekit.recipe import Recipe
from edgekit.spec import Array
from edgekit_tensorrt.decoder_weights import Codes, codes_from_blocks, joinable, joined_codes
from edgekit_tensorrt.graph_writer import GraphWriter

INT32, FLOAT = TensorProto.INT32, TensorProto.FLOAT


def onnx_from_decoder(
    decoder: Decoder, recipe: Recipe, file: io.BufferedIOBase, location: str
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The model, its weights written to ``file``, and the names of the nodes with 4-bit weights."""
    graph = _Graph(decoder, recipe, GraphWriter(file, location, half=recipe.weights != "float32"))
    graph.write()
    # The first opset with 4-bit integers and blocks, else what TensorRT 10.3 documents.
    opset, ir = (21, 10) if graph.quantized else (20, 9)
    return graph.writer.model("decoder", opset=opset, ir=ir), tuple(graph.quantized)


class _Graph:
    def __init__(self, decoder: Decoder, recipe: Recipe, writer: GraphWriter) -> None:
        self.decoder, self.spec, self.writer = decoder, decoder.spec, writer
        self.quantized: list[str] = []
        self._in_codes = recipe.quantized
        self._made: dict[str, str] = {}  # nodes that several products share

    def write(self) -> None:
        spec, writer = self.spec, self.writer
        tokens = writer.input("tokens", INT32, ["N"])
        positions = writer.input("positions", INT32, ["N"])
        self.mask = writer.input("mask", writer.dtype, ["N", "T"])
        cache = [spec.layers, spec.kv_heads, spec.head_dim]
        past = []
        for name in ("past_keys", "past_values"):
            whole = writer.input(name, writer.dtype, ["P", *cache])
            past.append(writer.split(whole, [1] * spec.layers, axis=1, name=f"{name}.split"))
        rows = writer.input("rows", INT32, ["R"])
        self._rotation(positions)
        # What layers add to is float32: in some models it leaves float16. It costs no kernel.
        x = writer.cast(self._embedded(tokens), FLOAT, name="embedded.float")
        new: list[list[str]] = [[], []]
        for index in range(spec.layers):
            x, key, value = self._layer(f"layers.{index}", x, past[0][index], past[1][index])
            new[0].append(key)
            new[1].append(value)
        x = writer.op("Gather", x, rows, name="wanted", axis=0)
        hidden = self._norm(x, "norm")
        (logits,) = self._products(hidden, [self.decoder.head], name="logits.product")
        writer.output("logits", logits, FLOAT, ["R", spec.vocabulary])
        writer.output("hidden", hidden, FLOAT, ["R", spec.hidden])
        for name, parts in zip(("keys", "values"), new, strict=True):
            stacked = writer.op("Concat", *parts, name=f"{name}.stacked", axis=1)
            writer.output(name, stacked, writer.dtype, ["N", *cache])

    def _rotation(self, positions: str) -> None:
        """Cosines and sines of the tokens' positions, [N, 1, D / 2]."""
        tables = zip(("cos", "sin"), self.spec.rotation(self.decoder.capacity), strict=True)
        self.cos, self.sin = (
            self.writer.op(
                "Gather",
                self.writer.floats(f"{name}.table", table[:, None]),
                positions,
                name=name,
                axis=0,
            )
            for name, table in tables
        )

    def _layer(self, name: str, x: str, keys: str, values: str) -> tuple[str, str, str]:
        """What goes on, and the new keys and values, [N, 1, G, D]."""
        writer = self.writer
        h = self._norm(x, f"{name}.attention_norm")
        attended, key, value = self._attention(name, h, keys, values)
        (out,) = self._products(attended, [f"{name}.o"], name=f"{name}.o.product")
        out = writer.cast(out, FLOAT, name=f"{name}.o.float")
        x = writer.op("Add", x, out, name=f"{name}.attended")
        h = self._norm(x, f"{name}.ffn_norm")
        gate, up = self._products(h, [f"{name}.gate", f"{name}.up"], name=f"{name}.gate_up")
        sigmoid = writer.op("Sigmoid", gate, name=f"{name}.sigmoid")
        silu = writer.op("Mul", gate, sigmoid, name=f"{name}.silu")
        h = writer.op("Mul", silu, up, name=f"{name}.gated")
        (out,) = self._products(h, [f"{name}.down"], name=f"{name}.down.product")
        out = writer.cast(out, FLOAT, name=f"{name}.down.float")
        return writer.op("Add", x, out, name=f"{name}.out"), key, value

    def _attention(self, name: str, h: str, keys: str, values: str) -> tuple[str, str, str]:
        """In the form that NVIDIA's compiler makes one kernel of."""
        writer, spec = self.writer, self.spec
        parts = [f"{name}.{part}" for part in "qkv"]
        outs = self._products(h, parts, name=f"{name}.qkv")
        q, k, v = (self._heads(part, out) for part, out in zip(parts, outs, strict=True))
        q, k = self._rotated(q, f"{name}.q"), self._rotated(k, f"{name}.k")
        scale = writer.floats("attention.scale", 1 / math.sqrt(spec.head_dim))
        q = writer.op("Mul", q, scale, name=f"{name}.q.scaled")
        q = self._reshaped(q, [-1, 1, spec.heads, spec.head_dim], f"{name}.q.new")
        q = writer.op("Transpose", q, name=f"{name}.q.first", perm=[1, 2, 0, 3])  # [1, H, N, D]
        new = [-1, 1, spec.kv_heads, spec.head_dim]
        k, v = self._reshaped(k, new, f"{name}.k.new"), self._reshaped(v, new, f"{name}.v.new")
        keys = self._seen(keys, k, f"{name}.keys")
        keys = writer.op("Transpose", keys, name=f"{name}.keys.last", perm=[0, 1, 3, 2])
        scores = writer.op("MatMul", q, keys, name=f"{name}.scores")  # [1, H, N, T]
        scores = writer.op("Add", scores, self.mask, name=f"{name}.masked")
        weights = writer.op("Softmax", scores, name=f"{name}.softmax", axis=-1)
        y = writer.op("MatMul", weights, self._seen(values, v, f"{name}.values"), name=f"{name}.y")
        y = writer.op("Transpose", y, name=f"{name}.y.last", perm=[2, 0, 1, 3])
        return self._reshaped(y, [-1, spec.heads * spec.head_dim], f"{name}.y.joined"), k, v

    def _seen(self, past: str, new: str, name: str) -> str:
        """Kept and new, [T, 1, G, D], as each head of the queries reads them: [1, H, T, D]."""
        writer, spec = self.writer, self.spec
        x = writer.op("Concat", past, new, name=name, axis=0)
        x = writer.op("Transpose", x, name=f"{name}.first", perm=[1, 2, 0, 3])
        each = spec.heads // spec.kv_heads
        if each == 1:
            return x
        x = writer.op("Unsqueeze", x, writer.integers("third", [2]), name=f"{name}.third")
        shape = writer.integers("each", [1, 1, each, 1, 1])
        x = writer.op("Expand", x, shape, name=f"{name}.each")
        return self._reshaped(x, [1, spec.heads, -1, spec.head_dim], f"{name}.heads")

    def _heads(self, part: str, x: str) -> str:
        """[N, heads * D] to [N, heads, D], with the bias and the norm that the model has."""
        writer, spec, name = self.writer, self.spec, part.rpartition(".")[2]
        if spec.qkv_bias:
            bias = writer.floats(f"{part}_bias", self.decoder.floats(f"{part}_bias"))
            x = writer.op("Add", x, bias, name=f"{part}.biased")
        heads = spec.heads if name == "q" else spec.kv_heads
        x = self._reshaped(x, [-1, heads, spec.head_dim], f"{part}.heads")
        if not spec.qk_norm or name == "v":
            return x
        return self._norm(writer.cast(x, FLOAT, name=f"{part}.float"), f"{part}_norm")

    def _rotated(self, x: str, name: str) -> str:
        writer, half = self.writer, self.spec.head_dim // 2
        first, second = writer.split(x, [half, half], axis=-1, name=f"{name}.split")

        def product(a: str, b: str, label: str) -> str:
            return writer.op("Mul", a, b, name=f"{name}.{label}")

        first_cos, second_sin = product(first, self.cos, "ac"), product(second, self.sin, "bs")
        second_cos, first_sin = product(second, self.cos, "bc"), product(first, self.sin, "as")
        left = writer.op("Sub", first_cos, second_sin, name=f"{name}.left")
        right = writer.op("Add", second_cos, first_sin, name=f"{name}.right")
        return writer.op("Concat", left, right, name=f"{name}.rotated", axis=-1)

    def _norm(self, x: str, weight: str) -> str:
        """``x / rms(x) * weight`` of float32, in the graph's type."""
        writer = self.writer
        square = writer.op("Mul", x, x, name=f"{weight}.square")
        axes = writer.integers("last", [-1])
        mean = writer.op("ReduceMean", square, axes, name=f"{weight}.mean", keepdims=1)
        epsilon = writer.constant("epsilon", np.array(self.spec.epsilon), np.float32)
        mean = writer.op("Add", mean, epsilon, name=f"{weight}.mean_epsilon")
        root = writer.op("Sqrt", mean, name=f"{weight}.rms")
        x = writer.op("Div", x, root, name=f"{weight}.unit")
        values = writer.constant(weight, self.decoder.floats(weight), np.float32)
        x = writer.op("Mul", x, values, name=f"{weight}.normed")
        return writer.op("Cast", x, name=f"{weight}.out", to=writer.dtype) if writer.half else x

    def _matrix(self, name: str) -> Array | Codes:
        weight = self.decoder.weights[name]
        if self._in_codes and isinstance(weight, Blocks):
            return codes_from_blocks(weight)
        return self.decoder.floats(name)

    def _embedded(self, tokens: str) -> str:
        """The rows of the embedding, [N, hidden]; of codes, those rows alone become floats."""
        writer, matrix, name = self.writer, self._matrix("embedding"), "embedding"
        if not isinstance(matrix, Codes):
            table = writer.floats(name, matrix)
            return writer.op("Gather", table, tokens, name="embedded", axis=0)
        x = writer.op("Gather", self._floats_of(name, matrix), tokens, name="embedded", axis=0)
        if matrix.halves == 2:
            high, low = writer.split(x, [matrix.columns] * 2, axis=1, name="embedded.split")
            x = writer.op("Add", high, low, name="embedded.both")
        if matrix.offsets is None:
            return x
        offsets = self._offsets_of(name, matrix)
        offsets = writer.op("Gather", offsets, tokens, name="embedded.offsets", axis=0)
        each = writer.floats("embedded.each", 1 / matrix.block)
        offsets = writer.op("Mul", offsets, each, name="embedded.offset")
        offsets = writer.op(
            "Unsqueeze", offsets, writer.integers("last", [-1]), name="embedded.off"
        )
        x = self._reshaped(x, [-1, matrix.columns // matrix.block, matrix.block], "embedded.blocks")
        x = writer.op("Add", x, offsets, name="embedded.shifted")
        return self._reshaped(x, [-1, matrix.columns], "embedded.rows")

    def _products(self, x: str, names: Sequence[str], *, name: str) -> list[str]:
        """``x`` times each of the matrices, in one product where they are of one form."""
        matrices = [self._matrix(each) for each in names]
        if len(names) > 1 and not joinable(matrices):
            pairs = zip(names, matrices, strict=True)
            return [self._product(x, one, each, name=f"{each}.product") for each, one in pairs]
        key = name if len(names) > 1 else names[0]
        sizes = [len(one.codes if isinstance(one, Codes) else one) for one in matrices]
        codes = [one for one in matrices if isinstance(one, Codes)]
        floats = [one for one in matrices if not isinstance(one, Codes)]
        whole = joined_codes(codes) if codes else np.concatenate(floats)
        out = self._product(x, whole, key, name=f"{key}.product")
        return self.writer.split(out, sizes, axis=1, name=f"{name}.split")

    def _product(self, x: str, matrix: Array | Codes, key: str, *, name: str) -> str:
        """``x @ matrix.T``, with the matrix's constants called after ``key``."""
        writer = self.writer
        if not isinstance(matrix, Codes):
            return writer.op("Gemm", x, writer.floats(key, matrix), name=name, transB=1)
        self.quantized.append(name)
        left = x if matrix.halves == 1 else self._twice(x)
        out = writer.op("Gemm", left, self._floats_of(key, matrix), name=name, transB=1)
        if matrix.offsets is None:
            return out
        means, offsets = self._block_means(x, matrix), self._offsets_of(key, matrix)
        more = writer.op("Gemm", means, offsets, name=f"{name}.offset", transB=1)
        return writer.op("Add", out, more, name=f"{name}.shifted")

    def _floats_of(self, key: str, matrix: Codes) -> str:
        """What the codes stand for: NVIDIA's compiler puts this into the product that reads it."""
        name = f"{key}.floats"
        if name not in self._made:
            codes = self.writer.codes(f"{key}.codes", matrix.codes)
            scales = self.writer.floats(f"{key}.scales", matrix.scales)
            self._made[name] = self.writer.op(
                "DequantizeLinear", codes, scales, name=name, axis=1, block_size=matrix.block
            )
        return self._made[name]

    def _offsets_of(self, key: str, matrix: Codes) -> str:
        assert matrix.offsets is not None
        return self.writer.floats(f"{key}.offsets", matrix.block * matrix.offsets)

    def _twice(self, x: str) -> str:
        name = f"{x}.twice"
        if name not in self._made:
            self._made[name] = self.writer.op("Concat", x, x, name=name, axis=1)
        return self._made[name]

    def _block_means(self, x: str, matrix: Codes) -> str:
        """[N, blocks]: means, for sums could leave float16."""
        name = f"{x}.means{matrix.block}"
        if name not in self._made:
            shape = [-1, matrix.columns // matrix.block, matrix.block]
            blocks = self._reshaped(x, shape, f"{name}.blocks")
            axes = self.writer.integers("last", [-1])
            self._made[name] = self.writer.op("ReduceMean", blocks, axes, name=name, keepdims=0)
        return self._made[name]

    def _reshaped(self, x: str, shape: Sequence[int], name: str) -> str:
        label = "shape." + "x".join(str(size) for size in shape)
        return self.writer.op("Reshape", x, self.writer.integers(label, shape), name=name)
