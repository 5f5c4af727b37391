"""Speculative decoding on Spec-Bench's questions, against plain decoding and against llama.cpp.

    edgekit spec plan BUNDLE
    python -m tools.bench_speculation BUNDLE[:ARTIFACT]... --questions question.jsonl \\
        --gguf FILE --llama-python PYTHON

``question.jsonl`` is Spec-Bench's (arXiv 2401.07851); its texts keep their own terms, so it is not
part of this project. The first turn of each question, greedy, batch 1, the first 128 tokens. Each
engine runs in a process of its own and waits while another works; for each question every way of
decoding is asked in turn. Seconds are of decoding, behind the prompt.

``single`` is plain decoding with passes of one token, ``exact`` with passes of the narrowest exact
width, ``auto`` what ``generate`` does by the bundle's plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgekit import TextModel, host
from edgekit.decode.generate import generate
from edgekit.render import table
from tools.bench_llm import REST, Ask, artifacts, engine

TOKENS = 128
TASKS = ("conversation", "translation", "summarization", "qa", "math_reasoning", "rag")
WAYS = ("single", "exact", "auto")


def questions(path: Path, each: int) -> list[tuple[str, str]]:
    """Task and text of the first turns, ``each`` of a task, spread over its lines."""
    by_task: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        value = json.loads(line)
        task = value["category"] if value["category"] in TASKS else "conversation"
        by_task[task].append(value["turns"][0])
    return [
        (task, texts[index * len(texts) // min(each, len(texts))])
        for task, texts in by_task.items()
        for index in range(min(each, len(texts)))
    ]


def fitted(model: TextModel, text: str) -> list[int]:
    """The question's tokens; what is too long loses its middle."""
    tokens = model.encoded(text, chat=True)
    room = model.context - TOKENS - 40
    while len(tokens) > room:
        text = text[: len(text) * 2 // 5] + " ... " + text[len(text) * 3 // 5 + 5 :]
        tokens = model.encoded(text, chat=True)
    return tokens


def answer(model: TextModel, asked: dict[str, Any]) -> dict[str, object]:
    """One text, one way."""
    prompt, way = asked["prompt"], asked["mode"]
    list(model.tokens([prompt[0] ^ 1], limit=1, drafter="off"))  # so that no prompt is reused
    if way == "exact":
        stepper = model.stepper
        stepper.rewind(0)
        decoded = generate(
            stepper, prompt, limit=TOKENS, stops=model.stops, widths=stepper.exact_widths
        )
        tokens = [next(decoded)]
        start = time.perf_counter()
        tokens += decoded
        return {"tokens": tokens, "seconds": time.perf_counter() - start, "passes": len(tokens) - 1}
    drafter = "auto" if way == "auto" else "off"
    tokens = list(model.tokens(prompt, limit=TOKENS, drafter=drafter))
    took = model.answer
    assert took is not None
    passes = took.passes or len(tokens) - 1
    return {"tokens": tokens, "seconds": took.decode_seconds, "passes": passes}


def serve(bundle: Path, name: str, threads: int) -> None:
    """One artifact behind a pipe."""
    with TextModel(bundle, name, threads=threads) as model:
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(model, json.loads(line))), flush=True)


Rate = dict[str, Any]  # one answer: seconds a token, tokens, tokens a pass


def asked_once(ask: Ask, prompt: list[int], way: str, stops: Sequence[int]) -> Rate:
    """What one way made of one question."""
    time.sleep(REST)
    words = {"prompt": prompt, "limit": TOKENS, "stops": list(stops)}
    got = ask({"do": "generate", "mode": way, **words})
    behind = max(len(got["tokens"]) - 1, 1)
    return {
        "seconds": got["seconds"] / behind,
        "tokens": got["tokens"],
        "per_pass": behind / got["passes"] if got["passes"] else 0.0,
    }


def measured(
    engines: dict[str, Ask], asked: list[tuple[str, list[int]]], stops: Sequence[int]
) -> list[dict[tuple[str, str], Rate]]:
    """For each question, every engine's every way."""
    found = []
    for number, (task, prompt) in enumerate(asked):
        rates = {}
        names = list(engines) if number % 2 else list(reversed(engines))
        for name in names:
            for way in ("plain", "lookup") if name == "llama.cpp" else WAYS:
                rates[name, way] = asked_once(engines[name], prompt, way, stops)
        found.append(rates)
        print(f"{number + 1} of {len(asked)}: {task}", file=sys.stderr, flush=True)
    return found


def ratios(
    rates: Sequence[dict[tuple[str, str], Rate]], fast: tuple[str, str], slow: tuple[str, str]
) -> list[float]:
    """How often faster, for each question, by time a token."""
    return [each[slow]["seconds"] / each[fast]["seconds"] for each in rates]


def shown(values: Sequence[float]) -> str:
    """The mean, with the middle half."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.fmean(values):.2f} ({low:.2f} to {high:.2f})"


def report(
    name: str, tasks: Sequence[str], rates: Sequence[dict[tuple[str, str], Rate]], llama: bool
) -> str:
    """The table of one artifact: every task, and all of them."""
    rows = []
    for task in (*dict.fromkeys(tasks), "all"):
        chosen = [r for t, r in zip(tasks, rates, strict=True) if task in (t, "all")]
        fast = name, "auto"
        against = [(name, "exact"), (name, "single")]
        against += [("llama.cpp", "plain"), ("llama.cpp", "lookup")] if llama else []
        same = sum(r[name, "auto"]["tokens"] == r[name, "exact"]["tokens"] for r in chosen)
        rows.append(
            (
                task,
                f"{same} of {len(chosen)}",
                f"{statistics.fmean(r[fast]['per_pass'] for r in chosen):.2f}",
                *(shown(ratios(chosen, fast, slow)) for slow in against),
            )
        )
    header = ["task", "equal to exact", "tokens a pass", "x exact (a)", "x single (b)"]
    header += ["x llama.cpp", "x its lookup"] if llama else []
    return f"{name}, auto:\n{table(header, rows)}"


def main() -> None:
    """A table for each artifact; with --json FILE, every answer too."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[:ARTIFACT]")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--each", type=int, default=40, help="questions of each task")
    parser.add_argument("--threads", type=int, default=host.cores())
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    machine = host.describe()
    print(f"{machine['processor']}; {' '.join(machine['features'])}; {asked.threads} threads")  # type: ignore[arg-type]
    found = artifacts(asked.bundles)
    words = TextModel(found[0][1], found[0][2])
    chosen = [(task, fitted(words, text)) for task, text in questions(asked.questions, asked.each)]
    with ExitStack() as stack:
        engines: dict[str, Ask] = {}
        if asked.gguf:
            path = str(Path(__file__).with_name("llama_engine.py"))
            size = str(words.context + 64)
            command = [asked.llama_python, path, str(asked.gguf), str(asked.threads), size]
            engines["llama.cpp"] = stack.enter_context(engine(command))
        for label, folder, name, _ in found:
            command = [sys.executable, "-m", "tools.bench_speculation", "--serve"]
            command += [str(folder), name, str(asked.threads)]
            engines[label] = stack.enter_context(engine(command))
        rates = measured(engines, chosen, words.stops)
    tasks = [task for task, _ in chosen]
    for label, _, _, _ in found:
        print("\n" + report(label, tasks, rates, bool(asked.gguf)))
    if asked.json:
        plain = [
            {"task": task, **{" ".join(key): rate for key, rate in each.items()}}
            for task, each in zip(tasks, rates, strict=True)
        ]
        asked.json.write_text(json.dumps({"machine": machine, "questions": plain}))
    return None


if __name__ == "__main__":
    main()
