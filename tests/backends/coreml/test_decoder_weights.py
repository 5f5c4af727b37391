"""Blocks as Core ML stores them: the same codes, and offsets that may be floats."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.blocks import Blocks, widened
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_coreml.constexpr import decode
from edgekit_coreml.decoder_weights import Codes, codes_from_blocks


def decoded(codes: Codes) -> Array:
    """As the package stores it, decoded."""
    given = {"data": codes.data, "scale": codes.scale, "offset": codes.offset}
    parameters = {name: value for name, value in given.items() if value is not None}
    return decode("constexpr_blockwise_shift_scale", parameters)[0].astype(np.float32)


def blocks(bits: int = 4) -> Blocks:
    found = tiny_decoder(bits=bits).weights["layers.0.gate"]
    assert isinstance(found, Blocks)
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_stay_and_elements_are_equal_but_for_float16(bits: int) -> None:
    ours = blocks(bits)
    codes = codes_from_blocks(ours)
    assert np.array_equal(codes.data.astype(int) + ours.middle, ours.codes)
    assert (codes.scale.dtype.name, codes.bits) == ("float16", bits)
    step = np.repeat(ours.scales, ours.block, 1) * 2 ** (bits - 1)
    assert (np.abs(decoded(codes) - ours.floats()) < step * 2**-9).all()


def test_without_offsets_codes_are_symmetric_and_exact() -> None:
    plain = Blocks(blocks().codes, blocks().scales, 4)
    codes = codes_from_blocks(plain)
    assert codes.offset is None
    assert np.array_equal(decoded(codes), plain.floats().astype(np.float16).astype(np.float32))


def test_widened_codes_keep_their_scales() -> None:
    narrow, wide = codes_from_blocks(blocks()), codes_from_blocks(widened(blocks()))
    assert np.array_equal(wide.scale, narrow.scale)
    assert np.array_equal(wide.data, narrow.data)
    assert wide.bits == 8


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_a_block_of_one_value_is_that_value(scale: float) -> None:
    whole = blocks()
    assert whole.offsets is not None
    scales, offsets = whole.scales.copy(), whole.offsets.copy()
    scales[0], offsets[0] = scale, [0.5, 0.0]
    flat = Blocks(whole.codes, scales, 4, offsets)
    found = decoded(codes_from_blocks(flat))
    assert np.isfinite(found).all()
    assert np.abs(found - flat.floats()).max() < 1e-3
    assert (found[0, : flat.block] == 0.5).all()
