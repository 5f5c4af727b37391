"""Runs one function of a ``Package`` with torch: ``Interpreter(package).run(feeds)``.

It does what the program says, one operation at a time, and after each one holds the result to the
type that the operation declares. A float16 value is held in float32 after it was rounded to
float16, so that arithmetic is that of float32 and every result has the precision, and the range,
that it has on a device. How a device accumulates inside an operation is not known; this is a model
of it and no bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgekit.errors import RuntimeFailed
from edgekit.graph import first_line
from edgekit.spec import Array
from edgekit_coreml import constexpr
from edgekit_coreml.control import (
    CONTROL,
    VARIADIC,
    Plan,
    Slot,
    Source,
    State,
    Step,
    Values,
    Weight,
    operation_types,
    planned,
)
from edgekit_coreml.package import (
    Constant,
    Function,
    Operation,
    Package,
    Variable,
)
from edgekit_coreml.values import (
    HELD,
    STORED,
    checked_state,
    exported,
    fed,
    fixed_shape,
    held,
    held_constant,
    upheld,
)
from edgekit_coreml.weights import damaged, shown

Trace = Callable[[Operation, str, Tensor], None]
_STATEFUL = frozenset({"read_state", "write_state", "coreml_update_state"})


@dataclass(frozen=True)
class Overflow:
    """The first float16 result that is not finite although all that went in was."""

    op: str
    output: str
    largest: float  # the largest finite magnitude before it was rounded


class Interpreter:
    """One function, ready to run; decoded weights are kept from run to run.

    Functions of one package that are given the same ``decoded`` keep them together.
    """

    def __init__(
        self,
        package: Package,
        function: str | None = None,
        *,
        ops: Mapping[str, Callable[..., Any]] | None = None,
        decoded: dict[Hashable, Any] | None = None,
    ) -> None:
        if ops is None:
            from edgekit_coreml.ops import OPS

            ops = OPS
        self._function = _chosen(package, function)
        self._package = package  # its arrays are views of files that it keeps open
        self._ops = ops
        self._plan = planned(self._function)
        self._constants: dict[Constant | Weight, Any] = {}
        self._decoded: dict[Hashable, Any] = {} if decoded is None else decoded
        known = ops.keys() | CONTROL.keys() | constexpr.FORMS.keys() | _STATEFUL | {"const"}
        self.unknown_ops: tuple[str, ...] = tuple(
            sorted(set(operation_types(self._function.block)) - known)
        )
        self.overflow: Overflow | None = None

    def new_state(self) -> dict[str, Tensor]:
        """Zeros of each state, by name; functions of one package may share them."""
        return {
            one.name: torch.zeros(fixed_shape(one), dtype=STORED.get(one.dtype, HELD[one.dtype]))
            for one in self._function.states
        }

    def run(
        self,
        feeds: Mapping[str, Array],
        state: dict[str, Tensor] | None = None,
        *,
        trace: Trace | None = None,
    ) -> dict[str, object]:
        """Outputs by feature name; ``state`` is changed. Raises ``BadInput``, ``RuntimeFailed``."""
        if self.unknown_ops:
            unknown = ", ".join(map(shown, self.unknown_ops))
            raise _failed(f"the operations {unknown} are not known here")
        self.overflow = None
        inputs = fed(self._function, feeds)
        kept = self.new_state() if state is None else checked_state(self._function, state)
        run = _Run(self, kept, trace)
        with torch.no_grad():
            values = run.block(self._plan, inputs)
        names = self._function.block.outputs
        found = dict(zip(names, values, strict=True))
        return {one.name: exported(one, found[one.name]) for one in self._function.output_features}

    def _constant(self, source: Constant | Weight) -> Any:
        if source not in self._constants:
            place = _place(source)
            if place not in self._decoded:
                self._decoded[place] = held_constant(
                    source.value if isinstance(source, Constant) else _decoded(source)
                )
            self._constants[source] = self._decoded[place]
        return self._constants[source]


class _Run:
    """One run: the slots as they fill and empty again."""

    def __init__(
        self, interpreter: Interpreter, state: dict[str, Tensor], trace: Trace | None
    ) -> None:
        self._interpreter, self._state, self._trace = interpreter, state, trace
        self._slots: dict[Slot, Any] = {}

    def block(self, plan: Plan, inputs: Values) -> Values:
        self._slots.update(zip(plan.inputs, inputs, strict=True))
        for step in plan.steps:
            self._step(step)
            for slot in step.releases:
                del self._slots[slot]
        outputs = tuple(self._value(one) for one in plan.outputs)
        for slot in {*plan.inputs, *plan.releases}:
            self._slots.pop(slot, None)
        return outputs

    def _value(self, source: Source) -> Any:
        match source:
            case Slot():
                return self._slots[source]
            case State():
                return source
            case _:
                return self._interpreter._constant(source)

    def _step(self, step: Step) -> None:
        given: dict[str, Any] = {}
        for name, sources in step.sources.items():
            values = tuple(self._value(one) for one in sources)
            given[name] = values if name in VARIADIC or len(values) != 1 else values[0]
        with _naming(step.operation):
            results = self._results(step, given)
        for slot, (result, precise) in zip(step.slots, results, strict=True):
            self._slots[slot] = result
            if isinstance(result, Tensor):
                self._watch(step.operation, given, slot.variable, result, precise)
                if self._trace is not None:
                    self._trace(step.operation, slot.variable.name, result)

    def _results(self, step: Step, given: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """Each result as it is held, and before it was rounded."""
        kind = step.operation.type
        if kind in _STATEFUL:
            found = self._stateful(kind, given)
        elif kind in CONTROL:
            found = CONTROL[kind](step, self.block, **given)
        else:
            found = self._interpreter._ops[kind](**given)
        results = found if isinstance(found, tuple) else (found,)
        if len(results) != len(step.slots):
            raise ValueError(f"it gave {len(results)} results, and declares {len(step.slots)}")
        return [
            (held(result, slot.variable), result)
            for result, slot in zip(results, step.slots, strict=True)
        ]

    def _stateful(self, kind: str, given: Mapping[str, Any]) -> Any:
        state = given["state" if kind == "coreml_update_state" else "input"]
        if not isinstance(state, State):
            raise TypeError("its input is not a state")
        if kind == "read_state":
            return upheld(self._state[state.name])
        value = given["value" if kind == "coreml_update_state" else "data"]
        before = self._state[state.name]
        if value.shape != before.shape:
            raise ValueError(f"{tuple(value.shape)} does not fit the state {shown(state.name)}")
        # A new tensor: what was read before keeps its values.
        self._state[state.name] = value.to(before.dtype, copy=True)
        return upheld(self._state[state.name]) if kind == "coreml_update_state" else ()

    def _watch(
        self,
        operation: Operation,
        given: Mapping[str, Any],
        variable: Variable,
        result: Tensor,
        precise: Tensor,
    ) -> None:
        own = operation.type in CONTROL or operation.type in _STATEFUL
        if self._interpreter.overflow is not None or variable.dtype != "fp16" or own:
            return
        if _finite(result) or not all(map(_finite, given.values())):
            return
        magnitudes = precise.abs()
        finite = magnitudes[magnitudes.isfinite()]
        largest = float(finite.max()) if finite.numel() else 0.0
        self._interpreter.overflow = Overflow(operation.type, variable.name, largest)


def _failed(why: str) -> RuntimeFailed:
    return RuntimeFailed(f"coreml could not run the model: {why}")


@contextmanager
def _naming(operation: Operation) -> Iterator[None]:
    """Whatever a function raises when its inputs do not fit, with the operation's name."""
    try:
        yield
    except RuntimeFailed:
        raise
    # A damaged program can give a function anything, and functions answer as Python does.
    except Exception as why:
        raise _failed(f"{operation.type} {shown(operation.name)}: {first_line(why)}") from why


