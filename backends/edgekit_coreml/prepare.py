"""The captured graph as the converter must see it: what Core ML users expect is added here.

Node names stay as they are, since they name the layers of the finished package. The graph is
edited, not wrapped and captured again, for the same reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument

from edgekit.graph import quiet
from edgekit.image import ImageInput
from edgekit.program import Program
from edgekit.repairs import LOG_SOFTMAX, with_pool_strides
from edgekit.spec import TensorSpec
from edgekit_coreml.names import PROBABILITIES

with quiet():
    from coremltools.converters.mil.frontend.torch import is_torch_fx_node_supported

aten = torch.ops.aten
_FEW_BITS = (torch.bool, torch.uint8, torch.int8)  # no feature of Core ML has one of these dtypes


def converter_program(program: Program) -> ExportedProgram:
    """A copy of the program's graph, repaired and extended for the converter."""
    with quiet():
        exported: ExportedProgram = with_pool_strides(copy.deepcopy(program.exported))
        exported = exported.run_decompositions(_repairs())
        exported = exported.run_decompositions(_for_unsupported(exported))
    _accept_small_inputs(exported)
    _return_each_once(exported)
    if (image := image_of(program)) is not None:
        _normalise_inside(exported, image, [spec.name for spec in program.inputs])
    if classes(program) is not None:
        _add_probabilities(exported, program)
    exported.graph_module.recompile()
    return exported


def image_of(program: Program) -> ImageInput | None:
    """How pictures become the model's input, where Core ML can take them: one at a time."""
    image = program.image
    fits = image is not None and any(
        image.feeds(spec) and spec.shape[0] == 1 and not spec.dims for spec in program.inputs
    )
    return image if fits else None


def classes(program: Program) -> int | None:
    """The index of the one output that holds a score for each label, or None."""
    count = len(program.labels)
    found = [
        index
        for index, spec in enumerate(program.outputs)
        if spec.dtype == "float32" and spec.shape == (1, count)
    ]
    distinct = len(set(program.labels)) == count  # a dictionary holds each once
    return found[0] if count > 1 and distinct and len(found) == 1 else None


# What the converter accepts and turns into something else, and nothing here repairs.
WRONG = dict.fromkeys(
    (aten._upsample_bilinear2d_aa.default, aten._upsample_bilinear2d_aa.vec),
    "coremltools drops antialias=True without saying so (measured: 1 dB from eager); resize "
    "without it, or before the model",
)


def is_supported(node: torch.fx.Node) -> bool:
    """Whether the converter has a function for what a graph node calls."""
    if getattr(node.target, "namespace", "") == "quantized_decomposed":
        return True  # registered under its full name, and asked for without the namespace
    try:
        return bool(is_torch_fx_node_supported(node))
    except AssertionError:  # it takes ``&``, __and__, for an op that writes into its input
        return False


def _repairs() -> dict[Any, Callable[..., Any]]:
    """Ops that the converter accepts and gets wrong, or that are easily written out (measured;
    see README.md here)."""
    table = torch.export.default_decompositions()
    return {
        aten.gelu.default: _gelu,
        aten.rms_norm.default: _rms_norm,
        aten._fused_rms_norm.default: _fused_rms_norm,
        **LOG_SOFTMAX,
        aten.pad.default: _pad,
        aten.fmod.Scalar: _fmod,
        aten.fmod.Tensor: _fmod,
        # It multiplies by a mask of zeros: minus infinity becomes NaN.
        **{op: table[op] for op in (aten.triu.default, aten.tril.default)},
    }


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The converter turns the tanh form silently into the exact one, unless it is written out."""
    if approximate != "tanh":
        return NotImplemented  # type: ignore[no-any-return]  # the op then stays as it is
    inner = (x + torch.pow(x, 3) * 0.044715) * 0.7978845608028654
    return x * 0.5 * (torch.tanh(inner) + 1.0)


def _rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _fused_rms_norm(x, shape, weight, eps)[0]


def _fused_rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """The converter scales epsilon with the largest element, and has none by default."""
    axes = list(range(-len(shape), 0))
    scale = torch.rsqrt(x.square().mean(axes, keepdim=True) + (eps or torch.finfo(x.dtype).eps))
    y = x * scale
    return (y * weight if weight is not None else y), scale


def _pad(x: Tensor, pad: list[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """The converter has no circular mode."""
    if mode != "circular" or min(pad) < 0:
        return NotImplemented  # type: ignore[no-any-return]
    for index, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = x.dim() - 1 - index
        parts = [x.narrow(axis, x.shape[axis] - before, before), x, x.narrow(axis, 0, after)]
        x = torch.cat([part for part in parts if part.shape[axis] != 0], axis)
    return x


def _fmod(x: Tensor, other: Any) -> Tensor:
    return torch.sign(x) * torch.remainder(x.abs(), abs(other))


def _for_unsupported(exported: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """torch's own decompositions of those ops that the converter does not know, or fails on."""
    table = torch.export.default_decompositions()
    names = {
        node.target
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and (not is_supported(node) or node.target in _FAIL)
    }
    return {op: table[op] for op in names if op in table}


# The converter's registry has them; its functions fail on exported graphs.
_FAIL = frozenset({aten.lstm.input, aten.gru.input, aten.upsample_bicubic2d.vec})


def _user_inputs(exported: ExportedProgram) -> list[torch.fx.Node]:
    nodes = {node.name: node for node in exported.graph.nodes}
    return [
        nodes[spec.arg.name]
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and spec.arg.name in nodes
    ]


