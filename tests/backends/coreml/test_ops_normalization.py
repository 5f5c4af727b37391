"""Normalizations against torch's modules; those without one against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit_coreml import ops

# Any, because most ops return one tensor and some a tuple.
OPS: dict[str, Any] = {**ops.OPS}
few = settings(max_examples=25, deadline=None, derandomize=True)
spaces = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(spaces, st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_batch_norm(space: list[int], channels: int, affine: bool, seed: int) -> None:
    x, mean = _random(seed, 2, channels, *space), _random(seed + 1, channels)
    variance = _random(seed + 2, channels).square()
    gamma = _random(seed + 3, channels) if affine else None
    beta = _random(seed + 4, channels) if affine else None
    y = OPS["batch_norm"](
        x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=torch.tensor(1e-3)
    )
    expected = F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@few
@given(st.lists(st.integers(2, 4), min_size=1, max_size=2), st.booleans(), st.integers(0, 99))
def test_instance_norm(space: list[int], affine: bool, seed: int) -> None:
    x = _random(seed, 2, 3, *space)
    gamma = _random(seed + 1, 3) if affine else None
    beta = _random(seed + 2, 3) if affine else None
    y = OPS["instance_norm"](x=x, gamma=gamma, beta=beta, epsilon=torch.tensor(1e-2))
    expected = F.instance_norm(x, weight=gamma, bias=beta, eps=1e-2)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [[-1], [1, 2], [2, 1], [-1, -2]])
def test_layer_norm_over_the_last_axes(axes: list[int]) -> None:
    x = _random(0, 3, 4, 5)
    shape = [5] if len(axes) == 1 else [4, 5]
    gamma, beta = _random(1, *shape), _random(2, *shape)
    y = OPS["layer_norm"](
        x=x, axes=torch.tensor(axes), gamma=gamma, beta=beta, epsilon=torch.tensor(1e-3)
    )
    torch.testing.assert_close(y, F.layer_norm(x, shape, gamma, beta, 1e-3))


def test_layer_norm_over_axes_apart() -> None:
    x, gamma = _random(0, 3, 4, 5), _random(1, 3, 5)
    y = OPS["layer_norm"](x=x, axes=torch.tensor([2, 0]), gamma=gamma)
    moved = F.layer_norm(x.permute(1, 0, 2), [3, 5], gamma)
    torch.testing.assert_close(y, moved.permute(1, 0, 2))


def test_layer_norm_without_axes_takes_all() -> None:
    x = _random(0, 2, 3)
    torch.testing.assert_close(OPS["layer_norm"](x=x), F.layer_norm(x, [2, 3]))


@few
@given(spaces, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_local_response_norm(space: list[int], channels: int, size: int, seed: int) -> None:
    x = _random(seed, 2, channels, *space)
    y = OPS["local_response_norm"](
        x=x,
        size=torch.tensor(size),
        alpha=torch.tensor(0.3),
        beta=torch.tensor(0.6),
        k=torch.tensor(1.5),
    )
    expected = nn.LocalResponseNorm(size, alpha=0.3, beta=0.6, k=1.5)(x)
    torch.testing.assert_close(y, expected)


def test_l2_norm_takes_the_last_three_axes() -> None:
    x = _random(0, 2, 3, 4, 5).numpy()
    y = OPS["l2_norm"](x=torch.from_numpy(x), epsilon=torch.tensor(0.5))
    for batch in range(2):
        length = np.sqrt((x[batch].astype(np.float64) ** 2).sum() + 0.5)
        np.testing.assert_allclose(y[batch], x[batch] / length, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "epsilon"),
    [("batch_norm", 1e-5), ("instance_norm", 1e-5), ("layer_norm", 1e-5), ("l2_norm", 1e-6)],
)
def test_the_epsilon_of_the_reference_is_the_default(name: str, epsilon: float) -> None:
    x = _random(0, 1, 2, 3, 4) * 1e-3  # small enough that the epsilon shows
    arguments = {"x": x}
    if name == "batch_norm":
        arguments |= {"mean": torch.zeros(2), "variance": torch.full((2,), 1e-6)}
    stated = OPS[name](**arguments, epsilon=torch.tensor(epsilon))
    torch.testing.assert_close(OPS[name](**arguments), stated, rtol=1e-6, atol=0)
    other = OPS[name](**arguments, epsilon=torch.tensor(epsilon * 2))
    assert not torch.allclose(stated, other, rtol=1e-3)
