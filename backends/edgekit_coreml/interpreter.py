"""Runs one function of a ``Package`` with torch: ``Interpreter(package).run(feeds)``.

It does what the program says, one operation at a time, and after each one holds the result to the
type that the operation declares. A float16 value is held in float32 after it was rounded to
float16, so that arithmetic is that of float32 and every result has the precision, and the range,
that it has on a device. How a device accumulates inside an operation is not known; this is a model
of it and no bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import BadInput, RuntimeFailed
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
    Feature,
    Function,
    Operation,
    Package,
    Variable,
)
from edgekit_coreml.weights import damaged, shown

Trace = Callable[[Operation, str, Tensor], None]
_STATEFUL = frozenset({"read_state", "write_state", "coreml_update_state"})

# MIL's types as they are held while a program runs. Of the unsigned types wider than a byte torch
# has hardly more than the name, and int64 is in no program but for labels.
HELD = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float32,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int32,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int32,
    "uint64": torch.int32,
}
_STORED = {"fp16": torch.float16}  # of a state, where not as held


@dataclass(frozen=True)
class Overflow:
    """The first float16 result that is not finite although all that went in was."""

    op: str
    output: str
    largest: float  # the largest finite magnitude before it was rounded


class Interpreter:
    """One function, ready to run; decoded weights are kept from run to run."""

    def __init__(
        self,
        package: Package,
        function: str | None = None,
        *,
        ops: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        if ops is None:
            from edgekit_coreml.ops import OPS

            ops = OPS
        self._function = _chosen(package, function)
        self._package = package  # its arrays are views of files that it keeps open
        self._ops = ops
        self._plan = planned(self._function)
        self._constants: dict[Constant | Weight, Any] = {}
        known = ops.keys() | CONTROL.keys() | constexpr.FORMS.keys() | _STATEFUL | {"const"}
        self.unknown_ops: tuple[str, ...] = tuple(
            sorted(set(operation_types(self._function.block)) - known)
        )
        self.overflow: Overflow | None = None

    def new_state(self) -> dict[str, Tensor]:
        """Zeros of each state, by name; functions of one package may share them."""
        return {
            one.name: torch.zeros(_fixed(one), dtype=_STORED.get(one.dtype, HELD[one.dtype]))
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
        fed = _fed(self._function, feeds)
        held = self.new_state() if state is None else _checked_state(self._function, state)
        run = _Run(self, held, trace)
        with torch.no_grad():
            values = run.block(self._plan, fed)
        names = self._function.block.outputs
        found = dict(zip(names, values, strict=True))
        return {one.name: _exported(one, found[one.name]) for one in self._function.output_features}

    def _constant(self, source: Constant | Weight) -> Any:
        if source not in self._constants:
            self._constants[source] = _held_constant(
                source.value if isinstance(source, Constant) else _decoded(source)
            )
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
            (_held(result, slot.variable), result)
            for result, slot in zip(results, step.slots, strict=True)
        ]

    def _stateful(self, kind: str, given: Mapping[str, Any]) -> Any:
        state = given["state" if kind == "coreml_update_state" else "input"]
        if not isinstance(state, State):
            raise TypeError("its input is not a state")
        if kind == "read_state":
            return _upheld(self._state[state.name])
        value = given["value" if kind == "coreml_update_state" else "data"]
        before = self._state[state.name]
        if value.shape != before.shape:
            raise ValueError(f"{tuple(value.shape)} does not fit the state {shown(state.name)}")
        # A new tensor: what was read before keeps its values.
        self._state[state.name] = value.to(before.dtype, copy=True)
        return _upheld(self._state[state.name]) if kind == "coreml_update_state" else ()

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


def _fixed(variable: Variable) -> tuple[int, ...]:
    return tuple(size or 0 for size in variable.shape)


def _finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_finite, value))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    # One sum instead of a mask: no number of float16 values adds up to infinity in float32.
    return math.isfinite(value.sum()) or bool(value.isfinite().all())


def _upheld(stored: Tensor) -> Tensor:
    return stored.float() if stored.dtype == torch.float16 else stored


def _held(value: Any, variable: Variable) -> Any:
    """A result in the type and shape that its operation declares."""
    if not isinstance(value, Tensor):
        return value  # a list, or what a classifier gives
    if not _has_shape(variable, value.shape):
        declared = "x".join("?" if size is None else str(size) for size in variable.shape)
        raise ValueError(f"it gave the shape {tuple(value.shape)}, and declares {declared}")
    return _rounded(value, variable.dtype)


def _has_shape(variable: Variable, shape: Sequence[int]) -> bool:
    return len(variable.shape) == len(shape) and all(
        size is None or size == found for size, found in zip(variable.shape, shape, strict=True)
    )


def _rounded(tensor: Tensor, dtype: str) -> Tensor:
    if dtype == "fp16":
        return tensor.to(torch.float16).to(torch.float32)
    held = HELD[dtype]
    if held.is_floating_point or tensor.dtype == held:
        return tensor.to(held)
    if held == torch.bool:
        return tensor != 0
    if tensor.is_floating_point():
        # As ARM converts: toward zero, to the nearest end of the range, NaN to 0.
        range_ = torch.iinfo(held)
        tensor = tensor.double().nan_to_num(0.0).clamp(range_.min, range_.max)
    return tensor.to(torch.int64).to(held)


def _held_constant(value: Any) -> Any:
    """A constant as operations take it."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype in (np.int64, np.uint32, np.uint64):
        # Of an array without axes clip makes a scalar.
        value = np.asarray(np.clip(value, *_int32_range(value))).astype(np.int32)
    elif value.dtype == np.uint16:
        value = value.astype(np.int32)
    tensor = torch.from_numpy(np.asarray(value) if value.flags.writeable else value.copy())
    return tensor.float() if tensor.is_floating_point() else tensor


