"""What a package calls things: its features, and the graph nodes behind its variables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
