"""Runs the captured graph node by node, and rebuilds it so that it returns every node (torch)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgekit.capture import export_module, output_specs
from edgekit.graph import node_source, op_name, quiet
from edgekit.layers import Layer, layer_from_values
from edgekit.program import Program, Reference
from edgekit.spec import Arrays, TensorSpec


def layers_from_program(program: Program) -> list[Layer]:
    """Every floating-point value of the eager graph on the first sample, in its order.

    One that holds infinity, such as a mask, has no distance in dB and is left out.
    """
    layers: list[Layer] = []
    nodes = {node.name: node for node in program.exported.graph.nodes}
    returned_nodes = program.exported.graph_signature.user_outputs
    outputs = {
        str(node): spec.name for node, spec in zip(returned_nodes, program.outputs, strict=True)
    }

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            floating = isinstance(result, Tensor) and result.is_floating_point()
            if n.op == "call_function" and floating and n.name in nodes:
                _, module = node_source(nodes[n.name])
                array = result.float().numpy(force=True)  # numpy has no bfloat16
                if np.isfinite(array).all():
                    returned = outputs.get(n.name, "")
                    layers.append(layer_from_values(n.name, op_name(n), module, array, returned))
            return result

    sample = program.reference.samples[0]
    with quiet(), torch.no_grad():
        Recorder(program.exported.module()).run(*_tensors(program.inputs, sample))
    return layers


def source_of(program: Program, node: str) -> str:
    """The user's source line of the graph node called ``node``, or ""."""
    found = next((each for each in program.exported.graph.nodes if each.name == node), None)
    return node_source(found)[0] if found is not None else ""


def _tensors(inputs: Sequence[TensorSpec], sample: Arrays) -> list[Tensor]:
    return [torch.from_numpy(np.array(sample[spec.name])) for spec in inputs]


def revealing(program: Program, names: Sequence[str]) -> Program:
    """A program that returns the nodes called ``names`` and nothing else.

    For a runtime that shows nothing of its inside. What it runs is then another artifact than
    the one in the bundle, made the same way. Its reference is the first sample alone. Raises
    ``CaptureFailed``.
    """
    sample = program.reference.samples[0]
    with quiet():
        module = copy.deepcopy(program.exported.module())
        wanted = set(names)
        nodes = [node for node in module.graph.nodes if node.name in wanted]
        output = next(node for node in module.graph.nodes if node.op == "output")
        output.args = (tuple(nodes),)
        module.graph._codegen = torch.fx.graph.CodeGen()
        module.recompile()
        exported = export_module(_Flat(module), program.inputs)
        with torch.no_grad():
            values = exported.module()(*_tensors(program.inputs, sample))
    shown = [node.name for node in nodes]
    expected = {name: value.numpy(force=True) for name, value in zip(shown, values, strict=True)}
    return replace(
        program,
        exported=exported,
        outputs=output_specs(exported, shown, program.inputs),
        reference=Reference((sample,), (expected,), program.reference.source),
        image=None,
        labels=(),
    )


class _Flat(nn.Module):
    """Passes tensors on in order, in float32; copies, since a runtime may not return views."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        leaves = pytree.tree_leaves(self.module(*tensors))
        return [(each if each.dtype is torch.float32 else each.float()) * 1.0 for each in leaves]
