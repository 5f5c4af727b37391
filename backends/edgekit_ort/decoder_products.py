"""Matrix products of a decoder's graph: MatMulNBits with its offsets, Gemm, and the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.blocks import Blocks, alike, joined
from edgekit.decoder import Weight
from edgekit.spec import Array
from edgekit_ort.decoder_codes import fitting, packed
from edgekit_ort.decoder_layout import Expanded
from edgekit_ort.decoder_weights import WeightFile

MICROSOFT = "com.microsoft"
_INT8_PRODUCTS = 4  # MatMulNBits: activations in 8 bits, a scale for each block of a row


@dataclass(frozen=True)
class Form:
    """How a decoder's graph computes.

    ``half``: float matrices lie in the file in float16. ``kernel``: bits of the codes in the
    products; 8 expands those of 4 when the graph is opened. ``padded``: attention takes rows
    beyond the graph's own, given as an input, so that one row runs as several do.
    """

    half: bool = False
    kernel: int = 4
    padded: bool = False

    @property
    def exact_from(self) -> int:
        """The fewest tokens of a pass that equals every wider one to the bit; see README.md."""
        return 1 if self.padded else 2


@dataclass
class Draft:
    """A graph in the making: rows are tokens, so values are [tokens, features]."""

    file: WeightFile
    form: Form
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    expand: list[Expanded] = field(default_factory=list)
    _sums: dict[tuple[str, int], str] = field(default_factory=dict)

    def node(
        self, op: str, inputs: Sequence[str], output: str | list[str], **attributes: Any
    ) -> str:
        """Append a node named after its first output, which is returned."""
        outputs = [output] if isinstance(output, str) else output
        made = helper.make_node(op, inputs, outputs, name=outputs[0], **attributes)
        self.nodes.append(made)
        return outputs[0]

    def constant(self, name: str, array: Array) -> str:
        """An initializer, made once for each name."""
        if name not in self.initializers:
            self.initializers[name] = self.file.tensor(name, array)
        return name

    def integers(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self.constant("int." + ".".join(map(str, values)), np.array(values, np.int64))

    def product(
        self, x: str, parts: dict[str, Weight], output: str, bias: Array | None = None
    ) -> str:
        """``x @ weight.T + bias`` for the matrices of ``parts``, side by side in their order."""
        weights = list(parts.values())
        if alike(weights):
            blocks = [fitting(w, name) for name, w in parts.items() if isinstance(w, Blocks)]
            return self._quantized(x, joined(blocks), output, bias)
        if not any(isinstance(weight, Blocks) for weight in weights):
            return self._float(x, np.concatenate([np.asarray(w) for w in weights]), output, bias)
        columns = np.cumsum([weight.shape[0] for weight in weights])[:-1]
        biases = [None] * len(parts) if bias is None else np.split(bias, columns)
        results = [
            self.product(x, {name: weight}, f"{output}.{name}", part)
            for (name, weight), part in zip(parts.items(), biases, strict=True)
        ]
        return self.node("Concat", results, output, axis=-1)

    def _float(self, x: str, weight: Array, output: str, bias: Array | None) -> str:
        inputs = [x, self._matrix(f"{output}.weight", weight)]
        if bias is not None:
            inputs.append(self.constant(f"{output}.bias", bias))
        return self.node("Gemm", inputs, output, transB=1)

    def _matrix(self, name: str, weight: Array) -> str:
        """A float32 matrix, from float16 in the file where the form says so."""
        if not self.form.half:
            return self.constant(name, weight)
        half = self.constant(f"{name}.half", weight.astype(np.float16))
        return self.node("Cast", [half], name, to=TensorProto.FLOAT)

    def _quantized(self, x: str, blocks: Blocks, output: str, bias: Array | None) -> str:
        """Symmetric codes in the integer kernel, and ``offset * sum(x)`` for each block in float:
        exactly what the file says, as scale * (code - middle) + offset is a sum."""
        rows, columns = blocks.shape
        wide = self.form.kernel == 8 and blocks.bits == 4
        scales = blocks.scales / 16 if wide else blocks.scales
        codes = self._expanded if wide else self.constant
        inputs = [
            x,
            codes(f"{output}.codes", packed(blocks)),
            self.constant(f"{output}.scales", scales),
        ]
        if bias is not None:
            inputs += ["", "", self.constant(f"{output}.bias", bias)]
        result = output if blocks.offsets is None else f"{output}.codes_product"
        self.node(
            "MatMulNBits",
            inputs,
            result,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=8 if wide else blocks.bits,
            block_size=blocks.block,
            accuracy_level=_INT8_PRODUCTS,
        )
        if blocks.offsets is None:
            return output
        offsets = self.constant(f"{output}.offsets", np.ascontiguousarray(blocks.offsets.T))
        return self.node("Gemm", [self._sum(x, blocks), offsets, result], output)

    def _expanded(self, name: str, content: Array) -> str:
        """8-bit codes that the stepper makes of the file's 4-bit ones."""
        offset = self.file.put(content)
        rows, blocks, half = content.shape
        shape = (rows, blocks, 2 * half)
        self.initializers[name] = self.file.stand_in(
            name, shape, TensorProto.UINT8, offset, int(np.prod(shape))
        )
        self.expand.append(Expanded(name, offset, (rows, blocks, half)))
        return name

    def _sum(self, x: str, blocks: Blocks) -> str:
        """Sums of ``x`` over blocks, once for each ``x``: [tokens, blocks]."""
        key = x, blocks.block
        if key not in self._sums:
            shape = self.integers(-1, blocks.scales.shape[1], blocks.block)
            cut = self.node("Reshape", [x, shape], f"{x}.in_blocks")
            self._sums[key] = self.node(
                "ReduceSum", [cut, self.integers(2)], f"{x}.sums", keepdims=0
            )
        return self._sums[key]

    def embedded(self, tokens: str, weight: Weight, output: str) -> str:
        """The rows of ``weight`` at ``tokens``."""
        if isinstance(weight, Blocks):
            return self._embedded_codes(tokens, fitting(weight, "embedding"), output)
        if not self.form.half:
            return self.node("Gather", [self.constant("embedding", weight), tokens], output)
        half = self.constant("embedding.half", weight.astype(np.float16))
        rows = self.node("Gather", [half, tokens], f"{output}.half")
        return self.node("Cast", [rows], output, to=TensorProto.FLOAT)

    def _embedded_codes(self, tokens: str, blocks: Blocks, output: str) -> str:
        codes = packed(blocks).reshape(blocks.shape[0], -1)
        codes_name = self.constant("embedding.codes", codes)
        scales = self.constant("embedding.scales", blocks.scales)
        symmetric = output if blocks.offsets is None else f"{output}.symmetric"
        self.node(
            "GatherBlockQuantized",
            [codes_name, tokens, scales],
            symmetric,
            domain=MICROSOFT,
            bits=blocks.bits,
            block_size=blocks.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if blocks.offsets is None:
            return output
        table = self.constant("embedding.offsets", blocks.offsets)
        offsets = self.node("Gather", [table, tokens], f"{output}.offsets")
        column = self.node("Unsqueeze", [offsets, self.integers(2)], f"{output}.offset")
        count = blocks.scales.shape[1]
        shape = self.integers(-1, count, blocks.block)
        cut = self.node("Reshape", [symmetric, shape], f"{output}.in_blocks")
        total = self.node("Add", [cut, column], f"{output}.sum")
        return self.node("Reshape", [total, self.integers(-1, blocks.shape[1])], output)
