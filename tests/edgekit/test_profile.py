"""A figure is written when the machine was quiet, and refused with the reason when not."""

from __future__ import annotations

import importlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgekit import host
from edgekit.bundle import Bundle, open_bundle
from edgekit.errors import NoisyMachine, RuntimeFailed
from edgekit.evidence import percentile
from edgekit.profile import profile, unmeasurable
from edgekit.testing import ReplayBackend, example_bundle

# Not "from edgekit import profile": the package's function of that name hides the module.
profile_module = importlib.import_module("edgekit.profile")

RECORDED: dict[str, Any] = {
    "import_ms": 1.0,
    "cold_load_ms": 5.0,
    "first_run_ms": 2.0,
    "warm_load_ms": 3.0,
    "times_ms": tuple(2.0 + index / 100 for index in range(100)),
    "peak_memory_bytes": 50_000_000,
    "model_memory_bytes": 1_000_000,
    "ops": ({"op": "Conv", "node": "conv_1", "microseconds": 7.0},),
    "others_busy_cores": 0.1,
}
BUSY = {"others_busy_cores": 0.7}
LONG_TAIL = {"times_ms": (2.0,) * 80 + (3.5,) * 20}


@dataclass
class Imitation(ReplayBackend):
    """A backend that may be an interpreter here."""

    emulation: str = "copy the bundle to the device"


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> list[ReplayBackend]:
    """The one that is installed; a test may put another in front."""
    found = [ReplayBackend()]
    monkeypatch.setattr(profile_module, "backend", lambda name: found[0])
    return found


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return example_bundle(tmp_path / "bundle")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the fresh process is asked; it answers with ``RECORDED``."""
    calls: list[tuple[object, ...]] = []
    record(monkeypatch, {}, calls)
    return calls


def record(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    calls: list[tuple[object, ...]] | None = None,
) -> None:
    def answer(*words: object) -> dict[str, Any]:
        if calls is not None:
            calls.append(words)
        return {**RECORDED, **changes}

    monkeypatch.setattr(profile_module, "in_fresh_process", answer)


def done(monkeypatch: pytest.MonkeyPatch, code: int, out: str = "", err: str = "") -> None:
    answer = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: answer)


@pytest.mark.usefixtures("asked")
def test_a_quiet_figure_is_written_into_the_bundle_which_still_opens(bundle: Bundle) -> None:
    measured = profile(bundle)
    assert measured.noise == ""
    written = open_bundle(bundle.folder).measurement("replay-fp32")
    assert written is not None
    assert written == json.loads(json.dumps(measured.to_json()))
    assert (written["p50_ms"], written["p90_ms"], written["p99_ms"]) == (2.49, 2.89, 2.98)
    assert written["size_bytes"] == bundle.artifact().size
    assert len(RECORDED["times_ms"]) == 100


def test_threads_default_to_the_cores_and_both_are_passed_on(
    bundle: Bundle, asked: list[tuple[object, ...]]
) -> None:
    assert profile(bundle, save=False).threads == host.cores()
    assert profile(bundle, "replay", threads=3, runs=7, save=False).threads == 3
    assert asked == [
        ("edgekit.measure", bundle.folder, "replay-fp32", host.cores(), 100),
        ("edgekit.measure", bundle.folder, "replay-fp32", 3, 7),
    ]


@pytest.mark.usefixtures("asked")
def test_a_figure_that_is_not_kept_leaves_the_bundle_alone(bundle: Bundle) -> None:
    before = (bundle.folder / "manifest.json").read_bytes()
    profile(bundle, save=False)
    assert (bundle.folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (BUSY, r"other processes used 0\.7 of \d+ cores while it ran: the median of 2\.49 ms"),
        (LONG_TAIL, r"the slowest tenth of the runs took 1\.8 times the median: the median of 2"),
    ],
)
def test_a_noisy_figure_is_refused_with_the_reason_and_what_to_do(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    record(monkeypatch, changes)
    with pytest.raises(
        NoisyMachine,
        match=rf"replay-fp32 was timed, but {reason}.* Close what else runs and try again, or "
        r"accept it with --noisy-ok\.",
    ):
        profile(bundle)
    assert open_bundle(bundle.folder).measurement("replay-fp32") is None


def test_a_noisy_figure_that_is_accepted_carries_its_reason(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(monkeypatch, BUSY)
    measured = profile(bundle, noisy_ok=True)
    written = open_bundle(bundle.folder).measurement("replay-fp32")
    assert written is not None
    assert written["noise"] == measured.noise != ""


@pytest.mark.parametrize(
    "changes",
    [
        {"others_busy_cores": 0.25},
        {"others_busy_cores": None},
        {"times_ms": (2.0,) * 80 + (3.0,) * 20},
        {"times_ms": (2.0,) * 91 + (90.0,) * 9},
        {"times_ms": (2.0,)},
    ],
)
def test_what_is_at_the_limit_or_not_known_is_no_noise(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    record(monkeypatch, changes)
    assert profile(bundle, save=False).noise == ""


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (25, 1), (26, 2), (50, 2), (51, 3), (90, 4), (100, 4)]
)
def test_a_percentile_is_the_nearest_rank(percent: int, value: int) -> None:
    assert percentile([4, 2, 1, 3], percent) == value


def test_a_percentile_of_one_run_is_that_run() -> None:
    assert percentile([7.5], 99) == 7.5


def test_a_fresh_process_that_knows_no_such_target_is_quoted(bundle: Bundle) -> None:
    with pytest.raises(
        RuntimeFailed, match="replay-fp32 could not be measured: unknown target 'replay'"
    ):
        profile(bundle)


def test_a_runtime_that_crashes_is_said_with_its_signal(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(monkeypatch, -11)
    with pytest.raises(RuntimeFailed, match="crashed with SIGSEGV while it ran replay-fp32"):
        profile(bundle)


def test_a_process_that_fails_without_a_word_is_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(monkeypatch, 1)
    with pytest.raises(RuntimeFailed, match="could not be measured: no reason given"):
        profile(bundle)


def test_a_process_that_hangs_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "CHILD_TIMEOUT", 0.01)
    with pytest.raises(RuntimeFailed, match=r"did not finish in 0 s; ask for fewer --runs"):
        profile(bundle)


def test_what_a_runtime_prints_before_the_result_does_no_harm(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(monkeypatch, 0, out="a banner\n" + json.dumps(RECORDED) + "\n", err="a warning")
    assert profile(bundle).times_ms == RECORDED["times_ms"]


def test_the_time_of_an_interpreter_is_refused_with_the_way_to_measure(
    bundle: Bundle, asked: list[tuple[object, ...]], adapters: list[ReplayBackend]
) -> None:
    adapters.insert(0, Imitation())
    sentence = (
        r"^replay-fp32 is run by an interpreter here; to measure it, copy the bundle to the d"
    )
    with pytest.raises(RuntimeFailed, match=sentence):
        profile(bundle, noisy_ok=True)
    assert asked == []
    assert open_bundle(bundle.folder).measurement("replay-fp32") is None


def test_where_the_vendors_runtime_runs_there_is_nothing_to_say(
    bundle: Bundle, adapters: list[ReplayBackend]
) -> None:
    assert unmeasurable(bundle.artifact()) == ""
    adapters.insert(0, Imitation(emulation=""))
    assert unmeasurable(bundle.artifact()) == ""
