"""Matrices quantized in blocks: integer codes with a scale, and an offset, for each block of a row.

The one form in which weights of language models travel from a file to the targets, so that what
comes quantized keeps its own codes and scales. Needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgekit.spec import Array


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns], each row cut into blocks of ``columns / scales.shape[1]``.

    An element is ``scale * (code - 2**(bits - 1)) + offset``: ``codes`` are uint8 [rows, columns]
    below ``2**bits``, ``scales`` and ``offsets`` float32 [rows, blocks]. Without offsets the codes
    are symmetric. ``bits`` is 4 or 8.
    """

    codes: Array
    scales: Array
    bits: int
    offsets: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (output features) and columns (input features)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    @property
    def middle(self) -> int:
        """The code that stands for the offset alone: 8 or 128."""
        return 1 << (self.bits - 1)

    @property
    def bytes(self) -> int:
        """What a file needs at least: codes packed, scales and offsets in float16."""
        numbers = self.scales.size + (0 if self.offsets is None else self.offsets.size)
        return self.codes.size * self.bits // 8 + 2 * numbers

    def floats(self) -> Array:
        """The matrix that the codes stand for, float32."""
        rows, columns = self.shape
        signed = self.codes.reshape(rows, -1, self.block).astype(np.float32) - self.middle
        signed *= self.scales[..., None]
        if self.offsets is not None:
            signed += self.offsets[..., None]
        return signed.reshape(rows, columns)

    def rows(self, index: Array) -> Blocks:
        """The rows of ``index``, in its order."""
        offsets = None if self.offsets is None else self.offsets[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], offsets=offsets)


def joined(parts: list[Blocks]) -> Blocks:
    """Matrices of the same columns, bits and blocks, one below the other."""
    first = parts[0]
    offsets = None
    if any(part.offsets is not None for part in parts):
        offsets = np.concatenate(
            [np.zeros_like(p.scales) if p.offsets is None else p.offsets for p in parts]
        )
    codes = np.concatenate([part.codes for part in parts])
    return Blocks(codes, np.concatenate([p.scales for p in parts]), first.bits, offsets)


def alike(parts: list[Array | Blocks]) -> bool:
    """Whether ``joined`` takes them: all in blocks, with the same bits and block."""
    blocks = [part for part in parts if isinstance(part, Blocks)]
    return len(blocks) == len(parts) and len({(b.bits, b.block) for b in blocks}) == 1


def widened(blocks: Blocks) -> Blocks:
    """The same matrix, to the last bit of its scales, in 8-bit codes."""
    if blocks.bits == 8:
        return blocks
    times = 1 << (8 - blocks.bits)
    return replace(
        blocks, codes=blocks.codes * np.uint8(times), scales=blocks.scales / times, bits=8
    )
