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
from edgekit.pt2e import calibrate
from edgekit.recipe import FP16, Recipe
from edgekit.repairs import with_pool_strides
from edgekit.selection import kept_nodes
from edgekit_executorch.annotate import Annotator
from edgekit_executorch.linear_layers import in_four_bits
from edgekit_executorch.ranges import fit_ranges

with quiet():
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


def program_in_precision(program: Program, recipe: Recipe) -> ExportedProgram:
    """The captured graph in a recipe's precision, with float32 inputs and outputs.

    An integer recipe without calibration data, as ``check`` may have it, is the float graph.
    """
    if recipe == FP16:
        return _in_half(program)
    if recipe.weights == "int4":
        return in_four_bits(program, kept_nodes(program, recipe))
    if recipe.calibrated and program.calibration is not None:
        return _in_integers(program, recipe)
    return program.exported


def _in_integers(program: Program, recipe: Recipe) -> ExportedProgram:
    """As torchao's PT2E makes it, with what XNNPACK can take: see ``annotate`` and ``ranges``."""
    kept = kept_nodes(program, recipe)
    with quiet():
        # A copy: it folds batch norms into the weights that other targets are still to take.
        module = copy.deepcopy(with_pool_strides(program.exported).module())
        _copy_per_use(module)
        prepared = prepare_pt2e(module, Annotator(recipe.method, _with_folded(program, kept)))
    calibrate(prepared, program, "calibrating executorch int8")
    with quiet():
        fit_ranges(prepared)
        converted = convert_pt2e(prepared)
    return export_module(converted, program.inputs)


def _copy_per_use(module: torch.fx.GraphModule) -> None:
    """A parameter of its own for each use of a parameter, as of a layer that is called twice.

    The quantizer leaves the weight of later uses float, which the runtime refuses; and XNNPACK
    takes the bias in steps of the first use's scales for all, and then answers wrongly. Weights
    that are the same bytes in the end are held once.
    """
    for node in [each for each in module.graph.nodes if each.op == "get_attr"]:
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(module.get_submodule(owner), name)
        for index, user in enumerate(list(node.users)[1:]):
            own = f"own_{node.name}_{index}"
            module.register_buffer(own, value.detach().clone())
            with module.graph.inserting_after(node):
                copied = module.graph.create_node("get_attr", own)
            copied.meta = dict(node.meta)
            user.replace_input_with(node, copied)
    module.recompile()


def _with_folded(program: Program, kept: frozenset[str]) -> frozenset[str]:
    """``kept``, and the layers that a kept batch norm will be folded into."""
    folded = (
        node.args[0].name
        for node in program.exported.graph.nodes
        if node.name in kept and node.target is torch.ops.aten.batch_norm.default
    )
    return kept | frozenset(folded)


def _in_half(program: Program) -> ExportedProgram:
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
