"""Codes of a decoder's matrices in the layouts of this runtime's kernels. Needs numpy alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgekit.blocks import Blocks
from edgekit.errors import LoweringFailed
from edgekit.spec import Array

# Columns of a block that MatMulNBits and GatherBlockQuantized were tried with.
SMALLEST, WIDEST = 16, 256


def packed(blocks: Blocks) -> Array:
    """Codes as MatMulNBits takes them: uint8 [rows, blocks, block * bits / 8], low halves first."""
    codes = blocks.codes
    if blocks.bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes.reshape(blocks.shape[0], blocks.scales.shape[1], -1)


def expanded(content: Array) -> Array:
    """Packed 4-bit codes, uint8 [rows, blocks, n], as 8-bit codes [rows, blocks, 2 n].

    Each is 16 times itself: with a sixteenth of the scale the same number, as
    16 (q - 8) = 16 q - 128.
    """
    codes = np.empty((*content.shape, 2), np.uint8)
    np.left_shift(content, 4, out=codes[..., 0])
    np.bitwise_and(content, 0xF0, out=codes[..., 1])
    return codes.reshape(*content.shape[:-1], -1)


def fitting(blocks: Blocks, name: str) -> Blocks:
    """The same matrix in blocks of a size that the kernels take: a power of two, 16 to 256.

    A larger block is cut, its scale repeated. Raises ``LoweringFailed`` where none divides it.
    """
    size = blocks.block
    cut = min(size & -size, WIDEST)
    if cut < SMALLEST:
        raise LoweringFailed(
            f"{name} is quantized in blocks of {size} columns; onnxruntime's kernels take blocks "
            f"of a multiple of {SMALLEST}. Quantize it in blocks of 32."
        )
    if cut == size:
        return blocks
    times = size // cut
    offsets = None if blocks.offsets is None else np.repeat(blocks.offsets, times, 1)
    return replace(blocks, scales=np.repeat(blocks.scales, times, 1), offsets=offsets)
