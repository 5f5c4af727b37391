"""Blocks of codes: exact where they must be, near where they round."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.block_quantize import blocks_from_floats, quantized_decoder
from edgekit.blocks import Blocks, alike, joined, widened
from edgekit.errors import BadModel
from edgekit.spec import Array
from edgekit.testing import tiny_decoder


def matrix(rows: int = 6, columns: int = 64) -> Array:
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)


def example(bits: int = 4) -> Blocks:
    weight = tiny_decoder(bits=bits).weights["layers.0.q"]
    assert isinstance(weight, Blocks)
    return weight


def test_floats_are_scale_times_code_from_the_middle_and_offset() -> None:
    codes = np.array([[0, 15, 8, 9]], np.uint8)
    blocks = Blocks(codes, np.array([[2.0, 3.0]], np.float32), 4, np.array([[0.5, -1]], np.float32))
    assert blocks.block == 2
    assert blocks.floats().tolist() == [[-15.5, 14.5, -1.0, 2.0]]


@pytest.mark.parametrize(("bits", "decibels"), [(8, 42), (4, 19)])
def test_rounding_is_as_near_as_its_bits(bits: int, decibels: float) -> None:
    floats = matrix()
    blocks = blocks_from_floats(floats, bits)
    noise = blocks.floats() - floats
    assert 10 * np.log10((floats**2).sum() / (noise**2).sum()) > decibels
    assert blocks.codes.max() < 2**bits
    assert blocks.block == 32


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_one_value_are_kept_exactly(bits: int) -> None:
    floats = matrix()
    floats[0, :32], floats[1, 32:] = 0, 0
    found = blocks_from_floats(floats, bits).floats()
    assert not found[0, :32].any()
    assert not found[1, 32:].any()
    assert np.isfinite(found).all()
    floats[2] = 0.75
    np.testing.assert_allclose(blocks_from_floats(floats, bits).floats()[2], 0.75, rtol=1e-6)


def test_columns_that_are_no_multiple_of_a_block_are_refused() -> None:
    with pytest.raises(BadModel, match="a matrix of 40 columns cannot be cut into blocks of 32"):
        blocks_from_floats(matrix(columns=40), 4)


def test_eight_bits_hold_four_exactly() -> None:
    blocks = example()
    wide = widened(blocks)
    assert wide.bits == 8
    np.testing.assert_array_equal(wide.floats(), blocks.floats())
    assert widened(wide) is wide


def test_joined_matrices_are_those_below_one_another() -> None:
    plain = Blocks(example().codes, example().scales, 4)
    both = joined([example(), plain])
    np.testing.assert_array_equal(
        both.floats(), np.concatenate([example().floats(), plain.floats()])
    )
    assert alike([example(), plain])
    assert not alike([example(), example(8)])
    assert not alike([example(), matrix()])


def test_rows_are_taken_in_their_order() -> None:
    index = np.array([3, 0, 5])
    np.testing.assert_array_equal(example().rows(index).floats(), example().floats()[index])


def test_what_comes_in_blocks_keeps_its_own_codes() -> None:
    decoder = tiny_decoder(bits=4)
    four, eight = quantized_decoder(decoder, 4), quantized_decoder(decoder, 8)
    for name, weight in decoder.weights.items():
        if isinstance(weight, Blocks):
            assert four.weights[name] is weight
            np.testing.assert_array_equal(eight.floats(name), weight.floats())
        else:
            assert four.weights[name] is weight


def test_what_comes_as_floats_gets_four_bits_and_the_head_eight() -> None:
    found = quantized_decoder(tiny_decoder(tied=False), 4).weights
    bits = {name: w.bits for name, w in found.items() if isinstance(w, Blocks)}
    assert bits["embedding"] == bits["head"] == 8
    assert bits["layers.0.q"] == bits["layers.1.down"] == 4
    assert not any(isinstance(found[name], Blocks) for name in ("norm", "layers.0.ffn_norm"))


def test_a_matrix_in_blocks_says_what_a_file_needs() -> None:
    blocks = example()
    rows, columns = blocks.shape
    assert blocks.bytes == rows * columns // 2 + 2 * 2 * rows * columns // 32
