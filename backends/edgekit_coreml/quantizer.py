"""Which values become int8 in a W8A8 package, and how their ranges are taken (torch, torchao).

coremltools has a quantizer of its own for PT2E; it imports modules that torch 2.13 no longer has.
This one quantizes what coremltools' own pass for activations does: the inputs of convolutions,
linear layers, pools and sums. Results are quantized where the next such op takes them, so the
model's outputs, gates, softmax and products of two activations stay float16.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from edgekit.graph import quiet
from edgekit.pt2e import observer
from edgekit.recipe import Method

with quiet():
    from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

aten = torch.ops.aten
SMALLEST = 2**-14  # the smallest normal float16: a smaller scale loses digits, or is flushed to 0
MOST_LOST = 10 ** (1 / 10)  # of a layer's weight noise, 1 dB, before it stays float
MOST_CENTRED = 1.1  # of a range's width; a range nearer to symmetric than that is made so

WEIGHTED = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
)
# With paddings given as words torch calls them otherwise, and the converter knows both.
_PADDED = frozenset({aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding})
SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})
POOLS = frozenset({aten.max_pool2d.default, aten.avg_pool2d.default})
OPS = frozenset({"conv1d", "conv2d", "conv3d", "linear", "add", "max_pool2d", "avg_pool2d"})

_NOT_NEGATIVE = frozenset(
    {
        *(aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default),
        *(aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int, aten.sqrt.default),
        *(aten.abs.default, aten.exp.default, aten.square.default),
    }
)
# What gives back values of its input, or means of them.
_PASSING = frozenset(
    {
        *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.slice.Tensor),
        *(aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim),
        *(aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default),
        *(aten.mean.dim, aten.dropout.default, aten.contiguous.default, aten.clone.default),
    }
)


class Int8Quantizer(Quantizer):  # type: ignore[misc]  # untyped base
    """Marks what becomes int8; ``keep_float`` are names of the captured graph's nodes."""

    def __init__(self, method: Method, keep_float: Collection[str]) -> None:
        self._method, self._kept = method, frozenset(keep_float)

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in model.graph.nodes:
            taken = None if node.name in self._kept else self._taken(model, node)
            if taken:
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(taken, None, _annotated=True)
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        return

    def _taken(
        self, model: torch.fx.GraphModule, node: torch.fx.Node
    ) -> dict[torch.fx.Node, QuantizationSpec] | None:
        """The inputs of ``node`` that become int8, with how; None where it stays float."""
        if node.target in WEIGHTED | _PADDED:
            x, weight = cast("list[Any]", node.args[:2])
            if _is_activation(x) and _holds_codes_well(model, weight):
                return {x: self._activation(x), weight: _WEIGHT}
        elif node.target in SUMS | POOLS:
            inputs: list[Any] = list(node.args[: 2 if node.target in SUMS else 1])
            if all(map(_is_activation, inputs)):
                return {one: self._activation(one) for one in inputs}
        return None

    def _activation(self, node: torch.fx.Node) -> QuantizationSpec:
        """By the op that made the value, so that every reader of it asks for the same codes."""
        unsigned = _is_not_negative(node)
        return QuantizationSpec(
            torch.uint8 if unsigned else torch.int8,
            _centring(self._method).with_args(eps=SMALLEST),
            0 if unsigned else -128,
            255 if unsigned else 127,
            torch.per_tensor_affine,
        )


@cache
def _centring(method: Method) -> Any:
    """An observer that leaves out the zero point where that costs little: Core ML runs faster."""
    base: Any = observer(method)

    class Centring(base):  # type: ignore[misc]
        def _calculate_qparams(self, low: Tensor, high: Tensor) -> Any:
            width, reach = high - low, 2 * torch.maximum(low.abs(), high.abs())
            near = self.dtype == torch.int8 and bool(reach <= MOST_CENTRED * width)
            self.qscheme = torch.per_tensor_symmetric if near else torch.per_tensor_affine
            return super()._calculate_qparams(low, high)

    return Centring


_WEIGHT = QuantizationSpec(
    torch.int8,
    PerChannelMinMaxObserver.with_args(eps=SMALLEST),
    -127,
    127,
    torch.per_channel_symmetric,
    0,
)


def _is_activation(value: object) -> bool:
    """Whether it is a float tensor that the graph computes, of an axis at least.

    The converter wraps an int8 constant of no axes around: a scalar beside an activation came out
    wrong (24 dB in all), so constants and scalars stay float.
    """
    if not isinstance(value, torch.fx.Node) or value.op not in ("call_function", "placeholder"):
        return False
    held = value.meta.get("val")
    return isinstance(held, Tensor) and held.dtype == torch.float32 and held.dim() > 0


def _holds_codes_well(model: torch.fx.GraphModule, node: object) -> bool:
    """Whether int8 codes with float16 scales can stand for this weight.

    Scales are never below ``SMALLEST``. A channel of tiny weights then has coarser codes; where
    that costs the layer more than ``MOST_LOST``, or where all weights are 0, it stays float.
    """
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return False
    weight = _attribute(model, str(node.target)).detach()
    if weight.dtype != torch.float32 or not weight.any():
        return False
    largest = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True)
    wanted = largest / 127
    noise = [_noise(weight, scale) for scale in (wanted, wanted.clamp(min=SMALLEST))]
    return noise[1] <= MOST_LOST * noise[0]


def _noise(weight: Tensor, scale: Tensor) -> float:
    safe = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return float((torch.round(weight / safe) * safe - weight).double().square().sum())


def _attribute(model: torch.fx.GraphModule, path: str) -> Tensor:
    owner: Any = model
    for name in path.split("."):
        owner = getattr(owner, name)
    assert isinstance(owner, Tensor)
    return owner


def _is_not_negative(node: torch.fx.Node) -> bool:
    while node.target in _PASSING and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    if node.target is aten.cat.default:
        return all(_is_not_negative(one) for one in node.args[0])  # type: ignore[union-attr, arg-type]
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default):
        lower = node.args[1] if len(node.args) > 1 else None
        return isinstance(lower, (int, float)) and lower >= 0
    return node.target in _NOT_NEGATIVE
