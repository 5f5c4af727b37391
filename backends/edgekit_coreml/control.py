"""Lays a function out for running, and runs what is not plain math on tensors.

``planned`` resolves every name once: to a slot that some step fills, to a constant, to a
compressed weight or to a state; blocks nested in a ``cond`` or a ``while_loop`` become plans of
their own, over the same slots. Each step also knows which values nobody needs after it.
``CONTROL`` has the operations that run blocks, hold lists or end a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgekit_coreml.package import Block, Constant, Function, Operation, Variable
from edgekit_coreml.weights import damaged, shown

# Inputs that are a tuple even where the program binds one value to them.
VARIADIC = frozenset(
    {"values", "loop_vars", "elem_shape", "ref_tensors", "begins", "ends", "end_masks"}
)
# A loop that a damaged constant made endless has to stop; no model comes near this.
MAX_ITERATIONS = 1_000_000
MAX_LIST = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A value that a step, or the caller, puts there while the program runs."""

    variable: Variable


@dataclass(frozen=True, slots=True)
class State:
    """A state by its name."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One output of a ``constexpr_*`` operation, decoded when first used."""

    operation: Operation
    index: int
    parameters: Mapping[str, Constant | Weight]


Source = Slot | State | Weight | Constant


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation with its inputs resolved; ``releases`` are not needed after it."""

    operation: Operation
    sources: Mapping[str, tuple[Source, ...]]
    slots: tuple[Slot, ...]
    plans: tuple[Plan, ...]
    releases: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A block, ready to run; ``releases`` are outputs that are its own slots."""

    inputs: tuple[Slot, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Source, ...]
    releases: tuple[Slot, ...]


def planned(function: Function) -> Plan:
    """The function's body. Raises ``RuntimeFailed`` where it makes no sense."""
    scope: dict[str, Source] = {one.name: State(one.name) for one in function.states}
    return _plan(function.block, function.inputs, scope)


def operation_types(block: Block) -> Iterator[str]:
    """The type of every operation, those in nested blocks too."""
    for operation in block.operations:
        yield operation.type
        for nested in operation.blocks:
            yield from operation_types(nested)


def _plan(block: Block, inputs: Sequence[Variable], around: Mapping[str, Source]) -> Plan:
    scope = dict(around)
    filled = [Slot(one) for one in inputs]
    scope.update((slot.variable.name, slot) for slot in filled)
    unreleased: list[Step] = []
    for operation in block.operations:
        if operation.type == "const":
            scope[operation.outputs[0].name] = operation.attributes["val"]
        elif operation.type.startswith("constexpr_"):
            parameters = _weight_parameters(operation, scope)
            for index, output in enumerate(operation.outputs):
                scope[output.name] = Weight(operation, index, parameters)
        else:
            step = _step(operation, scope)
            scope.update((slot.variable.name, slot) for slot in step.slots)
            unreleased.append(step)
    outputs = tuple(scope[name] for name in block.outputs)
    steps = tuple(_with_releases(unreleased, set(outputs)))
    own = {*filled, *(slot for step in steps for slot in step.slots)}
    returned = tuple(one for one in outputs if isinstance(one, Slot) and one in own)
    return Plan(tuple(filled), steps, outputs, returned)


def _weight_parameters(
    operation: Operation, scope: Mapping[str, Source]
) -> dict[str, Constant | Weight]:
    # iOS 16 wrote these as attributes, iOS 18 as inputs.
    parameters: dict[str, Constant | Weight] = {
        name: value for name, value in operation.attributes.items() if name != "name"
    }
    for name, bindings in operation.inputs.items():
        sources = [scope[one] if isinstance(one, str) else one for one in bindings]
        if len(sources) != 1 or not isinstance(sources[0], Constant | Weight):
            raise damaged(f"the weight {shown(operation.name)} is not constant in {shown(name)}")
        parameters[name] = sources[0]
    return parameters


def _step(operation: Operation, scope: Mapping[str, Source]) -> Step:
    sources = {
        name: tuple(scope[one] if isinstance(one, str) else one for one in bindings)
        for name, bindings in operation.inputs.items()
    }
    plans = tuple(_plan(nested, nested.inputs, scope) for nested in operation.blocks)
    return Step(operation, sources, tuple(Slot(one) for one in operation.outputs), plans, ())


