"""Parses and builds with NVIDIA's libraries in a child process that has a time and memory limit.

``parse_onnx`` says how TensorRT understood a model, ``build_engine`` compiles it for GPUs that need
not be here. A child that hangs, is killed or crashes becomes one sentence, never a crash here.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import MissingRuntime, RuntimeFailed, UsageError
from edgekit_tensorrt.bindings import MODULES, installed
from edgekit_tensorrt.network import Network, read_network
from edgekit_tensorrt.plan import COMPUTE_CAPABILITIES, Plan, plan_from_dump

# Enough for the largest scratch buffers seen, and less than the boards it may run on have.
WORKSPACE_BYTES = 4 << 30
_POLL_SECONDS = 0.05
# What TensorRT proper builds on the machine itself, and TensorRT-RTX has no target for.
ELSEWHERE = {
    "sm87": "Jetson Orin",
    "sm90": "Hopper",
    "sm100": "Blackwell data-centre GPUs",
    "sm103": "Blackwell data-centre GPUs",
    "sm110": "Jetson Thor",
}


@dataclass(frozen=True)
class ParserError:
    """One reason why NVIDIA's parser refuses a model."""

    code: str
    operator: str
    node: str  # the name of the ONNX node
    description: str

    def __str__(self) -> str:
        place = f" in node {self.node!r}" if self.node else ""
        operator = f"{self.operator}{place}: " if self.operator else ""
        # The condition that failed, as it stands in the parser's source.
        reason = "the parser does not know it" if self.description == "false" else self.description
        return f"{operator}{reason} ({self.code})"


@dataclass(frozen=True)
class Parsed:
    """A model in NVIDIA's terms; ``network`` is None where there are errors."""

    network: Network | None
    errors: tuple[ParserError, ...]
    warnings: tuple[str, ...]
    runtime: str  # "tensorrt_rtx 1.7.1.116"


@dataclass(frozen=True)
class Built:
    """An engine, and the kernels it consists of."""

    engine: bytes
    plan: Plan
    seconds: float
    runtime: str


@dataclass(frozen=True)
class _Limits:
    seconds: float
    memory_gb: float
    options: bool  # whether the command line can raise them

    def of_time(self) -> str:
        more = "; raise --tensorrt-build-seconds" if self.options else ""
        return f"it was stopped after {self.seconds:g} seconds, its limit{more}"

    def of_memory(self) -> str:
        more = "; raise --tensorrt-build-memory" if self.options else ""
        return f"it needs more than {self.memory_gb:g} GB of memory, its limit{more}"


def parse_onnx(model: bytes | Path, *, seconds: float = 300, memory_gb: float = 8) -> Parsed:
    """Give the model to NVIDIA's parser. Refusals are ``errors``; only a crash raises.

    Raises ``RuntimeFailed`` or ``MissingRuntime``.
    """
    doing = "load the model"
    with tempfile.TemporaryDirectory(prefix="edgekit-tensorrt-") as name:
        folder = Path(name)
        limits = _Limits(seconds, memory_gb, options=False)
        result = _run({"job": "parse"}, model, folder, limits, doing)
        errors = tuple(ParserError(**error) for error in result.get("errors", ()))
        if not errors:
            _raise_failure(result, doing)
        network = None if errors else read_network(folder)
    return Parsed(network, errors, tuple(result["warnings"]), result["runtime"])


def build_engine(
    model: bytes | Path,
    *,
    compute_capabilities: Sequence[str],
    profiles: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]],
    seconds: float = 600,
    memory_gb: float = 8,
) -> Built:
    """Compile for the named GPUs, such as ``sm86``; one engine serves them all.

    ``profiles`` gives each input whose sizes vary its smallest, typical and largest shape. The
    same model gives the same bytes. Raises ``UsageError``, ``RuntimeFailed`` or
    ``MissingRuntime``.
    """
    doing = "build the engine"
    request = {
        "job": "build",
        "compute_capabilities": check_compute_capabilities(compute_capabilities),
        "profiles": {
            name: [[int(size) for size in shape] for shape in shapes]
            for name, shapes in profiles.items()
        },
        "workspace_bytes": WORKSPACE_BYTES,
    }
    with tempfile.TemporaryDirectory(prefix="edgekit-tensorrt-") as name:
        folder = Path(name)
        limits = _Limits(seconds, memory_gb, options=True)
        result = _run(request, model, folder, limits, doing)
        _raise_failure(result, doing)
        engine = (folder / "engine.bin").read_bytes()
    plan = plan_from_dump(result["layers"])
    return Built(engine, plan, result["seconds"], result["runtime"])


