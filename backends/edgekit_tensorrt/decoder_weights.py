"""Matrices of a decoder as TensorRT multiplies by them: floats, or symmetric 4-bit codes.

TensorRT has one fused kernel for weights in blocks along the sum: 4-bit codes without offsets, and
scales above 0. (Blocks of 8-bit codes are made floats first, all of them in every pass.) So every
matrix that comes in blocks keeps its own codes and scales in that form, exactly:

* 8 bits: ``code - 128 = 16 * high + low + 8``, the two halves symmetric 4-bit codes. They stand
  side by side, twice as long along the sum, and multiply the input joined to itself. Where no
  ``low`` says anything, as in 4-bit codes that were widened, the high half alone is kept;
* a scale below 0: ``s * (c - 8) = |s| * ((15 - c) - 8) + |s|``;
* what offsets add is ``blockmean(x) @ (block * offsets)``, a product ``1 / block`` as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekit.blocks import Blocks
from edgekit.spec import Array

# TensorRT takes scales above 0 alone; a block whose scale is 0 gets this, and codes of 0.
SMALLEST_SCALE = np.finfo(np.float16).smallest_subnormal


@dataclass(frozen=True)
class Codes:
    """A matrix as ``scales * codes`` in each block, with ``offsets`` added.

    ``codes`` are int8 [rows, halves * columns] within -8..7, ``scales`` float16
    [rows, halves * blocks], ``offsets`` float32 [rows, blocks] or None.
    """

    codes: Array
    scales: Array
    block: int
    halves: int  # 2 where the matrix had 8 bits
    offsets: Array | None

    @property
    def columns(self) -> int:
        return int(self.codes.shape[1]) // self.halves


def codes_from_blocks(blocks: Blocks) -> Codes:
    """The same matrix; what is rounded are scales and offsets alone, to float16."""
    blocks = _with_positive_scales(blocks)
    codes, scales, offsets = blocks.codes, blocks.scales, blocks.offsets
    if blocks.bits == 4:
        return _made(codes.view(np.int8) - np.int8(8), scales, blocks.block, 1, offsets)
    high, low = (codes >> 4).view(np.int8) - np.int8(8), codes & 15
    if not low.any():
        return _made(high, 16 * scales, blocks.block, 1, offsets)
    both = np.concatenate([high, low.view(np.int8) - np.int8(8)], 1)
    more = 8 * scales if offsets is None else offsets + 8 * scales
    return _made(both, np.concatenate([16 * scales, scales], 1), blocks.block, 2, more)


def _made(codes: Array, scales: Array, block: int, halves: int, offsets: Array | None) -> Codes:
    half = np.maximum(scales, SMALLEST_SCALE).astype(np.float16)
    return Codes(codes, half, block, halves, offsets)


def _with_positive_scales(blocks: Blocks) -> Blocks:
    """Turn the codes of blocks whose scale is below 0; codes of 0 where the scale is 0."""
    if (blocks.scales > 0).all():
        return blocks
    negative = np.repeat(blocks.scales < 0, blocks.block, 1)
    codes = np.where(negative, (1 << blocks.bits) - 1 - blocks.codes, blocks.codes)
    codes = np.where(np.repeat(blocks.scales == 0, blocks.block, 1), blocks.middle, codes)
    turned = np.where(blocks.scales < 0, -blocks.scales, 0)
    offsets = turned if blocks.offsets is None else blocks.offsets + turned
    return Blocks(codes.astype(np.uint8), np.abs(blocks.scales), blocks.bits, offsets)


def joined_codes(parts: list[Codes]) -> Codes:
    """Matrices that ``joinable`` takes, one below the other."""
    offsets = None
    if any(part.offsets is not None for part in parts):
        columns = parts[0].columns // parts[0].block
        offsets = np.concatenate(
            [
                np.zeros((len(part.codes), columns), np.float32)
                if part.offsets is None
                else part.offsets
                for part in parts
            ]
        )
    return Codes(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        parts[0].block,
        parts[0].halves,
        offsets,
    )


def joinable(parts: list[Array | Codes]) -> bool:
    """Whether one product can do for all: floats alone, or codes of one form."""
    codes = [part for part in parts if isinstance(part, Codes)]
    forms = {(part.block, part.halves) for part in codes}
    return not codes or (len(codes) == len(parts) and len(forms) == 1)
