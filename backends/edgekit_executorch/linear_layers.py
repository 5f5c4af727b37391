"""int4: weights of linear layers in groups of 32 with a scale each, activations 8-bit as they come.

ExecuTorch calls it 8da4w. XNNPACK has 4-bit kernels for linear layers alone; convolutions stay
float.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekit.capture import export_module
from edgekit.errors import LoweringFailed
from edgekit.graph import quiet
from edgekit.program import Program

with quiet():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

GROUP = 32
_PREFIX = "linear_in_four_bits_"


def in_four_bits(program: Program, kept: Collection[str]) -> ExportedProgram:
    """The captured graph with 4-bit linear layers, but for those named in ``kept``.

    Raises ``LoweringFailed`` for a model that has none whose inputs are a multiple of ``GROUP``.
    """
    with quiet():
        module = copy.deepcopy(program.exported.module())
        widths = _as_modules(module, kept)
        if not any(width % GROUP == 0 for width in widths):
            found = f"its linear layers have {_listed(widths)} inputs" if widths else "it has none"
            raise LoweringFailed(
                f"int4 holds the weights of linear layers with a multiple of {GROUP} inputs, and "
                f"the model has none of these: {found}. Use --precision int8."
            )
        four_bits = torch.int4  # type: ignore[attr-defined]  # made when torch is imported
        settings = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=four_bits, weight_granularity=PerGroup(GROUP)
        )
        quantize_(module, settings, filter_fn=_takes_groups)
        return export_module(module, program.inputs)


def _listed(widths: Collection[int]) -> str:
    return ", ".join(map(str, sorted(set(widths))))


def _takes_groups(module: nn.Module, name: str) -> bool:
    ours = name.rpartition(".")[2].startswith(_PREFIX)
    return ours and isinstance(module, nn.Linear) and module.in_features % GROUP == 0


def _as_modules(graph_module: GraphModule, kept: Collection[str]) -> list[int]:
    """Calls of ``nn.Linear`` in place of calls of its op: torchao rewrites modules.

    Returns the number of inputs of each.
    """
    widths = []
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.aten.linear.default or node.name in kept:
            continue
        if not (isinstance(node.args[1], Node) and node.args[1].op == "get_attr"):
            continue  # a product with something computed
        layer = _layer(graph_module, *node.args[1:])
        widths.append(layer.in_features)
        graph_module.add_submodule(_PREFIX + node.name, layer)
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(_PREFIX + node.name, (node.args[0],))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return widths


def _layer(graph_module: GraphModule, weight: Node, bias: Node | None = None) -> nn.Linear:
    values = _held(graph_module, weight)
    outputs, inputs = values.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(values, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(_held(graph_module, bias), requires_grad=False)
    return layer


def _held(graph_module: GraphModule, node: Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name).detach()
