"""Decodes on a GPU of NVIDIA's, with an engine built for it on entry: not tried on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from edgekit.decode.stepper import Rows
from edgekit_tensorrt import generate_on_jetson
from edgekit_tensorrt.decoder_passes import CountedDecoder, files_together
from edgekit_tensorrt.native import translated


class EngineStepper(CountedDecoder):
    """The same code that the bundle carries to a device, behind the SDK's own protocol."""

    _engine: generate_on_jetson.DecoderEngine | None = None

    def __enter__(self) -> Self:
        decoder = cast(Mapping[str, Any], self._artifact.provenance["decoder"])
        with (
            tempfile.TemporaryDirectory(prefix="edgekit-tensorrt-") as folder,
            translated("load the model"),
        ):
            model = files_together(self._artifact, Path(folder))
            plan = generate_on_jetson.built(model, decoder)
            self._engine = generate_on_jetson.DecoderEngine(plan, decoder).__enter__()
        self.length = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._engine is not None:
            self._engine.__exit__(kind, error, trace)
            self._engine = None
        self.length = 0

    def step(
        self,
        tokens: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Rows:
        """One pass, as ``edgekit.decode.stepper.Stepper`` has it."""
        assert self._engine is not None, "the stepper is not open"
        inputs = self.inputs_of(tokens, parents, rows)
        with translated("run the model"):
            answer = self._engine.step(inputs, self.length)
        self.length += len(tokens)
        return Rows(answer["logits"], answer["hidden"])
