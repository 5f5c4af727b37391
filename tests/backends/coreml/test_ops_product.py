"""Products, attention, quantizers, draws and suppression against torch and loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from edgekit_coreml import ops

OPS: dict[str, Any] = {**ops.OPS}
few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 99)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(st.lists(st.integers(1, 3), max_size=2), seeds, st.booleans())
def test_linear_is_torchs(lead: list[int], seed: int, biased: bool) -> None:
    x, weight = _random(seed, *lead, 4), _random(seed + 1, 3, 4)
    bias = _random(seed + 2, 3) if biased else None
    y = OPS["linear"](x=x, weight=weight, bias=bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


def test_products_of_integers_are_integers() -> None:
    x = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    assert OPS["matmul"](x=x, y=x).tolist() == [[7, 10], [15, 22]]
    y = OPS["linear"](x=x, weight=x, bias=x[0])
    assert (y.dtype, y.tolist()) == (torch.int32, [[6, 13], [12, 27]])
    # Next to a constant the types may differ.
    assert OPS["matmul"](x=x.float(), y=x).dtype == torch.float32


def test_a_vector_is_not_transposed() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    found = OPS["matmul"](x=x, y=y, transpose_y=torch.tensor(True))
    assert found.tolist() == [11, 17]
    assert OPS["matmul"](x=y, y=x, transpose_y=torch.tensor(True)).tolist() == [11, 17]


@few
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(["none", "float", "bool"]), seeds)
def test_attention_is_torchs(target: int, source: int, kind: str, seed: int) -> None:
    query, key = _random(seed, 2, 3, target, 4), _random(seed + 1, 2, 3, source, 4)
    value, mask = _random(seed + 2, 2, 3, source, 5), _random(seed + 3, target, source)
    given_mask = {"none": None, "float": mask, "bool": (mask > 0) | (torch.arange(source) == 0)}
    arguments = (query, key, value)
    y = OPS["scaled_dot_product_attention"](
        query=query, key=key, value=value, attn_mask=given_mask[kind]
    )
    expected = F.scaled_dot_product_attention(*arguments, attn_mask=given_mask[kind])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@few
@given(st.sampled_from(["int8", "uint8"]), st.integers(-3, 2), seeds)
def test_quantizers_are_torchs(name: str, axis: int, seed: int) -> None:
    x = _random(seed, 2, 3, 4) * 50
    size = x.shape[axis]
    dtype = torch.int8 if name == "int8" else torch.uint8
    scale, zero = torch.rand(size) + 0.1, torch.randint(0, 9, (size,), dtype=dtype)
    quantizer = torch.qint8 if name == "int8" else torch.quint8
    y = OPS["quantize"](
        input=x, scale=scale, zero_point=zero, axis=torch.tensor(axis), output_dtype=name
    )
    expected = _quantized(x, scale, zero, axis, quantizer)
    # Torch multiplies by the reciprocal: a half may fall to the other side.
    assert y.dtype == dtype
    assert int((y.int() - expected.int()).abs().max()) <= 1
    assert float((y != expected).float().mean()) < 0.05
    back = OPS["dequantize"](input=y, scale=scale, zero_point=zero, axis=torch.tensor(axis))
    shape = [-1 if i == axis % 3 else 1 for i in range(3)]
    wide = y.double() - zero.double().reshape(shape)
    torch.testing.assert_close(back.double(), wide * scale.double().reshape(shape))


def _quantized(x: Tensor, scale: Tensor, zero: Tensor, axis: int, kind: torch.dtype) -> Tensor:
    """The definition of quantize_per_channel, channel by channel."""
    low, high = (-128, 127) if kind == torch.qint8 else (0, 255)
    parts = [
        np.clip(np.rint(part.numpy() / np.float32(s)) + int(z), low, high)
        for part, s, z in zip(x.unbind(axis), scale, zero, strict=True)
    ]
    dtype = torch.int8 if kind == torch.qint8 else torch.uint8
    return torch.from_numpy(np.stack(parts, axis % x.dim())).to(dtype)


def test_quantizers_without_a_zero_point_and_at_halves() -> None:
    x = torch.tensor([-0.5, 0.5, 1.5, 2.5, 300.0])
    codes = OPS["quantize"](input=x, scale=torch.tensor(1.0), output_dtype="int8")
    assert codes.tolist() == [0, 0, 2, 2, 127]
    # A difference of narrow integers would wrap: -128 - 127.
    y = OPS["dequantize"](
        input=torch.tensor([-128], dtype=torch.int8),
        scale=torch.tensor(0.5),
        zero_point=torch.tensor(127, dtype=torch.int8),
    )
    assert y.tolist() == [-127.5]


def test_draws_have_shape_and_range_and_repeat_with_a_seed() -> None:
    shape, seed = torch.tensor([40, 50]), torch.tensor(3)
    uniform = OPS["random_uniform"](
        shape=shape, low=torch.tensor(-1.0), high=torch.tensor(3.0), seed=seed
    )
    assert uniform.shape == (40, 50)
    assert -1 <= float(uniform.min()) < -0.9
    assert 2.9 < float(uniform.max()) < 3
    normal = OPS["random_normal"](shape=shape, mean=torch.tensor(5.0), stddev=torch.tensor(2.0))
    assert abs(float(normal.mean()) - 5) < 0.5
    assert abs(float(normal.std()) - 2) < 0.5
    coin = OPS["random_bernoulli"](shape=shape, prob=torch.tensor(0.25), seed=seed)
    assert set(coin.unique().tolist()) == {0, 1}
    assert abs(float(coin.mean()) - 0.25) < 0.1
    again = OPS["random_bernoulli"](shape=shape, prob=torch.tensor(0.25), seed=seed)
    torch.testing.assert_close(coin, again)
    assert not torch.equal(OPS["random_normal"](shape=shape), OPS["random_normal"](shape=shape))


@pytest.mark.parametrize("mode", ["logits", "probs"])
def test_categories_are_drawn_by_their_chances(mode: str) -> None:
    chances = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    x = chances if mode == "probs" else chances.log()
    drawn = OPS["random_categorical"](x=x, mode=mode, size=torch.tensor(50))
    assert drawn.shape == (2, 50)
    assert drawn.dtype == torch.float32
    assert drawn[0].unique().tolist() == [1]
    assert drawn[1].unique().tolist() == [0, 2]


def test_what_cannot_repeat_on_a_device_is_named() -> None:
    assert {name for name in ops.OPS if name.startswith("random_")} == ops.NONDETERMINISTIC


def _overlap(a: Any, b: Any) -> float:
    sides = [
        max(0.0, min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2)
            - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2))
        for i in (0, 1)
    ]  # fmt: skip
    both = sides[0] * sides[1]
    return float(both / (a[2] * a[3] + b[2] * b[3] - both))


def _greedy(
    boxes: Any, scores: Any, iou: float, least: float, limit: int, per_class: bool
) -> list[int]:
    """Keeps the best box that is left, and drops what overlaps it, until none is left."""
    best, kind = scores.max(1), scores.argmax(1)
    left = [i for i in sorted(range(len(boxes)), key=lambda i: -best[i]) if best[i] >= least]
    kept: list[int] = []
    while left and len(kept) < limit:
        first = left.pop(0)
        kept.append(first)
        left = [
            i
            for i in left
            if (per_class and kind[i] != kind[first]) or _overlap(boxes[i], boxes[first]) <= iou
        ]
    return kept or [int(best.argmax())]


@few
@given(st.integers(1, 8), st.integers(1, 3), st.booleans(), st.booleans(), seeds)
def test_suppression_keeps_the_best_of_what_overlaps(
    count: int, classes: int, per_class: bool, older: bool, seed: int
) -> None:
    boxes = torch.rand(2, count, 4, generator=torch.Generator().manual_seed(seed)) + 0.2
    scores, limit = _random(seed, 2, count, classes), 5
    threshold = {"score_threshold": torch.tensor(0.1)} if older else {}
    found = OPS["non_maximum_suppression"](
        boxes=boxes if older else boxes.mT,
        scores=scores if older else scores.mT,
        iou_threshold=torch.tensor(0.4),
        max_boxes=torch.tensor(limit),
        per_class_suppression=torch.tensor(per_class),
        **threshold,
    )
    assert len(found) == (4 if older else 3)
    chosen, marks = (t if older else t.mT for t in found[:2])
    for n in (0, 1):
        least = 0.1 if older else -np.inf
        kept = _greedy(boxes[n].numpy(), scores[n].numpy(), 0.4, least, limit, per_class)
        assert found[2][n].tolist() == kept + [-1] * (limit - len(kept))
        torch.testing.assert_close(chosen[n, : len(kept)], boxes[n, kept])
        torch.testing.assert_close(marks[n, : len(kept)], scores[n, kept])
        assert not chosen[n, len(kept) :].any()
        if older:
            assert found[3][n] == len(kept)


def test_suppression_of_boxes_without_an_area() -> None:
    boxes = torch.tensor([[[0.0, 0, 0, 0], [0, 0, 0, 0]]])
    found = OPS["non_maximum_suppression"](
        boxes=boxes.mT, scores=torch.tensor([[[1.0, 2.0]]]), iou_threshold=torch.tensor(0.0),
        max_boxes=torch.tensor(2),
    )  # fmt: skip
    assert found[2].tolist() == [[1, 0]]


def test_suppression_keeps_the_order_of_equal_scores() -> None:
    boxes = torch.arange(40.0)[None, :, None] * torch.tensor([2.0, 2, 0, 0]) + torch.tensor(
        [0.0, 0, 1, 1]
    )
    found = OPS["non_maximum_suppression"](
        boxes=boxes.mT, scores=torch.ones(1, 1, 40), iou_threshold=torch.tensor(0.5),
        max_boxes=torch.tensor(40),
    )  # fmt: skip
    assert found[2].tolist() == [list(range(40))]
