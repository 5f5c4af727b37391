"""The captured graph as the converter must see it: what Core ML users expect is added here.

Node names stay as they are, since they name the layers of the finished package. The graph is
edited, not wrapped and captured again, for the same reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument

from edgekit.graph import quiet, with_pool_strides
from edgekit.image import ImageInput
from edgekit.program import Program

with quiet():
    from coremltools.converters.mil.frontend.torch import is_torch_fx_node_supported

__all__ = [
    "PROBABILITIES",
    "classes",
    "converter_program",
    "image_of",
    "is_torch_fx_node_supported",
]

aten = torch.ops.aten
PROBABILITIES = "edgekit_probabilities"


def converter_program(program: Program) -> ExportedProgram:
    """A copy of the program's graph, repaired and extended for the converter."""
    with quiet():
        exported: ExportedProgram = with_pool_strides(copy.deepcopy(program.exported))
        exported = exported.run_decompositions(_repairs())
        exported = exported.run_decompositions(_for_unsupported(exported))
    _accept_bool_inputs(exported)
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
    return found[0] if count > 1 and len(found) == 1 else None


def _repairs() -> dict[Any, Callable[..., Any]]:
    """Ops that the converter accepts and gets wrong (measured; see README.md here)."""
    repairs: dict[Any, Callable[..., Any]] = {aten.gelu.default: _gelu}
    for op in (aten.rms_norm.default, aten._fused_rms_norm.default):
        repairs[op] = _rms_norm if op is aten.rms_norm.default else _fused_rms_norm
    return repairs


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


def _for_unsupported(exported: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """torch's own decompositions of those ops that the converter does not know, or fails on."""
    table = torch.export.default_decompositions()
    names = {
        node.target
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and (not is_torch_fx_node_supported(node) or node.target in _FAIL)
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


def _accept_bool_inputs(exported: ExportedProgram) -> None:
    """Core ML has no boolean feature: it takes int32, and the graph asks whether it is 0."""
    for node in _user_inputs(exported):
        value = node.meta["val"]
        if value.dtype == torch.bool:
            node.meta["val"] = value.to(torch.int32)
            asked = _after(node, f"{node.name}_is_set", aten.ne.Scalar, node, 0)
            _replace_uses(node, asked, [asked])


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
