"""Decodes with a language model as NVIDIA's parser understood it, on machines without its GPUs.

The graph answers with the new tokens' keys and values; the cache is kept here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from edgekit.artifact import Artifact
from edgekit.decode.stepper import Rows
from edgekit.errors import RuntimeFailed
from edgekit_tensorrt.decoder_passes import CountedDecoder, files_together
from edgekit_tensorrt.faults import faults_of_file
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.processes import parse_onnx


class NetworkStepper(CountedDecoder):
    """NVIDIA's parsed network, interpreted in its own precisions; weights are unpacked once."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self._interpreter: NetworkInterpreter | None = None
        self._keys = self._values = np.empty(0)
        self._runtime = ""
        self.faults: tuple[str, ...] = ()
        self.cause = ""

    @property
    def level(self) -> Literal["static", "emulated"]:
        """``static`` where the network holds a layer that the interpreter lacks."""
        return "static" if self._opened.unknown else "emulated"

    @property
    def notes(self) -> tuple[str, ...]:
        own = f"Parsed by {self._runtime}, its network interpreted."
        if unknown := self._opened.unknown:
            own = (
                f"The interpreter has no {', '.join(unknown)}; the model was parsed by "
                f"{self._runtime} and not run. Run generate_on_jetson.py on the device."
            )
        found = self._artifact.provenance.get("notes")
        return (own, *(str(each) for each in (found if isinstance(found, list) else ())))

    def __enter__(self) -> Self:
        with tempfile.TemporaryDirectory(prefix="edgekit-tensorrt-") as folder:
            model = files_together(self._artifact, Path(folder))
            parsed = parse_onnx(model)
            if parsed.network is None:
                reasons = "; ".join(str(error) for error in parsed.errors)
                raise RuntimeFailed(f"tensorrt could not load the model: {reasons}")
            self.faults = faults_of_file(model, parsed)
        self._runtime = parsed.runtime
        self._interpreter = NetworkInterpreter(parsed.network)
        self._interpreter.fold()
        spec = self.spec
        shape = (self.capacity, spec.layers, spec.kv_heads, spec.head_dim)
        self._keys, self._values = np.zeros(shape, self._dtype), np.zeros(shape, self._dtype)
        self.length = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interpreter = None
        self._keys = self._values = np.empty(0)
        self.length = 0

    @property
    def _opened(self) -> NetworkInterpreter:
        assert self._interpreter is not None, "the stepper is not open"
        return self._interpreter

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """One pass, as ``edgekit.decode.stepper.Stepper`` has it."""
        interpreter = self._opened
        if interpreter.unknown:
            raise RuntimeFailed(f"tensorrt could not run the model here: {self.notes[0]}")
        inputs = self.inputs_of(tokens, parents, rows)
        kept = slice(0, self.length)
        answer = interpreter.run(
            {**inputs, "past_keys": self._keys[kept], "past_values": self._values[kept]}
        )
        new = slice(self.length, self.length + len(tokens))
        self._keys[new], self._values[new] = answer["keys"], answer["values"]
        self.length += len(tokens)
        if interpreter.overflow is not None and not self.cause:
            self.cause = (
                f"The first value beyond float16: {interpreter.overflow}. Keep it in float32: "
                "export with --precision fp32."
            )
        return Rows(answer["logits"], answer["hidden"])
