"""Timing one artifact in this process: loads, runs, memory, and what the child process says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekit import host, measure
from edgekit.artifact import Artifact
from edgekit.bundle import Bundle
from edgekit.contract import OpTime
from edgekit.recipe import FP32
from edgekit.spec import Array, Arrays
from edgekit.testing import ReplayBackend, ReplaySession, example_bundle


class Telling(ReplaySession):
    """A session that says where the time goes."""

    def op_timings(self, arrays: Arrays, runs: int) -> list[OpTime]:
        return [OpTime("Copy", "copy_1", float(runs))]


class TellingBackend(ReplayBackend):
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Telling:
        return Telling(artifact)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHORTEST_SECONDS", 0.02)
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("measure") / "bundle")


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A clock that stands still until it is told that a second has passed."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter_ns=time.perf_counter_ns)
    monkeypatch.setattr(measure, "time", clock)

    def forward() -> None:
        now[0] += 1

    return forward


def measured(bundle: Bundle, adapter: ReplayBackend, runs: int = 5) -> dict[str, object]:
    sample = bundle.reference().samples[0]
    return measure.measure(adapter, bundle.artifact(), sample, threads=1, runs=runs)


def test_a_measurement_is_plain_json_with_every_raw_time(bundle: Bundle) -> None:
    found = measured(bundle, ReplayBackend())
    assert json.loads(json.dumps(found)) == found
    times = found["times_ms"]
    assert isinstance(times, list)
    assert len(times) >= 5
    assert min(times) > 0
    for name in ("import_ms", "cold_load_ms", "warm_load_ms", "first_run_ms"):
        assert isinstance(value := found[name], float)
        assert value > 0
    assert found["ops"] == []


def test_memory_is_a_plausible_number_of_bytes(bundle: Bundle) -> None:
    found = measured(bundle, ReplayBackend())
    peak, model = found["peak_memory_bytes"], found["model_memory_bytes"]
    assert isinstance(peak, int)
    assert isinstance(model, int)
    assert 10_000_000 < peak < 10_000_000_000
    assert 0 <= model < peak
    assert measure.peak_memory() >= peak


def test_ops_are_listed_where_the_runtime_tells(bundle: Bundle) -> None:
    found = measured(bundle, TellingBackend())
    assert found["ops"] == [
        {"op": "Copy", "node": "copy_1", "microseconds": float(measure.OP_RUNS)}
    ]


def test_off_linux_the_load_of_others_is_not_known(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "busy_seconds", lambda: None)
    assert measured(bundle, ReplayBackend())["others_busy_cores"] is None


def test_the_load_of_others_is_the_busy_time_that_is_not_our_own(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tick: Callable[[], None]
) -> None:
    busy, own = iter([100.0, 107.0]), iter([50.0, 51.0])
    monkeypatch.setattr(host, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(host, "own_seconds", lambda: next(own))

    class Slow(ReplaySession):
        def run(self, arrays: Arrays) -> dict[str, Array]:
            tick()
            return {}

    times, others = measure._time_runs(Slow(bundle.artifact()), {}, 4)
    assert len(times) == 4
    assert others == (7 - 1) / 4


def test_at_least_so_many_runs_and_at_least_so_long(tick: Callable[[], None]) -> None:
    assert len(measure._repeat(tick, 7, 3)) == 7
    assert len(measure._repeat(tick, 2, 5)) == 5


def test_a_slow_model_is_not_run_forever(tick: Callable[[], None]) -> None:
    assert len(measure._repeat(tick, 1000, 1)) == measure.LONGEST_SECONDS


def test_files_in_memory_need_no_forgetting() -> None:
    artifact = Artifact("replay", FP32, "m", {"m": b"123"}, (), ())
    measure.drop_from_cache(artifact)


def test_the_child_prints_one_json_document(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "backend", lambda name: ReplayBackend(name))
    words = [str(bundle.folder), "replay-fp32", "--threads", "1", "--runs", "3"]
    assert measure.main(words) == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert len(json.loads(found.out)["times_ms"]) >= 3


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [("replay", 2, "unknown target 'replay'"), ("other", 2, "unknown artifact 'other'")],
)
def test_the_child_says_what_is_wrong_in_a_sentence(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], name: str, code: int, sentence: str
) -> None:
    assert measure.main([str(bundle.folder), name, "--threads", "1", "--runs", "1"]) == code
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(sentence)


def test_the_child_refuses_a_damaged_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    (bundle.folder / "README.md").write_text("altered")
    assert measure.main([str(bundle.folder), "replay", "--threads", "1", "--runs", "1"]) == 4
    assert "was altered or cut short" in capsys.readouterr().err
