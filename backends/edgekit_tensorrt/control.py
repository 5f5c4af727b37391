"""Which layers belong to which loop or branch; TensorRT marks only their borders.

A loop is a number that its border layers share: TRIP_LIMIT says when it ends, RECURRENCE carries a
value from one round to the next, ITERATOR hands out slices, LOOP_OUTPUT collects. All other layers
of the body are found by what they depend on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from edgekit_tensorrt.network import Layer, Network

BORDERS = ("TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT")
BRANCHES = ("CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT")


@dataclass
class Loop:
    """The borders of one loop."""

    limits: list[Layer] = field(default_factory=list)
    recurrences: list[Layer] = field(default_factory=list)
    iterators: list[Layer] = field(default_factory=list)
    outputs: list[Layer] = field(default_factory=list)

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """What must be known before the first round."""
        names = [layer.inputs[0] for layer in self.recurrences + self.iterators]
        names += [layer.inputs[0] for layer in self.limits if layer.attributes["kind"] == "COUNT"]
        names += [layer.inputs[1] for layer in self.outputs if len(layer.inputs) > 1]
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True)
class Control:
    """Loops by number, conditions by number, and for each tensor the loops it varies in."""

    loops: dict[int, Loop]
    conditions: dict[int, str]
    varies: dict[str, frozenset[int]]


def control_of(network: Network) -> Control:
    """Find the loops and branches of a network."""
    loops: dict[int, Loop] = {}
    conditions = {}
    for layer in network.layers:
        if layer.kind in BORDERS:
            loop = loops.setdefault(layer.attributes["loop"], Loop())
            {
                "TRIP_LIMIT": loop.limits,
                "RECURRENCE": loop.recurrences,
                "ITERATOR": loop.iterators,
                "LOOP_OUTPUT": loop.outputs,
            }[layer.kind].append(layer)
        elif layer.kind == "CONDITION" and layer.inputs[0] is not None:
            conditions[layer.attributes["conditional"]] = layer.inputs[0]
    return Control(loops, conditions, _variation(network, loops, conditions) if loops else {})


def _variation(
    network: Network, loops: dict[int, Loop], conditions: dict[int, str]
) -> dict[str, frozenset[int]]:
    """Go over all layers until nothing new depends on a loop."""
    varies: dict[str, frozenset[int]] = {}
    changed = True
    while changed:
        changed = False
        for layer in network.layers:
            found = _dependencies(layer, varies, loops, conditions)
            for name in layer.outputs:
                if found != varies.get(name, frozenset()):
                    varies[name] = found
                    changed = True
    return varies


def _dependencies(
    layer: Layer,
    varies: dict[str, frozenset[int]],
    loops: dict[int, Loop],
    conditions: dict[int, str],
) -> frozenset[int]:
    names = [name for name in layer.inputs if name is not None]
    if layer.kind in ("CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT"):
        names.append(conditions[layer.attributes["conditional"]])
    if layer.kind not in BORDERS:
        return frozenset().union(*(varies.get(name, frozenset()) for name in names))
    number = layer.attributes["loop"]
    if layer.kind == "LOOP_OUTPUT":
        names += loops[number].entries
    found = frozenset().union(*(varies.get(name, frozenset()) for name in names))
    if layer.kind == "LOOP_OUTPUT":
        return found - {number}
    return found | {number}
