"""The ranges that each method finds, and that calibration shows its progress."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.calibration import checked_calibration
from edgekit.capture import capture, reference_from
from edgekit.pt2e import calibrate, observer
from edgekit.recipe import METHODS, Method
from edgekit.source import resolve


def largest(method: Method, values: torch.Tensor) -> float:
    """The largest value that the codes stand for."""
    found = observer(method).with_args(
        dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine
    )()
    found(values)
    scale, zero = found.calculate_qparams()
    return float((127 - zero) * scale)


def test_only_min_max_keeps_one_value_in_a_million() -> None:
    torch.manual_seed(0)
    values = torch.rand(1_000_000)
    values[0] = 100.0
    assert largest("min-max", values) == pytest.approx(100, rel=0.01)
    assert largest("entropy", values) < 99
    assert largest("percentile", values) < 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_values_without_rare_ones(method: Method) -> None:
    assert largest(method, torch.linspace(-1, 1, 10_000)) == pytest.approx(1, abs=0.02)


def test_a_percentile_of_two_batches_is_that_of_both() -> None:
    found = observer("percentile").with_args(
        dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine
    )()
    found(torch.linspace(0, 1, 100_000))
    found(torch.linspace(0, 3, 100_000))
    scale, _ = found.calculate_qparams()
    assert float(scale * 255) == pytest.approx(3, rel=0.01)


def test_calibration_sees_every_sample_and_tells_of_each() -> None:
    model = resolve(nn.Linear(3, 2), ["input=1x3"])
    program = capture(model, reference_from(model))
    seen: list[torch.Tensor] = []
    told: list[str] = []

    class Prepared(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            assert not torch.is_grad_enabled()
            seen.append(x)

    samples = [{"input": np.full((1, 3), index, np.float32)} for index in range(8)]
    samples[0]["input"][0, 0] = 5
    data = checked_calibration(samples, "counted").reporting(told.append)
    calibrate(Prepared(), replace(program, calibration=data), "calibrating it")
    assert [float(each[0, 2]) for each in seen] == list(range(8))
    assert told[0].startswith("calibrating it: 1 of 8")
    with pytest.raises(ValueError, match="without calibration data"):
        calibrate(Prepared(), program, "calibrating it")
