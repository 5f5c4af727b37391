"""Ops written out equal the ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.repairs import (
    LOG_SOFTMAX,
    log_softmax,
    pixel_unshuffle,
    with_pool_strides,
    written_out,
)

quick = settings(deadline=None, max_examples=20, derandomize=True)
aten = torch.ops.aten


@quick
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    channels=st.integers(1, 3),
    factor=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_pixel_unshuffle(
    batch: list[int], channels: int, factor: int, sizes: tuple[int, int]
) -> None:
    x = torch.randn(*batch, channels, sizes[0] * factor, sizes[1] * factor)
    torch.testing.assert_close(pixel_unshuffle(x, factor), F.pixel_unshuffle(x, factor))


@quick
@given(axis=st.integers(-3, 2), spread=st.sampled_from([1.0, 1e3, 1e30]))
def test_log_softmax_of_near_and_distant_scores(axis: int, spread: float) -> None:
    x = torch.randn(2, 3, 4) * spread
    torch.testing.assert_close(log_softmax(x, axis), F.log_softmax(x, axis))


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(F.max_pool2d(x, 2).flatten(1).relu(), 1)


def test_only_what_is_in_the_table_is_written_out() -> None:
    exported = torch.export.export(Mixed(), (torch.zeros(1, 2, 4, 4),))
    before = [node.name for node in exported.graph.nodes]
    assert written_out(exported, {aten.gelu.default: F.gelu}) is exported
    after = [node.name for node in written_out(exported, LOG_SOFTMAX).graph.nodes]
    assert "log_softmax" not in after
    assert {"max_pool2d", "relu"} <= set(after) & set(before)


@pytest.mark.parametrize("stride", [None, 1])
def test_a_stride_that_is_left_out_is_written_and_a_given_one_stays(stride: int | None) -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(x, 2, stride)

    exported = with_pool_strides(torch.export.export(Pool(), (torch.zeros(1, 2, 4, 4),)))
    (pool,) = (node for node in exported.graph.nodes if "max_pool2d" in node.name)
    assert pool.args[2] == ([2, 2] if stride is None else [1, 1])
