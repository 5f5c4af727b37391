"""What a tensor looks like at the edge: name, shape of sizes and named dims, dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BadInput, DamagedFile, UsageError

Array = NDArray[Any]
Arrays = Mapping[str, Array]

DTYPES = ("float32", "int64", "int32", "int8", "uint8", "bool")


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension whose size is chosen when the artifact runs: ``minimum`` to ``maximum``."""

    name: str
    minimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.name}:{self.minimum}..{self.maximum}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: ``TensorSpec("x", (Dim("batch", 1, 8), 3, 224, 224), "float32")``."""

    name: str
    shape: tuple[int | Dim, ...]
    dtype: str

    def __str__(self) -> str:
        shape = "x".join(str(dim) for dim in self.shape) or "scalar"
        return f"{self.name}={shape}" + ("" if self.dtype == "float32" else f":{self.dtype}")

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The named dims, in order."""
        return tuple(dim for dim in self.shape if isinstance(dim, Dim))

    def sizes(self, chosen: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Concrete sizes: each named dim takes its value in ``chosen``, else its minimum."""
        chosen = chosen or {}
        return tuple(
            chosen.get(dim.name, dim.minimum) if isinstance(dim, Dim) else dim for dim in self.shape
        )

    def to_json(self) -> dict[str, object]:
        """A JSON object; a named dim is ``{"name", "min", "max"}``."""
        shape = [
            {"name": dim.name, "min": dim.minimum, "max": dim.maximum}
            if isinstance(dim, Dim)
            else dim
            for dim in self.shape
        ]
        return {"name": self.name, "shape": shape, "dtype": self.dtype}

    @classmethod
    def from_json(cls, value: object) -> TensorSpec:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        match value:
            case {"name": str(name), "shape": list(sizes), "dtype": str(dtype)} if dtype in DTYPES:
                return cls(name, tuple(_dim_from_json(size) for size in sizes), dtype)
        raise DamagedFile(f"a tensor spec in the manifest is malformed: {value!r}")


def _dim_from_json(value: object) -> int | Dim:
    match value:
        case {"name": str(name), "min": int(low), "max": int(high)} if (
            type(low) is type(high) is int and 0 <= low <= high
        ):
            return Dim(name, low, high)
        case int(size) if type(size) is int and size >= 0:  # a bool is an int to Python
            return size
    raise DamagedFile(f"a dim in the manifest is malformed: {value!r}")


_DIM = re.compile(r"(?P<name>[A-Za-z_]\w*):(?P<low>\d{1,9})\.\.(?P<high>\d{1,9})|(?P<size>\d{1,9})")


def parse_spec(text: str) -> TensorSpec:
    """Read ``x=1x3x224x224``, ``x=batch:1..8x3x224x224`` or ``ids=1x16:int64``.

    Raises ``UsageError`` with the form expected.
    """
    name, equals, rest = text.partition("=")
    shape_text, colon, dtype = rest.rpartition(":")
    if not colon or dtype not in DTYPES:
        if colon and re.fullmatch(r"[a-z]+\d*", dtype):
            raise UsageError(f"--input {text}: dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
        shape_text, dtype = rest, "float32"
    shape = _parse_shape(shape_text)
    if not (equals and name.isidentifier() and shape):
        raise UsageError(
            f"--input {text!r} is not NAME=SHAPE; write for example x=1x3x224x224, "
            "x=batch:1..8x3x224x224 (a named dim needs its range) or ids=1x16:int64."
        )
    return TensorSpec(name, shape, dtype)


def _parse_shape(text: str) -> tuple[int | Dim, ...]:
    """The dims of ``text``, or () where it is no shape."""
    dims: list[int | Dim] = []
    position = 0
    while match := _DIM.match(text, position):
        if match["size"]:
            dims.append(int(match["size"]))
        else:
            low, high = int(match["low"]), int(match["high"])
            if not 1 <= low <= high:
                raise UsageError(f"dim {match[0]}: the range must rise and start at 1 or above.")
            dims.append(Dim(match["name"], low, high) if low < high else low)
        if match.end() == len(text):
            return tuple(dims) if 0 not in dims else ()
        if text[match.end()] != "x":
            break
        position = match.end() + 1
    return ()


def check_arrays(specs: Iterable[TensorSpec], arrays: Mapping[str, object]) -> dict[str, Array]:
    """Return ``arrays`` in the order of ``specs``, contiguous, or raise ``BadInput``.

    Names must be the same; dtypes too (nothing is cast silently); sizes must fit, and a dim
    named in two inputs must have one size in both.
    """
    specs = tuple(specs)
    expected = ", ".join(str(spec) for spec in specs)
    for name in arrays:
        if name not in {spec.name for spec in specs}:
            raise BadInput(f"there is no input {name!r}; the model takes: {expected}.")
    bound: dict[str, int] = {}
    checked: dict[str, Array] = {}
    for spec in specs:
        if spec.name not in arrays:
            raise BadInput(f"input {spec.name!r} is missing; the model takes: {expected}.")
        checked[spec.name] = _check_array(spec, np.asarray(arrays[spec.name]), bound)
    return checked


def _check_array(spec: TensorSpec, array: Array, bound: dict[str, int]) -> Array:
    if array.dtype.name != spec.dtype:
        raise BadInput(
            f"input {spec.name!r} has dtype {array.dtype.name}; the model takes {spec.dtype}. "
            f"Convert it with .astype('{spec.dtype}')."
        )
    given = "x".join(map(str, array.shape)) or "scalar"
    if array.ndim != len(spec.shape):
        raise BadInput(f"input {spec.name!r} has shape {given}; the model takes {spec}.")
    for size, dim in zip(array.shape, spec.shape, strict=True):
        if isinstance(dim, int):
            fits = size == dim
        else:
            fits = dim.minimum <= size <= dim.maximum and bound.setdefault(dim.name, size) == size
        if not fits:
            raise BadInput(f"input {spec.name!r} has shape {given}; the model takes {spec}.")
    # Runtimes read storage, not strides: a transposed view would be read as something else.
    # (ascontiguousarray would give a scalar one axis.)
    return array if array.flags.c_contiguous else array.copy(order="C")
