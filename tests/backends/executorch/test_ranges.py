"""Scales that the kernels would refuse are raised, and small values keep their resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgekit.errors import RuntimeFailed
from edgekit.recipe import INT8
from edgekit_executorch import quantize
from tests.backends.executorch.made import made


class Dead(nn.Module):
    """A layer whose result is 0 everywhere, and a bias of 1 in the layer that takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.dead.bias.fill_(-1000)  # type: ignore[union-attr]
            self.last.weight *= 1e-3
            self.last.bias.copy_(torch.tensor([1.0, -2.0, 3.0, 400.0]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.dead(x)))
        return y


class Small(nn.Module):
    """Values far below one step of the quantizer's own smallest scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.first.weight *= 1e-2
            self.first.bias.zero_()  # type: ignore[union-attr]
            self.last.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


def test_scales_that_no_kernel_takes_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(Dead(), INT8).noise < -30
    monkeypatch.setattr(quantize, "fit_ranges", lambda prepared: None)
    try:
        unfitted = made(Dead(), INT8).noise
    except RuntimeFailed:
        return  # the runtime makes no such kernel
    assert unfitted > -30  # or it makes one whose bias does not fit


def test_small_values_keep_their_resolution() -> None:
    assert made(Small(), INT8).noise < -30
