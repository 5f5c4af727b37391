"""Runs ``.mlpackage``s with our own interpreter: off a Mac nothing of Apple's runs them."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Self

import numpy as np

from edgekit.artifact import Artifact
from edgekit.errors import BadInput, RuntimeFailed
from edgekit.image import ImageInput
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit.widths import Bits, Store
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.names import graph_name
from edgekit_coreml.package import Block, Package

PREFIX = "model.mlpackage/"


class InterpreterSession:
    """One package, interpreted op by op in its own precisions."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        image = artifact.provenance.get("image")
        self._image = ImageInput.from_json(image) if image else None
        self._features: dict[str, str] = dict(artifact.provenance["features"])  # type: ignore[call-overload]
        self._used: list[str] = list(artifact.provenance.get("used", ()))  # type: ignore[call-overload]
        self._nodes: dict[str, str] = dict(artifact.provenance.get("nodes", {}))  # type: ignore[call-overload]
        self._declared: set[str] = set()  # features that the package takes
        self._read: set[str] = set()  # those of them that it does anything with
        self._interpreter: Interpreter | None = None
        self._store: Store | None = None  # of the codes, once another bit-width was asked for
        self.cause = ""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.outputs

    @property
    def level(self) -> Literal["static", "emulated"]:
        """``static`` where the package holds an op that the interpreter lacks."""
        return "static" if self._opened.unknown_ops else "emulated"

    @property
    def notes(self) -> tuple[str, ...]:
        unknown = self._opened.unknown_ops
        if not unknown:
            return ()
        return (
            f"The MIL interpreter has no {', '.join(unknown)}; the package was converted by "
            "coremltools and not run. Run predict_on_mac.py on a Mac to prove it.",
        )

    @property
    def faults(self) -> tuple[str, ...]:
        """Inputs that the model uses and the package does not read."""
        return tuple(
            f"The package drops the input {name!r}: the model uses it, no operation of the package "
            "reads it."
            for name in self._used
            if self._features[f"input.{name}"] not in self._read
        )

    def set_bits(self, bits: Bits) -> None:
        """Run at ``bits`` from now on, by rewriting the codes in memory.

        Raises ``UsageError`` where the package has one bit-width, or not that one.
        """
        if self._store is None:
            self._store = Store(self._artifact)
        self._artifact = self._store.at(bits)
        if self._interpreter is not None:
            self.__enter__()

    def __enter__(self) -> Self:
        files = {
            name.removeprefix(PREFIX): content
            for name, content in self._artifact.files.items()
            if name.startswith(PREFIX)
        }
        package = Package.read(files)
        self._interpreter = Interpreter(package)
        main = package.functions[package.default_function]
        self._declared = {feature.name for feature in main.input_features}
        self._read = set(_read_in(main.block)) & self._declared
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interpreter = None

    @property
    def _opened(self) -> Interpreter:
        assert self._interpreter is not None, "the session is not open"
        return self._interpreter

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name. Raises ``BadInput`` or ``RuntimeFailed``."""
        return self._run(arrays, None)

    def layers(self, arrays: Arrays) -> dict[str, Array]:
        """Every intermediate value, by the name of the program's graph node."""
        values: dict[str, Array] = {}
        self._run(arrays, values)
        return values

    def _run(self, arrays: Arrays, values: dict[str, Array] | None) -> dict[str, Array]:
        interpreter = self._opened
        if interpreter.unknown_ops:
            raise RuntimeFailed(f"coreml could not run the model here: {self.notes[0]}")
        feeds = {
            self._features[f"input.{name}"]: self._fed(name, array)
            for name, array in check_arrays(self.inputs, arrays).items()
            if self._features[f"input.{name}"] in self._declared
        }

        def keep(_op: object, name: str, value: object) -> None:
            assert values is not None
            values[self._node(name)] = np.asarray(value)

        answer = interpreter.run(feeds, trace=keep if values is not None else None)
        if (overflow := interpreter.overflow) is not None and not self.cause:
            self.cause = (
                f"The first value beyond float16 is {self._node(overflow.output)!r}, made by "
                f"{overflow.op}: {overflow.largest:.3g}, where 65504 is the most. Keep it in "
                "float32: export with --precision fp32."
            )
        return {spec.name: self._returned(spec, answer) for spec in self.outputs}

    def _node(self, variable: str) -> str:
        """The graph node that a variable of the package stands for."""
        return self._nodes.get(variable) or graph_name(variable)

    def _fed(self, name: str, array: Array) -> Array:
        """As the package takes it: an image input takes pixels and normalises them itself."""
        if array.dtype == np.int64 and not np.array_equal(array, array.astype(np.int32)):
            raise BadInput(
                f"input {name!r} holds integers beyond int32, which is all that Core ML takes."
            )
        if self._image is None or name != self._image.name:
            return array
        return self._image.pixels(array)  # a sample that was no picture stays what it is

    def _returned(self, spec: TensorSpec, answer: dict[str, object]) -> Array:
        feature = self._features[f"output.{spec.name}"]
        if feature not in answer:
            raise RuntimeFailed(f"coreml could not run the model: it returns no {feature!r}.")
        return np.asarray(answer[feature]).astype(spec.dtype)


def _read_in(block: Block) -> Iterator[str]:
    """Every name that something in a block reads, nested blocks included."""
    yield from block.outputs
    for operation in block.operations:
        for bindings in operation.inputs.values():
            yield from (one for one in bindings if isinstance(one, str))
        for nested in operation.blocks:
            yield from _read_in(nested)
