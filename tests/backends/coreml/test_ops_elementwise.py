"""What value inference leaves open of the elementwise ops, activations and reductions.

Integer division, the types of results, casts at the edges, the limits of activations, ties. The
formulas themselves are checked in test_ops_inference.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from edgekit_coreml import ops

OPS: dict[str, Any] = {**ops.OPS}
few = settings(max_examples=30, deadline=None, derandomize=True)
whole = st.integers(-20, 20)
nonzero = whole.filter(bool)


def _int(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


@few
@given(whole, nonzero)
def test_integer_division_keeps_integers(x: int, y: int) -> None:
    found = {name: OPS[name](x=_int(x), y=_int(y)) for name in ("real_div", "floor_div", "mod")}
    assert all(value.dtype == torch.int32 for value in found.values())
    assert found["real_div"].item() == math.trunc(x / y)
    assert found["floor_div"].item() == x // y
    assert found["mod"].item() == x % y


@few
@given(st.floats(-9, 9, width=32), st.floats(-9, 9, width=32).filter(lambda y: abs(y) > 0.1))
def test_float_remainders_have_the_sign_of_the_divisor(x: float, y: float) -> None:
    found = OPS["mod"](x=torch.tensor([x]), y=torch.tensor([y])).item()
    exact = x - y * math.floor(x / y)
    assert found == pytest.approx(exact, abs=1e-4) or abs(abs(found - exact) - abs(y)) < 1e-4
    assert found == 0 or (found > 0) == (y > 0)


@pytest.mark.parametrize(
    ("x", "dtype", "value"),
    [
        (2.9, "int32", 2),
        (-2.9, "int32", -2),
        (-0.5, "int32", 0),
        (300, "uint8", 44),
        (300, "int8", 44),
        (-1, "uint16", 65535),
        (70000, "uint16", 4464),
        (70000.0, "uint16", 65535),
        (-3.5, "uint16", 0),
        (-300.0, "int8", -128),
        (3e9, "int32", 2**31 - 1),
        (math.nan, "int32", 0),
        (0.25, "bool", True),
        (0, "bool", False),
        (3, "fp32", 3.0),
        (3, "fp16", 3.0),
    ],
)
def test_casts(x: float, dtype: str, value: float) -> None:
    y = OPS["cast"](x=torch.tensor([x]), dtype=dtype)
    assert y.item() == value
    assert y.dtype == ops.arguments.DTYPES[dtype]


def test_cast_of_a_boolean() -> None:
    assert OPS["cast"](x=torch.tensor([True, False]), dtype="int32").tolist() == [1, 0]


def test_epsilons_by_default() -> None:
    x = torch.zeros(1)
    assert OPS["inverse"](x=x).item() == pytest.approx(1e4)
    assert OPS["rsqrt"](x=x).item() == pytest.approx(1e6)
    assert OPS["log"](x=x).item() == pytest.approx(math.log(1.4e-45), rel=1e-3)


def test_rounding_takes_halves_to_the_even_neighbour() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert OPS["round"](x=x).tolist() == [-2, 0, 0, 2, 2]


def test_select_broadcasts_all_three() -> None:
    y = OPS["select"](
        cond=torch.tensor([[True], [False]]), a=torch.tensor([1.0, 2.0]), b=torch.tensor(7.0)
    )
    assert y.tolist() == [[1, 2], [7, 7]]


@few
@given(st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=5))
def test_activations_are_torchs(values: list[float]) -> None:
    x = torch.tensor(values)
    half = torch.tensor(0.5)
    pairs = {
        "silu": (OPS["silu"](x=x), F.silu(x)),
        "softplus": (OPS["softplus"](x=x), F.softplus(x.double(), threshold=100).float()),
        "elu": (OPS["elu"](x=x, alpha=half), F.elu(x, 0.5)),
        "leaky_relu": (OPS["leaky_relu"](x=x, alpha=half), F.leaky_relu(x, 0.5)),
        "relu": (OPS["relu"](x=x), F.relu(x)),
        "relu6": (OPS["relu6"](x=x), F.relu6(x)),
        "sigmoid": (OPS["sigmoid"](x=x), 1 / (1 + torch.exp(-x.double())).float()),
        "hard": (
            OPS["sigmoid_hard"](x=x, alpha=torch.tensor(1 / 6), beta=half),
            F.hardsigmoid(x),
        ),
        "thresholded": (
            OPS["thresholded_relu"](x=x, alpha=half),
            torch.tensor([value if value >= 0.5 else 0.0 for value in values]),
        ),
    }
    for name, (found, expected) in pairs.items():
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_clamped_relu_below_zero() -> None:
    """The reference clamps both sides at beta; its own inference adds two clamps."""
    y = OPS["clamped_relu"](
        x=torch.tensor([-4.0, 4.0]), alpha=torch.tensor(-1.0), beta=torch.tensor(2.0)
    )
    assert y.tolist() == [2, 2]


def test_gelu_refuses_a_mode_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'ERF'"):
        OPS["gelu"](x=torch.zeros(1), mode="ERF")


@pytest.mark.parametrize("name", ["softplus_parametric", "prelu"])
def test_a_parameter_per_channel_lies_along_axis_one(name: str) -> None:
    x = torch.full((1, 2, 3, 4), -1.0)
    rest = {"beta": torch.ones(2)} if name == "softplus_parametric" else {}
    y = OPS[name](x=x, alpha=torch.tensor([1.0, 2.0]), **rest)
    torch.testing.assert_close(y[:, 1], y[:, 0] * 2)
    assert y.shape == x.shape


@pytest.mark.parametrize("name", [name for name in ops.OPS if name.startswith("reduce_")])
def test_reductions_drop_or_keep_their_axis(name: str) -> None:
    x = torch.rand(2, 3, 4) + 0.1
    axis = {"axis": torch.tensor(1)} if "arg" in name else {"axes": torch.tensor([1])}
    assert OPS[name](x=x, **axis).shape == (2, 4)
    assert OPS[name](x=x, **axis, keep_dims=torch.tensor(True)).shape == (2, 1, 4)


def test_reductions_of_integers_are_integers() -> None:
    x = torch.tensor([[1, 2], [-3, -4]], dtype=torch.int32)
    mean = OPS["reduce_mean"](x=x, axes=torch.tensor([1]))
    assert mean.dtype == torch.int32
    assert mean.tolist() == [1, -3]
    assert OPS["reduce_prod"](x=x).item() == 24
    assert OPS["reduce_max"](x=x, axes=torch.tensor([], dtype=torch.int32)).tolist() == x.tolist()


def test_of_equal_extremes_the_first_is_named() -> None:
    x = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert OPS["reduce_argmax"](x=x).item() == 1
    assert OPS["reduce_argmin"](x=x, output_dtype="uint16").item() == 0


def test_log_sum_exp_does_not_overflow() -> None:
    assert OPS["reduce_log_sum_exp"](x=torch.tensor([1000.0, 1000.0])).item() == pytest.approx(
        1000 + math.log(2)
    )
