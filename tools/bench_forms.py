"""Latency of PartialNet's forms on each runtime, interleaved in one run. Prints a Markdown table.

    python tools/bench_forms.py                      PartialNet-T0 and FasterNet-T0, 1 and 2 threads
    python tools/bench_forms.py --rounds 5 --threads 1

Variants of one thread count run in turn, a burst of runs each, round after round, so that all
meet the same noise. A ratio is taken within a round; the spread is over rounds. Every thread
count has its own process, since the thread pools of torch and ExecuTorch are one for a process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import edgekit
from edgekit import host
from edgekit.capture import capture, reference_from
from edgekit.model import Model
from edgekit.recipe import FP32
from edgekit.source import resolve
from edgekit.speed import burst

MODELS = ("partialnet-t0", "fasternet-t0")
TARGETS = ("onnxruntime", "executorch")
BURST_SECONDS = 0.4
Runs = dict[str, Callable[[], object]]


def eager(model: Model) -> Callable[[], object]:
    """One run of the trained form in PyTorch."""
    x = torch.from_numpy(np.asarray(model.samples[0]["images"]))

    def run() -> object:
        with torch.inference_mode():
            return model.module(x)

    return run


def variants(name: str, threads: int, stack: ExitStack) -> Runs:
    """Every form of a model, opened and proven, by what it is called in the table."""
    model = resolve(name)
    reference = reference_from(model)
    runs: Runs = {f"{name} | eager torch | trained": eager(model)}
    for target in TARGETS:
        backend = edgekit.backend(target)
        for form in (None, getattr(backend, "form", None)):
            chosen = model if form else replace(model, deploy=None)
            artifact = backend.lower(capture(chosen, reference, form=form), FP32)
            edgekit.verify(backend, artifact, reference).require()
            session = stack.enter_context(backend.open(artifact, threads=threads))
            sample = reference.samples[0]
            label = "deploy" if form else "trained, plainly"
            runs[f"{name} | {target} | {label}"] = partial(session.run, sample)
    return runs


def measure(threads: int, rounds: int) -> dict[str, list[float]]:
    """Medians of every variant, round by round."""
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        runs: Runs = {}
        for name in MODELS:
            runs |= variants(name, threads, stack)
        medians: dict[str, list[float]] = {title: [] for title in runs}
        for number in range(rounds):
            print(f"{threads} threads, round {number + 1} of {rounds}", file=sys.stderr)
            for title, run in runs.items():
                medians[title].append(burst(run, BURST_SECONDS))
    return medians


def rows(medians: Mapping[str, Sequence[float]], threads: int) -> list[str]:
    """Table rows: p50, and the ratio to the plain export on the same runtime."""
    lines = []
    for title, times in medians.items():
        name, target, _ = title.split(" | ")
        plain = medians.get(f"{name} | {target} | trained, plainly", times)
        ratios = [p / t for p, t in zip(plain, times, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        shown = "" if target == "eager torch" else spread
        lines.append(f"| {title} | {threads} | {statistics.median(times):.2f} ms | {shown} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each thread count in its own process, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        print(json.dumps(measure(int(asked.threads), asked.rounds)))
        return 0
    lines = []
    for threads in asked.threads.split(","):
        words = ["--child", "--threads", threads, "--rounds", str(asked.rounds)]
        done = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True
        )
        lines += rows(json.loads(done.stdout.splitlines()[-1]), int(threads))
    machine = host.describe()
    print(f"{machine['processor']}, {machine['cores']} cores: {' '.join(machine['features'])}")  # type: ignore[arg-type]
    print("\n| model | runtime | form | threads | p50 | speed against the plain export |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
