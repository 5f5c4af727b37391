"""Latency, load time and memory of an artifact on this machine; a noisy run is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.bundle import Bundle
from edgekit.contract import Emulation
from edgekit.errors import NoisyMachine, RuntimeFailed, UsageError
from edgekit.evidence import MOST_SPREAD, percentile
from edgekit.registry import backend

# Another process on this many cores, and the median is not the model's.
MOST_OTHERS = 0.25
CHILD_TIMEOUT = 600.0


@dataclass(frozen=True)
class Measurement:
    """What was measured, with every raw time. Milliseconds and bytes.

    ``noise`` says why the figure should not be trusted, "" where it can be. ``ops`` holds op,
    node and mean microseconds where the runtime tells. ``model_memory_bytes`` is the peak above
    what the process held before the model was loaded.
    """

    artifact: str
    device: str
    threads: int
    import_ms: float
    cold_load_ms: float
    warm_load_ms: float
    first_run_ms: float
    times_ms: tuple[float, ...]
    peak_memory_bytes: int
    model_memory_bytes: int
    size_bytes: int
    others_busy_cores: float | None
    ops: tuple[Mapping[str, object], ...]
    host: Mapping[str, object]

    def percentile(self, percent: int) -> float:
        """The time that ``percent`` of the runs kept under, in milliseconds."""
        return percentile(self.times_ms, percent)

    @property
    def noise(self) -> str:
        """Why this figure should not be trusted, or ""."""
        return noise_of(self.times_ms, self.others_busy_cores, self.host)

    def to_json(self) -> dict[str, object]:
        """All fields, with the percentiles and the noise."""
        shown = {f"p{percent}_ms": self.percentile(percent) for percent in (50, 90, 99)}
        return {**shown, "noise": self.noise, **asdict(self)}


def noise_of(
    times_ms: Sequence[float], others_busy_cores: float | None, machine: Mapping[str, object]
) -> str:
    """Why the median of ``times_ms`` should not be trusted, or ""."""
    spread = percentile(times_ms, 90) / percentile(times_ms, 50)
    if others_busy_cores is not None and others_busy_cores > MOST_OTHERS:
        return (
            f"other processes used {others_busy_cores:.1f} of {machine['cores']} cores while it ran"
        )
    if spread > MOST_SPREAD:
        return f"the slowest tenth of the runs took {spread:.1f} times the median"
    return ""


def profile(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    runs: int = 100,
    noisy_ok: bool = False,
    save: bool = True,
) -> Measurement:
    """Measure one artifact in a fresh process, at batch and sizes of the first sample.

    ``threads`` defaults to the cores this process may use. Raises ``NoisyMachine`` where the
    figure cannot be trusted, unless ``noisy_ok``. The result goes into the bundle as perf.json.
    """
    artifact = bundle.artifact(name)
    if bundle.manifest.language:
        raise UsageError(
            f"{bundle.folder} holds a language model; edgekit.language_profile.profile_language is "
            "for it, or edgekit profile on the command line."
        )
    if reason := unmeasurable(artifact):
        raise RuntimeFailed(reason)
    threads = threads or host.cores()
    raw = in_fresh_process("edgekit.measure", bundle.folder, artifact.name, threads, runs)
    measurement = Measurement(
        artifact=artifact.name,
        device="this host",
        threads=threads,
        size_bytes=artifact.size,
        host=host.describe(),
        **{**raw, "times_ms": tuple(raw["times_ms"]), "ops": tuple(raw["ops"])},
    )
    if measurement.noise and not noisy_ok:
        raise NoisyMachine(
            f"{artifact.name} was timed, but {measurement.noise}: the median of "
            f"{measurement.percentile(50):.2f} ms may not be the model's. Close what else runs "
            "and try again, or accept it with --noisy-ok."
        )
    if save:
        bundle.write_measurement(artifact.name, measurement.to_json())
    return measurement


def unmeasurable(artifact: Artifact) -> str:
    """Why timing ``artifact`` here would say nothing of the device, or ""."""
    adapter = backend(artifact.target)
    how = adapter.emulation if isinstance(adapter, Emulation) else ""
    return how and f"{artifact.name} is run by an interpreter here; to measure it, {how}."


def in_fresh_process(
    module: str, folder: Path, name: str, threads: int, runs: int
) -> dict[str, Any]:
    """What ``python -m module`` measures of an artifact. Raises ``RuntimeFailed``."""
    command = [sys.executable, "-m", module, str(folder), name]
    command += ["--threads", str(threads), "--runs", str(runs)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as cause:
        raise RuntimeFailed(
            f"{name} did not finish in {CHILD_TIMEOUT:.0f} s; ask for fewer --runs."
        ) from cause
    if done.returncode < 0:
        crash = signal.Signals(-done.returncode).name
        raise RuntimeFailed(f"the runtime crashed with {crash} while it ran {name}.")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeFailed(f"{name} could not be measured: {last[0]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
