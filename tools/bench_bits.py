"""One file at four bit-widths: its size, the time of a switch, and that every width is exact.

    python tools/bench_bits.py                         partialnet-t0 on every target
    python tools/bench_bits.py --targets onnxruntime,executorch --model partialnet-nano \\
        --calibration FILE.npz --labels FILE.npz       with the accuracy of each width

For each target: the artifact of ``--precision any``, and those of any8, any6, any4 and any2 made
separately; sizes; the time from ``set_bits`` to a session that has answered once, against the
time of a run; whether outputs equal those of the separate artifact to the bit. Without labels
the accuracy column is the SQNR of random inputs, and means nothing for a trained model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit import host
from edgekit.accuracy import Labelled, answers, read_labelled
from edgekit.artifact import Artifact
from edgekit.calibration import checked_calibration, read_calibration
from edgekit.contract import Backend, Emulation, Switchable
from edgekit.making import Captures, lowered
from edgekit.model import Model
from edgekit.planning import plan
from edgekit.recipe import WIDTHS
from edgekit.render import size_text, table
from edgekit.samples import draw_samples
from edgekit.source import resolve
from edgekit.speed import race
from edgekit.verify import verify

SWITCHES = 9  # once where an interpreter runs: there a switch is to parse the package again


def compare_widths(
    adapter: Backend, captures: Captures, model: Model, labelled: Labelled | None
) -> list[tuple[object, ...]]:
    """Rows of the table for one target."""
    (every,) = plan([adapter.name], "any")
    (baseline,) = plan([adapter.name], "fp32" if adapter.name != "tensorrt" else "fp16")
    program = captures.program(adapter, every.recipe)
    one = lowered(adapter, every.recipe, program)
    separate = {
        bits: lowered(adapter, replace(every.recipe, weights=f"any{bits}"), program)  # type: ignore[arg-type]
        for bits in WIDTHS
    }
    together = sum(each.model_size for each in separate.values())
    # As if each separate file were packed to its width, which no convolution kernel here reads.
    packed = sum(one.model_size - round(_codes(one) * (1 - bits / 8)) for bits in WIDTHS)
    plain = lowered(adapter, baseline.recipe, captures.program(adapter))
    rows: list[tuple[object, ...]] = []
    with adapter.open(one) as session:
        if not isinstance(session, Switchable):
            raise edgekit.UsageError(f"{adapter.name} does not switch.")
        for bits in WIDTHS:
            switch = _switch_ms(session, bits, model, 1 if _emulated(adapter) else SWITCHES)
            session.set_bits(bits)
            right = [session.run(sample) for sample in model.samples]
            with adapter.open(separate[bits]) as other:
                same = all(
                    np.array_equal(answer[name], theirs[name])
                    for answer, sample in zip(right, model.samples, strict=True)
                    for theirs in (other.run(sample),)
                    for name in answer
                )
            rows.append(
                (
                    adapter.name,
                    bits,
                    size_text(one.model_size),
                    f"{one.model_size / together:.1%}",
                    f"{one.model_size / packed:.1%}",
                    f"{switch:.1f} ms",
                    "equal" if same else "DIFFERENT",
                    _quality(adapter, separate[bits], captures, labelled),
                    _speed(adapter, plain, separate[bits], model),
                )
            )
    return rows


def _codes(artifact: Artifact) -> int:
    """Bytes of codes, one for each quantized weight."""
    codes: Any = artifact.provenance["codes"]
    return sum(int(place["count"]) for place in codes["places"])


def _emulated(adapter: Backend) -> bool:
    return isinstance(adapter, Emulation) and bool(adapter.emulation)


def _switch_ms(session: edgekit.Session, bits: int, model: Model, switches: int) -> float:
    """Median milliseconds of a switch to ``bits`` and the first answer, less those of a run."""
    assert isinstance(session, Switchable)
    sample, times = model.samples[0], []
    for _ in range(switches):
        session.set_bits(8 if bits != 8 else 2)
        session.run(sample)
        start = time.perf_counter()
        session.set_bits(bits)
        session.run(sample)
        switched = time.perf_counter()
        session.run(sample)
        times.append(1e3 * (2 * switched - start - time.perf_counter()))
    return statistics.median(times)


def _quality(
    adapter: Backend, artifact: Artifact, captures: Captures, labelled: Labelled | None
) -> str:
    if labelled is None:
        outputs = verify(adapter, artifact, captures.reference).outputs
        return f"{min(each.sqnr_db or 0.0 for each in outputs):.1f} dB"
    with adapter.open(artifact) as session:
        given = answers(session, labelled)
    return f"{(given == labelled.labels).mean():.2%}"


def _speed(adapter: Backend, plain: Artifact, artifact: Artifact, model: Model) -> str:
    if _emulated(adapter):
        return "on the device"
    return str(race(adapter, plain, artifact, model.samples[0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="partialnet-t0")
    parser.add_argument("--targets", default="onnxruntime,executorch,coreml,tensorrt")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--labels", type=Path)
    asked = parser.parse_args(arguments)
    model = resolve(asked.model)
    if asked.calibration:
        data = read_calibration(asked.calibration, model.inputs, model.image)
    else:
        drawn = draw_samples(model.inputs, model.image, count=16)
        data = checked_calibration(drawn, "random, seed 0")
    labelled = (
        read_labelled(asked.labels, model.inputs, model.image, model.labels)
        if asked.labels
        else None
    )
    captures = Captures(model, calibration=data)
    rows = []
    for target in asked.targets.split(","):
        print(f"{asked.model} on {target}", file=sys.stderr)
        rows += compare_widths(edgekit.backend(target), captures, model, labelled)
    machine = host.describe()
    print(f"{machine['processor']}, {machine['cores']} cores: {' '.join(machine['features'])}\n")  # type: ignore[arg-type]
    quality = "top-1" if labelled else "SQNR"
    header = (
        "target",
        "bits",
        "one file",
        "of four",
        "of four packed",
        "switch",
        "outputs",
        quality,
    )
    print(table((*header, "speed against float"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
