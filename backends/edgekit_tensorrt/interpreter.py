"""Runs a parsed network with torch, layer by layer: what NVIDIA's import of a model computes.

It shows, without a GPU, where the parser understood a model otherwise than it was meant, and where
values leave the range of float16. It is not TensorRT's arithmetic: kernels that fuse layers keep
more digits between them and add in another order.

Values are made when they are needed, so layers may stand in any order, and the branch of a
condition that is not taken is not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edgekit.errors import BadInput, RuntimeFailed
from edgekit.spec import Array
from edgekit_tensorrt.control import BORDERS, BRANCHES, Control, Loop, control_of
from edgekit_tensorrt.layers import LACKS, RUN, Call
from edgekit_tensorrt.layers.values import (
    ARRAYS,
    DTYPES,
    array_from_tensor,
    rounded,
    tensor_from_array,
)
from edgekit_tensorrt.network import Layer, Network, topological_order

Trace = Callable[[str, Tensor], None]
_CONTROL = {*BORDERS, *BRANCHES, "ASSERTION"}


@dataclass(frozen=True)
class Overflow:
    """The first float16 result that is not finite although its inputs were."""

    layer: str
    kind: str
    output: str
    largest: float  # its largest magnitude before it was rounded to float16

    def __str__(self) -> str:
        return (
            f"layer {self.layer!r} ({self.kind}) gives {self.output!r} = {self.largest:g}, "
            "and float16 ends at 65504"
        )


@dataclass
class _Frame:
    """Values of one round of a loop; the outermost frame is the network itself."""

    loop: int | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


class NetworkInterpreter:
    """One network, ready to run any number of times."""

    def __init__(self, network: Network, *, constants: Mapping[str, Array] | None = None) -> None:
        """``constants``: arrays by layer name, for CONSTANT layers that could not be read."""
        self._network = network
        self._producer = network.producer()
        self._control: Control = control_of(network)
        self._given = {
            layer.outputs[0]: tensor_from_array(constants[layer.name], self._dtype(layer)).reshape(
                layer.attributes["shape"]
            )
            for layer in network.layers
            if layer.kind == "CONSTANT" and constants and layer.name in constants
        }
        self._constants: dict[str, Tensor] = dict(self._given)
        self._readers = self._plain_readers()
        self.unknown: tuple[str, ...] = tuple(dict.fromkeys(self._find_unknown()))
        self.overflow: Overflow | None = None

    def run(self, feeds: Mapping[str, Array], *, trace: Trace | None = None) -> dict[str, Array]:
        """Outputs by name; BF16 and FP8 come as float32. Raises ``BadInput``, ``RuntimeFailed``.

        ``trace`` is called with every value that a layer makes; in a loop, once a round.
        """
        if self.unknown:
            raise RuntimeFailed(
                f"edgekit cannot run TensorRT's network: it has no {', '.join(self.unknown)}."
            )
        with torch.no_grad():
            run = _Execution(self, self._feeds(feeds), trace)
            run.evaluate(self._network.outputs)
        self.overflow = run.overflow
        return {
            name: array_from_tensor(run.value(name), self._network.tensors[name].dtype)
            for name in self._network.outputs
        }

    def fold(self) -> None:
        """Work out now, once for all runs, what no input has a part in; ``trace`` sees none of it.

        What it was made from is forgotten: of weights in codes their floats alone stay. A network
        with loops or branches stays as it is.
        """
        if self.unknown or self._control.loops or self._control.conditions:
            return
        varying, kept = set(self._network.inputs), []
        for layer in topological_order(self._network):
            if varying.intersection(name for name in layer.inputs if name is not None):
                varying.update(layer.outputs)
                kept.append(layer)
        read = {name for layer in kept for name in layer.inputs if name is not None}
        wanted = (read | set(self._network.outputs)) - varying
        with torch.no_grad():
            for name in sorted(wanted):
                run = _Execution(self, {}, None)
                run.evaluate((name,))
                found = run.value(name)
                self._constants = {
                    one: self._constants[one] for one in wanted & set(self._constants)
                }
                self._constants[name] = found
        self._network = replace(self._network, layers=tuple(kept))
        self._producer = self._network.producer()
        self._readers = self._plain_readers()

    def _dtype(self, layer: Layer) -> str:
        return self._network.tensors[layer.outputs[0]].dtype

    def _feeds(self, feeds: Mapping[str, Array]) -> dict[str, Tensor]:
        names = ", ".join(self._network.inputs)
        if set(feeds) != set(self._network.inputs):
            raise BadInput(f"the network takes {names}; it was given {', '.join(feeds)}.")
        values = {}
        for name, array in feeds.items():
            tensor = self._network.tensors[name]
            wanted = ARRAYS.get(tensor.dtype)
            if wanted is not None and array.dtype.name != wanted:
                raise BadInput(f"input {name!r} has dtype {array.dtype}; it takes {wanted}.")
            fits = len(array.shape) == len(tensor.shape) and all(
                size in (-1, given) for size, given in zip(tensor.shape, array.shape, strict=True)
            )
            if not fits:
                raise BadInput(
                    f"input {name!r} has shape {list(array.shape)}; it takes "
                    f"{list(tensor.shape)}, where -1 is any size."
                )
            values[name] = tensor_from_array(array, tensor.dtype)
        return values

    def _find_unknown(self) -> Iterable[str]:
        for layer in self._network.layers:
            if layer.kind not in RUN and layer.kind not in _CONTROL:
                yield layer.kind
            elif layer.kind in LACKS and (mode := LACKS[layer.kind](layer)):
                yield f"{layer.kind} {mode}"
            for name in layer.outputs:
                if self._network.tensors[name].dtype not in DTYPES:
                    yield f"dtype {self._network.tensors[name].dtype}"
            if layer.kind == "CONSTANT" and layer.outputs[0] not in self._given:
                held = layer.weights.get("weights")
                if held is not None and held.values is None:
                    yield f"value of the {held.dtype} constant {layer.name}"

    def _plain_readers(self) -> Counter[str]:
        """How often each value is read, if only by layers that run once; others are kept."""
        counts: Counter[str] = Counter()
        kept = {*self._network.outputs, *self._control.conditions.values()}
        for loop in self._control.loops.values():
            kept |= set(loop.entries)
        for layer in self._network.layers:
            names = [name for name in layer.inputs if name is not None]
            once = layer.kind not in _CONTROL and not any(
                self._control.varies.get(name) for name in layer.outputs
            )
            counts.update(names)
            kept |= set() if once else set(names)
        return Counter({name: count for name, count in counts.items() if name not in kept})


class _Execution:
    """One run: the frames of values, from the network outwards to the innermost loop."""

    def __init__(
        self, interpreter: NetworkInterpreter, feeds: dict[str, Tensor], trace: Trace | None
    ) -> None:
        self._network = interpreter._network
        self._producer = interpreter._producer
        self._control = interpreter._control
        self._constants = interpreter._constants
        self._remaining = interpreter._readers.copy()
        self._trace = trace
        self.frames = [_Frame(values=feeds)]
        self.overflow: Overflow | None = None

    def evaluate(self, names: Iterable[str]) -> None:
        """Make these values, and before them what they need."""
        stack = list(names)[::-1]
        while stack:
            name = stack[-1]
            if self._known(name):
                stack.pop()
                continue
            layer = self._producer.get(name)
            if layer is None:
                raise RuntimeFailed(f"tensorrt's network reads {name!r}, which nothing makes.")
            missing = [one for one in self._needs(layer) if not self._known(one)]
            if missing:
                stack.extend(reversed(missing))
            else:
                self._make(layer)

    def value(self, name: str) -> Tensor:
        if name in self._constants:
            return self._constants[name]
        return self._home(name).values[name]

    def _known(self, name: str) -> bool:
        return name in self._constants or name in self._home(name).values

    def _home(self, name: str) -> _Frame:
        """The innermost loop that the value varies in, else the network."""
        loops = self._control.varies.get(name)
        if loops:
            for frame in reversed(self.frames):
                if frame.loop in loops:
                    return frame
        return self.frames[0]

    def _needs(self, layer: Layer) -> Sequence[str]:
        if layer.kind == "LOOP_OUTPUT":
            return self._control.loops[layer.attributes["loop"]].entries
        if layer.kind == "CONDITIONAL_OUTPUT":
            condition = self._control.conditions[layer.attributes["conditional"]]
            if not self._known(condition):
                return (condition,)
            return (self._branch(layer, condition),)
        return tuple(name for name in layer.inputs if name is not None)

    def _branch(self, layer: Layer, condition: str) -> str:
        chosen = layer.inputs[0 if bool(self.value(condition)) else 1]
        assert chosen is not None
        return chosen

    def _make(self, layer: Layer) -> None:
        if layer.kind == "LOOP_OUTPUT":
            self._run_loop(layer.attributes["loop"])
        elif layer.kind == "CONDITIONAL_OUTPUT":
            condition = self._control.conditions[layer.attributes["conditional"]]
            self._store(layer, layer.outputs[0], self.value(self._branch(layer, condition)))
        elif layer.kind == "CONDITIONAL_INPUT":
            assert layer.inputs[0] is not None
            self._store(layer, layer.outputs[0], self.value(layer.inputs[0]))
        else:
            self._run_layer(layer)

    def _run_layer(self, layer: Layer) -> None:
        inputs = tuple(None if name is None else self.value(name) for name in layer.inputs)
        tensors = [self._network.tensors[name] for name in layer.outputs]
        call = Call(layer, inputs, tuple(t.dtype for t in tensors), tuple(t.shape for t in tensors))
        try:
            results = RUN[layer.kind](call)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as cause:
            raise RuntimeFailed(
                f"edgekit cannot run layer {layer.name!r} ({layer.kind}) of TensorRT's network: "
                f"{cause}"
            ) from cause
        results = results if isinstance(results, tuple) else (results,)
        for tensor, result in zip(tensors, results, strict=True):
            value = rounded(result, tensor.dtype)
            if tensor.dtype == "HALF" and self.overflow is None and inputs:
                self._check_range(layer, tensor.name, result, value, inputs)
            self._store(layer, tensor.name, value)
        self._release(layer)

    def _check_range(
        self,
        layer: Layer,
        name: str,
        result: Tensor,
        value: Tensor,
        inputs: tuple[Tensor | None, ...],
    ) -> None:
        if bool(value.isfinite().all()):
            return
        floats = (one for one in inputs if one is not None and one.is_floating_point())
        if all(bool(one.isfinite().all()) for one in floats):
            largest = float(result.to(torch.float32).abs().nan_to_num(float("inf")).max())
            self.overflow = Overflow(layer.name, layer.kind, name, largest)

    def _store(self, layer: Layer, name: str, value: Tensor) -> None:
        if layer.kind == "CONSTANT":
            self._constants[name] = value
        else:
            self._home(name).values[name] = value
        if self._trace is not None:
            self._trace(name, value)

    def _release(self, layer: Layer) -> None:
        """Forget values whose last reader has run: a large network would not fit otherwise."""
        for name in layer.inputs:
            if name is not None and name in self._remaining:
                self._remaining[name] -= 1
                if not self._remaining[name]:
                    self.frames[0].values.pop(name, None)

    def _run_loop(self, number: int) -> None:
        loop = self._control.loops[number]
        limit = self._limit(loop)
        state = {one.outputs[0]: self.value(_only(one, 0)) for one in loop.recurrences}
        slices = {one.outputs[0]: _slices(one, self.value(_only(one, 0))) for one in loop.iterators}
        collected: dict[str, list[Tensor]] = {one.outputs[0]: [] for one in loop.outputs}
        frame = _Frame(number)
        self.frames.append(frame)
        rounds = 0
        while limit is None or rounds < limit:
            frame.values = state | {name: one[rounds] for name, one in slices.items()}
            if not self._continues(loop):
                break
            for one in loop.outputs:
                self.evaluate((_only(one, 0),))
                collected[one.outputs[0]].append(self.value(_only(one, 0)))
            backward = {one.outputs[0]: _only(one, 1) for one in loop.recurrences}
            self.evaluate(backward.values())
            state = {name: self.value(source) for name, source in backward.items()}
            rounds += 1
        self.frames.pop()
        for one in loop.outputs:
            self._store(one, one.outputs[0], self._collected(one, collected, state))

    def _limit(self, loop: Loop) -> int | None:
        counts = [one for one in loop.limits if one.attributes["kind"] == "COUNT"]
        return min((int(self.value(_only(one, 0))) for one in counts), default=None)

    def _continues(self, loop: Loop) -> bool:
        conditions = [_only(one, 0) for one in loop.limits if one.attributes["kind"] == "WHILE"]
        self.evaluate(conditions)
        return all(bool(self.value(name)) for name in conditions)

    def _collected(
        self, layer: Layer, collected: dict[str, list[Tensor]], state: dict[str, Tensor]
    ) -> Tensor:
        source, values = _only(layer, 0), collected[layer.outputs[0]]
        if layer.attributes["kind"] == "LAST_VALUE":
            return state[source] if source in state else values[-1]
        if not values:
            shape = [max(size, 0) for size in self._network.tensors[layer.outputs[0]].shape]
            return torch.zeros(shape)
        ordered = values[::-1] if layer.attributes["kind"] == "REVERSE" else values
        return torch.stack(ordered, dim=layer.attributes["axis"])


def _only(layer: Layer, index: int) -> str:
    name = layer.inputs[index]
    assert name is not None
    return name


def _slices(layer: Layer, value: Tensor) -> Sequence[Tensor]:
    slices = value.unbind(layer.attributes["axis"])
    return slices[::-1] if layer.attributes["reverse"] else slices