def _int32_range(value: Array) -> tuple[Any, Any]:
    top = value.dtype.type(2**31 - 1)
    return (value.dtype.type(0 if value.dtype.kind == "u" else -(2**31)), top)


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


def _fed(function: Function, feeds: Mapping[str, Array]) -> tuple[Tensor, ...]:
    """The function's inputs, in its order and its types. Raises ``BadInput``."""
    features = {one.name: one for one in function.input_features}
    for name in feeds:
        if name not in features:
            raise BadInput(f"the model has no input {name!r}; it takes: {', '.join(features)}")
    return tuple(_fed_input(one, features[one.name], feeds) for one in function.inputs)


def _fed_input(variable: Variable, feature: Feature, feeds: Mapping[str, Array]) -> Tensor:
    array = feeds.get(variable.name)
    if array is None:
        if not feature.optional:
            raise BadInput(f"the input {variable.name!r} is missing")
        array = np.full(feature.shape, feature.default, np.float32)
    tensor = torch.from_numpy(np.array(array))  # a copy: the array may be read-only
    if not variable.shape and tensor.numel() == 1:
        tensor = tensor.reshape(())  # the description cannot say scalar, and says 1
    _check_shape(variable, feature, tuple(tensor.shape))
    return _rounded(tensor, variable.dtype)


def _check_shape(variable: Variable, feature: Feature, shape: tuple[int, ...]) -> None:
    fits = _has_shape(variable, shape)
    if fits and feature.ranges and shape:
        fits = len(feature.ranges) == len(shape) and all(
            low <= size and (high < 0 or size <= high)
            for size, (low, high) in zip(shape, feature.ranges, strict=True)
        )
    if fits and feature.shapes:
        fits = shape in feature.shapes
    if not fits:
        raise BadInput(f"the input {variable.name!r} cannot have the shape {shape}")


def _checked_state(function: Function, state: dict[str, Tensor]) -> dict[str, Tensor]:
    for one in function.states:
        if one.name not in state or tuple(state[one.name].shape) != one.shape:
            raise BadInput(f"the state {one.name!r} of shape {one.shape} is missing")
    return state


_EXPORTED = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int8": torch.int8,
}


def _exported(feature: Feature, value: Any) -> object:
    """A result as the model's user gets it, with memory of its own."""
    match feature.kind:
        case "string" | "int64" | "double" | "dictionary":
            return value
        case "image" if feature.dtype == "uint8":
            return value.round().nan_to_num(0.0).clamp(0, 255).to(torch.uint8).numpy()
    exported: object = value.to(_EXPORTED[feature.dtype], copy=True).contiguous().numpy()
    return exported
