"""Times one artifact in this process; ``edgekit.profile`` starts a fresh one for each.

A fresh process, because a first load, a first run and a peak of memory happen once in one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, open_bundle
from edgekit.contract import Backend, OpTimings, Session
from edgekit.errors import EdgekitError
from edgekit.registry import backend
from edgekit.spec import Arrays

# Shorter than this, the kernel's count of busy time (10 ms ticks) says nothing.
SHORTEST_SECONDS = 1.0
LONGEST_SECONDS = 30.0
WARM_UP_SECONDS = 0.3
OP_RUNS = 20

T = TypeVar("T")


def measure(
    adapter: Backend, artifact: Artifact, sample: Arrays, *, threads: int, runs: int
) -> dict[str, object]:
    """Load twice, run, time. Times in milliseconds, memory in bytes, others' load in cores."""
    first, import_ms = timed(lambda: adapter.open(artifact, threads=threads))
    base = peak_memory()  # the runtime's code is in memory, the model is not
    drop_from_cache(artifact)
    session, cold_ms = timed(first.__enter__)
    _, first_ms = timed(lambda: session.run(sample))
    first.__exit__(None, None, None)
    second = adapter.open(artifact, threads=threads)
    session, warm_ms = timed(second.__enter__)
    times, others = _time_runs(session, sample, runs)
    peak = peak_memory()
    ops = session.op_timings(sample, OP_RUNS) if isinstance(session, OpTimings) else []
    second.__exit__(None, None, None)
    return {
        "import_ms": import_ms,
        "cold_load_ms": cold_ms,
        "first_run_ms": first_ms,
        "warm_load_ms": warm_ms,
        "times_ms": times,
        "peak_memory_bytes": peak,
        "model_memory_bytes": peak - base,
        "ops": [asdict(op) for op in ops],
        "others_busy_cores": others,
    }


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and how many milliseconds it took."""
    start = time.perf_counter_ns()
    result = action()
    return result, (time.perf_counter_ns() - start) / 1e6


def _time_runs(session: Session, sample: Arrays, runs: int) -> tuple[list[float], float | None]:
    """Every run's milliseconds, and how many cores other processes used meanwhile."""
    _repeat(lambda: session.run(sample), 3, WARM_UP_SECONDS)
    start, busy, own = time.monotonic(), host.busy_seconds(), host.own_seconds()
    times = _repeat(lambda: session.run(sample), runs, SHORTEST_SECONDS)
    wall, after = time.monotonic() - start, host.busy_seconds()
    if busy is None or after is None:
        return times, None
    others = (after - busy - (host.own_seconds() - own)) / wall
    return times, round(max(0.0, others), 3)


def _repeat(action: Callable[[], object], least: int, seconds: float) -> list[float]:
    """Run at least ``least`` times and at least ``seconds``, but stop after the longest time."""
    times: list[float] = []
    start = time.monotonic()
    while (spent := time.monotonic() - start) < LONGEST_SECONDS and (
        len(times) < least or spent < seconds
    ):
        times.append(round(timed(action)[1], 4))
    return times


def drop_from_cache(artifact: Artifact) -> None:
    """Ask the system to forget the files, so that the first load reads them from the disk."""
    for content in artifact.files.values():
        if isinstance(content, Path) and hasattr(os, "posix_fadvise"):
            with content.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measured_main(
    work: Callable[[Bundle, Artifact, int, int], Mapping[str, object]], arguments: list[str] | None
) -> int:
    """What a fresh process runs: ``work`` on one artifact, with threads and runs; a JSON document
    on stdout, or a sentence on stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    asked = parser.parse_args(arguments)
    try:
        bundle = open_bundle(asked.bundle)
        result = work(bundle, bundle.artifact(asked.artifact), asked.threads, asked.runs)
    except EdgekitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0


def _work(bundle: Bundle, artifact: Artifact, threads: int, runs: int) -> dict[str, object]:
    sample = bundle.reference().samples[0]
    return measure(backend(artifact.target), artifact, sample, threads=threads, runs=runs)


def main(arguments: list[str] | None = None) -> int:
    """Measure an artifact on the bundle's first sample."""
    return measured_main(_work, arguments)


if __name__ == "__main__":
    sys.exit(main())
