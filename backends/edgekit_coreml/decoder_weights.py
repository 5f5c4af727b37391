"""A decoder's weights as the constants of a ML Program: made once, shared by every function.

A matrix in blocks keeps its codes: ``scale * (code - offset)`` is what the package stores, and the
offset may be a float there, so that a file's own minimum of a block needs no other form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.blocks import Blocks, alike, joined
from edgekit.decoder import Decoder
from edgekit.errors import LoweringFailed
from edgekit.graph import quiet
from edgekit.spec import Array

with quiet():  # it warns of every torch newer than it was tried with
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

_LARGEST_OFFSET = 2.0**15  # in codes; beyond it a block is one value, its offset


@dataclass(frozen=True)
class Codes:
    """What ``constexpr_blockwise_shift_scale`` takes: int8 or int4 ``data`` [rows, columns],
    ``scale`` and ``offset`` [rows, blocks] in float16."""

    data: Array
    scale: Array
    offset: Array | None
    bits: int


def codes_from_blocks(blocks: Blocks) -> Codes:
    """The same matrix as Core ML stores it: an element is ``scale * (data - offset)``.

    Scales are rounded to float16 where they are not float16 already, as those of GGUF files are.
    """
    data = (blocks.codes.astype(np.int16) - blocks.middle).astype(np.int8)
    scales = blocks.scales
    if blocks.bits == 8 and not (blocks.codes & 15).any():
        # Codes of four bits that were widened: their own scale, 16 times as large, keeps digits
        # that a float16 below 6e-5 loses.
        data, scales = data >> 4, scales * 16
    scale = scales.astype(np.float16)
    if blocks.offsets is None:
        return Codes(data, scale, None, blocks.bits)
    held = scale.astype(np.float32)
    flat = np.abs(blocks.offsets) > _LARGEST_OFFSET * held
    scale = np.where(flat, np.abs(blocks.offsets), held).astype(np.float16)
    held = np.where(scale == 0, 1, scale).astype(np.float32)
    if flat.any():
        wide = np.repeat(flat, blocks.block, axis=1)
        data = np.where(wide, np.int8(0), data)
    return Codes(data, scale, (-blocks.offsets / held).astype(np.float16), blocks.bits)


class Constants:
    """Hands constants to the function that is being built.

    Functions that ask for one name get one record of the weight file: that is what the weight
    id of a constant does, and why the arrays are kept.
    """

    def __init__(self, decoder: Decoder, *, half: bool, coded: bool) -> None:
        self._decoder, self._coded = decoder, coded
        self.dtype: Any = np.float16 if half else np.float32
        self._arrays: dict[str, Array] = {}
        self._codes: dict[str, Codes] = {}

    def values(self, name: str, array: Array) -> Any:
        """``array`` in the precision of the program; the same ``name`` is stored once."""
        if name not in self._arrays:
            self._arrays[name] = self._held(name, array)
        return _constant(name, self._arrays[name])

    def vector(self, name: str) -> Any:
        """A norm's weight or a bias."""
        return self.values(name, self._decoder.floats(name))

    def floats(self, name: str) -> Array:
        """A weight as float32, to make another constant of."""
        return self._decoder.floats(name)

    def matrices(self, names: Sequence[str]) -> list[tuple[Any, list[str]]]:
        """Matrices of the same input, merged where they can be, and the names in each."""
        weights = [self._decoder.weights[name] for name in names]
        if self._coded and not alike(weights):
            return [(self.matrix([name]), [name]) for name in names]
        return [(self.matrix(names), list(names))]

    def matrix(self, names: Sequence[str]) -> Any:
        """Matrices one below the other: [output features, input features]."""
        key = "+".join(names)
        weights = [self._decoder.weights[name] for name in names]
        blocks = [weight for weight in weights if isinstance(weight, Blocks)]
        if not self._coded or not blocks:
            if key not in self._arrays:
                floats = [self._held(name, self._decoder.floats(name)) for name in names]
                self._arrays[key] = floats[0] if len(floats) == 1 else np.concatenate(floats)
            return _constant(key, self._arrays[key])
        if key not in self._codes:
            self._codes[key] = codes_from_blocks(joined(blocks))
        return _coded(key, self._codes[key])

    def _held(self, name: str, array: Array) -> Array:
        """In the precision of the program. Raises ``LoweringFailed`` where it is too large."""
        with np.errstate(over="ignore"):
            held = array.astype(self.dtype)
        if not np.isfinite(held).all():
            raise LoweringFailed(
                f"the weight {name!r} holds {float(np.abs(array).max()):.3g}, and float16 no more "
                "than 65504; export with --precision fp32."
            )
        return held


def _constant(name: str, array: Array) -> Any:
    constant = mb.const(val=array)
    constant.op.weight_id = name
    return constant


def _coded(name: str, codes: Codes) -> Any:
    data = codes.data
    if codes.bits == 4:
        data = data.astype(types.type_mapping.string_to_nptype("int4"))
    parts = {"data": data, "scale": codes.scale, "offset": codes.offset}
    return mb.constexpr_blockwise_shift_scale(
        **{
            part: _constant(f"{name}.{part}", array)
            for part, array in parts.items()
            if array is not None
        }
    )
