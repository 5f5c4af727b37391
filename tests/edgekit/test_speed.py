"""A race is run in turns, and a difference within its noise is none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Self

import pytest

from edgekit import speed
from edgekit.artifact import Artifact
from edgekit.recipe import FP32, INT8
from edgekit.spec import Array, Arrays
from edgekit.speed import AGREEING, Speed, race
from edgekit.testing import ReplayBackend, ReplaySession

SLOW = Artifact("clocked", FP32, "", {}, (), ())
FAST = Artifact("clocked", INT8, "", {}, (), ())


class Clock:
    """Time that passes only while a session runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []
        self.threads: list[int | None] = []


class ClockedSession(ReplaySession):
    def __init__(self, artifact: Artifact, clock: Clock, times: Iterator[float]) -> None:
        super().__init__(artifact)
        self._clock, self._times = clock, times

    def __enter__(self) -> Self:
        return self

    def run(self, arrays: Arrays) -> dict[str, Array]:
        self._clock.now += next(self._times)
        self._clock.runs.append(self._artifact.name)
        return {}


class Clocked(ReplayBackend):
    """Each artifact's runs take the times it was given, over and over."""

    def __init__(self, clock: Clock, slow: list[float], fast: list[float]) -> None:
        super().__init__("clocked")
        self._clock = clock
        self.times: dict[str, Iterator[float]] = {
            SLOW.name: itertools.cycle(slow),
            FAST.name: itertools.cycle(fast),
        }

    def open(self, artifact: Artifact, *, threads: int | None = None) -> ClockedSession:
        self._clock.threads.append(threads)
        return ClockedSession(artifact, self._clock, self.times[artifact.name])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(
        perf_counter=lambda: clock.now, perf_counter_ns=lambda: round(clock.now * 1e9)
    )
    monkeypatch.setattr(speed, "time", fake)
    return clock


def test_a_race_says_the_median_of_its_rounds_and_their_spread(clock: Clock) -> None:
    found = race(Clocked(clock, [0.010], [0.004]), SLOW, FAST, {}, threads=3, rounds=5)
    assert found.float_ms == pytest.approx(10)
    assert found.ms == pytest.approx(4)
    assert [found.ratio, found.low, found.high] == pytest.approx([2.5] * 3)
    assert found.agreeing == 1
    assert found.threads == 3
    assert clock.threads == [3, 3]
    assert found.faster


def test_both_run_in_turn_after_one_run_that_is_not_counted(clock: Clock) -> None:
    first_is_slow = itertools.chain([9.0], itertools.repeat(0.01))
    backend = Clocked(clock, [0.01], [0.01])
    backend.times[FAST.name] = iter(first_is_slow)
    found = race(backend, SLOW, FAST, {}, threads=1, rounds=3)
    assert found.ms == pytest.approx(10)
    assert clock.runs == [SLOW.name, FAST.name] * (len(clock.runs) // 2)


def test_one_thread_and_all_cores_are_raced_and_the_worse_of_them_counts(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.speed.host.cores", lambda: 4)

    class Threaded(Clocked):
        def open(self, artifact: Artifact, *, threads: int | None = None) -> ClockedSession:
            fast = {1: 0.008, 4: 0.001}[threads or 0]
            self.times = {SLOW.name: itertools.repeat(0.004), FAST.name: itertools.repeat(fast)}
            return super().open(artifact, threads=threads)

    found = race(Threaded(clock, [0.004], [0.004]), SLOW, FAST, {}, rounds=3)
    assert clock.threads == [1, 1, 4, 4]
    assert found.threads == 1
    assert found.ratio == pytest.approx(0.5)


def test_a_model_that_takes_seconds_is_not_run_for_hours(clock: Clock) -> None:
    race(Clocked(clock, [20.0], [10.0]), SLOW, FAST, {}, threads=1)
    assert len(clock.runs) == 2 * (1 + 3 * 3)  # three rounds of three, whatever they take


def test_a_fast_model_is_run_long_enough_in_each_round(clock: Clock) -> None:
    race(Clocked(clock, [0.001], [0.001]), SLOW, FAST, {}, threads=1, rounds=2)
    assert clock.now == pytest.approx(2 * speed.ROUND_SECONDS, rel=0.05)


@pytest.mark.parametrize(
    ("ratio", "agreeing", "faster"),
    [
        (1.3, 1.0, True),
        (1.3, AGREEING, True),
        (1.3, AGREEING - 0.01, False),
        (1.03, 1.0, True),
        (1.01, 1.0, False),
        (1.0, 1.0, False),
        (0.9, 1.0, False),
    ],
)
def test_what_most_rounds_do_not_show_is_noise(ratio: float, agreeing: float, faster: bool) -> None:
    assert Speed(2.0, 1.0, ratio, 0.8, 1.5, agreeing, 2).faster is faster


def test_a_speed_is_written_with_its_spread() -> None:
    found = Speed(2.0, 1.0, 1.234, 1.1, 1.456, 1.0, 2)
    assert str(found) == "1.23x (1.10 to 1.46)"
    assert Speed(**found.to_json()) == found  # type: ignore[arg-type]
