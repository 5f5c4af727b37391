"""Reads the container of a GGUF file: its fields by name, its tensors as bytes.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. Every length is held
against what is left of the file before it is believed, so that a file cut short, or with a
number gone wrong, is a sentence at once. Needs numpy alone.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import BadModel, DamagedFile
from edgekit.spec import Array

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST = 1 << 20  # fields or tensors that a file may have

# By ggml's number: the name, how many weights a block has, how many bytes. Types that are not
# read are here with no sizes, so that a refusal can name them.
KINDS: Mapping[int, tuple[str, int, int]] = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 8: ("Q8_0", 32, 34)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 12: ("Q4_K", 256, 144), 14: ("Q6_K", 256, 210)},
    **{6: ("Q5_0", 0, 0), 7: ("Q5_1", 0, 0), 9: ("Q8_1", 0, 0), 10: ("Q2_K", 0, 0)},
    **{11: ("Q3_K", 0, 0), 13: ("Q5_K", 0, 0), 15: ("Q8_K", 0, 0), 16: ("IQ2_XXS", 0, 0)},
    **{17: ("IQ2_XS", 0, 0), 18: ("IQ3_XXS", 0, 0), 19: ("IQ1_S", 0, 0), 20: ("IQ4_NL", 0, 0)},
    **{21: ("IQ3_S", 0, 0), 22: ("IQ2_S", 0, 0), 23: ("IQ4_XS", 0, 0), 24: ("I8", 0, 0)},
    **{25: ("I16", 0, 0), 26: ("I32", 0, 0), 27: ("I64", 0, 0), 28: ("F64", 0, 0)},
    **{29: ("IQ1_M", 0, 0), 34: ("TQ1_0", 0, 0), 35: ("TQ2_0", 0, 0), 39: ("MXFP4", 0, 0)},
}
READ = tuple(name for name, block, _ in KINDS.values() if block)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    **{10: "Q", 11: "q", 12: "d"}
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file has it: ``shape`` has the rows first; ``data`` are its bytes, uint8
    [rows, bytes of a row], empty where the type ``kind`` is not read."""

    kind: str
    shape: tuple[int, ...]
    data: Array


@dataclass(frozen=True)
class Gguf:
    """Fields (numbers, strings, lists, arrays) and tensors by name."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """A place in the file's bytes that never runs over their end."""

    def __init__(self, path: Path, content: Array) -> None:
        self.path, self.content, self.at = path, content, 0

    def damaged(self, reason: str) -> DamagedFile:
        return DamagedFile(
            f"{self.path} is no whole GGUF file: {reason}. Download or convert it again."
        )

    def take(self, count: int) -> Array:
        """The next ``count`` bytes."""
        left = len(self.content) - self.at
        if count > left:
            raise self.damaged(
                f"it is cut short, byte {self.at} announces {count} bytes and {left} follow"
            )
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, bytes(self.take(struct.calcsize(code))))[0]

    def text(self) -> str:
        start = self.at
        try:
            return bytes(self.take(self.number("Q"))).decode()
        except UnicodeDecodeError as cause:
            raise self.damaged(f"the text at byte {start} is not UTF-8") from cause

    def value(self) -> Any:
        """A field's value: its type, then itself."""
        return self._of(self.number("I"))

    def _of(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.damaged(f"byte {self.at - 4} names a value type {kind}, which none is")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            return np.frombuffer(self.take(count * size), "<" + _SCALARS[kind])
        if kind != _STRING:
            raise self.damaged(f"byte {self.at - 12} names a list of {kind}, which is not read")
        return [self.text() for _ in range(count)]  # too many end with the file


def read_gguf(path: Path) -> Gguf:
    """The fields and tensors of a file; tensors stay on the disk until they are used.

    Raises ``BadModel`` where there is no such file, else ``DamagedFile``.
    """
    if not path.is_file():
        raise BadModel(f"there is no file {path}.")
    if path.stat().st_size < 24:
        raise DamagedFile(f"{path} is no GGUF file: it has {path.stat().st_size} bytes.")
    cursor = _Cursor(path, np.memmap(path, np.uint8, "r"))
    magic = bytes(cursor.take(4))
    if magic != MAGIC:
        raise DamagedFile(f"{path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
    version = cursor.number("I")
    if version not in VERSIONS:
        big = version & 0xFFFF == 0
        raise DamagedFile(
            f"{path} is GGUF {'for big-endian machines' if big else f'version {version}'}; "
            "little-endian versions 2 and 3 are read. Convert the model again."
        )
    tensors, count = cursor.number("Q"), cursor.number("Q")
    if max(tensors, count) > MOST:
        raise cursor.damaged(f"it announces {tensors} tensors and {count} fields")
    fields = {cursor.text(): cursor.value() for _ in range(count)}
    return Gguf(path, fields, _tensors(cursor, tensors, fields.get("general.alignment", 32)))


def _tensors(cursor: _Cursor, count: int, alignment: object) -> dict[str, GgufTensor]:
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
    heads: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        name, dims = cursor.text(), cursor.number("I")
        if dims > 8:
            raise cursor.damaged(f"tensor {name} has {dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]  # ggml has the columns first
        heads.append((name, shape, cursor.number("I"), cursor.number("Q")))
    start = -(-cursor.at // alignment) * alignment
    found = {
        name: _tensor(cursor, start, shape, number, offset) for name, shape, number, offset in heads
    }
    if len(found) < count:
        raise cursor.damaged("two tensors have the same name")
    return found


def _tensor(
    cursor: _Cursor, start: int, shape: tuple[int, ...], number: int, offset: int
) -> GgufTensor:
    name, block, size = KINDS.get(number, (f"number {number}", 0, 0))
    if not block:
        return GgufTensor(name, shape, np.empty((0, 0), np.uint8))
    columns = shape[-1] if shape else 1
    if columns % block:
        raise cursor.damaged(f"a row of {columns} weights is no whole number of {name} blocks")
    rows = math.prod(shape[:-1])
    cursor.at = min(start + offset, len(cursor.content))
    data = cursor.take(rows * (columns // block * size))
    return GgufTensor(name, shape, data.reshape(rows, -1) if rows else data.reshape(0, 0))
