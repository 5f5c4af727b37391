"""Reads what an op is called with: a tensor from the file, or a Python value from a default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Flag: TypeAlias = Tensor | bool
Whole: TypeAlias = Tensor | int
Real: TypeAlias = Tensor | float
Wholes: TypeAlias = Tensor | Sequence[int]

DTYPES = {
    "fp16": torch.float32,  # held in float32: whoever runs the program rounds
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int16,
    "uint16": torch.int32,  # torch has the type and hardly an operator for it
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def ints(values: Wholes) -> list[int]:
    """A vector of whole numbers; a scalar is a vector of one."""
    if isinstance(values, Tensor):
        return [int(value) for value in values.reshape(-1).tolist()]
    return [int(value) for value in values]


def flags(values: Tensor | None, count: int) -> list[bool]:
    """A vector of ``count`` booleans, all False when the op was given none."""
    return [False] * count if values is None else [bool(v) for v in values.reshape(-1).tolist()]


def integer(value: Whole) -> int:
    return int(value.item()) if isinstance(value, Tensor) else int(value)


def flag(value: Flag) -> bool:
    return bool(value.item()) if isinstance(value, Tensor) else bool(value)


def real(value: Real) -> float:
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def axis_of(axis: Whole, rank: int) -> int:
    """An axis counted from the front."""
    number = integer(axis)
    return number + rank if number < 0 else number


def along(vector: Tensor, rank: int, axis: int) -> Tensor:
    """A vector shaped so that it broadcasts along ``axis``; a scalar stays one."""
    if vector.dim() == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices as torch takes them: int64, negative ones counted from the end."""
    positive = indices.long()
    return torch.where(positive < 0, positive + size, positive)


def as_dtype(x: Tensor, dtype: str) -> Tensor:
    """``x`` in the MIL type of that name.

    A float is cut toward zero and held at the ends of the range, as ARM converts; an integer that
    does not fit wraps.
    """
    name = dtype.lower()
    if name == "bool":
        return x != 0
    if name.startswith("fp"):
        return x.to(torch.float32)
    low, high = (0, 0xFFFF) if name == "uint16" else _range(DTYPES[name])
    if x.is_floating_point():
        x = x.double().nan_to_num(0.0).clamp(low, high)
    elif name == "uint16":
        x = x.to(torch.int32) & high
    return x.to(torch.int64).to(DTYPES[name])


def _range(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return limits.min, limits.max
