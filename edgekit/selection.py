"""Which graph nodes the names in a recipe's ``keep_float`` mean (needs torch)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from edgekit.errors import UnknownName
from edgekit.graph import node_source, op_name
from edgekit.program import Program
from edgekit.recipe import Recipe


def kept_nodes(program: Program, recipe: Recipe) -> frozenset[str]:
    """Names of the nodes of ``program`` that stay float.

    Each entry of ``keep_float`` is the name of a node, the path of a module (every node in it), or
    the name of an op (every call of it). The first call of an op has the op's name too: ``%conv2d``
    is that node alone. Raises ``UnknownName`` for one that matches nothing.
    """
    nodes = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    kept: set[str] = set()
    for entry in recipe.keep_float:
        found = {node.name for node in nodes if _means(entry, node)}
        if not found:
            raise UnknownName("layer to keep in float", entry, _known(nodes), hint=_HINT)
        kept |= found
    return frozenset(kept)


def node_entries(program: Program, nodes: Iterable[str]) -> list[str]:
    """What ``keep_float`` calls the nodes of these names and nothing else."""
    calls = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    taken = {short_op(node) for node in calls}
    for node in calls:
        parts = node_source(node)[1].split(".")
        taken |= {".".join(parts[: count + 1]) for count in range(len(parts))}
    return [f"%{name}" if name in taken else name for name in nodes]


_HINT = "Nodes of the graph, modules by path and ops such as softmax can be named."
_SHOWN = 40


def _means(entry: str, node: torch.fx.Node) -> bool:
    _, module = node_source(node)
    inside = bool(entry) and f"{module}.".startswith(f"{entry}.")
    return entry in (node.name, f"%{node.name}", short_op(node)) or inside


def short_op(node: torch.fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``; in-place forms go by the plain name."""
    parts = op_name(node).split(".")
    return (parts[1] if len(parts) > 1 else parts[0]).rstrip("_")


def _known(nodes: Iterable[torch.fx.Node]) -> list[str]:
    modules = dict.fromkeys(module for node in nodes if (module := node_source(node)[1]))
    ops = dict.fromkeys(short_op(node) for node in nodes)
    listed = [*modules, *ops]
    return listed[:_SHOWN] + (["…"] if len(listed) > _SHOWN else [])
