"""edgekit's language artifacts against llama.cpp on the same GGUF, interleaved on this machine.

    python tools/bench_llm.py out/smollm2 out/smollm2-kernel8:onnxruntime-int4 --gguf FILE \\
        --llama-python PYTHON

``PYTHON`` is one that has llama-cpp-python, built with ``CMAKE_ARGS=-DGGML_NATIVE=ON``. Every
engine runs in a process of its own and waits on a pipe while another is timed. A round asks each
for the same; ratios are taken within a round, and their median is given with the middle half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import host, open_bundle
from edgekit.bundle import Bundle
from edgekit.contract import Decodes
from edgekit.decode.scoring import read
from edgekit.decode.stepper import Stepper, feed
from edgekit.registry import backend, distance
from edgekit.render import table

WIDTHS = (1, 2, 4, 8, 16, 32)
PROMPT, LENGTH, CONTEXT = 256, 256, 1088
BURST = 8  # single-token passes timed together in a round
REST = 0.05  # seconds for the threads of the last engine to fall asleep

Ask = Callable[[dict[str, Any]], Any]


def answer(stepper: Stepper, asked: dict[str, Any]) -> object:
    """Seconds of a prompt or of a pass, or the losses of a text: what ``llama_engine`` does too."""
    if asked["do"] == "prefill":
        stepper.rewind(0)
        start = time.perf_counter()
        feed(stepper, asked["tokens"])
        return time.perf_counter() - start
    if asked["do"] == "pass":
        stepper.rewind(asked["length"])
        start = time.perf_counter()
        stepper.step(asked["tokens"])
        return time.perf_counter() - start
    reading = read(stepper, asked["tokens"])
    return {"losses": reading.losses.tolist(), "likeliest": reading.likeliest.tolist()}


def serve(bundle: Path, name: str, threads: int) -> None:
    """One artifact behind a pipe."""
    artifact = open_bundle(bundle).artifact(name)
    adapter = backend(artifact.target)
    assert isinstance(adapter, Decodes)
    with adapter.open_decoder(artifact, threads=threads) as stepper:
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(stepper, json.loads(line))), flush=True)


@contextmanager
def engine(command: Sequence[str]) -> Iterator[Ask]:
    """A child process that answers requests."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def receive() -> str:
            assert child.stdout is not None
            while line := child.stdout.readline():
                if line.startswith(("ready", "{", "[")) or line[:1].isdigit():
                    return line
            raise SystemExit(f"{command} ended before it answered; run it by hand to see why.")

        def ask(request: dict[str, Any]) -> Any:
            assert child.stdin is not None
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            return json.loads(receive())

        receive()
        yield ask
        child.stdin.close()
        child.wait(20)


def timed(
    engines: dict[str, Ask], vocabulary: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """For each engine and each thing asked, the seconds of every round."""
    tokens = [(7 * index + 3) % vocabulary for index in range(PROMPT)]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in engines}

    def keep(name: str, what: str, seconds: float) -> None:
        times[name].setdefault(what, []).append(seconds)

    for round_ in range(rounds + 1):  # the first is to warm up
        order = list(engines) if round_ % 2 else list(reversed(engines))
        for name in order:
            time.sleep(REST)
            spent = engines[name]({"do": "prefill", "tokens": tokens})
            for width in WIDTHS:
                bursts = BURST if width == 1 else 2
                request = {"do": "pass", "length": LENGTH, "tokens": tokens[:width]}
                passes = [engines[name](request) for _ in range(bursts + 1)][1:]
                if round_:
                    keep(name, f"T{width}", statistics.median(passes))
            if round_:
                keep(name, "prefill", spent)
        print(f"round {round_} of {rounds}", file=sys.stderr, flush=True)
    return times


def bandwidth(threads: int) -> float:
    """Bytes a second that ``threads`` processes read together from memory."""
    code = (
        "import numpy as np, time; a = np.ones(1 << 26, np.float32); a.sum(); t = time.time(); "
        "[a.max() for _ in range(8)]; print(8 * a.nbytes / (time.time() - t))"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(threads)
    ]
    return sum(float(child.communicate()[0]) for child in children)


