"""A graph for XNNPACK's delegate, written node by node.

ExecuTorch's own way from a PyTorch graph to this form runs a dozen passes over each delegate and
takes seconds for each; a decoder is thirty delegates of one shape, so they are written here
instead, in milliseconds. The form is ExecuTorch's: ``backends/xnnpack/serialization``. A size of 0
in a reshape or a slice is what the input has, so one graph runs with any number of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from edgekit.graph import quiet
from edgekit.spec import Array

with quiet():
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
        serialize_xnnpack_binary,
    )
    from executorch.backends.xnnpack.utils import xnnpack_constants as constants
    from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput

_FP32 = schema.XNNDatatype.xnn_datatype_fp32
_ALIGNMENT = 16  # of constants, in bytes


class Graph:
    """Values are integers: the ids that its methods return. Shapes count for their rank alone,
    but for constants: the runtime takes sizes from the tensors it is given."""

    def __init__(self) -> None:
        self.given: list[Array] = []  # what the delegate wants behind its inputs
        self._nodes: list[Any] = []
        self._values: list[Any] = []
        self._constants = [schema.ConstantDataOffset(0, 0)]  # 0 says: not a constant
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._store = NamedDataStore()
        self._rank: list[int] = []
        self._made: dict[Hashable, int] = {}

    def input(self, rank: int) -> int:
        """The delegate's next argument, float32. Before all of ``given``."""
        assert not self.given
        return self._input(rank)

    def factor(self, values: Array) -> int:
        """A float32 array that values are multiplied with. It is an argument, the next after the
        inputs: the runtime forgets constants once it has packed the weights of products."""
        self.given.append(values)
        return self._input(values.ndim)

    def _input(self, rank: int) -> int:
        flag = constants.XNN_VALUE_FLAG_EXTERNAL_INPUT
        value = self._value(rank, external=len(self._inputs), flags=flag)
        self._inputs.append(value)
        return value

    def output(self, value: int) -> None:
        """Make ``value`` the delegate's next result."""
        self._outputs.append(value)

    def constant(self, values: Array) -> int:
        """A float32 array that is the matrix or the bias of a product."""
        content = _bytes(values)

        def make() -> int:
            return self._value(values.ndim, dims=list(values.shape), held=self._hold(content))

        return self.once(("constant", values.shape, content), make)

    def channels(self, codes: Array, scales: Array) -> int:
        """A matrix [out, in] of int8 codes, with a float32 scale for each output."""
        how = schema.PerChannelQuant([], 0, self._hold(_bytes(scales), "scale_"), scales.size)
        datatype = schema.XNNDatatype.xnn_datatype_qcint8
        return self._value(
            2, dims=list(codes.shape), held=self._hold(_bytes(codes)), datatype=datatype, how=how
        )

    def groups(self, codes: Array, scales: Array) -> int:
        """A matrix [out, in] of 4-bit codes around 8, with a bfloat16 scale, given as its upper 16
        bits, for each group: ``scales`` [out, groups]."""
        packed = codes[:, ::2] | (codes[:, 1::2] << 4)  # the earlier column low
        group = codes.shape[1] // scales.shape[1]
        how = schema.PerChannelGroupQuant([], 0, group)
        how.scale_buffer_idx, how.num_scales = self._hold(_bytes(scales), "scale_"), scales.size
        datatype = schema.XNNDatatype.xnn_datatype_qbint4
        return self._value(
            2, dims=list(codes.shape), held=self._hold(_bytes(packed)), datatype=datatype, how=how
        )

    def once(self, key: Hashable, make: Callable[[], int]) -> int:
        """What ``make`` returned when this was first called with ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _hold(self, content: bytes, kind: str = "") -> int:
        """The place in the list of constants. Delegates share what has the same bytes."""
        name = kind + hashlib.sha256(content).hexdigest()
        self._store.add_named_data(name, content, _ALIGNMENT)
        by_name = constants.UINT64_MAX  # the offset that says so
        self._constants.append(schema.ConstantDataOffset(by_name, len(content), name))
        return len(self._constants) - 1

    def _value(
        self,
        rank: int,
        *,
        dims: list[int] | None = None,
        held: int = 0,
        external: int = constants.XNN_INVALID_VALUE_ID,
        flags: int = 0,
        datatype: Any = _FP32,
        how: Any = None,
    ) -> int:
        number = len(self._values)
        shape = dims or [1] * rank
        value = schema.XNNTensorValue(datatype, rank, shape, held, external, flags, number)
        if how is not None:
            value = schema.XNNQuantizedTensorValue(value, how)
        self._values.append(schema.XValue(value))
        self._rank.append(rank)
        return number

    def _add(self, node: Any, value: int) -> int:
        self._nodes.append(schema.XNode(node, 0, None))
        return value

    def unary(self, kind: str, value: int) -> int:
        """``Square``, ``ReciprocalSquareRoot``, ``Sigmoid`` or ``Softmax`` of the last dim."""
        out = self._value(self._rank[value])
        return self._add(getattr(schema, f"XNN{kind}")(value, out, 0), out)

    def binary(self, kind: str, left: int, right: int) -> int:
        """``Add``, ``Multiply`` or ``Subtract``, with broadcasting."""
        out = self._value(max(self._rank[left], self._rank[right]))
        return self._add(getattr(schema, f"XNN{kind}")(left, right, out, 0), out)

    def product(self, left: int, right: int, *, transposed: bool = False) -> int:
        """Matrices [batch, n, k] by [batch, k, m], or [batch, m, k] where ``transposed``."""
        out = self._value(self._rank[left])
        flags = constants.XNN_FLAG_TRANSPOSE_B if transposed else 0
        return self._add(schema.XNNBatchMatrixMultiply(left, right, out, flags), out)

    def linear(self, value: int, matrix: int, bias: int | None = None) -> int:
        """``value @ matrix.T + bias`` on the last dim."""
        out = self._value(self._rank[value])
        missing = constants.XNN_INVALID_VALUE_ID if bias is None else bias
        return self._add(schema.XNNFullyConnected(value, matrix, missing, out, 0), out)

    def in_bytes(self, value: int) -> int:
        """``value`` in 8-bit codes with a scale for each row, made once."""
        return self.once(("bytes", value), lambda: self._in_bytes(value))

    def _in_bytes(self, value: int) -> int:
        out = self._value(
            self._rank[value],
            datatype=schema.XNNDatatype.xnn_datatype_qdint8,
            how=schema.PerTokenDynamicQuant(1),
        )
        return self._add(schema.XNNConvert(value, out, 0), out)

    def reshape(self, value: int, shape: Sequence[int]) -> int:
        """At most one size is 0: what is left."""
        out = self._value(len(shape))
        return self._add(schema.XNNStaticReshape(len(shape), list(shape), value, out, 0), out)

    def transpose(self, value: int, order: Sequence[int]) -> int:
        out = self._value(len(order))
        return self._add(schema.XNNStaticTranspose(len(order), list(order), value, out, 0), out)

    def slice(self, value: int, start: int, size: int) -> int:
        """``size`` of the first dim from ``start``, and all of the others."""
        rank = self._rank[value]
        starts, sizes = [start] + [0] * (rank - 1), [size] + [0] * (rank - 1)
        out = self._value(rank)
        return self._add(schema.XNNStaticSlice(rank, starts, sizes, value, out, 0), out)

    def payload(self) -> tuple[bytes, NamedDataStoreOutput]:
        """The delegate's bytes, and its constants by name."""
        for number, value in enumerate(self._outputs, len(self._inputs)):
            tensor = self._values[value].xvalue_union
            tensor.external_id = number
            tensor.flags |= constants.XNN_VALUE_FLAG_EXTERNAL_OUTPUT
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self._inputs) + len(self._outputs),
            input_ids=self._inputs,
            output_ids=self._outputs,
            constant_data=self._constants,
        )
        content = serialize_xnnpack_binary(graph, bytearray())
        return content, self._store.get_named_data_store_output()


def _bytes(values: Array) -> bytes:
    return np.ascontiguousarray(values).tobytes()
