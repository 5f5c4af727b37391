"""Reads a package's weight file: numbers of every width, each record checked before it is used.

weight.bin   u32 count, u32 version 2, then zeros up to byte 64; then records
record       at a multiple of 64: u32 0xDEADBEEF, u32 dtype, u64 size in bytes, u64 offset of
             the data (64 after the record), u64 number of unused bits in the last byte
data         little-endian; below one byte, packed from the lowest bit up
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import RuntimeFailed
from edgekit.spec import Array

_SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQQ")
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type: its MIL name, its bits in a file, the numpy type of its decoded values."""

    name: str
    bits: int
    numpy: Any
    blob: int = 0  # its code in a weight file; 0 where that has none

    @property
    def signed(self) -> bool:
        return self.name.startswith("int")


# By the number that the protobuf gives them.
DTYPES = {
    1: Dtype("bool", 8, np.bool_),
    2: Dtype("string", 0, np.object_),
    10: Dtype("fp16", 16, np.float16, 1),
    11: Dtype("fp32", 32, np.float32, 2),
    12: Dtype("fp64", 64, np.float64),
    21: Dtype("int8", 8, np.int8, 4),
    22: Dtype("int16", 16, np.int16, 6),
    23: Dtype("int32", 32, np.int32, 14),
    24: Dtype("int64", 64, np.int64),
    25: Dtype("int4", 4, np.int8, 8),
    31: Dtype("uint8", 8, np.uint8, 3),
    32: Dtype("uint16", 16, np.uint16, 7),
    33: Dtype("uint32", 32, np.uint32, 15),
    34: Dtype("uint64", 64, np.uint64),
    35: Dtype("uint4", 4, np.uint8, 11),
    36: Dtype("uint2", 2, np.uint8, 10),
    37: Dtype("uint1", 1, np.uint8, 9),
    38: Dtype("uint6", 6, np.uint8, 13),
    39: Dtype("uint3", 3, np.uint8, 12),
}


def damaged(why: str) -> RuntimeFailed:
    """The error for a package that cannot be loaded."""
    return RuntimeFailed(f"coreml could not load the model: {why}")


def shown(name: str) -> str:
    """A name from a file, fit for one line of a message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def unpack(packed: Array, bits: int, count: int, *, signed: bool = False) -> Array:
    """The first ``count`` values of ``bits`` bits each, lowest bit first, as one byte each."""
    if packed.size * 8 < count * bits:
        raise ValueError(f"{packed.size} bytes hold less than {count} values of {bits} bits")
    if bits == 4:  # what large weights have: ten times as fast as bit by bit
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count]
    else:
        single = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        values = np.packbits(single, axis=1, bitorder="little").reshape(count)
    if not signed:
        return values
    # The sign bit is moved to the byte's own, and back with it repeated.
    return (values << (8 - bits)).view(np.int8) >> (8 - bits)


class Weights:
    """A weight file, mapped if it lies on disk; each record is checked when it is asked for."""

    def __init__(self, files: Mapping[str, bytes | Path], path: str) -> None:
        self._path = path
        content = files.get(path)
        if content is None:
            raise damaged(f"the package has no file {shown(path)}, where its weights should be")
        try:
            # Mode "c": pages are the file's, and torch gets the writable array it insists on.
            self._bytes: Array = (
                np.frombuffer(content, np.uint8)
                if isinstance(content, bytes)
                else np.memmap(content, np.uint8, "c")
            )
        except (OSError, ValueError) as cause:
            raise damaged(f"{shown(path)} is empty, or cannot be read") from cause
        if self._bytes.size < _ALIGNMENT:
            raise damaged(f"{shown(path)} is too short to hold weights")
        self._count, version = struct.unpack_from("<II", self._bytes.data)
        if version != 2:
            raise damaged(f"{shown(path)} is not a weight file of version 2")
        self._offsets: set[int] = set()

    def read(self, offset: int, dtype: Dtype, count: int) -> Array:
        """The packed bytes of the ``count`` values whose record is at ``offset``."""
        where = f"the weight record at {offset} of {shown(self._path)}"
        if offset % _ALIGNMENT or not _ALIGNMENT <= offset <= self._bytes.size - _ALIGNMENT:
            raise damaged(f"{where} is outside the file, or not where records are")
        sentinel, code, size, start, unused = _RECORD.unpack_from(self._bytes.data, offset)
        bits = count * dtype.bits
        if sentinel != _SENTINEL:
            raise damaged(f"{where} does not begin as a record does")
        if code != dtype.blob:
            raise damaged(f"{where} has another dtype than the program says, {dtype.name}")
        if size != -(-bits // 8) or unused != size * 8 - bits:
            raise damaged(f"{where} holds {size} bytes, and its shape needs {-(-bits // 8)}")
        if start != offset + _ALIGNMENT or start + size > self._bytes.size:
            raise damaged(f"{where} has its data outside the file, or not behind itself")
        self._offsets.add(offset)
        packed: Array = self._bytes[start : start + size]
        return packed

    def check_count(self) -> None:
        """The header's count is all that is left to catch a file from another model."""
        if len(self._offsets) > self._count:
            raise damaged(
                f"{shown(self._path)} says it has {self._count} records, "
                f"and the program uses {len(self._offsets)}"
            )
