"""int4: linear layers alone, in groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from edgekit.errors import LoweringFailed
from edgekit.recipe import FP32, PRECISIONS
from tests.backends.executorch.made import made

INT4 = PRECISIONS["int4"]


class Two(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 64), nn.Linear(64, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return y


def test_linear_layers_become_four_bits_in_one_delegate() -> None:
    one = made(Two(), INT4, "x=1x64")
    assert one.artifact.provenance["delegates"] == 1
    assert one.artifact.provenance["outside"] == {}
    assert one.noise < -15
    assert one.artifact.size < 0.6 * made(Two(), FP32, "x=1x64").artifact.size


def test_the_batch_may_vary() -> None:
    assert made(Two(), INT4, "x=batch:1..4x64").noise < -15


def test_a_layer_that_is_kept_stays_as_it_is() -> None:
    kept = made(Two(), replace(INT4, keep_float=("first", "relu")), "x=1x64")
    assert kept.artifact.size > made(Two(), INT4, "x=1x64").artifact.size + 10_000


def test_a_layer_whose_inputs_make_no_groups_stays_float() -> None:
    assert made(Two(width=50), INT4, "x=1x50").noise < -15


@pytest.mark.parametrize(
    ("module", "shape", "found"),
    [
        (nn.Conv2d(3, 4, 1), "input=1x3x4x4", "it has none"),
        (nn.Linear(50, 4), "input=1x50", "its linear layers have 50 inputs"),
    ],
)
def test_a_model_without_such_layers_is_refused(module: nn.Module, shape: str, found: str) -> None:
    with pytest.raises(LoweringFailed, match=rf"{found}\. Use --precision int8"):
        made(module, INT4, shape)
