"""RESIZE and GRID_SAMPLE against ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

few = settings(derandomize=True, deadline=None, max_examples=6, database=None)

COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDING = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


@few
@given(
    coordinates=st.sampled_from(COORDINATES),
    scale=st.sampled_from([0.5, 0.75, 1.5, 2.0, 2.5]),
    size=st.integers(3, 15),
)
def test_resize(ops: type[Ops], coordinates: str, scale: float, size: int) -> None:
    graph = ops(19)
    x = ops.normal(1, 2, 6, 8)
    by_scale = ops.constant([1, 1, scale, 2])
    by_size = ops.constant([1, 2, size, 8], "int64")
    common: dict[str, Any] = {"coordinate_transformation_mode": coordinates}
    for rounding in ROUNDING:
        graph.add("Resize", x, None, by_scale, nearest_mode=rounding, mode="nearest", **common)
        graph.add("Resize", x, None, None, by_size, nearest_mode=rounding, mode="nearest", **common)
    graph.add("Resize", x, None, by_scale, mode="linear", **common)
    graph.add("Resize", x, None, None, by_size, mode="linear", **common)
    for coefficient in (-0.75, -0.5):
        for outside in (0, 1):
            cubic: dict[str, Any] = {
                "cubic_coeff_a": coefficient,
                "exclude_outside": outside,
                "mode": "cubic",
            }
            graph.add("Resize", x, None, by_scale, **cubic, **common)
            graph.add("Resize", x, None, None, by_size, **cubic, **common)
    graph.check()


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sampling(ops: type[Ops], mode: str, padding: str) -> None:
    graph = ops()
    x = ops.normal(2, 3, 5, 6)
    grid = 1.3 * np.tanh(ops.normal(2, 4, 7, 2))
    for corners in (0, 1):
        graph.add("GridSample", x, grid, mode=mode, padding_mode=padding, align_corners=corners)
    graph.check(1e-4)
