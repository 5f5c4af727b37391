"""Where the codes of a W8A8 package's weights lie: for one file at many bit-widths."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import torch

from edgekit.errors import LoweringFailed
from edgekit.graph import node_source
from edgekit.spec import Array

_DATA = {
    "constexpr_affine_dequantize": "quantized_data",
    "constexpr_blockwise_shift_scale": "data",
}
_RECORD = 64  # bytes before a record's data; package.py checks it


def places(
    spec: Any, exported: Any, main: tuple[str, bytes], weights: tuple[str, bytes]
) -> list[dict[str, Any]]:
    """For every quantized weight: ``layer``, ``file``, ``offset`` and ``count``.

    ``spec`` is the protobuf that ``main`` holds, ``exported`` the graph it was converted from;
    ``main`` and ``weights`` are names and contents of the two files. Each place is compared with
    the codes of the graph. Raises ``LoweringFailed`` where one is not found.
    """
    wanted = _wanted(exported)
    layers = _layers(wanted)
    found: dict[str, tuple[str, int]] = {}
    for operation in _operations(spec):
        node = _node_of(operation, wanted)
        if node is not None:
            value = _value(operation, _DATA[operation.type])
            found[node] = _place(value, spec, main, weights)
    for node, (codes, _) in wanted.items():
        same = (one for one in found if np.array_equal(wanted[one][0], codes))
        if node not in found and (twin := next(same, None)) is not None:
            found[node] = found[twin]  # the converter holds equal weights once
    contents = dict([main, weights])
    placed: dict[tuple[str, int], dict[str, Any]] = {}
    for node, (codes, _) in wanted.items():
        if node not in found or not _is_there(codes, found[node], contents):
            raise LoweringFailed(
                f"the codes of {layers[node]!r} were not found in the package, so it could not "
                "run at several bit-widths; keep that layer float with --keep-float, or choose "
                "--precision int8."
            )
        file, offset = found[node]
        # Where two layers have one place, they change their width together.
        placed.setdefault(
            (file, offset),
            {"layer": layers[node], "file": file, "offset": offset, "count": codes.size},
        )
    return list(placed.values())


def _wanted(exported: Any) -> dict[str, tuple[Array, torch.fx.Node]]:
    """By the node that dequantizes them: the codes of each weight, and the layer that reads it."""
    signature, found = exported.graph_signature, {}
    names = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    names |= signature.inputs_to_lifted_tensor_constants
    held = {**exported.state_dict, **exported.constants}
    for node in exported.graph.nodes:
        if node.target is torch.ops.quantized_decomposed.dequantize_per_channel.default:
            codes = held[names[node.args[0].name]].numpy()
            found[node.name] = (codes, next(iter(node.users)))
    return found


def _layers(wanted: dict[str, tuple[Array, torch.fx.Node]]) -> dict[str, str]:
    """What users call each layer: its module, or its node where that is not one layer's name."""
    modules = {node: node_source(user)[1] for node, (_, user) in wanted.items()}
    own = list(modules.values())
    return {
        node: module if module and own.count(module) == 1 else wanted[node][1].name
        for node, module in modules.items()
    }


def _operations(spec: Any) -> Iterator[Any]:
    for function in spec.mlProgram.functions.values():
        for operation in function.block_specializations[function.opset].operations:
            if operation.type in _DATA:
                yield operation


def _node_of(operation: Any, wanted: Any) -> str | None:
    """The graph node that an operation stands for; the converter may append how it was cast."""
    name = operation.outputs[0].name
    known = (name, name.removesuffix("_to_fp16"), name.removesuffix("_cast_fp16"))
    return next((one for one in known if one in wanted), None)


def _value(operation: Any, parameter: str) -> Any:
    if parameter in operation.attributes:  # as before iOS18
        return operation.attributes[parameter]
    (argument,) = operation.inputs[parameter].arguments
    return argument.value


def _place(
    value: Any, spec: Any, main: tuple[str, bytes], weights: tuple[str, bytes]
) -> tuple[str, int]:
    if value.WhichOneof("value") == "blobFileValue":
        return weights[0], value.blobFileValue.offset + _RECORD
    return main[0], _inline(value.immediateValue.tensor, spec, main[1])


def _inline(tensor: Any, spec: Any, content: bytes) -> int:
    """Where a small constant lies in the protobuf: the bytes that change when its codes do."""
    codes = tensor.bytes.values
    tensor.bytes.values = bytes(255 - code for code in codes)
    changed = spec.SerializeToString(deterministic=True)
    tensor.bytes.values = codes
    if len(changed) != len(content):
        return -1
    differ = np.flatnonzero(np.frombuffer(changed, np.uint8) != np.frombuffer(content, np.uint8))
    whole = differ.size == len(codes) > 0 and differ[-1] - differ[0] + 1 == len(codes)
    return int(differ[0]) if whole else -1


def _is_there(codes: Array, place: tuple[str, int], contents: dict[str, bytes]) -> bool:
    file, offset = place
    count = prod(codes.shape)
    if offset < 0 or offset + count > len(contents[file]):
        return False
    lying = np.frombuffer(contents[file], np.int8, count, offset)
    # In any order of axes: widths are derived code by code.
    return np.array_equal(np.sort(lying), np.sort(codes, axis=None))
