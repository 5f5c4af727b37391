"""Runs ``.pte`` programs. The one module that imports ExecuTorch to run it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch

from edgekit.artifact import Artifact
from edgekit.errors import RuntimeFailed
from edgekit.graph import quiet
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit.widths import Store

with quiet():
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime, Verification


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """The runtime raises a code, and says the reason on stderr: put both into one sentence."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            with _stderr_to(log):
                yield
        except (RuntimeError, KeyError) as cause:
            log.seek(0)
            notes = [line.strip() for line in log if line.strip()]
            named = [note for note in notes if "Missing operator" in note]
            reason = "; ".join([str(cause).splitlines()[0], *(named or notes[-1:])])
            raise RuntimeFailed(f"executorch could not {doing}: {reason}") from cause


@contextmanager
def coded(doing: str) -> Iterator[None]:
    """As ``translated``, with the runtime's code alone."""
    try:
        yield
    except RuntimeError as cause:
        raise RuntimeFailed(f"executorch could not {doing}: {cause}") from cause


@contextmanager
def _stderr_to(log: TextIO) -> Iterator[None]:
    """Both ways of the native code to stderr: through Python's object, and to the descriptor."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        os.dup2(log.fileno(), 2)
        with redirect_stderr(log):
            yield
    finally:
        log.flush()
        os.dup2(kept, 2)
        os.close(kept)


def set_threads(threads: int | None) -> None:
    """So many threads for all sessions opened from now on; None leaves what there is."""
    # The thread pool is one for the whole process, and to replace it takes it away from
    # sessions that are open.
    if threads not in (None, portable_lib._threadpool_get_thread_count()):
        portable_lib._unsafe_reset_threadpool(threads)


class ExecutorchSession:
    """One program's ``forward``, from entry to exit of the context."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        self._artifact, self._threads = artifact, threads
        self._program: Any = None
        self._method: Any = None
        self._ran = False
        self._store: Store | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.outputs

    def set_bits(self, bits: int | Mapping[str, int]) -> None:
        """Run at ``bits`` from now on, from memory. Raises ``UsageError`` or ``UnknownName``."""
        self._store = self._store or Store(self._artifact)
        self._artifact = self._store.at(bits)
        if self._method is not None:
            self._close()
            self._load()

    def __enter__(self) -> Self:
        self._load()
        return self

    def _load(self) -> None:
        source = self._artifact.source
        with translated("load the program"):
            set_threads(self._threads)
            # The program is kept: a method whose program is gone crashes.
            self._program = Runtime.get().load_program(
                str(source) if isinstance(source, Path) else source,
                verification=Verification.InternalConsistency,
            )
            self._method = self._program.load_method("forward")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._method = self._program = None
        self._ran = False

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name. Raises ``BadInput`` or ``RuntimeFailed``."""
        checked = check_arrays(self.inputs, arrays)
        # check_arrays made them contiguous: other layouts are read as if they were, silently.
        tensors = [torch.from_numpy(array) for array in checked.values()]
        # What cannot run says why on stderr, most often the first time; to listen for that
        # costs too much to do it in every run.
        with coded("run the program") if self._ran else translated("run the program"):
            results = self._method.execute(tensors)
        self._ran = True
        return {
            spec.name: result.numpy() for spec, result in zip(self.outputs, results, strict=True)
        }
