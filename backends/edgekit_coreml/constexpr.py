"""Decodes compressed weights: every ``constexpr_*`` operation, as numpy on whole arrays.

The iOS 16 forms are flat, packed into bytes and come with a shape; the iOS 18 forms have the
weight's own rank, and one may be the input of another (a table of int8 codes, itself scaled).
Both kinds share names; ``decode`` tells them apart by their parameters. What does not fit
together raises ``ValueError`` or ``IndexError``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from edgekit.spec import Array
from edgekit_coreml.weights import unpack

Parameters = Mapping[str, Any]


def decode(form: str, parameters: Parameters) -> tuple[Array, ...]:
    """The arrays that the operation ``form`` gives; a sparse form gives its mask and its data."""
    # What a float16 cannot hold becomes infinite, as everywhere else, and is no warning.
    with np.errstate(over="ignore", invalid="ignore"):
        return FORMS[form](parameters)


def _affine_dequantize(given: Parameters) -> tuple[Array, ...]:
    data, scale = given["quantized_data"], given["scale"]
    axis = int(given["axis"])

    def along(values: Array) -> Array:
        shape = [1] * data.ndim
        shape[axis] = values.size
        return values.reshape(shape)

    # float32, and rounded once: a float16 cannot hold the product before that.
    shifted = data.astype(np.float32) - along(given["zero_point"]).astype(np.float32)
    return ((shifted * along(scale)).astype(scale.dtype),)


def _cast(given: Parameters) -> tuple[Array, ...]:
    dtypes = {"fp16": np.float16, "fp32": np.float32}
    if given["output_dtype"] not in dtypes:
        raise ValueError(f"a weight cannot be cast to {given['output_dtype']}")
    return (given["source_val"].astype(dtypes[given["output_dtype"]]),)


def _lut_to_dense(given: Parameters) -> tuple[Array, ...]:
    if "shape" in given:
        return (_flat_lut(given["indices"], given["lut"], given["shape"]),)
    return (_looked_up(given["indices"], given["lut"], given.get("vector_axis")),)


def _flat_lut(packed: Array, table: Array, shape: Array) -> Array:
    bits = table.size.bit_length() - 1
    if table.size != 1 << bits or not 1 <= bits <= 8:
        raise ValueError(f"a table of {table.size} values fits no number of bits")
    sizes = tuple(shape.tolist())
    dense: Array = table[unpack(packed, bits, prod(sizes))].reshape(sizes)
    return dense


def _looked_up(indices: Array, table: Array, vector_axis: Array | None) -> Array:
    """Each index replaced by a row of its block's table, laid out along ``vector_axis``."""
    *groups, palettes, width = table.shape
    blocked, expanded = _blocked(indices, groups)
    # [group, palette, width] looked up by (group, index) leaves the vector as the last axis.
    rows = table.reshape(-1, palettes, width)
    if prod(groups) == 1:
        found: Array = rows[0][blocked]
    else:
        found = rows[np.arange(prod(groups)).reshape(expanded), blocked]
    found = found.reshape(*indices.shape, width)
    if width == 1:
        return found.reshape(indices.shape)
    if vector_axis is None:
        raise ValueError("a table of vectors needs the axis along which they lie")
    axis = range(indices.ndim)[int(vector_axis)]
    shape = list(indices.shape)
    shape[axis] *= width
    dense: Array = np.moveaxis(found, -1, axis + 1).reshape(shape)
    return dense


def _blockwise_shift_scale(given: Parameters) -> tuple[Array, ...]:
    return (_shift_scaled(given["data"], given["scale"], given.get("offset")),)


def _shift_scaled(data: Array, scale: Array, offset: Array | None) -> Array:
    """``scale * (data - offset)``, each value of which serves a block of the data."""
    blocked, expanded = _blocked(data, scale.shape)
    values = blocked.astype(np.float32)
    if offset is not None:
        values -= offset.reshape(expanded).astype(np.float32)
        if offset.dtype.kind == "f" and scale.dtype == np.float16:
            # A difference of small whole numbers is exact in float16; of these it may not be.
            values = values.astype(np.float16).astype(np.float32)
    values *= scale.reshape(expanded)
    return values.astype(scale.dtype).reshape(data.shape)


def _blocked(data: Array, groups: Sequence[int]) -> tuple[Array, tuple[int, ...]]:
    """The data with each axis split into (group, within); the shape that groups broadcast in."""
    if len(groups) != data.ndim:
        raise ValueError(f"{len(groups)} axes of blocks do not fit data of {data.ndim} axes")
    if any(not count or size % count for size, count in zip(data.shape, groups, strict=True)):
        raise ValueError(f"blocks of {tuple(groups)} do not divide data of {data.shape}")
    pairs = [(count, size // count) for size, count in zip(data.shape, groups, strict=True)]
    blocked = data.reshape([size for pair in pairs for size in pair])
    return blocked, tuple(size for count, _ in pairs for size in (count, 1))


def _sparse_to_dense(given: Parameters) -> tuple[Array, ...]:
    mask = given["mask"]
    if "shape" in given:
        sizes = tuple(given["shape"].tolist())
        mask = unpack(mask, 1, prod(sizes)).reshape(sizes)
    return (_dense(given["nonzero_data"], mask),)


def _dense(data: Array, mask: Array) -> Array:
    dense = np.zeros(mask.shape, data.dtype)
    if np.count_nonzero(mask) != data.size:  # numpy would repeat a single value
        raise ValueError(f"{data.size} values do not fit a mask of {np.count_nonzero(mask)}")
    dense[mask != 0] = data
    return dense


def _lut_to_sparse(given: Parameters) -> tuple[Array, ...]:
    mask, table, axis = given["indices_mask"], given["lut"], given.get("vector_axis")
    dense = _looked_up(_dense(given["indices_nonzero_data"], mask), table, axis)
    if table.shape[-1] > 1:
        mask = np.repeat(mask, table.shape[-1], int(axis or 0))
    return mask, dense[mask != 0]


def _sparse_blockwise_shift_scale(given: Parameters) -> tuple[Array, ...]:
    mask = given["data_mask"]
    data = _dense(given["nonzero_data"], mask)
    return mask, _shift_scaled(data, given["scale"], given.get("offset"))[mask != 0]


FORMS: Mapping[str, Callable[[Parameters], tuple[Array, ...]]] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