def _chosen(package: Package, name: str | None) -> Function:
    function = package.functions.get(package.default_function if name is None else name)
    if function is None:
        known = ", ".join(sorted(package.functions))
        raise _failed(f"it has no function {shown(name or '')}; there is: {known}")
    return function


def _finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_finite, value))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    # One sum instead of a mask: no number of float16 values adds up to infinity in float32.
    return math.isfinite(value.sum()) or bool(value.isfinite().all())


def _place(source: Constant | Weight) -> Hashable:
    """Where a value lies: functions that share a record of a file have one of their own each."""
    if isinstance(source, Weight):
        parameters = ((name, _place(one)) for name, one in sorted(source.parameters.items()))
        return source.operation.type, source.index, *parameters
    if source.packed is None:
        return id(source)
    return source.packed.ctypes.data, source.dtype, source.shape


def _decoded(weight: Weight) -> Array:
    """A compressed weight, with those that it is made of, which nobody else needs."""
    done: dict[Operation, tuple[Array, ...]] = {}

    def arrays(one: Weight) -> tuple[Array, ...]:
        if one.operation not in done:
            done[one.operation] = constexpr.decode(
                one.operation.type,
                {
                    name: source.value
                    if isinstance(source, Constant)
                    else arrays(source)[source.index]
                    for name, source in one.parameters.items()
                },
            )
        return done[one.operation]

    declared = weight.operation.outputs[weight.index]
    try:
        array = arrays(weight)[weight.index]
    except (ValueError, LookupError, TypeError, MemoryError) as cause:
        raise damaged(f"the weight {shown(declared.name)}: {first_line(cause)}") from cause
    if array.shape != declared.shape:
        raise damaged(f"the weight {shown(declared.name)} has not the shape that it declares")
    return array
