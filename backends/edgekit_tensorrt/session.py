"""Runs typed ONNX as NVIDIA's parser understood it, on machines that have no GPU of NVIDIA's."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, Self

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from edgekit.artifact import Artifact
from edgekit.errors import RuntimeFailed
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit.widths import Bits, Store
from edgekit_tensorrt.faults import faults_of
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.processes import parse_onnx


class NetworkSession:
    """NVIDIA's parsed network, interpreted layer by layer in its own precisions."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._store: Store | None = None  # of the codes, once another bit-width was asked for
        self._interpreter: NetworkInterpreter | None = None
        self._names: list[tuple[str, str]] = []  # ours, the file's
        self._runtime = ""
        self.faults: tuple[str, ...] = ()
        self.cause = ""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.outputs

    @property
    def level(self) -> Literal["static", "emulated"]:
        """``static`` where the network holds a layer that the interpreter lacks."""
        return "static" if self._opened.unknown else "emulated"

    @property
    def notes(self) -> tuple[str, ...]:
        unknown = self._opened.unknown
        own = f"Parsed by {self._runtime}, its network interpreted."
        if unknown:
            own = (
                f"The interpreter has no {', '.join(unknown)}; the model was parsed and built by "
                f"{self._runtime} and not run. Run build_engine.py on the device to prove it."
            )
        found = self._artifact.provenance.get("notes")  # of lowering: what a plan left in float
        return (own, *(str(each) for each in (found if isinstance(found, list) else ())))

    def set_bits(self, bits: Bits) -> None:
        """Run at ``bits`` from now on, parsed again from memory. Raises ``UsageError``."""
        if self._store is None:
            self._store = Store(self._artifact)
        self._artifact = self._store.at(bits)
        self.cause = ""
        if self._interpreter is not None:
            self.__enter__()

    def __enter__(self) -> Self:
        source = self._artifact.source
        content = source if isinstance(source, bytes) else source.read_bytes()
        parsed = parse_onnx(source)
        if parsed.network is None:
            reasons = "; ".join(str(error) for error in parsed.errors)
            raise RuntimeFailed(f"tensorrt could not load the model: {reasons}")
        try:
            model = onnx.load_from_string(content)
        except DecodeError as cause:
            raise RuntimeFailed(f"tensorrt could not load the model: {cause}.") from cause
        self._runtime = parsed.runtime
        self._names = [
            (spec.name, value.name)
            for spec, value in zip(self.outputs, model.graph.output, strict=False)
        ]
        self.faults = tuple(faults_of(model, parsed.network, parsed.warnings))
        self._interpreter = NetworkInterpreter(parsed.network)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interpreter = None

    @property
    def _opened(self) -> NetworkInterpreter:
        assert self._interpreter is not None, "the session is not open"
        return self._interpreter

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name. Raises ``BadInput`` or ``RuntimeFailed``."""
        return self._run(arrays, None)

    def layers(self, arrays: Arrays) -> dict[str, Array]:
        """Every intermediate value, by the name of the program's graph node."""
        values: dict[str, Array] = {}
        outputs = self._run(arrays, values)
        return {**values, **outputs}

    def _run(self, arrays: Arrays, values: dict[str, Array] | None) -> dict[str, Array]:
        interpreter = self._opened
        if interpreter.unknown:
            raise RuntimeFailed(f"tensorrt could not run the model here: {self.notes[0]}")
        feeds = check_arrays(self.inputs, arrays)

        def keep(name: str, value: object) -> None:
            assert values is not None
            values[name] = np.asarray(value)

        answer = interpreter.run(feeds, trace=keep if values is not None else None)
        if interpreter.overflow is not None and not self.cause:
            self.cause = (
                f"The first value beyond float16: {interpreter.overflow}. Keep it in float32: "
                "export with --precision fp32."
            )
        return {ours: answer[name] for ours, name in self._names if name in answer}
