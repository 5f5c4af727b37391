"""Builds and runs the engine where a GPU of NVIDIA's is: the same code that the bundle carries."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import TracebackType
from typing import Self

from edgekit.artifact import Artifact
from edgekit.errors import RuntimeFailed
from edgekit.evidence import NotPossible
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit.widths import Bits, Store
from edgekit_tensorrt import build_engine


@cache
def has_gpu() -> bool:
    """Whether TensorRT's own module is installed and the driver reports a GPU."""
    if not any(find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx")):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    started = driver.cuInit(0) == 0
    return started and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """What a script for devices raises, as the SDK's own error."""
    try:
        yield
    except NotPossible as cause:
        raise RuntimeFailed(f"tensorrt could not {doing}: {cause}") from cause


class EngineSession:
    """One engine, built for the GPU here on entry, from the file that is in the bundle."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._store: Store | None = None  # of the codes, once another bit-width was asked for
        self._engine: build_engine.Engine | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.outputs

    def __enter__(self) -> Self:
        source = self._artifact.source
        content = source if isinstance(source, bytes) else source.read_bytes()
        profiles = build_engine.profiles_of([spec.to_json() for spec in self.inputs])
        with translated("load the model"):
            engine = build_engine.Engine(build_engine.build(content, profiles))
            self._engine = engine.__enter__()
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

    def set_bits(self, bits: Bits) -> None:
        """Run at ``bits`` from now on: an engine is built for it. Raises ``UsageError``."""
        if self._store is None:
            self._store = Store(self._artifact)
        self._artifact = self._store.at(bits)
        if self._engine is not None:
            self.__exit__(None, None, None)
            self.__enter__()

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name. Raises ``BadInput`` or ``RuntimeFailed``."""
        assert self._engine is not None, "the session is not open"
        with translated("run the model"):
            answer = self._engine.run(check_arrays(self.inputs, arrays))
        edges = {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }
        return build_engine.renamed(answer, edges)