def spread(ratios: Sequence[float]) -> str:
    """The median, with the middle half."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def rows(times: dict[str, dict[str, list[float]]], base: str) -> list[tuple[str, ...]]:
    """One row for each engine: speeds, and against ``base`` in the same round."""
    shown = []
    for name, found in times.items():
        one = found["T1"]
        curve = [
            f"{statistics.median([a / b for a, b in zip(found[f'T{w}'], one, strict=True)]):.2f}"
            for w in WIDTHS[1:]
        ]
        against = [
            spread([b / a for a, b in zip(found[what], times[base][what], strict=True)])
            for what in ("T1", "prefill")
        ]
        shown.append(
            (
                name,
                f"{1e3 * statistics.median(one):.2f} ms",
                f"{1e3 * min(one):.2f} ms",
                f"{1 / statistics.median(one):.1f}",
                against[0],
                f"{PROMPT / statistics.median(found['prefill']):.0f}",
                against[1],
                *curve,
            )
        )
    return shown


def artifacts(words: Sequence[str]) -> list[tuple[str, Path, str, Bundle]]:
    """Label, bundle and artifact of each ``BUNDLE`` or ``BUNDLE:ARTIFACT`` that runs here."""
    found = []
    for word in words:
        folder, _, name = word.partition(":")
        bundle = open_bundle(folder)
        names = [name] if name else list(bundle.artifacts)
        found += [
            (f"{Path(folder).name}:{each}", Path(folder), each, bundle)
            for each in names
            if distance(bundle.artifact(each).target) == 0
        ]
    return found


def bench(asked: argparse.Namespace, threads: int) -> dict[str, Any]:
    """All engines at one number of threads: the table, the perplexities, the roofline."""
    found = artifacts(asked.bundles)
    reference = found[0][3].language_reference()
    with ExitStack() as stack:
        llama = str(Path(__file__).with_name("llama_engine.py"))
        words = [asked.llama_python, llama, str(asked.gguf), str(threads), str(CONTEXT)]
        engines = {"llama.cpp": stack.enter_context(engine(words))}
        for label, folder, name, _ in found:
            words = [sys.executable, __file__, "--serve", str(folder), name, str(threads)]
            engines[label] = stack.enter_context(engine(words))
        times = timed(engines, reference.logits.shape[1], asked.rounds)
        losses = {}
        if threads == asked.threads[0]:
            for name, ask in engines.items():
                got = ask({"do": "losses", "tokens": list(reference.text)})
                count = len(got["losses"])
                same = np.asarray(got["likeliest"]) == reference.likeliest[:count]
                eager = float(np.exp(reference.losses[:count].mean()))
                losses[name] = (float(np.exp(np.mean(got["losses"]))), eager, float(same.mean()))
    header = ("engine", "T(1)", "least", "tokens/s", "x llama.cpp", "prefill/s", "x llama.cpp")
    print(f"\n{threads} thread(s), {LENGTH} tokens cached; T(N)/T(1) for N = 2 4 8 16 32")
    curve = tuple(f"T{width}" for width in WIDTHS[1:])
    print(table((*header, *curve), rows(times, "llama.cpp")))
    roofline(times, found, asked.gguf, threads)
    if losses:
        print("\nthe same text, token by token; eager is PyTorch in float32:")
        words_ = [(n, f"{p:.3f}", f"{e:.3f}", f"{s:.2%}") for n, (p, e, s) in losses.items()]
        print(table(("engine", "perplexity", "eager", "same next token"), words_))
    return {"threads": threads, "times": times, "losses": losses}


def roofline(
    times: dict[str, dict[str, list[float]]],
    found: Sequence[tuple[str, Path, str, Bundle]],
    gguf: Path,
    threads: int,
) -> None:
    """Bytes of weights over the bandwidth: what share of it decoding reaches."""
    rate = bandwidth(threads)
    sizes = {"llama.cpp": gguf.stat().st_size}
    for label, _, name, bundle in found:
        sizes[label] = bundle.artifact(name).model_size
    listed = [
        (
            name,
            f"{sizes[name] / 1e6:.1f} MB",
            f"{1e3 * sizes[name] / rate:.2f} ms",
            f"{sizes[name] / rate / statistics.median(found_['T1']):.0%}",
        )
        for name, found_ in times.items()
    ]
    print(f"\nroofline: {rate / 1e9:.1f} GB/s read by {threads} process(es)")
    print(table(("engine", "file", "file / bandwidth", "share reached"), listed))


def main() -> None:
    """The tables on stdout; with --json FILE, every time too."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[:ARTIFACT]")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    machine = host.describe()
    print(f"{machine['processor']}; {' '.join(machine['features'])}; {machine['cores']} cores")  # type: ignore[arg-type]
    results = [bench(asked, threads) for threads in asked.threads]
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine, "results": results}))
    return None


if __name__ == "__main__":
    main()
