"""What a package calls things: its features, and the graph nodes behind its variables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.errors import LoweringFailed
from edgekit.program import Program

LABEL = "classLabel"
PROBABILITIES = "edgekit_probabilities"


@dataclass(frozen=True)
class Names:
    """What the package calls the program's inputs and outputs, in their order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def names_of(program: Program, exported: Any) -> Names:
    """One space of identifiers, shared with the graph's nodes and what a classifier adds.

    An output may have the name of the node that makes it; any other name would be another value.
    """
    nodes = {node.name for node in exported.graph.nodes if node.op == "call_function"}
    taken = {LABEL, f"{LABEL}_probs", PROBABILITIES}
    inputs = tuple(_free(spec.name, "_input", nodes, taken) for spec in program.inputs)
    outputs = tuple(
        _free(spec.name, "_output", nodes - {node}, taken)
        for spec, node in zip(program.outputs, _results(exported), strict=False)
    )
    return Names(inputs, outputs)


def _results(exported: Any) -> list[str]:
    """The names of the nodes that the graph returns; a classifier returns one more."""
    (results,) = next(node for node in exported.graph.nodes if node.op == "output").args
    return [node.name for node in results]


def _free(name: str, suffix: str, refused: set[str], taken: set[str]) -> str:
    """An identifier like ``name`` that is neither refused nor taken; from now on it is taken."""
    free = re.sub(r"\W", "_", name, flags=re.ASCII)
    free = f"_{free}" if free[0].isdigit() else free
    while free in refused or free in taken:
        free += suffix
    taken.add(free)
    return free


def graph_name(variable: str) -> str:
    """The converter appends how it cast a value to the name of the node that made it."""
    return variable.removesuffix("_cast_fp16").removesuffix("_to_fp16")


def nodes_by_variable(spec: Any, exported: Any, outputs: Sequence[str]) -> dict[str, str]:
    """The graph node of each variable whose name does not say it: outputs, and repeated names."""
    nodes = {node.name for node in exported.graph.nodes if node.op == "call_function"}
    found = {
        output: node
        for output, node in zip(outputs, _results(exported), strict=False)
        if output != node
    }
    variables = [
        output.name
        for function in spec.mlProgram.functions.values()
        for operation in function.block_specializations[function.opset].operations
        for output in operation.outputs
    ]
    shown = {graph_name(variable) for variable in variables} | set(found.values())
    for variable in variables:
        name = graph_name(variable)
        node = name.removesuffix("_0")  # it makes a name its own where the plain one was taken
        if name not in nodes and node in nodes and node not in shown:
            found[variable] = node
    return found


def kept_operations(
    internal: Any, program: Program, kept: Collection[str], names: Names, exported: Any
) -> list[str]:
    """The operations that the graph nodes ``kept`` became in the converter's own program.

    A node without weights may have become none. Raises ``LoweringFailed`` where one with weights
    did, since it could not stay float.
    """
    returned = dict(zip(names.outputs, _results(exported), strict=False))
    by_node: dict[str, list[str]] = {}  # an output's node is the operation, and then a cast
    for function in internal.functions.values():
        for operation in function.operations:
            for output in operation.outputs:
                if operation.op_type != "const":
                    node = returned.get(output.name) or graph_name(output.name)
                    for name in {node, node.removesuffix("_0")}:  # made a name of its own
                        by_node.setdefault(name, []).append(operation.name)
    found: list[str] = []
    for node in program.exported.graph.nodes:
        if node.name in kept:
            known = next((one for one in _merged_into(program, node) if one in by_node), None)
            if known is None and _has_weights(program, node):
                raise LoweringFailed(
                    f"{node.name!r} was to stay float, and coremltools merged it into another "
                    "operation; keep its neighbours float too, or choose --precision fp16."
                )
            found += by_node[known] if known is not None else []
    return sorted(set(found))


def _merged_into(program: Program, node: Any) -> Iterator[str]:
    """The names that a layer may go by: what it is scaled, shifted or normed by goes into it."""
    yield node.name
    weighted = _has_weights(program, node)
    while weighted and len(node.users) == 1:
        (node,) = node.users
        if not str(node.target).startswith(_MERGED):
            return
        yield node.name


_MERGED = ("aten.batch_norm", "aten.mul", "aten.div", "aten.add", "aten.sub")


def _has_weights(program: Program, node: Any) -> bool:
    parameters = program.exported.graph_signature.inputs_to_parameters
    return any(one.name in parameters for one in node.all_input_nodes)
