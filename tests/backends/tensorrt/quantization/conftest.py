"""Programs with calibration data, small and random, and what is in the files made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.calibration import checked_calibration
from edgekit.capture import capture, reference_from
from edgekit.program import Program
from edgekit.samples import draw_samples
from edgekit.source import resolve

Make = Callable[..., Program]


class Mixed(nn.Module):
    """What int8 should take (dense, point, projections, head), and what it should leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dense = nn.Conv2d(8, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 16, 1)
        self.qkv = nn.Linear(16, 48)
        self.project = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.stem(x))))
        x = F.relu(self.dense(x))
        x = x + self.point(x)
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        attention = F.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
        tokens = tokens + self.project(attention)
        y: Tensor = self.head(tokens.mean(1))
        return y


IMAGE = "x=1x3x8x8"


def calibrated_program(make: Callable[[], nn.Module], *inputs: str, count: int = 8) -> Program:
    """The captured module with random weights, and as many random samples as calibration data."""
    torch.manual_seed(0)
    model = resolve(make().eval(), list(inputs))
    program = capture(model, reference_from(model))
    samples = draw_samples(model.inputs, count=count)
    return replace(program, calibration=checked_calibration(samples, "random"))


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each value."""
    return {name: node for node in model.graph.node for name in node.output}


def from_integers(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that read a dequantized value, but for casts."""
    made = producers(model)
    return {
        node.name
        for node in model.graph.node
        for name in node.input
        if name in made and made[name].op_type == "DequantizeLinear"
    }


@pytest.fixture(scope="session")
def mixed() -> Program:
    return calibrated_program(Mixed, IMAGE)