def _with_releases(steps: Sequence[Step], kept: set[Source]) -> list[Step]:
    """Walks backwards: the first use met of a slot is its last, and nothing follows it."""
    own = {slot for step in steps for slot in step.slots}
    needed = set(kept)
    found = []
    for step in reversed(steps):
        ending = ({*step.slots} | (own & {*_sources(step)})) - needed
        needed |= ending
        found.append(Step(step.operation, step.sources, step.slots, step.plans, tuple(ending)))
    return found[::-1]


def _sources(step: Step) -> Iterator[Source]:
    for sources in step.sources.values():
        yield from sources
    for plan in step.plans:
        yield from plan.outputs
        for nested in plan.steps:
            yield from _sources(nested)


Values = tuple[Any, ...]
Run = Callable[[Plan, Values], Values]


def _cond(step: Step, run: Run, *, pred: Tensor) -> Values:
    return run(step.plans[0 if bool(pred) else 1], ())


def _while_loop(step: Step, run: Run, *, loop_vars: Values) -> Values:
    condition, body = step.plans
    for _ in range(MAX_ITERATIONS):
        if not bool(run(condition, loop_vars)[0]):
            return loop_vars
        loop_vars = run(body, loop_vars)
    raise RuntimeError(f"it did not end within {MAX_ITERATIONS} iterations")


# A list is a Python list of tensors, None where nothing was written yet. Lists are values: what
# writes to one gives a new one.


def _make_list(step: Step, run: Run, *, init_length: Any = 1, **given: Any) -> list[Tensor | None]:
    length = int(init_length)
    if not 0 <= length <= MAX_LIST:
        raise ValueError(f"a list of {length} elements is not possible")
    return [None] * length


def _list_length(step: Step, run: Run, *, ls: list[Tensor | None]) -> Tensor:
    return torch.tensor(len(ls), dtype=torch.int32)


def _list_read(step: Step, run: Run, *, ls: list[Tensor | None], index: Tensor) -> Tensor:
    return _element(ls, int(index))


def _list_gather(step: Step, run: Run, *, ls: list[Tensor | None], indices: Tensor) -> Tensor:
    return torch.stack([_element(ls, index) for index in indices.tolist()])


def _list_write(
    step: Step, run: Run, *, ls: list[Tensor | None], index: Tensor, value: Tensor
) -> list[Tensor | None]:
    return _written(ls, [int(index)], [value])


def _list_scatter(
    step: Step, run: Run, *, ls: list[Tensor | None], indices: Tensor, value: Tensor
) -> list[Tensor | None]:
    return _written(ls, indices.tolist(), list(value))


def _element(ls: Sequence[Tensor | None], index: int) -> Tensor:
    if not 0 <= index < len(ls):
        raise IndexError(f"a list of {len(ls)} elements has none at {index}")
    element = ls[index]
    if element is None:
        raise IndexError(f"the element at {index} is read before it is written")
    return element


def _written(
    ls: Sequence[Tensor | None], indices: Sequence[int], values: Sequence[Tensor]
) -> list[Tensor | None]:
    """A copy with the values in place; it grows, as the format's lists do."""
    longest = max(indices, default=-1) + 1
    if min(indices, default=0) < 0 or longest > MAX_LIST:
        raise IndexError(f"a list cannot be written at {list(indices)}")
    written = [*ls, *([None] * (longest - len(ls)))]
    for index, value in zip(indices, values, strict=True):
        written[index] = value
    return written


def _classify(
    step: Step, run: Run, *, probabilities: Tensor, classes: tuple[Any, ...]
) -> tuple[Any, dict[Any, float]]:
    """The likeliest label, the first of equals, and every label's probability."""
    values = probabilities.reshape(-1).tolist()
    table = dict(zip(classes, values, strict=True))
    return classes[values.index(max(values))], table


CONTROL: Mapping[str, Callable[..., Any]] = {
    "classify": _classify,
    "cond": _cond,
    "list_gather": _list_gather,
    "list_length": _list_length,
    "list_read": _list_read,
    "list_scatter": _list_scatter,
    "list_write": _list_write,
    "make_list": _make_list,
    "while_loop": _while_loop,
}
