"""Speed and memory of a language artifact on this machine; a noisy run is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from edgekit import host
from edgekit.bundle import Bundle
from edgekit.errors import NoisyMachine, RuntimeFailed
from edgekit.evidence import percentile
from edgekit.profile import in_fresh_process, noise_of, unmeasurable


@dataclass(frozen=True)
class LanguageMeasurement:
    """What was measured. Milliseconds and bytes.

    ``first_token_ms`` is of a prompt of ``prompt_tokens``, with everything cold; ``prefill_ms``
    the same warm. ``times_ms`` are passes of one token behind that prompt. ``passes_ms`` gives,
    for two lengths of what is cached, the median pass of each number of tokens: the T(N) that
    speculative decoding lives by.
    """

    artifact: str
    device: str
    threads: int
    import_ms: float
    cold_load_ms: float
    warm_load_ms: float
    first_token_ms: float
    prompt_tokens: int
    prefill_ms: float
    times_ms: tuple[float, ...]
    passes_ms: Mapping[str, Mapping[str, float]]
    peak_memory_bytes: int
    model_memory_bytes: int
    size_bytes: int
    others_busy_cores: float | None
    host: Mapping[str, object]

    @property
    def decode_tokens_per_second(self) -> float:
        """By the median pass of one token."""
        return 1e3 / percentile(self.times_ms, 50)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of a warm prompt."""
        return 1e3 * self.prompt_tokens / self.prefill_ms

    @property
    def noise(self) -> str:
        """Why this figure should not be trusted, or ""."""
        return noise_of(self.times_ms, self.others_busy_cores, self.host)

    def to_json(self) -> dict[str, object]:
        """All fields, with the rates, the percentiles and the noise."""
        shown = {f"p{percent}_ms": percentile(self.times_ms, percent) for percent in (50, 90, 99)}
        rates = {
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
        }
        return {**shown, **rates, "noise": self.noise, **asdict(self)}


def profile_language(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    runs: int = 100,
    noisy_ok: bool = False,
    save: bool = True,
) -> LanguageMeasurement:
    """Measure one language artifact in a fresh process, with its whole context filled once.

    Raises ``NoisyMachine`` where the figure cannot be trusted, unless ``noisy_ok``. The result
    goes into the bundle as perf.json.
    """
    artifact = bundle.artifact(name)
    if reason := unmeasurable(artifact):
        raise RuntimeFailed(reason)
    threads = threads or host.cores()
    raw = in_fresh_process("edgekit.language_measure", bundle.folder, artifact.name, threads, runs)
    measurement = LanguageMeasurement(
        artifact=artifact.name,
        device="this host",
        threads=threads,
        size_bytes=artifact.size,
        host=host.describe(),
        **{**raw, "times_ms": tuple(raw["times_ms"])},
    )
    if measurement.noise and not noisy_ok:
        raise NoisyMachine(
            f"{artifact.name} was timed, but {measurement.noise}: "
            f"{measurement.decode_tokens_per_second:.0f} tokens/s may not be the model's. Close "
            "what else runs and try again, or accept it with --noisy-ok."
        )
    if save:
        bundle.write_measurement(artifact.name, measurement.to_json())
    return measurement
