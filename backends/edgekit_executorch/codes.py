"""Where the 8-bit codes of the weights lie in a ``.pte``.

XNNPACK's part of a program keeps each constant as a segment of its own, named by the SHA-256 of
its bytes. The codes come from the quantized graph, are put into the orders of axes that the
delegate writes, and looked up by that name: nothing is searched for, so nothing can be mistaken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from edgekit.errors import LoweringFailed
from edgekit.graph import node_source, quiet
from edgekit.program import Program

with quiet():
    from executorch.exir._serialize import _program as pte

_DEQUANTIZE = "dequantize_per_channel"


def places_of_codes(
    content: bytes, quantized: ExportedProgram, program: Program, file: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The place of each weight's codes in ``file``, and layers that share those of another.

    Two weights with the same codes are one segment; it goes by the first layer's name. Raises
    ``LoweringFailed`` for a weight whose codes the file does not hold.
    """
    segments = _segments(content)
    names = _layer_names(quantized, program)
    places: dict[str, dict[str, Any]] = {}
    shared: dict[str, str] = {}
    for layer, codes in _codes(quantized, names):
        key = next((name for name in _names(codes) if name in segments), None)
        if key is None:
            raise LoweringFailed(
                f"the codes of {layer} were not found in the program that ExecuTorch wrote, so "
                "its width could not be switched; use --precision int8."
            )
        if key in places:
            shared[layer] = str(places[key]["layer"])
            continue
        offset, count = segments[key]
        places[key] = {"layer": layer, "file": file, "offset": offset, "count": count}
    return list(places.values()), shared


def _segments(content: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of every named constant of a ``.pte``."""
    header = pte._get_extended_header(content)
    if header is None:
        return {}
    described = pte._flatbuffer_to_program(content[: header.program_size])
    found = {}
    for entry in described.named_data or []:
        segment = described.segments[entry.segment_index]
        found[entry.key] = (header.segment_base_offset + segment.offset, segment.size)
    return found


def _codes(quantized: ExportedProgram, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Every quantized weight's layer and codes, int8 in the order of PyTorch, in graph order."""
    signature = quantized.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    held.update(signature.inputs_to_lifted_tensor_constants)
    for node in quantized.graph.nodes:
        if _DEQUANTIZE not in str(node.target):
            continue
        name = held[node.args[0].name]
        value = quantized.state_dict.get(name, quantized.constants.get(name))
        for user in node.users:
            yield names[user.name], value


def _layer_names(quantized: ExportedProgram, program: Program) -> dict[str, str]:
    """What the layer of each node with codes is called: its module's path where that is enough."""
    users = [
        user
        for node in quantized.graph.nodes
        if _DEQUANTIZE in str(node.target)
        for user in node.users
    ]
    captured = {node.name: node for node in program.exported.graph.nodes}
    paths = {user.name: node_source(captured.get(user.name, user))[1] for user in users}
    often = [path for path in paths.values() if list(paths.values()).count(path) > 1]
    return {name: name if not path or path in often else path for name, path in paths.items()}


def _names(codes: Tensor) -> Iterator[str]:
    """The names that a constant with these codes may have, by the order of its axes."""
    for ordered in _orders(codes):
        yield hashlib.sha256(ordered.numpy().tobytes()).hexdigest()


def _orders(codes: Tensor) -> Iterator[Tensor]:
    """As it is (linear); channels last; and with the first axes swapped (depthwise)."""
    yield codes.contiguous()
    image = codes if codes.dim() != 3 else codes.unsqueeze(2)  # 1-D convolutions become 2-D
    if image.dim() == 4:
        yield image.permute(0, 2, 3, 1).contiguous()
        yield image.permute(1, 2, 3, 0).contiguous()
