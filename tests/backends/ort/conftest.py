"""A small network and calibration data for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.calibration import checked_calibration
from edgekit.capture import capture, reference_from
from edgekit.program import Program
from edgekit.source import resolve


class Residual(nn.Module):
    """Two convolutions with a sum around them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, 40, 1)
        self.head = nn.Linear(40, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.stem(x))
        y = torch.relu(self.outer(torch.relu(y + self.inner(y))))
        return {"logits": self.head(y.mean((2, 3)))}


def calibrated(
    module: nn.Module, shape: tuple[int, ...], name: str = "x", samples: int = 16
) -> Program:
    """``module`` captured for an input of ``shape``, with noise to calibrate on."""
    model = resolve(module.eval(), [f"{name}=" + "x".join(map(str, shape))])
    noise = np.random.default_rng(0).standard_normal((samples, *shape)).astype(np.float32)
    data = checked_calibration([{name: array} for array in noise], "noise")
    return replace(capture(model, reference_from(model)), calibration=data)


@pytest.fixture(scope="session")
def residual() -> Program:
    torch.manual_seed(0)
    return calibrated(Residual(), (1, 3, 16, 16))
