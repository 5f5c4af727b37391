"""Float matrices to blocks of codes, and a decoder with every matrix in blocks.

Rounding to 4 bits needs torch and torchao.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgekit.blocks import Blocks, widened
from edgekit.decoder import Decoder, Weight
from edgekit.errors import BadModel
from edgekit.spec import Array

BLOCK = 32


def blocks_from_floats(floats: Array, bits: int, block: int = BLOCK) -> Blocks:
    """Round a float32 matrix [rows, columns] to ``bits``, 4 or 8, a scale for each ``block``.

    ``columns`` is a multiple of ``block``. 8 bits are symmetric, the largest magnitude of a block
    127; 4 bits have an offset too, both found by half-quadratic quantization (HQQ, Badri and
    Shaji 2023) in torchao: of what was tried it costs the least perplexity, see tools/README.md.
    """
    rows, columns = floats.shape
    if columns % block:
        raise BadModel(
            f"a matrix of {columns} columns cannot be cut into blocks of {block}; choose "
            "--precision fp16."
        )
    if bits == 4:
        return _half_quadratic(floats, block)
    parts = floats.reshape(rows, columns // block, block)
    scales = (np.abs(parts).max(-1) / 127).astype(np.float32)
    safe = np.where(scales == 0, 1, scales)
    codes = np.rint(parts / safe[..., None]) + 128
    return Blocks(codes.astype(np.uint8).reshape(rows, columns), scales, 8)


def _half_quadratic(floats: Array, block: int) -> Blocks:
    """4-bit codes with a float zero point: ``scale * (code - zero)``."""
    import torch

    from edgekit.graph import quiet

    with quiet():
        from torchao.quantization import quant_primitives

        # No public function of torchao gives the float zero point, which a tested version pins.
        found = quant_primitives._choose_qparams_and_quantize_affine_hqq(
            torch.from_numpy(np.ascontiguousarray(floats)),
            nbits=4,
            group_size=block,
            compute_dtype=torch.float32,
            device="cpu",
            raw_output=True,
        )
    codes, scales, zeros = (each.numpy() for each in found[:3])
    low, high = _ends(floats, block)
    # A block of one value has no range to cut, and HQQ divides by it.
    flat = low == high
    scales = np.where(flat, 0, scales).astype(np.float32)
    offsets = np.where(flat, low, scales * (8 - np.where(flat, 0, zeros))).astype(np.float32)
    return Blocks(codes.astype(np.uint8), scales, 4, offsets)


def _ends(floats: Array, block: int) -> tuple[Array, Array]:
    parts = floats.reshape(len(floats), -1, block)
    return parts.min(-1), parts.max(-1)


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
