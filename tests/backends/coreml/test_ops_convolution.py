"""Convolutions and pools against loops written from the reference, and against torch's modules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit_coreml import ops

# Any, because most ops return one tensor and some a tuple.
OPS: dict[str, Any] = {**ops.OPS}
few = settings(max_examples=25, deadline=None, derandomize=True)
PAD_TYPES = ("valid", "same", "same_lower", "custom")


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _stated_pads(
    pad_type: str, pad: Sequence[int], size: Sequence[int], span: Sequence[int], step: Sequence[int]
) -> list[tuple[int, int]]:
    """From the reference: ``same`` keeps ceil(size / stride), its odd element goes to the end."""
    found = []
    for axis in range(len(size)):
        if pad_type == "custom":
            found.append((pad[2 * axis], pad[2 * axis + 1]))
            continue
        total = 0
        if pad_type != "valid":
            kept = math.ceil(size[axis] / step[axis])
            total = max(0, step[axis] * (kept - 1) + span[axis] - size[axis])
        small, large = math.floor(total / 2), math.ceil(total / 2)
        found.append((large, small) if pad_type == "same_lower" else (small, large))
    return found


def _slow_conv(x: Any, weight: Any, pads: Any, step: Any, spread: Any, groups: int) -> Any:
    padded: Any = np.pad(x, [(0, 0), (0, 0), *pads])
    per_group = weight.shape[0] // groups
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    sizes = [(n - k) // s + 1 for n, k, s in zip(padded.shape[2:], spans, step, strict=True)]
    y: Any = np.zeros((x.shape[0], weight.shape[0], *sizes))
    for out, *place in itertools.product(range(weight.shape[0]), *map(range, sizes)):
        first = (out // per_group) * weight.shape[1]
        window = tuple(
            slice(p * s, p * s + k, d)
            for p, s, k, d in zip(place, step, spans, spread, strict=True)
        )
        seen = padded[(slice(None), slice(first, first + weight.shape[1]), *window)]
        y[(slice(None), out, *place)] = (seen * weight[out]).reshape(x.shape[0], -1).sum(1)
    return y


@st.composite
def _convolutions(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    several = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, step, spread = draw(several), draw(several), draw(several)
    least = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    return {
        "size": [n + draw(st.integers(0, 3)) for n in least],
        "kernel": kernel,
        "step": step,
        "spread": spread,
        "groups": draw(st.sampled_from([1, 2])),
        "pad_type": draw(st.sampled_from(PAD_TYPES)),
        "pad": draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank)),
        "seed": draw(st.integers(0, 99)),
        "bias": draw(st.booleans()),
    }


@few
@given(_convolutions())
def test_conv_is_the_sum_over_its_window(case: dict[str, Any]) -> None:
    groups, seed = case["groups"], case["seed"]
    x = _random(seed, 2, 2 * groups, *case["size"])
    weight = _random(seed + 1, 2 * groups, 2, *case["kernel"])
    bias = _random(seed + 2, 2 * groups) if case["bias"] else None
    spans = [(k - 1) * d + 1 for k, d in zip(case["kernel"], case["spread"], strict=True)]
    pads = _stated_pads(case["pad_type"], case["pad"], case["size"], spans, case["step"])
    expected = _slow_conv(x.numpy(), weight.numpy(), pads, case["step"], case["spread"], groups)
    y = OPS["conv"](
        x=x,
        weight=weight,
        bias=bias,
        strides=_int32(case["step"]),
        pad_type=case["pad_type"],
        pad=_int32(case["pad"]),
        dilations=_int32(case["spread"]),
        groups=_int32(groups),
    )
    if bias is not None:
        expected = expected + bias.numpy().reshape(1, -1, *[1] * len(case["size"]))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_conv_has_the_defaults_of_the_reference() -> None:
    x, weight = _random(0, 1, 3, 5, 6), _random(1, 4, 3, 2, 2)
    expected = _slow_conv(x.numpy(), weight.numpy(), [(0, 0)] * 2, [1, 1], [1, 1], 1)
    np.testing.assert_allclose(OPS["conv"](x=x, weight=weight), expected, rtol=1e-4, atol=1e-5)


# torch warns that an even kernel makes it copy its input.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_same_is_torchs_same_for_even_kernels() -> None:
    module = nn.Conv2d(2, 3, (2, 4), padding="same", bias=False)
    x = _random(3, 1, 2, 5, 6)
    y = OPS["conv"](x=x, weight=module.weight.detach(), pad_type="same")
    torch.testing.assert_close(y, module(x).detach())


def test_same_needs_no_pad_where_the_stride_skips_the_end() -> None:
    x, weight = _random(4, 1, 1, 4), torch.ones(1, 1, 1)
    y = OPS["conv"](x=x, weight=weight, strides=_int32([2]), pad_type="same")
    torch.testing.assert_close(y, x[..., ::2])
    bare = OPS["conv"](x=x, weight=weight, pad_type="custom")  # its pad defaults to zeros
    torch.testing.assert_close(bare, x)


def test_conv_quantized_is_conv_of_the_dequantized_weight() -> None:
    codes = torch.randint(0, 256, (4, 2, 3), dtype=torch.uint8)
    scale, offset = torch.rand(4), torch.rand(4)
    x = _random(5, 1, 2, 8)
    real = torch.stack([codes[i].float() * scale[i] + offset[i] for i in range(4)])
    y = OPS["conv_quantized"](
        x=x, weight=codes, quantization_type="linear", quant_scale=scale, quant_bias=offset,
        strides=_int32([2]),
    )  # fmt: skip
    torch.testing.assert_close(y, nn.functional.conv1d(x, real, stride=2))
    with pytest.raises(ValueError, match="lut"):
        OPS["conv_quantized"](
            x=x, weight=codes, quantization_type="lut", quant_scale=scale, quant_bias=offset
        )


def _slow_conv_transpose(x: Any, weight: Any, step: Any, spread: Any, groups: int) -> Any:
    """Every input element adds its weighted kernel where it stands."""
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    sizes = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], step, spans, strict=True)]
    per_in, per_out = x.shape[1] // groups, weight.shape[1]
    y = np.zeros((x.shape[0], per_out * groups, *sizes))
    for channel, *place in itertools.product(range(x.shape[1]), *map(range, x.shape[2:])):
        first = channel // per_in * per_out
        window = tuple(
            slice(p * s, p * s + k, d)
            for p, s, k, d in zip(place, step, spans, spread, strict=True)
        )
        value = x[(slice(None), channel, *place)].reshape(-1, 1, *[1] * len(sizes))
        y[(slice(None), slice(first, first + per_out), *window)] += value * weight[channel]
    return y


@few
@given(_convolutions())
def test_conv_transpose_spreads_every_element(case: dict[str, Any]) -> None:
    groups, seed, rank = case["groups"], case["seed"], len(case["size"])
    x = _random(seed, 2, 2 * groups, *case["size"])
    weight = _random(seed + 1, 2 * groups, 3, *case["kernel"])
    bias = _random(seed + 2, 3 * groups) if case["bias"] else None
    kind = "same" if case["pad_type"] == "same_lower" else case["pad_type"]
    full = _slow_conv_transpose(x.numpy(), weight.numpy(), case["step"], case["spread"], groups)
    for axis in range(rank):
        size, step = full.shape[2 + axis], case["step"][axis]
        front, end = 0, size
        if kind == "custom":
            front, end = case["pad"][2 * axis], size - case["pad"][2 * axis + 1]
        elif kind == "same":
            front = max(size - x.shape[2 + axis] * step, 0) // 2
            end = front + x.shape[2 + axis] * step
        if front >= end:
            return  # the pads leave nothing
        missing = max(end - size, 0)  # a stride beyond the window
        full = np.pad(full, [(0, missing if i == 2 + axis else 0) for i in range(rank + 2)])
        full = full.take(range(front, end), 2 + axis)
    if bias is not None:
        full = full + bias.numpy().reshape(1, -1, *[1] * rank)
    y = OPS["conv_transpose"](
        x=x,
        weight=weight,
        bias=bias,
        pad=_int32(case["pad"]),
        pad_type=kind,
        strides=_int32(case["step"]),
        dilations=_int32(case["spread"]),
        groups=_int32(groups),
    )
    np.testing.assert_allclose(y, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", [0, 1])
def test_conv_transpose_meets_its_output_shape(extra: int) -> None:
    """The shape asks for what torch calls output padding: more of the full result, then zeros."""
    for padding in (0, 1):
        module = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=padding, output_padding=extra)
        x = _random(7, 1, 2, 4, 5)
        expected = module(x).detach()
        y = OPS["conv_transpose"](
            x=x,
            weight=module.weight.detach(),
            bias=None if module.bias is None else module.bias.detach(),
            pad=_int32([padding] * 4),
            pad_type="custom",
            strides=_int32([2, 2]),
            output_shape=_int32(list(expected.shape)),
        )
        torch.testing.assert_close(y, expected)


@st.composite
def _pools(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    several = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel = draw(several)
    return {
        "size": [k + draw(st.integers(0, 4)) for k in kernel],
        "kernel": kernel,
        "step": draw(several),
        "pad_type": draw(st.sampled_from(PAD_TYPES)),
        # No pad as wide as the window: such a window would hold nothing.
        "pad": [draw(st.integers(0, k - 1)) for k in kernel for _ in (0, 1)],
        "seed": draw(st.integers(0, 99)),
        "exclude": draw(st.booleans()),
    }


def _slow_pool(x: Any, case: dict[str, Any], kind: str) -> Any:
    kernel, step = case["kernel"], case["step"]
    pads = _stated_pads(case["pad_type"], case["pad"], case["size"], kernel, step)
    missing: Any = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=np.nan)
    sizes = [(n - k) // s + 1 for n, k, s in zip(missing.shape[2:], kernel, step, strict=True)]
    y: Any = np.zeros((*x.shape[:2], *sizes))
    for place in itertools.product(*map(range, sizes)):
        window = tuple(slice(p * s, p * s + k) for p, s, k in zip(place, step, kernel, strict=True))
        seen = missing[(slice(None), slice(None), *window)].reshape(*x.shape[:2], -1)
        if kind == "max":
            value = np.nanmax(seen, -1)
        elif kind == "l2":
            value = np.sqrt(np.nansum(seen**2, -1))
        else:
            count = (~np.isnan(seen)).sum(-1) if case["exclude"] else seen.shape[-1]
            value = np.nansum(seen, -1) / count
        y[(slice(None), slice(None), *place)] = value
    return y


@few
@given(_pools())
def test_pools_look_at_their_window(case: dict[str, Any]) -> None:
    x = _random(case["seed"], 2, 3, *case["size"])
    arguments = {
        "x": x,
        "kernel_sizes": _int32(case["kernel"]),
        "strides": _int32(case["step"]),
        "pad_type": case["pad_type"],
        "pad": _int32(case["pad"]),
    }
    exclude = torch.tensor(case["exclude"])
    found = {
        "max": OPS["max_pool"](**arguments),
        "l2": OPS["l2_pool"](**arguments),
        "avg": OPS["avg_pool"](**arguments, exclude_padding_from_average=exclude),
    }
    for kind, y in found.items():
        expected = _slow_pool(x.numpy(), case, kind)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5, err_msg=kind)


@few
@given(_pools())
def test_ceil_mode_is_torchs(case: dict[str, Any]) -> None:
    rank = len(case["size"])
    pad = [k // 2 for k in case["kernel"]]
    # Without pads the reference keeps a last window that starts behind the input; torch drops it.
    assume(all(s <= k for s, k in zip(case["step"], case["kernel"], strict=True)))
    x = _random(case["seed"], 1, 2, *case["size"])
    arguments = {
        "x": x,
        "kernel_sizes": _int32(case["kernel"]),
        "strides": _int32(case["step"]),
        "pad_type": "custom",
        "pad": _int32([p for p in pad for _ in (0, 1)]),
        "ceil_mode": torch.tensor(True),
    }
    biggest: Any = [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d][rank - 1]
    expected = biggest(case["kernel"], case["step"], pad, ceil_mode=True)(x)
    torch.testing.assert_close(OPS["max_pool"](**arguments), expected)
    mean: Any = [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d][rank - 1]
    exclude = case["exclude"]
    module = mean(case["kernel"], case["step"], pad, ceil_mode=True, count_include_pad=not exclude)
    y = OPS["avg_pool"](**arguments, exclude_padding_from_average=torch.tensor(exclude))
    torch.testing.assert_close(y, module(x))


def test_an_unknown_padding_is_refused() -> None:
    x = _random(0, 1, 1, 4)
    with pytest.raises(ValueError, match="pad_type 'full'"):
        OPS["max_pool"](x=x, kernel_sizes=_int32([2]), pad_type="full")
