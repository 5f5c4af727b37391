"""Runs ``.mlpackage``s with our own interpreter: off a Mac nothing of Apple's runs them."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, Self

import numpy as np

from edgekit.artifact import Artifact
from edgekit.errors import RuntimeFailed
from edgekit.image import ImageInput
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.package import Package

PREFIX = "model.mlpackage/"


class InterpreterSession:
    """One package, interpreted op by op in its own precisions."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        image = artifact.provenance.get("image")
        self._image = ImageInput.from_json(image) if image else None
        self._features: dict[str, str] = dict(artifact.provenance["features"])  # type: ignore[call-overload]
        self._interpreter: Interpreter | None = None
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

    faults: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        files = {
            name.removeprefix(PREFIX): content
            for name, content in self._artifact.files.items()
            if name.startswith(PREFIX)
        }
        self._interpreter = Interpreter(Package.read(files))
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
        }

        def keep(_op: object, name: str, value: object) -> None:
            assert values is not None
            values[_graph_name(name)] = np.asarray(value)

        answer = interpreter.run(feeds, trace=keep if values is not None else None)
        if (overflow := interpreter.overflow) is not None and not self.cause:
            self.cause = (
                f"The first value beyond float16 is {_graph_name(overflow.output)!r}, made by "
                f"{overflow.op}: {overflow.largest:.3g}, where 65504 is the most. Keep it in "
                "float32: export with --precision fp32."
            )
        return {spec.name: self._returned(spec, answer) for spec in self.outputs}

    def _fed(self, name: str, array: Array) -> Array:
        """As the package takes it: an image input takes pixels and normalises them itself."""
        if self._image is None or name != self._image.name:
            return array
        return self._image.pixels(array)  # a sample that was no picture stays what it is

    def _returned(self, spec: TensorSpec, answer: dict[str, object]) -> Array:
        feature = self._features[f"output.{spec.name}"]
        if feature not in answer:
            raise RuntimeFailed(f"coreml could not run the model: it returns no {feature!r}.")
        return np.asarray(answer[feature]).astype(spec.dtype)


def _graph_name(variable: str) -> str:
    """The converter appends how it cast a value to the name of the node that made it."""
    return variable.removesuffix("_cast_fp16").removesuffix("_to_fp16")
