"""Recipes to this runtime's own form of a program."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgekit.capture import export_module
from edgekit.errors import CaptureFailed, LoweringFailed
from edgekit.graph import quiet
from edgekit.program import Program
from edgekit.recipe import FP16, Recipe


def program_in_precision(program: Program, recipe: Recipe) -> ExportedProgram:
    """The captured graph, or the same graph in float16 with float32 inputs and outputs."""
    if recipe != FP16:
        return program.exported
    # A copy: half() would change the weights that other targets are still to be made from.
    with quiet():
        module = _made_in_half(copy.deepcopy(program.exported.module())).half()
    try:
        return export_module(_HalfInside(module), program.inputs)
    except (CaptureFailed, RuntimeError) as cause:
        raise LoweringFailed(
            f"the model cannot run in fp16 as it is written: {cause} Most often a tensor is made "
            "with dtype=torch.float32 inside forward; take the dtype of an input instead, or use "
            "--precision fp32."
        ) from cause


# Ops that make a tensor from nothing: a recurrent layer's first state, a mask.
_FACTORIES = ("zeros", "ones", "full", "empty", "scalar_tensor", "arange")


def _made_in_half(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``half()`` converts weights alone; what the graph makes in float32 would meet them."""
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if name in _FACTORIES and node.kwargs.get("dtype") == torch.float32:
            node.update_kwarg("dtype", torch.float16)
    module.recompile()
    return module


class _HalfInside(nn.Module):
    """Takes and returns float32; ``module`` sees float16."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        halves = [tensor.half() if tensor.is_floating_point() else tensor for tensor in tensors]
        outputs = torch.utils._pytree.tree_leaves(self.module(*halves))
        return [output.float() if output.is_floating_point() else output for output in outputs]
