"""The forms that a decoder's matrices take in XNNPACK's delegates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("executorch")

from edgekit.block_quantize import blocks_from_floats
from edgekit_executorch.decoder_delegates import in_bfloat16


def matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)


def test_scales_become_bfloat16_and_offsets_take_back_what_that_moved() -> None:
    blocks = blocks_from_floats(matrix(), 4)
    upper, offsets = in_bfloat16(blocks)
    scales = (upper.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(scales, blocks.scales, rtol=2**-8)
    wanted = blocks.floats()
    plain = np.abs(replace(blocks, scales=scales).floats() - wanted)
    refitted = np.abs(replace(blocks, scales=scales, offsets=offsets).floats() - wanted)
    assert np.square(refitted).sum() < np.square(plain).sum()


def test_scales_that_fit_bfloat16_change_nothing() -> None:
    blocks = blocks_from_floats(matrix(), 4)
    blocks = replace(blocks, scales=np.exp2(np.floor(np.log2(blocks.scales))))
    upper, offsets = in_bfloat16(blocks)
    np.testing.assert_array_equal((upper.astype(np.uint32) << 16).view(np.float32), blocks.scales)
    np.testing.assert_array_equal(offsets, blocks.offsets)
