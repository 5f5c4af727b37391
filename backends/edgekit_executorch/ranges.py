"""Scales that XNNPACK's kernels can take, found after calibration.

A kernel multiplies by ratios of scales and refuses to be made outside these bounds (XNNPACK's
``xnn_create_*``): then no program loads. A map that is 0 everywhere on the calibration data
would break them, so its scale is raised. Biases are 32-bit steps of the scales of input and
weights, and wrap around where those are too fine: then the input's scale is raised.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from edgekit.graph import quiet
from edgekit_executorch.annotate import RELUS, WEIGHTED

with quiet():
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase


# Half of what the kernels allow, so that no rounding matters.
_LARGEST_RATIO = 2.0**7  # scale of the input times scale of the weights, by that of the result
_LARGEST_BIAS = 2.0**30  # in steps of 32 bits


class _Ranges:
    """The scales of a calibrated graph: to find one is a search, so each is found once."""

    def __init__(self, prepared: GraphModule) -> None:
        self._prepared = prepared
        self._found: dict[Any, float] = {}

    def observer(self, node: object) -> Any:
        """The observer that a node of the prepared graph calls, or None."""
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        module = self._prepared.get_submodule(str(node.target))
        return module if isinstance(module, UniformQuantizationObserverBase) else None

    def result(self, node: Node) -> Any:
        """The observer of a node's result, or of the ReLU that is one kernel with it, or None."""
        for user in node.users:
            if (found := self.observer(user)) is not None:
                return found
        (only, *others) = node.users or [None]
        fused = only is not None and not others and only.target in RELUS
        return self.result(only) if fused else None  # type: ignore[arg-type]

    def scale(self, observer: Any) -> float:
        """The scale that its observer finds for one tensor."""
        if observer not in self._found:
            self._found[observer] = float(observer.calculate_qparams()[0])
        return self._found[observer]

    def raise_to(self, observer: Any, scale: float) -> None:
        """No scale of this observer will be below ``scale``."""
        if self.scale(observer) < scale:
            observer.eps.fill_(scale)
            self._found[observer] = scale

    def attribute(self, node: Node) -> Any:
        """The tensor of a ``get_attr`` node."""
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self._prepared.get_submodule(owner), name)


def fit_ranges(prepared: GraphModule) -> None:
    """Raise the scales of a calibrated graph's observers where a kernel would refuse them.

    In the order of the graph, twice: a scale raised for one kernel is another's input.
    """
    ranges = _Ranges(prepared)
    for _ in range(2):
        for node in prepared.graph.nodes:
            if node.target in WEIGHTED and (result := ranges.result(node)) is not None:
                _fit(ranges, node, result)


def _fit(ranges: _Ranges, node: Node, result: Any) -> None:
    source, weights = ranges.observer(node.args[0]), ranges.observer(node.args[1])
    if source is None or weights is None:
        return
    scales = weights.calculate_qparams()[0]
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, Node) and bias.op == "get_attr":
        values = ranges.attribute(bias).detach().abs()
        if values.shape == scales.shape:
            ranges.raise_to(source, float((values / (scales * _LARGEST_BIAS)).max()))
    ranges.raise_to(result, ranges.scale(source) * float(scales.max()) / _LARGEST_RATIO)
