"""The choice between kinds of scales, and the count of layers that really are integers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgekit.errors import RuntimeFailed
from edgekit_tensorrt.choice import answers, chosen, figures_of, left_in_float, sqnr_db
from edgekit_tensorrt.plan import Plan, PlanLayer, PlanTensor
from edgekit_tensorrt.quantize import PER_CHANNEL, PER_TENSOR


def figures(us: float | None, noise: float | None) -> dict[str, float | None]:
    return {"estimate_us": us, "sqnr_db": noise}


@pytest.mark.parametrize(
    ("channels", "whole", "expected"),
    [
        (figures(100, 40), figures(90, 40), PER_TENSOR),  # faster, as good
        (figures(100, 40), figures(90, 37), PER_TENSOR),  # 3 dB are allowed
        (figures(100, 40), figures(90, 36.9), PER_CHANNEL),
        (figures(100, 30), figures(90, 40), PER_TENSOR),  # faster and better
        (figures(90, 40), figures(100, 50), PER_CHANNEL),  # not faster
        (figures(90, 40), figures(90, 40), PER_CHANNEL),
        (figures(90, None), figures(80, None), PER_TENSOR),  # neither has any noise
        (figures(90, None), figures(80, 60), PER_CHANNEL),
        (figures(90, 40), figures(80, None), PER_TENSOR),
        (figures(None, 40), figures(None, 40), PER_CHANNEL),  # no engine, so no plan
    ],
)
def test_one_scale_for_a_weight_only_where_it_is_faster_and_as_good(
    channels: dict[str, float | None], whole: dict[str, float | None], expected: str
) -> None:
    assert chosen({PER_CHANNEL: channels, PER_TENSOR: whole}) == expected


def test_of_one_variant_that_could_be_built_there_is_no_choice() -> None:
    assert chosen({PER_CHANNEL: figures(9, 40)}) == PER_CHANNEL
    assert chosen({PER_TENSOR: figures(9, 40)}) == PER_TENSOR


def tensor(name: str, dtype: str, *shape: int) -> PlanTensor:
    return PlanTensor(name, shape, dtype)


def layer(
    inputs: tuple[PlanTensor, ...], constants: tuple[PlanTensor, ...], *nodes: str
) -> PlanLayer:
    return PlanLayer(
        "kernel", "gemm", "", inputs, (tensor("y", "Half", 4),), constants, tuple(nodes)
    )


def test_a_layer_is_int8_where_a_kernel_reads_int8_on_both_sides() -> None:
    x8, x16 = tensor("x", "Int8", 4), tensor("x", "Half", 4)
    w8, w16, w4 = (tensor("w", kind, 4, 4) for kind in ("Int8", "Half", "Int4"))
    plan = Plan(
        (
            layer((x8,), (w8,), "both", "w_DequantizeLinear"),
            layer((x16,), (w8,), "weights alone"),
            layer((x8,), (w16,), "input alone", "both"),
            layer((x16,), (w4,), "four bits"),
        )
    )
    names = {"both", "weights alone", "input alone", "four bits", "gone"}
    assert left_in_float(plan, names, "Int8") == [
        *("four bits", "gone", "input alone", "weights alone")
    ]
    assert left_in_float(plan, {"four bits", "both"}, "Int4") == ["both"]


def test_kernels_and_bytes_make_an_estimate() -> None:
    x, w = tensor("x", "Int8", 1000, 204), tensor("w", "Int8", 1000, 204)
    plan = Plan((layer((x,), (w,), "a"), layer((x,), (w,), "b")))
    found = figures_of(plan, math.inf)
    assert found["kernels"] == 2
    assert found["moved_bytes"] == 2 * 204_000 + 2 * 8
    assert found["constant_bytes"] == 2 * 204_000
    assert found["estimate_us"] == pytest.approx(2 * 3 + 4, abs=0.1)
    assert found["sqnr_db"] is None
    assert figures_of(None, 30.123) == {"estimate_us": None, "sqnr_db": 30.12}


def test_noise_is_that_of_the_worst_float_output_over_all_samples() -> None:
    ids = np.array([1, 2])
    exact = [[np.array([1.0, 0.0]), np.array([3.0]), ids], [np.array([0.0, 1.0]), np.zeros(1), ids]]
    found = [[np.array([1.0, 0.1]), np.array([3.0]), ids + 1], [*exact[1]]]
    assert sqnr_db(exact, found) == pytest.approx(10 * math.log10(2 / 0.01))
    assert sqnr_db(exact, exact) == math.inf
    assert sqnr_db([[ids]], [[ids + 1]]) == math.inf
    broken = [[np.array([np.inf, np.nan]), *exact[0][1:]], exact[1]]
    assert sqnr_db(exact, broken) == -999


def test_what_onnx_runtime_cannot_run_is_a_sentence() -> None:
    with pytest.raises(RuntimeFailed, match=r"^onnxruntime could not run the model to compare"):
        answers(b"no model", [])
