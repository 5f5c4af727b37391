"""Float matrices to blocks of codes, and a decoder with every matrix in blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgekit.blocks import Blocks, widened
from edgekit.decoder import Decoder, Weight
from edgekit.spec import Array

BLOCK = 32


def blocks_from_floats(floats: Array, bits: int, block: int = BLOCK) -> Blocks:
    """Round a float32 matrix [rows, columns] to ``bits``, 4 or 8, a scale for each ``block``.

    ``columns`` is a multiple of ``block``. 8 bits are symmetric; 4 bits have an offset too.
    """
    rows, columns = floats.shape
    parts = floats.reshape(rows, columns // block, block)
    if bits == 8:
        scales = np.abs(parts).max(-1) / 127
        safe = np.where(scales == 0, 1, scales)
        codes = np.rint(parts / safe[..., None]) + 128
        return Blocks(codes.astype(np.uint8).reshape(rows, columns), scales.astype(np.float32), 8)
    low, high = parts.min(-1), parts.max(-1)
    scales = (high - low) / ((1 << bits) - 1)
    safe = np.where(scales == 0, 1, scales)
    codes = np.rint((parts - low[..., None]) / safe[..., None]).astype(np.uint8)
    offsets = low + (1 << (bits - 1)) * scales
    return Blocks(codes.reshape(rows, columns), scales, bits, offsets)


def quantized_decoder(decoder: Decoder, bits: int) -> Decoder:
    """The same with every matrix in blocks: those that come so keep their own codes and scales.

    With 4 bits asked for, the embedding and the head that come as floats get 8: their error is
    in every logit. With 8, what has 4 is written in 8, exactly.
    """
    heads = {"embedding", decoder.head}
    weights: dict[str, Weight] = {}
    for name, weight in decoder.weights.items():
        if isinstance(weight, Blocks):
            weights[name] = widened(weight) if bits == 8 else weight
        elif weight.ndim == 2:
            weights[name] = blocks_from_floats(weight, 8 if name in heads else bits)
        else:
            weights[name] = weight
    return replace(decoder, weights=weights)
