"""This machine: processor features, load, and the versions of what is installed."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What decides which kernels a CPU runtime picks, and with them the last bits of a result.
_FEATURES = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "sve"),
)

# What an artifact's bytes depend on: a manifest names the version of each that was installed.
_TOOLS = (
    *("torch", "torchao", "numpy", "onnx", "onnxscript", "onnxruntime", "executorch"),
    *("coremltools", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
    *("gguf", "tokenizers"),
)


@cache
def describe() -> dict[str, object]:
    """JSON values: system, machine, processor, its features, cores this process may use."""
    name, flags = _cpuinfo()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": name or platform.processor() or "unknown",
        "features": [feature for feature in _FEATURES if feature in flags],
        "int8": int8_kernels(),
        "cores": cores(),
        "python": platform.python_version(),
    }


def int8_kernels() -> str:
    """How this processor adds up 8-bit products: ``vnni``, ``avx2``, ``arm64`` or ``other``.

    Kernels that differ in this differ in result, so a proof of integers names it.
    """
    _, flags = _cpuinfo()
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "vnni"
    if "avx2" in flags:
        return "avx2"
    return "arm64" if platform.machine().lower() in ("aarch64", "arm64") else "other"


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "", frozenset()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = values.get("flags", values.get("Features", ""))
    return values.get("model name", ""), frozenset(flags.split())


def installed_version(distribution: str) -> str | None:
    """The version installed, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def busy_seconds() -> float | None:
    """CPU seconds that all processes have used since boot, steal included; None off Linux."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq + steal) / ticks


def own_seconds() -> float:
    """CPU seconds that this process and its ended children have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def tool_versions() -> dict[str, str]:
    """The installed ones of the tools that make artifacts."""
    found = {tool: installed_version(tool) for tool in _TOOLS}
    return {tool: version for tool, version in found.items() if version}
