"""Times one language artifact in this process; ``language_profile`` starts a fresh one for each."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.bundle import Bundle
from edgekit.contract import Decodes
from edgekit.decode.stepper import Stepper, feed
from edgekit.measure import drop_from_cache, measured_main, peak_memory, timed
from edgekit.registry import language_backend

WIDTHS = (1, 2, 4, 8, 16, 32)
PREFILL = 256
DECODED = 64
LONGEST_SECONDS = 60.0


def measure_language(
    adapter: Decodes, artifact: Artifact, *, context: int, threads: int, runs: int
) -> dict[str, object]:
    """Load twice, prefill, decode, and time passes of several widths at two lengths.

    Times in milliseconds, memory in bytes, others' load in cores.
    """
    first, import_ms = timed(lambda: adapter.open_decoder(artifact, threads=threads))
    base = peak_memory()  # the runtime's code is in memory, the model is not
    drop_from_cache(artifact)
    stepper, cold_ms = timed(first.__enter__)
    prompt = _tokens(stepper, min(PREFILL, context // 2))
    _, first_ms = timed(lambda: feed(stepper, prompt))
    first.__exit__(None, None, None)
    second = adapter.open_decoder(artifact, threads=threads)
    stepper, warm_ms = timed(second.__enter__)
    start, busy, own = time.monotonic(), host.busy_seconds(), host.own_seconds()
    prefill = [_prefill(stepper, prompt) for _ in range(max(3, runs // 20))]
    times = _decode(stepper, prompt, min(DECODED, context - len(prompt) - 1), runs)
    lengths = sorted({min(128, context // 4), context // 2})
    passes = {length: _passes(stepper, length, runs) for length in lengths}
    wall, after = time.monotonic() - start, host.busy_seconds()
    others = None
    if busy is not None and after is not None:
        others = round(max(0.0, (after - busy - (host.own_seconds() - own)) / wall), 3)
    stepper.rewind(0)
    feed(stepper, _tokens(stepper, context))  # so that the peak is that of a full cache
    peak = peak_memory()
    second.__exit__(None, None, None)
    return {
        "import_ms": import_ms,
        "cold_load_ms": cold_ms,
        "warm_load_ms": warm_ms,
        "first_token_ms": first_ms,
        "prompt_tokens": len(prompt),
        "prefill_ms": statistics.median(prefill),
        "times_ms": times,
        "passes_ms": {str(length): curve for length, curve in passes.items()},
        "peak_memory_bytes": peak,
        "model_memory_bytes": peak - base,
        "others_busy_cores": others,
    }


def _tokens(stepper: Stepper, count: int) -> list[int]:
    """Any tokens will do: no time depends on which."""
    return [(7 * index + 3) % stepper.vocabulary for index in range(count)]


def _prefill(stepper: Stepper, prompt: list[int]) -> float:
    stepper.rewind(0)
    return timed(lambda: feed(stepper, prompt))[1]


def _decode(stepper: Stepper, prompt: list[int], count: int, runs: int) -> list[float]:
    """Milliseconds of single-token passes behind the prompt, ``runs`` of them."""
    times: list[float] = []
    began = time.monotonic()
    while len(times) < runs and time.monotonic() - began < LONGEST_SECONDS:
        stepper.rewind(len(prompt))
        for index in range(min(count, runs - len(times))):
            times.append(round(timed(_step(stepper, 1, index))[1], 4))
    return times


def _passes(stepper: Stepper, length: int, runs: int) -> dict[str, float]:
    """Median milliseconds of a pass of each width behind ``length`` tokens, interleaved."""
    stepper.rewind(0)
    feed(stepper, _tokens(stepper, length))
    widths = [width for width in WIDTHS if width in stepper.widths]
    times: dict[int, list[float]] = {width: [] for width in widths}
    began = time.monotonic()
    for round_ in range(max(5, runs // 4)):
        for width in widths:
            stepper.rewind(length)
            spent = timed(_step(stepper, width, round_))[1]
            if round_:  # the first of a width may have to prepare
                times[width].append(spent)
        if time.monotonic() - began > LONGEST_SECONDS and round_ > 2:
            break
    return {str(width): round(statistics.median(each), 4) for width, each in times.items()}


def _step(stepper: Stepper, width: int, salt: int) -> Callable[[], object]:
    tokens = [(11 * salt + index) % stepper.vocabulary for index in range(width)]
    return lambda: stepper.step(tokens)


def _work(bundle: Bundle, artifact: Artifact, threads: int, runs: int) -> dict[str, object]:
    adapter, context = language_backend(artifact.target), bundle.language.context
    return measure_language(adapter, artifact, context=context, threads=threads, runs=runs)


def main(arguments: list[str] | None = None) -> int:
    """Measure a language artifact."""
    return measured_main(_work, arguments)


if __name__ == "__main__":
    sys.exit(main())