def used_inputs(exported: ExportedProgram, inputs: Sequence[TensorSpec]) -> list[str]:
    """The inputs whose values, and not only their sizes, an output depends on."""
    waiting = [node for node in exported.graph.nodes if node.op == "output"]
    reached: set[torch.fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [] if node.target in _SIZES else node.all_input_nodes
    nodes = _user_inputs(exported)
    return [spec.name for spec, node in zip(inputs, nodes, strict=True) if node in reached]


_SIZES = frozenset(
    {
        *(aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default),
        *(aten.full_like.default, aten.empty_like.default, aten.new_zeros.default),
        *(aten.new_ones.default, aten.new_full.default),
    }
)


def _after(node: torch.fx.Node, name: str, target: Any, *arguments: Any) -> torch.fx.Node:
    """A new node behind ``node``, with the value that shape inference expects."""
    graph = node.graph
    with graph.inserting_after(node):
        made = graph.create_node("call_function", target, arguments, name=name)
    values = torch.utils._pytree.tree_map(
        lambda item: item.meta["val"] if isinstance(item, torch.fx.Node) else item, arguments
    )
    made.meta["val"] = target(*values)
    return made


def _replace_uses(old: torch.fx.Node, new: torch.fx.Node, keep: Iterable[torch.fx.Node]) -> None:
    kept = set(keep)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)


def _accept_small_inputs(exported: ExportedProgram) -> None:
    """Core ML has no boolean and no byte: it takes int32, and the graph asks whether it is 0."""
    for node in _user_inputs(exported):
        value = node.meta["val"]
        if value.dtype in _FEW_BITS:
            node.meta["val"] = value.to(torch.int32)
        if value.dtype == torch.bool:
            asked = _after(node, f"{node.name}_is_set", aten.ne.Scalar, node, 0)
            _replace_uses(node, asked, [asked])


def _return_each_once(exported: ExportedProgram) -> None:
    """A package's outputs are variables of its own: not an input's, and none stands for two."""
    output = next(node for node in exported.graph.nodes if node.op == "output")
    taken = set(_user_inputs(exported))
    results = list(output.args[0])
    for index, node in enumerate(results):
        if _variable(node) in taken:
            if node.meta["val"].dtype == torch.bool:
                own = _after(node, f"{node.name}_returned_{index}", aten.logical_and, node, node)
            else:
                own = _after(node, f"{node.name}_returned_{index}", aten.mul.Tensor, node, 1)
            results[index] = own
        taken.add(_variable(results[index]))
    output.args = (tuple(results),)
    for spec, node in zip(exported.graph_signature.output_specs, results, strict=True):
        spec.arg = TensorArgument(name=node.name)


def _variable(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose variable the converter uses for this one, since it changes nothing."""
    while node.target in _NO_CHANGE and isinstance(node.args[0], torch.fx.Node):
        before, after = node.args[0].meta["val"], node.meta["val"]
        if before.shape != after.shape or before.dtype != after.dtype:
            break
        node = node.args[0]
    return node


# ... where shape and dtype stay the same.
_NO_CHANGE = frozenset(
    {
        *(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default),
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
        *(aten._to_copy.default, aten.to.dtype, aten.slice.Tensor, aten.dropout.default),
        *(aten.flatten.using_ints, aten.squeeze.dims, aten.squeeze.default, aten.squeeze.dim),
    }
)


def _normalise_inside(exported: ExportedProgram, image: ImageInput, names: list[str]) -> None:
    """Pixels 0..255 become what the model takes, (pixel / 255 - mean) / std, inside the model.

    By channel, with plain numbers: the graph's signature has no place for new constants.
    """
    node = _user_inputs(exported)[names.index(image.name)]
    parts, last = [], node
    for channel, (mean, std) in enumerate(zip(image.mean, image.std, strict=True)):
        name = f"{node.name}_channel_{channel}"
        if image.channels > 1:
            last = _after(last, name, aten.slice.Tensor, node, 1, channel, channel + 1)
        taken = last if image.channels > 1 else node
        last = _after(last, f"{name}_scaled", aten.mul.Tensor, taken, 1 / (255 * std))
        last = _after(last, f"{name}_shifted", aten.sub.Tensor, last, mean / std)
        parts.append(last)
    if image.channels > 1:
        last = _after(last, f"{node.name}_normalised", aten.cat.default, parts, 1)
    own = {made for made in node.users if made.name.startswith(f"{node.name}_channel_")}
    _replace_uses(node, last, own)


def _add_probabilities(exported: ExportedProgram, program: Program) -> None:
    """One more output: a probability for each label, which Xcode and Vision show as confidence."""
    index = classes(program)
    assert index is not None
    output = next(node for node in exported.graph.nodes if node.op == "output")
    results = list(output.args[0])
    scores = results[index]
    if _are_probabilities([sample[program.outputs[index].name] for sample in _expected(program)]):
        # Divided by their sum, which is 1: an output may not be there twice.
        total = _after(scores, f"{PROBABILITIES}_sum", aten.sum.dim_IntList, scores, [1], True)
        made = _after(total, PROBABILITIES, aten.div.Tensor, scores, total)
    else:
        made = _after(scores, PROBABILITIES, aten.softmax.int, scores, 1)
    output.args = ((*results, made),)
    exported.graph_signature.output_specs.append(
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=made.name), target=None)
    )


def _expected(program: Program) -> tuple[dict[str, np.ndarray], ...]:
    return program.reference.expected


def _are_probabilities(scores: list[np.ndarray]) -> bool:
    return all((rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-3) for rows in scores)
