"""Blocks as TensorRT's symmetric 4-bit codes: the same matrix, whatever the blocks were."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.block_quantize import blocks_from_floats
from edgekit.blocks import Blocks, widened
from edgekit.spec import Array
from edgekit_tensorrt.decoder_weights import Codes, codes_from_blocks, joinable, joined_codes

RANDOM = np.random.default_rng(3)


def blocks(bits: int, *, offsets: bool = True, scales: Array | None = None) -> Blocks:
    """4 rows of 2 blocks of 16; scales and offsets are float16 numbers."""
    given = RANDOM.uniform(0.01, 0.1, (4, 2)).astype(np.float16).astype(np.float32)
    moved = RANDOM.uniform(-1, 1, (4, 2)).astype(np.float16).astype(np.float32)
    codes = RANDOM.integers(0, 1 << bits, (4, 32)).astype(np.uint8)
    return Blocks(codes, given if scales is None else scales, bits, moved if offsets else None)


def floats(codes: Codes) -> Array:
    """What TensorRT makes of them, in float32."""
    rows, columns = len(codes.codes), codes.columns
    each = codes.codes.reshape(rows, -1, codes.block) * codes.scales[..., None].astype(np.float32)
    whole = each.reshape(rows, codes.halves, columns).sum(1)
    if codes.offsets is not None:
        whole += np.repeat(codes.offsets, codes.block, 1)
    return np.asarray(whole)


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_codes_stand_for_the_same_matrix(bits: int, offsets: bool) -> None:
    given = blocks(bits, offsets=offsets)
    codes = codes_from_blocks(given)
    assert codes.halves == bits // 4
    np.testing.assert_allclose(floats(codes), given.floats(), atol=1e-6)


def test_codes_fit_four_bits_and_scales_are_above_zero() -> None:
    scales = np.array([[0.5, -0.25], [0, 0.125], [-0.5, 0], [0, 0]], np.float32)
    for bits in (4, 8):
        codes = codes_from_blocks(blocks(bits, scales=scales))
        assert codes.codes.min() >= -8
        assert codes.codes.max() <= 7
        assert (codes.scales > 0).all()


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_of_zero_or_below_changes_no_number(bits: int, offsets: bool) -> None:
    scales = np.array([[0.5, -0.25], [0, 0.125], [-0.5, 0], [0, 0]], np.float32)
    given = blocks(bits, scales=scales, offsets=offsets)
    np.testing.assert_allclose(floats(codes_from_blocks(given)), given.floats(), atol=1e-5)


def test_four_bits_that_were_widened_are_four_bits_again() -> None:
    given = blocks(4)
    narrow, again = codes_from_blocks(given), codes_from_blocks(widened(given))
    assert again.halves == 1
    np.testing.assert_array_equal(again.codes, narrow.codes)
    np.testing.assert_array_equal(again.scales, narrow.scales)


def test_matrices_of_one_form_stand_one_below_the_other() -> None:
    parts = [blocks(4), blocks(4, offsets=False)]
    both = joined_codes([codes_from_blocks(part) for part in parts])
    wanted = np.concatenate([part.floats() for part in parts])
    np.testing.assert_allclose(floats(both), wanted, atol=1e-6)


def test_matrices_of_two_forms_stay_apart() -> None:
    four, eight = codes_from_blocks(blocks(4)), codes_from_blocks(blocks(8))
    other = codes_from_blocks(blocks_from_floats(np.ones((4, 32), np.float32), 4, 32))
    plain = np.ones((4, 32), np.float32)
    assert joinable([four, four])
    assert joinable([plain, plain])
    assert not joinable([four, eight])
    assert not joinable([four, other])
    assert not joinable([four, plain])