def check_compute_capabilities(names: Sequence[str]) -> list[str]:
    """The names in lower case, each once. Raises ``UsageError`` for what cannot be built here."""
    known = ", ".join(COMPUTE_CAPABILITIES)
    if not names or isinstance(names, str):
        raise UsageError(f"name the GPUs to build for, as a list; there is: {known}.")
    lowered = list(dict.fromkeys(name.lower() for name in names))
    for name in lowered:
        if name in ELSEWHERE:
            raise UsageError(
                f"TensorRT-RTX has no target {name} ({ELSEWHERE[name]}); the engine must be built "
                "on that machine itself: copy the bundle there and, in the artifact's folder, "
                f"run: python3 build_engine.py. Here there is: {known}."
            )
        if name not in COMPUTE_CAPABILITIES:
            raise UsageError(f"unknown compute capability {name!r}; there is: {known}.")
    return lowered


def _run(
    request: dict[str, Any], model: bytes | Path, folder: Path, limits: _Limits, doing: str
) -> dict[str, Any]:
    """The child's ``result.json``; raises where it left none."""
    if not installed():
        raise MissingRuntime("tensorrt", MODULES[-1])
    if isinstance(model, Path):
        path = model.resolve()  # in place: external data lies beside it
    else:
        path = folder / "model.onnx"
        path.write_bytes(model)
    request |= {"model": str(path), "folder": str(folder)}
    file = folder / "request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    log = folder / "stderr.txt"
    code = _watched(
        [sys.executable, "-m", "edgekit_tensorrt.worker", str(file)], log, limits, doing
    )
    result = folder / "result.json"
    if code or not result.exists():
        notes = log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeFailed(f"tensorrt could not {doing}: {_ending(code, notes)}.")
    value: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return value


def _watched(command: list[str], log: Path, limits: _Limits, doing: str) -> int:
    """Run a child that is killed at its limits; its exit code.

    Memory is watched from outside: under setrlimit, a library whose allocation fails may wait
    for ever for a thread that it could not start. Resident memory is counted, because a GPU
    driver reserves terabytes of addresses.
    """
    end = time.monotonic() + limits.seconds
    with (
        log.open("wb") as stream,
        # The working directory comes first in the child's path: it must not be the user's.
        subprocess.Popen(
            command, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        ) as child,
    ):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(_POLL_SECONDS)
                if time.monotonic() > end:
                    raise RuntimeFailed(f"tensorrt could not {doing}: {limits.of_time()}.")
                if _peak_bytes(child.pid) > limits.memory_gb * 2**30:
                    raise RuntimeFailed(f"tensorrt could not {doing}: {limits.of_memory()}.")
        finally:
            child.kill()  # nothing, where it has ended


def _peak_bytes(process: int) -> int:
    """The most memory that a process has held at once; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _ending(code: int, notes: str) -> str:
    """Why a child ended without a result."""
    last = _shortened([line for line in notes.splitlines() if line.strip()][-1:])
    if code == -signal.SIGKILL:
        how = "signal SIGKILL, which Linux sends where memory runs out"
    else:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"its process ended with {how}{last and ': ' + last}"


def _raise_failure(result: dict[str, Any], doing: str) -> None:
    """Raise what the child reported in order, if anything."""
    failed = result.get("failed")
    if failed is None:
        return
    messages = [ParserError(**error) for error in result.get("errors", ())] or result["messages"]
    if failed == "load" and result["kind"] == MissingRuntime.__name__:
        raise MissingRuntime("tensorrt", MODULES[-1])
    if failed in ("profile", "targets"):
        raise UsageError(f"tensorrt could not {doing}: {messages[0]}.")
    reason = _shortened([str(message) for message in messages])
    if failed == "parse":
        reason = f"could not load the model: {reason or 'it has no layers or no outputs'}"
        raise RuntimeFailed(f"tensorrt {reason}.")
    raise RuntimeFailed(f"tensorrt could not {doing}: {reason or 'it gave no reason'}.")


def _shortened(messages: list[str], *, count: int = 3, length: int = 600) -> str:
    """The last messages on one line."""
    lines = [" ".join(message.split()).rstrip(".") for message in messages[-count:]]
    return "; ".join(line if len(line) <= length else line[:length] + "…" for line in lines)
