"""The second rounding gives the worked vectors of its definition, on every code there is."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.rounding import RULES, in_container, rewritten, second_rounding

ALL = np.arange(-128, 128).astype(np.int8)
SOME = [
    *(-128, -121, -120, -97, -96, -72, -40, -33, -32, -24, -8, -3, 0),
    *(7, 8, 9, 24, 31, 32, 40, 56, 95, 96, 119, 120, 127),
]
WORKED = {
    ("rne", 6): "-32 -30 -30 -24 -24 -18 -10 -8 -8 -6 -2 -1 0 2 2 2 6 8 8 10 14 24 24 30 30 31",
    ("rne", 4): "-8 -8 -8 -6 -6 -4 -2 -2 -2 -2 0 0 0 0 0 1 2 2 2 2 4 6 6 7 7 7",
    ("rne", 2): "-2 -2 -2 -2 -2 -1 -1 -1 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1 1 1",
    ("half_up", 6): "-32 -30 -30 -24 -24 -18 -10 -8 -8 -6 -2 -1 0 2 2 2 6 8 8 10 14 24 24 30 30 31",
    ("half_up", 4): "-8 -8 -7 -6 -6 -4 -2 -2 -2 -1 0 0 0 0 1 1 2 2 2 3 4 6 6 7 7 7",
    ("half_up", 2): "-2 -2 -2 -2 -1 -1 -1 -1 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1",
}


def by_definition(codes: NDArray[np.int8], bits: int, rule: str) -> NDArray[np.float64]:
    """The same in float64, as the paper writes it."""
    quotient = codes.astype(np.float64) / 2.0 ** (8 - bits)
    rounded = np.rint(quotient) if rule == "rne" else np.floor(quotient + 0.5)
    return np.clip(rounded, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


@pytest.mark.parametrize(("rule", "bits"), WORKED)
def test_the_worked_vectors_come_out(rule: str, bits: int) -> None:
    found = second_rounding(np.array(SOME, np.int8), bits, rule)
    assert found.tolist() == [int(text) for text in WORKED[rule, bits].split()]
    assert found.dtype == np.int8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_is_rounded_as_the_definition_in_float_does(bits: int, rule: str) -> None:
    narrow = second_rounding(ALL, bits, rule)
    np.testing.assert_array_equal(narrow, by_definition(ALL, bits, rule))
    assert len(set(narrow.tolist())) == 2**bits


def test_weights_in_float_go_through_the_stored_codes() -> None:
    weights = np.array(
        [-1.40, -0.97, -0.415, -0.085, 0, 0.0449, 0.085, 0.315, 0.64, 0.96, 1.195, 1.30]
    )
    codes = np.clip(np.rint(weights / 0.01), -128, 127).astype(np.int8)
    assert codes.tolist() == [-128, -97, -42, -8, 0, 4, 8, 32, 64, 96, 120, 127]
    at_4, at_2 = second_rounding(codes, 4), second_rounding(codes, 2)
    assert at_4.tolist() == [-8, -6, -3, 0, 0, 0, 0, 2, 4, 6, 7, 7]
    assert at_2.tolist() == [-2, -2, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(
        in_container(codes, 4) * 0.01,
        [-1.28, -0.96, -0.48, 0, 0, 0, 0, 0.32, 0.64, 0.96, 1.12, 1.12],
    )
    np.testing.assert_allclose(
        in_container(codes, 2) * 0.01,
        [-1.28, -1.28, -0.64, 0, 0, 0, 0, 0, 0.64, 0.64, 0.64, 0.64],
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [6, 4, 2])
def test_only_the_largest_codes_are_cut_off(bits: int, rule: str) -> None:
    shift = 8 - bits
    quotient = ALL / 2.0**shift
    unbounded = np.rint(quotient) if rule == "rne" else np.floor(quotient + 0.5)
    cut = ALL[unbounded != second_rounding(ALL, bits, rule)]
    # What rounds up to half the range and above has no code; below there is one for all.
    assert len(cut) == 2 ** (shift - 1)
    assert cut.tolist() == list(range(128 - 2 ** (shift - 1), 128))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("between", "bits", "differing"), [(4, 2, 24), (6, 4, 30)])
def test_a_width_made_from_another_is_not_that_width(
    rule: str, between: int, bits: int, differing: int
) -> None:
    chained = second_rounding(in_container(ALL, between, rule), bits, rule)
    assert int((chained != second_rounding(ALL, bits, rule)).sum()) == differing


@pytest.mark.parametrize(("bits", "most"), [(6, 3), (4, 15), (2, 63)])
def test_a_code_moves_by_half_a_step_and_where_it_is_cut_off_by_a_step(
    bits: int, most: int
) -> None:
    moved = np.abs(in_container(ALL, bits).astype(int) - ALL)
    step = 2 ** (8 - bits)
    assert moved[: -step // 2].max() == step // 2
    assert moved.max() == moved[-1] == most


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_in_the_container_is_the_code_times_its_step(bits: int, rule: str) -> None:
    shuffled = np.random.default_rng(0).permutation(np.repeat(ALL, 3)).reshape(16, 48)
    wide = in_container(shuffled, bits, rule)
    assert wide.dtype == np.int8
    np.testing.assert_array_equal(
        wide, second_rounding(shuffled, bits, rule).astype(int) * 2 ** (8 - bits)
    )


def test_eight_bits_are_the_codes_themselves_in_memory_of_their_own() -> None:
    narrow = second_rounding(ALL, 8)
    narrow[0] = 5
    assert ALL[0] == -128
    np.testing.assert_array_equal(in_container(ALL, 8), ALL)


@pytest.mark.parametrize(("bits", "rule"), [(0, "rne"), (9, "rne"), (4, "half_even")])
def test_a_width_or_a_rule_that_is_none_is_refused(bits: int, rule: str) -> None:
    with pytest.raises(ValueError, match="there are 1 to 8, by rne, half_up"):
        second_rounding(ALL, bits, rule)


def test_only_the_bytes_of_codes_are_rewritten() -> None:
    content = bytes(range(256))
    places = [
        {"layer": "a", "file": "m", "offset": 10, "count": 20},
        {"layer": "b", "file": "m", "offset": 100, "count": 5},
        {"layer": "c", "file": "m", "offset": 200, "count": 9},
    ]
    files = {"m": content, "other": b"not read"}
    found = rewritten(files, places, {"a": 4, "b": 8, "c": 2})
    assert list(found) == ["m"]
    expected = bytearray(content)
    for start, count, bits in ((10, 20, 4), (200, 9, 2)):
        codes = np.frombuffer(content[start : start + count], np.int8)
        expected[start : start + count] = in_container(codes, bits).tobytes()
    assert found["m"] == bytes(expected)
    assert files["m"] == bytes(range(256))


def test_the_rule_that_is_stored_is_the_one_that_rounds() -> None:
    files = {"m": np.array([8, 24], np.int8).tobytes()}
    place = [{"layer": "a", "file": "m", "offset": 0, "count": 2}]
    at_4 = {rule: rewritten(files, place, {"a": 4}, rule)["m"] for rule in RULES}
    assert at_4 == {"rne": bytes([0, 32]), "half_up": bytes([16, 32])}
