"""Two artifacts timed against each other in one run: a ratio, with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.contract import Backend, Session
from edgekit.spec import Arrays

ROUNDS = 9
ROUND_SECONDS = 0.2  # of both together; long enough for 20 runs of most models
FEWEST_RUNS = 3
LONGEST_SECONDS = 30.0
# Two sessions of one file differ by a percent or two; nobody feels less.
LEAST_GAIN = 1.02
# Of the rounds, so many must agree before a difference is more than noise.
AGREEING = 0.85


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of two artifacts, and how often faster the second is.

    ``ratio`` is the median over rounds of (first / second); ``low`` and ``high`` are the worst
    and the best round. ``agreeing`` is the share of rounds in which the second was faster.
    """

    float_ms: float
    ms: float
    ratio: float
    low: float
    high: float
    agreeing: float
    threads: int

    @property
    def faster(self) -> bool:
        """Whether the second is faster, by more than noise."""
        return self.ratio > LEAST_GAIN and self.agreeing >= AGREEING

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"

    def to_json(self) -> dict[str, float]:
        """Every field."""
        return asdict(self)


def race(
    backend: Backend,
    first: Artifact,
    second: Artifact,
    sample: Arrays,
    *,
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> Speed:
    """Run both in turn in this process, on one sample; in each round one run after the other.

    Without ``threads``: on one, and on all cores that this process may use, and the smaller ratio
    of the two. With several threads a runtime may wake them slowly for minutes on end, and a
    model of a quarter of a millisecond was then measured to win what it loses at other times.
    """
    if threads is None:
        counts = sorted({1, host.cores()})
        both = (race(backend, first, second, sample, threads=n, rounds=rounds) for n in counts)
        return min(both, key=lambda speed: speed.ratio)
    with (
        backend.open(first, threads=threads) as slow,
        backend.open(second, threads=threads) as fast,
    ):
        _once(slow, sample), _once(fast, sample)
        pairs: list[tuple[float, float]] = []
        begun = time.perf_counter()
        while len(pairs) < rounds and (
            len(pairs) < 3 or time.perf_counter() - begun < LONGEST_SECONDS
        ):
            pairs.append(_round(slow, fast, sample))
    ratios = [a / b for a, b in pairs]
    return Speed(
        float_ms=median(a for a, _ in pairs),
        ms=median(b for _, b in pairs),
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        agreeing=sum(ratio > 1.0 for ratio in ratios) / len(ratios),
        threads=threads,
    )


def burst(run: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of the runs that fit into ``seconds``, after one to settle."""
    run()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < FEWEST_RUNS:
        before = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - before))
    return median(times)


def _round(slow: Session, fast: Session, sample: Arrays) -> tuple[float, float]:
    """Median milliseconds of each."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + ROUND_SECONDS
    while len(times[0]) < FEWEST_RUNS or time.perf_counter() < end:
        times[0].append(_once(slow, sample))
        times[1].append(_once(fast, sample))
    return median(times[0]), median(times[1])


def _once(session: Session, sample: Arrays) -> float:
    start = time.perf_counter_ns()
    session.run(sample)
    return (time.perf_counter_ns() - start) / 1e6
