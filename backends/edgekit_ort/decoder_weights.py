"""Weights of a decoder in one file beside the graph, which the runtime maps into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.spec import Array

_PAGE = 4096  # the runtime maps a tensor in place where it starts at a page
_SMALL = 1024  # bytes; what is smaller stays in the graph, where its optimizer reads it


class WeightFile:
    """The external data of a graph: arrays one behind the other, equal ones once."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name, self._file = name, file
        self._places: dict[bytes, int] = {}

    def put(self, array: Array) -> int:
        """Write ``array``; the offset of its first byte."""
        content = np.ascontiguousarray(array).data.cast("B")
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % _PAGE))
            self._places[key] = self._file.tell()
            self._file.write(content)
        return self._places[key]

    def tensor(self, name: str, array: Array) -> onnx.TensorProto:
        """Write ``array``; the initializer called ``name`` that stands for it."""
        if array.nbytes < _SMALL:
            return numpy_helper.from_array(np.ascontiguousarray(array), name)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self.stand_in(name, array.shape, kind, self.put(array), array.nbytes)

    def stand_in(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, length: int
    ) -> onnx.TensorProto:
        """An initializer whose bytes lie at ``offset``, or are given when the graph is opened."""
        tensor = TensorProto(name=name, dims=shape, data_type=kind)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in ("location", self._name), ("offset", offset), ("length", length):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


@contextmanager
def weight_file(path: Path) -> Iterator[WeightFile]:
    """A new file at ``path``, open for writing."""
    with path.open("wb") as file:
        yield WeightFile(path.name, file)
