"""Text tables and the progress line: everything the command line draws."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from edgekit.bundle import Bundle
from edgekit.gate import Attempt
from edgekit.layers import LayerDeviation, by_module
from edgekit.profile import Measurement


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right, words to the left."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [
        all(row[column][:1] in "-0123456789." for row in cells[1:]) and len(cells) > 1
        for column in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def size_text(size: int) -> str:
    """``1.28 MB``, in powers of ten."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def bundle_rows(bundle: Bundle) -> list[dict[str, object]]:
    """One JSON object for each artifact: its proof and its last measurement."""
    rows: list[dict[str, object]] = []
    for name in bundle.artifacts:
        artifact, proof = bundle.artifact(name), bundle.proof(name)
        measured = bundle.measurement(name)
        rows.append(
            {
                "artifact": name,
                "target": artifact.target,
                "precision": artifact.recipe.precision,
                "standing": bundle.standing(name),
                "proof": proof.to_json(),
                "size_bytes": artifact.size,
                "measurement": measured,
            }
        )
    return rows


def bundle_table(bundle: Bundle) -> str:
    """The same for people."""
    rows = []
    for name in bundle.artifacts:
        artifact, proof = bundle.artifact(name), bundle.proof(name)
        measured = bundle.measurement(name)
        rows.append(
            (
                artifact.target,
                artifact.recipe.precision,
                bundle.standing(name),
                *proof.errors(),
                f"{measured['p50_ms']:.2f} ms" if measured else "not measured",
                size_text(artifact.size),
            )
        )
    header = ("target", "precision", "proof", "max abs", "max rel", "p50", "size")
    return table(header, rows)


def tried_table(attempts: Sequence[Attempt]) -> str:
    """Everything that was tried, and why it was kept or not; "" where nothing was."""
    rows = [
        (
            attempt.artifact,
            f"{len(attempt.recipe.keep_float)} float" if attempt.recipe.keep_float else "",
            f"{attempt.accuracy.percent:.2f}%" if attempt.accuracy else "-",
            f"{attempt.sqnr_db:.1f} dB" if attempt.sqnr_db is not None else "-",
            str(attempt.speed) if attempt.speed else "-",
            size_text(attempt.size_bytes) if attempt.size_bytes else "-",
            attempt.verdict,
            attempt.reason,
        )
        for attempt in attempts
    ]
    header = ("tried", "mixed", "top-1", "SQNR", "speed", "model", "verdict", "why")
    return table(header, rows) if rows else ""


def measurement_table(measurements: Sequence[Measurement]) -> str:
    """One row for each artifact measured."""
    header = ("artifact", "threads", "p50", "p90", "p99", "first", "cold load", "warm load")
    rows = [
        (
            m.artifact,
            m.threads,
            *(f"{m.percentile(percent):.3f} ms" for percent in (50, 90, 99)),
            *(f"{ms:.1f} ms" for ms in (m.first_run_ms, m.cold_load_ms, m.warm_load_ms)),
            size_text(m.peak_memory_bytes),
            size_text(m.size_bytes),
            m.noise or "quiet",
        )
        for m in measurements
    ]
    return table((*header, "peak memory", "size", "machine"), rows)


def op_table(ops: Sequence[Mapping[str, object]], count: int = 10) -> str:
    """The slowest nodes, longest first, with their share of all."""
    times = [float(str(op["microseconds"])) for op in ops]
    total = sum(times) or 1.0
    rows = [
        (op["op"], op["node"], f"{time_us:.1f}", f"{100 * time_us / total:.1f} %")
        for op, time_us in list(zip(ops, times, strict=True))[:count]
    ]
    return table(("op", "node", "microseconds", "share"), rows)


def layer_table(artifact: str, found: Sequence[LayerDeviation], why: str) -> str:
    """What each module returns, against eager; the first layer that differs, in a sentence."""
    rows = [
        (
            each.module or "(the model)",
            each.op,
            each.node,
            "equal" if each.sqnr_db == math.inf else f"{each.sqnr_db:.1f} dB",
            "diverges" if each.diverges else "ok",
        )
        for each in by_module(found)
    ]
    header = ("module", "op", "node", "SQNR", "")
    drawn = table(header, rows) if rows else ""
    return "\n".join(part for part in (f"{artifact}, by module:", drawn, why) if part)


class Progress:
    """Names the step at work on one line of a terminal; silent where there is none."""

    def __init__(self) -> None:
        self._stream = sys.stderr  # kept: it is replaced while a converter is silenced
        self._live = self._stream.isatty()
        self._step, self._started = "", time.monotonic()
        self._done = threading.Event()

    def __call__(self, step: str) -> None:
        """Start the next step."""
        if step.partition(":")[0] != self._step.partition(":")[0]:  # not the next of many inputs
            self._started = time.monotonic()
        self._step = step

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Draw while the block runs."""
        if not self._live:
            yield self
            return
        drawer = threading.Thread(target=self._draw, daemon=True)
        drawer.start()
        try:
            yield self
        finally:
            self._done.set()
            drawer.join()
            self._write("")

    def _draw(self) -> None:
        # Nothing for the first two seconds: short work needs no line.
        began = time.monotonic()
        while not self._done.wait(0.2):
            if self._step and time.monotonic() - began > 2:
                self._write(f"{self._step} … {time.monotonic() - self._started:.0f} s")

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()
