"""Which nodes of a captured graph XNNPACK is to compute in integers, and how ranges are shared.

What the quantizer of ExecuTorch chooses was measured against other choices; README.md here
has the figures. Convolutions and linear layers are annotated by it; the rest is decided here, node
by node in the order of the graph, so that integers go on where they already are:

- an addition, product or concatenation where every input already is integers, or a parameter:
  with one float among them, converting it costs more than the kernel saves, and accuracy too;
- what only moves values, on integers, with the range of its input (the quantizer leaves slices
  out, and the runtime then refuses the program);
- an average over the image, with a range of its own, since averages are smaller.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

from edgekit.graph import quiet
from edgekit.pt2e import observer
from edgekit.recipe import Method

with quiet():
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer_utils import OP_TO_ANNOTATOR
    from torchao.quantization.pt2e import PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationConfig,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

aten = torch.ops.aten

# In this order: a convolution with its ReLU is one kernel.
_WEIGHTED = (
    *("linear_relu", "linear", "conv_relu", "conv"),
    *("conv_transpose_relu", "conv_transpose"),
)
WEIGHTED_OPS = ("conv1d", "conv2d", "conv_transpose2d", "linear")
WEIGHTED = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input),
    aten.linear.default,
)
_MOVES = (
    *(aten.slice.Tensor, aten.reshape.default, aten.view.default, aten.flatten.using_ints),
    *(aten.permute.default, aten.transpose.int, aten.squeeze.dim),
    *(aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default),
    *(aten.max_pool2d.default, aten.pad.default),
)
_PAIRS = (aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor)
RELUS = (aten.relu.default, aten.relu_.default)
_NOTHING: tuple[list[object], ...] = ([], [None], [0], [0.0])
_IMAGE_AXES = ([2, 3], [3, 2])

INTEGER_OPS = frozenset(
    {*WEIGHTED_OPS, "add", "mul", "cat", "mean", "relu", "hardtanh", "max_pool2d"}
)

# The smallest scales. The quantizer's own 2**-12 is coarse for a channel whose weights stay
# below 0.03 or a map whose values stay below 0.06; what the kernels cannot take of finer ones is
# put right in ranges.py.
SMALLEST_WEIGHT_SCALE = 2**-16
SMALLEST_SCALE = 2**-20


def config(method: Method) -> Any:
    """8-bit symmetric weights per output channel, 8-bit activations per tensor."""
    activations = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=observer(method).with_args(eps=SMALLEST_SCALE),
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=SMALLEST_WEIGHT_SCALE),
    )
    return QuantizationConfig(activations, activations, weights, None, False)


class Annotator(Quantizer):  # type: ignore[misc]  # untyped base
    """``kept`` are names of nodes that stay float."""

    def __init__(self, method: Method, kept: Collection[str]) -> None:
        super().__init__()
        self._config, self._kept = config(method), kept
        self._integer: set[Node] = set()  # nodes whose results are integers

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark the nodes; ``prepare_pt2e`` calls it."""
        for pattern in _WEIGHTED:
            OP_TO_ANNOTATOR[pattern](model, self._config, self._may_weighted)
        for node in model.graph.nodes:
            if node.op != "call_function":
                continue
            if Q_ANNOTATION_KEY in node.meta:
                if node.meta[Q_ANNOTATION_KEY].output_qspec is not None:
                    self._integer.add(node)
            elif self._may(node):
                self._annotate(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to add to the converter's own checks."""

    def _may(self, node: Node) -> bool:
        return node.name not in self._kept

    def _may_weighted(self, node: Node) -> bool:
        """Also for the ReLU of a pair. What computes its weights has no integer kernel."""
        constants = node.args[1:3] if node.target in WEIGHTED else ()
        fixed = (each is None or getattr(each, "op", "") == "get_attr" for each in constants)
        return self._may(node) and all(fixed)

    def _annotate(self, node: Node) -> None:
        if node.target in _PAIRS:
            self._pair(node)
        elif node.target is aten.cat.default:
            self._cat(node)
        elif node.args and node.args[0] in self._integer:
            if node.target in _MOVES and _movable(node):
                shared = SharedQuantizationSpec(node.args[0])
                self._mark(node, {node.args[0]: shared}, shared)
            elif _averages_image(node):
                shared = SharedQuantizationSpec(node.args[0])
                self._mark(node, {node.args[0]: shared}, self._config.output_activation)

    def _pair(self, node: Node) -> None:
        inputs = [each for each in node.args[:2] if isinstance(each, Node)]
        tensors = [each for each in inputs if each in self._integer or _is_parameter(each)]
        if len(tensors) < 2 or not any(each in self._integer for each in inputs):
            return
        specs = dict.fromkeys(inputs, self._config.input_activation)
        (user, *others) = node.users or [None]
        if user is not None and not others and user.target in RELUS and self._may(user):
            # One kernel: what lies between the two is never an integer.
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(specs, None, _annotated=True)
            self._mark(user, {}, self._config.output_activation)
        else:
            self._mark(node, specs, self._config.output_activation)

    def _cat(self, node: Node) -> None:
        inputs: list[Node] = list(node.args[0])  # type: ignore[arg-type]
        if not all(each in self._integer for each in inputs):
            return
        source = inputs[0]
        shared = SharedQuantizationSpec((source, node))  # the kernel copies: one range for all
        specs = {source: self._config.input_activation}
        specs.update({each: shared for each in inputs if each is not source})
        self._mark(node, specs, shared)

    def _mark(self, node: Node, inputs: dict[Any, Any], output: Any) -> None:
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, output, _annotated=True)
        self._integer.add(node)


def _is_parameter(node: Node) -> bool:
    """A constant that is worth being integers: float32, and more than one number."""
    value = node.meta.get("val")
    if node.op != "get_attr" or not isinstance(value, torch.Tensor):
        return False
    return value.dtype == torch.float32 and value.numel() > 1


def _movable(node: Node) -> bool:
    """Not a slice with steps, and no padding but zeros: the delegate has no kernel for those."""
    if node.target is aten.slice.Tensor:
        return node.args[4:5] in ((), (1,))
    if node.target is aten.pad.default:
        return list(node.args[2:3]) in ([], ["constant"]) and list(node.args[3:4]) in _NOTHING
    return True


def _averages_image(node: Node) -> bool:
    """The one average that the delegate takes: over both image axes, and keeping them."""
    if node.target is not aten.mean.dim or len(node.args) < 3 or not node.args[2]:
        return False
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return rank == 4 and [axis % rank for axis in node.args[1]] in _IMAGE_AXES  # type: ignore[union-attr]
