"""Where float16 cannot hold what int8 arithmetic needs: islands of float32 scales.

An island is a quantized layer whose dequantized operands, and so its result, are float32, with a
cast to float16 after it. The integers and their kernel are the same; what changes is the type that
sums and scales are held in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.onnx_export import LARGEST_FLOAT16
from edgekit.spec import Array

SMALLEST_NORMAL = 2.0**-14  # of float16, 6.1e-5: what is smaller has fewer digits
_LARGEST_CODE = 128


def with_islands(half: onnx.ModelProto, single: onnx.ModelProto) -> list[str]:
    """Change ``half``, a QDQ model in float16, to hold islands where it needs them; their names.

    ``single`` is the same model in float32, with scales and biases as they were. A layer needs
    an island where

    * it is a matrix product with a scale for each channel: NVIDIA's compiler multiplies by the
      scales in a kernel of its own, and hands it the sum of products as float16, which ends at
      65504; with one scale for all it multiplies before it rounds, and a convolution hands on
      float32;
    * a scale is below the normal numbers of float16.
    """
    graph = _Graph(half, single)
    names = []
    for node in list(half.graph.node):
        operands = graph.operands(node)
        if operands is not None and _needs_island(node, operands):
            graph.make_island(node, operands)
            names.append(node.name)
    if names:
        graph.finish()
    return names


@dataclass(frozen=True)
class _Operands:
    """The two sides of a quantized layer, with the scales in float32."""

    dequantizers: tuple[onnx.NodeProto, onnx.NodeProto]
    scales: tuple[Array, Array]
    codes: Array  # of the weights
    axis: int


def _needs_island(node: onnx.NodeProto, operands: _Operands) -> bool:
    if any((scale < SMALLEST_NORMAL).any() for scale in operands.scales):
        return True
    per_channel = operands.scales[1].size > 1
    return node.op_type != "Conv" and per_channel and worst_sum(operands) > LARGEST_FLOAT16


def worst_sum(operands: _Operands) -> int:
    """The largest sum of products that any int8 input can lead to, in units of the scales."""
    others = tuple(axis for axis in range(operands.codes.ndim) if axis != operands.axis)
    return int(np.abs(operands.codes.astype(np.int64)).sum(axis=others).max()) * _LARGEST_CODE


@dataclass
class _Graph:
    """The float16 model being changed."""

    half: onnx.ModelProto
    single: onnx.ModelProto
    new: dict[str, tuple[list[onnx.NodeProto], onnx.NodeProto]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._made_by = {name: node for node in self.half.graph.node for name in node.output}
        self._held = {tensor.name: tensor for tensor in self.half.graph.initializer}
        self._exact = {tensor.name: tensor for tensor in self.single.graph.initializer}

    def operands(self, node: onnx.NodeProto) -> _Operands | None:
        """None where the node is not computed in integers."""
        found = [self._made_by.get(name) for name in node.input[:2]]
        if len(found) < 2 or found[0] is None or found[1] is None:
            return None
        left, right = found[0], found[1]
        if any(each.op_type != "DequantizeLinear" for each in (left, right)):
            return None
        scales = [numpy_helper.to_array(self._exact[each.input[1]]) for each in (left, right)]
        codes = numpy_helper.to_array(self._held[right.input[0]])
        axes = (attribute.i for attribute in right.attribute if attribute.name == "axis")
        axis = next(axes, 1) % codes.ndim
        return _Operands((left, right), (scales[0], scales[1]), codes, axis)

    def make_island(self, node: onnx.NodeProto, operands: _Operands) -> None:
        """Give the node operands of its own in float32, and a cast behind it."""
        left, right = operands.dequantizers
        before = self._input(node.name, left, operands.scales[0])
        before.append(self._dequantizer(f"{node.name}_weights", right, right.input[0], exact=True))
        node.input[0], node.input[1] = before[-2].output[0], before[-1].output[0]
        if len(node.input) > 2 and node.input[2]:
            before += self._bias(node)
        name = node.output[0]
        node.output[0] = f"{name}_float32"
        cast = helper.make_node(
            "Cast", [node.output[0]], [name], f"{node.name}_to_half", to=TensorProto.FLOAT16
        )
        self.new[node.name] = before, cast

    def _input(self, owner: str, old: onnx.NodeProto, scale: Array) -> list[onnx.NodeProto]:
        """Nodes that end in the dequantized input in float32."""
        if scale >= SMALLEST_NORMAL:
            # Quantized in float16 as before, and read with the very scale that it was made with.
            return [self._dequantizer(f"{owner}_input", old, old.input[0], exact=False)]
        quantizer = self._made_by[old.input[0]]
        cast = helper.make_node(
            "Cast",
            [quantizer.input[0]],
            [f"{owner}_input_float32"],
            f"{owner}_input_to_float32",
            to=TensorProto.FLOAT,
        )
        name = self._scale(quantizer.input[1], exact=True)
        again = helper.make_node(
            "QuantizeLinear",
            [cast.output[0], name, quantizer.input[2]],
            [f"{owner}_input_codes"],
            f"{owner}_input_QuantizeLinear",
        )
        return [cast, again, self._dequantizer(f"{owner}_input", old, again.output[0], exact=True)]

    def _dequantizer(
        self, name: str, old: onnx.NodeProto, codes: str, *, exact: bool
    ) -> onnx.NodeProto:
        made = onnx.NodeProto()
        made.CopyFrom(old)
        made.name = f"{name}_DequantizeLinear"
        made.input[0], made.input[1] = codes, self._scale(old.input[1], exact=exact)
        made.output[0] = f"{name}_dequantized"
        return made

    def _scale(self, name: str, *, exact: bool) -> str:
        """An initializer in float32: the exact one, or the value that float16 made of it."""
        wanted = f"{name}_float32" if exact else f"{name}_of_half"
        if wanted not in self._held:
            source = self._exact[name] if exact else self._held[name]
            self._hold(wanted, numpy_helper.to_array(source).astype(np.float32))
        return wanted

    def _hold(self, name: str, value: Array) -> None:
        self._held[name] = numpy_helper.from_array(value, name)
        self.half.graph.initializer.append(self._held[name])

    def _bias(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        name = node.input[2]
        node.input[2] = f"{name}_float32"
        if name in self._exact:
            if node.input[2] not in self._held:
                self._hold(node.input[2], numpy_helper.to_array(self._exact[name]))
            return ()
        node.input[2] = f"{node.name}_bias_float32"
        label = f"{node.name}_bias_to_float32"
        return (helper.make_node("Cast", [name], [node.input[2]], label, to=TensorProto.FLOAT),)

    def finish(self) -> None:
        """Put the new nodes in their places, and drop what nothing reads any more."""
        ordered = []
        for node in self.half.graph.node:
            before, after = self.new.get(node.name, ((), None))
            ordered += [*before, node, *([after] if after is not None else [])]
        drop_unread(self.half.graph, ordered)


def drop_unread(graph: onnx.GraphProto, ordered: Sequence[onnx.NodeProto]) -> None:
    """Make ``ordered`` the nodes of ``graph``, without those and the constants nobody reads."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(ordered):  # readers come after what they read
        if read.intersection(node.output):
            kept.append(onnx.NodeProto())
            kept[-1].CopyFrom(node)
            read |= set(node.input) | _inner_reads(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    copies = onnx.GraphProto(initializer=constants)
    del graph.initializer[:]
    graph.initializer.extend(copies.initializer)


def _inner_reads(node: onnx.NodeProto) -> set[str]:
    """What the graphs inside a node read, of a loop for example; too many names do no harm."""
    inner = [each.g for each in node.attribute if each.HasField("g")]
    reads = {name for graph in inner for each in graph.node for name in each.input}
    reads |= {value.name for graph in inner for value in graph.output}
    return reads.union(*(_inner_reads(each) for graph in inner for each in graph.node))
