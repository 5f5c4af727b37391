"""Writes an ONNX graph node by node, its large constants into a file beside it as they come."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike
from onnx import TensorProto, helper

from edgekit.spec import Array

_INLINE_BYTES = 1024  # what is smaller stays in the model: inference of shapes reads it there
_ALIGNMENT = 4096  # of each constant in the file, so that it can be mapped


class GraphWriter:
    """Nodes, inputs and outputs of a graph that computes in ``half`` or in float32.

    A value is called like the node that makes it. A constant that is asked for twice is made once.
    """

    def __init__(self, file: io.BufferedIOBase, location: str, *, half: bool) -> None:
        """``location`` is the file's name beside the model."""
        self.half = half
        self.dtype: int = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._file, self._location = file, location
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """A value that is given; a size that is a name varies."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Answer ``value``, cast to ``dtype``, under ``name``."""
        self.op("Cast", value, name=name, to=dtype)
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def op(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Add a node of one output; its name."""
        self._nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def split(self, x: str, sizes: Sequence[int], *, axis: int, name: str) -> list[str]:
        """Cut ``x`` into parts of these sizes; their names."""
        if len(sizes) == 1:
            return [x]
        parts = [f"{name}.{index}" for index in range(len(sizes))]
        given = self.integers(f"{name}.sizes", sizes)
        self._nodes.append(helper.make_node("Split", [x, given], parts, name, axis=axis))
        return parts

    def cast(self, x: str, dtype: int, *, name: str) -> str:
        """``x`` in another type than the graph's; nothing is added where that is the same."""
        return x if dtype == self.dtype else self.op("Cast", x, name=name, to=dtype)

    def integers(self, name: str, values: Sequence[int]) -> str:
        return self.constant(name, np.array(values), np.int64)

    def floats(self, name: str, values: Array | float) -> str:
        """A constant in the type that the graph computes in."""
        return self.constant(name, np.asarray(values), np.float16 if self.half else np.float32)

    def constant(self, name: str, values: Array, dtype: DTypeLike) -> str:
        array = np.ascontiguousarray(values, dtype).reshape(values.shape)
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self._constant(name, element, values.shape, array)

    def codes(self, name: str, codes: Array) -> str:
        """Signed 4-bit codes, given as int8, of an even count; two to a byte, low half first."""
        packed = codes.reshape(-1).view(np.uint8) & 15
        packed = packed[0::2] | packed[1::2] << 4
        return self._constant(name, TensorProto.INT4, codes.shape, packed)

    def _constant(self, name: str, dtype: int, shape: tuple[int, ...], content: Array) -> str:
        if name in self._constants:
            return name
        tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape)
        if content.nbytes < _INLINE_BYTES:
            tensor.raw_data = content.tobytes()
        else:
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
            place = {"offset": self._file.tell(), "length": content.nbytes}
            self._file.write(content.reshape(-1).view(np.uint8).data)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": self._location, **place}.items():
                tensor.external_data.add(key=key, value=str(value))
        self._constants[name] = tensor
        return name

    def model(self, name: str, *, opset: int, ir: int) -> onnx.ModelProto:
        """What was written, as a model; the constants in the file are not in it."""
        constants = list(self._constants.values())
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir
        )
