"""Specs survive text and JSON, refuse what is malformed, and hold arrays to what they say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadInput, DamagedFile, UsageError
from edgekit.spec import DTYPES, Dim, TensorSpec, check_arrays, parse_spec

quick = settings(deadline=None, max_examples=100, derandomize=True)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
sizes = st.integers(1, 5000)
dims = st.tuples(names, st.integers(1, 50), st.integers(1, 50)).map(
    lambda parts: Dim(parts[0], parts[1], parts[1] + parts[2])
)
specs = st.builds(
    TensorSpec,
    names,
    st.lists(sizes | dims, min_size=1, max_size=5).map(tuple),
    st.sampled_from(DTYPES),
)
X = TensorSpec("x", (Dim("batch", 1, 8), 3), "float32")
Y = TensorSpec("y", (Dim("batch", 1, 8),), "int64")


@quick
@given(specs)
def test_a_spec_written_as_text_is_read_back_the_same(spec: TensorSpec) -> None:
    assert parse_spec(str(spec)) == spec


@quick
@given(specs)
def test_a_spec_written_as_json_is_read_back_the_same(spec: TensorSpec) -> None:
    assert TensorSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@quick
@given(st.text(max_size=30) | st.from_regex(r"x=[0-9x:.a-z]{0,12}", fullmatch=True))
def test_any_text_is_a_spec_or_a_usage_error(text: str) -> None:
    try:
        spec = parse_spec(text)
    except UsageError:
        return
    assert parse_spec(str(spec)) == spec


def test_a_scalar_has_no_dims_in_json_and_a_word_in_text() -> None:
    scalar = TensorSpec("t", (), "int64")
    assert str(scalar) == "t=scalar:int64"
    assert TensorSpec.from_json(scalar.to_json()) == scalar


def test_a_range_of_one_size_is_that_size() -> None:
    assert parse_spec("x=batch:4..4x3") == TensorSpec("x", (4, 3), "float32")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x=",
        "=1x3",
        "x=0x3",
        "x=1x",
        "x=x1",
        "x=1,3",
        "x=batchx3",
        "x=-1",
        "1x=3",
        "x=1 x 3",
    ],
)
def test_a_text_that_is_no_spec_is_answered_with_examples(text: str) -> None:
    with pytest.raises(
        UsageError, match=re.escape(f"--input {text!r} is not NAME=SHAPE; write for example x=1x3")
    ):
        parse_spec(text)


def test_a_size_of_thousands_of_digits_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="is not NAME=SHAPE"):
        parse_spec("x=" + "9" * 5000)


def test_a_dtype_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"dtype 'float64' is not one of float32, int64, int32"):
        parse_spec("x=1x3:float64")


@pytest.mark.parametrize("text", ["x=b:0..3", "x=b:5..4x3"])
def test_a_range_that_does_not_rise_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"dim b:.*the range must rise and start at 1 or above"):
        parse_spec(text)


def test_sizes_take_the_chosen_value_or_the_minimum() -> None:
    spec = TensorSpec("x", (Dim("batch", 2, 8), 3, Dim("time", 5, 9)), "float32")
    assert spec.sizes() == (2, 3, 5)
    assert spec.sizes({"time": 7}) == (2, 3, 7)
    assert [dim.name for dim in spec.dims] == ["batch", "time"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"name": 1, "shape": [1], "dtype": "float32"},
        {"name": "x", "shape": "1", "dtype": "float32"},
        {"name": "x", "shape": [1], "dtype": "float64"},
        {"name": "x", "shape": [1], "dtype": ["float32"]},
    ],
)
def test_a_malformed_spec_is_damage(value: object) -> None:
    with pytest.raises(DamagedFile, match="a tensor spec in the manifest is malformed"):
        TensorSpec.from_json(value)


@pytest.mark.parametrize(
    "dim",
    [
        None,
        "3",
        1.0,
        True,
        -1,
        [],
        {},
        {"name": "b", "min": 1},
        {"name": "b", "min": 4, "max": 2},
        {"name": "b", "min": -1, "max": 2},
        {"name": "b", "min": True, "max": 2},
        {"name": "b", "min": "1", "max": 2},
        {"name": 3, "min": 1, "max": 2},
    ],
)
def test_a_malformed_dim_is_damage(dim: object) -> None:
    with pytest.raises(DamagedFile, match="a dim in the manifest is malformed"):
        TensorSpec.from_json({"name": "x", "shape": [dim], "dtype": "float32"})


def test_arrays_come_back_in_the_order_of_the_specs() -> None:
    arrays = {"y": np.zeros(2, np.int64), "x": np.zeros((2, 3), np.float32)}
    assert list(check_arrays((X, Y), arrays)) == ["x", "y"]


def test_a_transposed_view_is_copied_and_a_contiguous_array_is_not() -> None:
    spec = TensorSpec("x", (3, 2), "float32")
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    checked = check_arrays([spec], {"x": view})["x"]
    assert checked.flags.c_contiguous
    assert np.array_equal(checked, view)
    assert check_arrays([spec], {"x": checked})["x"] is checked


def test_a_scalar_stays_without_axes() -> None:
    assert check_arrays([TensorSpec("t", (), "float32")], {"t": np.float32(3)})["t"].shape == ()


def test_an_input_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(BadInput, match=r"no input 'z'; the model takes: x=batch:1\.\.8x3"):
        check_arrays([X], {"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)})


def test_a_missing_input_is_named() -> None:
    with pytest.raises(BadInput, match=r"input 'y' is missing; the model takes: .*y=batch.*:int64"):
        check_arrays((X, Y), {"x": np.zeros((1, 3), np.float32)})


def test_a_wrong_dtype_is_not_cast_and_the_sentence_says_how_to() -> None:
    with pytest.raises(
        BadInput, match=r"dtype float64; the model takes float32.*\.astype\('float32"
    ):
        check_arrays([X], {"x": np.zeros((1, 3))})


@pytest.mark.parametrize("shape", [(1, 4), (9, 3), (0, 3), (3,), (1, 3, 1), ()])
def test_a_shape_that_does_not_fit_is_refused_with_both(shape: tuple[int, ...]) -> None:
    given = "x".join(map(str, shape)) or "scalar"
    with pytest.raises(BadInput, match=rf"has shape {given}; the model takes x=batch:1\.\.8x3\."):
        check_arrays([X], {"x": np.zeros(shape, np.float32)})


def test_one_named_dim_has_one_size_in_all_inputs() -> None:
    with pytest.raises(BadInput, match="input 'y' has shape 3; the model takes"):
        check_arrays((X, Y), {"x": np.zeros((2, 3), np.float32), "y": np.zeros(3, np.int64)})
