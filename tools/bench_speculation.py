"""Speculative decoding on Spec-Bench's questions, against plain decoding and against llama.cpp.

    edgekit spec plan BUNDLE
    python -m tools.bench_speculation BUNDLE[:ARTIFACT]... --questions question.jsonl \\
        --gguf FILE --llama-python PYTHON --json RUN
    python -m tools.bench_speculation --tables RUN

``question.jsonl`` is Spec-Bench's (arXiv 2401.07851); its texts keep their own terms, so it is not
part of this project. The first turn of each question, greedy, batch 1, the first 128 tokens; the
task ``code_edit`` is our own, from ``code_edits.txt``. Each engine runs in a process of its own and
sleeps while another works; for each question every way of decoding is asked in turn, and at the
next in the opposite order. Seconds are of decoding, behind the prompt: an engine of ours keeps it
in the cache from way to way. Tokens are ids up to the stop token, itself included, on every side.
llama.cpp reads other 4-bit weights and writes other texts, so it is compared by time a token.

``single`` is plain decoding with passes of one token, ``exact`` with passes of the narrowest exact
width, ``auto`` what ``generate`` does by the bundle's plan, ``numerical`` the same by the plan of
that grade. What would only repeat ``single`` is not run.

``predicted`` is the plan's seconds for the passes that the answer took, by their widths, and the
seconds it spent on drafting, against the plan's single pass for every token. So widths and
acceptance are those of this run; told beforehand is the time. Not in it: that a pass takes longer
the more is cached (a plan's have 256 tokens before them), choosing tokens, and the loop around.

With ``--json RUN`` a stopped run goes on where it was; only what drafters learnt from earlier texts
is lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgekit import TextModel, host
from edgekit.decode.generate import generate
from edgekit.files import write_whole
from edgekit.speculation import OFF
from tools.bench_llm import REST, Ask, artifacts, engine
from tools.speculation_tables import LLAMA, OWN, Answer, Question, tables

TOKENS = 128
WARM = 16  # tokens of each way before anything is recorded
TASKS = ("conversation", "translation", "summarization", "qa", "math_reasoning", "rag")
EDITS = Path(__file__).with_name("code_edits.txt")


def edits(path: Path = EDITS) -> list[str]:
    """Our own prompts, parted by empty lines as ``edgekit spec plan --prompts`` takes them."""
    return [part.strip() for part in path.read_text("utf-8").split("\n\n") if part.strip()]


def questions(path: Path, each: int, own: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Task and text of the first turns, ``each`` of a task, spread over its lines; ``own`` too.

    The tasks take turns, so that none has a quieter hour than another.
    """
    by_task: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        value = json.loads(line)
        task = value["category"] if value["category"] in TASKS else "conversation"
        by_task[task].append(value["turns"][0])
    if own:
        by_task[OWN] = list(own)
    columns = []
    for task, texts in by_task.items():
        count = min(each, len(texts))
        columns.append([(task, texts[index * len(texts) // count]) for index in range(count)])
    return [found for turn in zip_longest(*columns) for found in turn if found is not None]


def fitted(model: TextModel, text: str) -> list[int]:
    """The question's tokens; what is too long loses its middle."""
    tokens = model.encoded(text, chat=True)
    room = model.context - TOKENS - 40
    while len(tokens) > room:
        text = text[: len(text) * 2 // 5] + " ... " + text[len(text) * 3 // 5 + 5 :]
        tokens = model.encoded(text, chat=True)
    return tokens


def about(model: TextModel) -> dict[str, Any]:
    """The ways worth running, and the plans they go by."""
    exact = model.stepper.exact_widths
    plans = {"auto": model.plan(), "numerical": model.plan("numerical")}
    drafting = [way for way, plan in plans.items() if plan and plan.chosen != OFF]
    return {
        "ways": ["single", *["exact"] * (bool(exact) and exact[0] > 1), *drafting],
        "narrowest": exact[0] if exact else None,
        "plans": {way: plan.to_json() for way, plan in plans.items() if plan},
    }


def answer(model: TextModel, prompt: list[int], way: str, limit: int) -> Answer:
    """One text, one way; but for its last token the prompt lies in the cache."""
    if way == "exact":
        stepper = model.stepper
        stepper.rewind(len(prompt) - 1)
        decoded = generate(
            stepper, prompt[-1:], limit=limit, stops=model.stops, widths=stepper.exact_widths
        )
        tokens = [next(decoded)]
        start = time.perf_counter()
        tokens += decoded
        spent = time.perf_counter() - start
        stepper.rewind(len(prompt) - 1)
        return {"tokens": tokens, "seconds": spent, "passes": len(tokens) - 1}
    if way == "single":
        tokens = list(model.tokens(prompt, limit=limit, drafter=OFF))
    else:
        tokens = list(model.tokens(prompt, limit=limit, grade=grade(way)))
    took = model.answer
    assert took is not None
    passes = took.passes or len(tokens) - 1
    got: Answer = {"tokens": tokens, "seconds": took.decode_seconds, "passes": passes}
    plan = None if way == "single" else model.plan(grade(way))
    if plan:
        passed = sum(count * plan.costs.seconds(width) for width, count in took.widths.items())
        got |= {"widths": took.widths, "drafting": took.drafting_seconds}
        got |= {"predicted": passed + took.drafting_seconds, "plain": plan.single_seconds}
    return got


def grade(way: str) -> Any:
    """That of the plan which a way goes by."""
    return "numerical" if way == "numerical" else "bitwise"


def serve(bundle: Path, name: str, threads: int) -> None:
    """One artifact behind a pipe."""
    with TextModel(bundle, name, threads=threads) as model:
        print("ready", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            got: object
            if asked["do"] == "about":
                got = about(model)
            elif asked["do"] == "fill":
                got = list(model.tokens(asked["prompt"], limit=1, drafter=OFF))
            else:
                got = answer(model, asked["prompt"], asked["mode"], asked["limit"])
            print(json.dumps(got), flush=True)


def every_way(
    engines: dict[str, Ask],
    ways: dict[str, list[str]],
    prompt: list[int],
    stops: Sequence[int],
    *,
    limit: int = TOKENS,
    backwards: bool = False,
) -> dict[str, dict[str, Answer]]:
    """What every engine's every way makes of a prompt."""
    order = -1 if backwards else 1
    found: dict[str, dict[str, Answer]] = {name: {} for name in engines}
    for name in list(engines)[::order]:
        if name != LLAMA:
            engines[name]({"do": "fill", "prompt": prompt})
        for way in ways[name][::order]:
            time.sleep(REST)
            words = {"prompt": prompt, "limit": limit, "stops": list(stops)}
            got = engines[name]({"do": "generate", "mode": way, **words})
            found[name][way] = got
    return found


def opened(path: Path | None, known: dict[str, Any]) -> dict[str, Any]:
    """The run recorded there, to go on with, or a new one. Exits where it was another."""
    if path is None or not path.exists():
        return {"about": known, "questions": []}
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    other = [key for key, value in known.items() if record["about"].get(key) != value]
    if other:
        raise SystemExit(
            f"{path} holds a run with other {' and other '.join(other)}; go on with the same "
            "bundles, plans, questions and machine, or give --json another file."
        )
    return record


def progress(done: int, total: int, started: int, seconds: float) -> str:
    """How far, and how long it will take at the pace since this run was started."""
    left = seconds / (done - started) * (total - done)
    return f"{done} of {total} questions, about {left / 60:.0f} min left"


def measured(
    engines: dict[str, Ask],
    asked: list[tuple[str, list[int]]],
    stops: Sequence[int],
    record: dict[str, Any],
    path: Path | None,
) -> None:
    """Every question that the record lacks; it is kept after each."""
    ways = {name: each["ways"] for name, each in record["about"]["engines"].items()}
    found: list[Question] = record["questions"]
    first, start = len(found), time.perf_counter()
    if first < len(asked):
        every_way(engines, ways, asked[first][1], stops, limit=WARM)
    for number, (task, prompt) in enumerate(asked[first:], first):
        answers = every_way(engines, ways, prompt, stops, backwards=number % 2 == 0)
        found.append({"task": task, "prompt": len(prompt), "answers": answers})
        if path:
            write_whole(path, json.dumps(record).encode())
        told = progress(number + 1, len(asked), first, time.perf_counter() - start)
        print(f"{told} ({task})", file=sys.stderr, flush=True)


def commands(asked: argparse.Namespace, context: int) -> Iterator[tuple[str, list[str]]]:
    """Each engine's name, and the process that it runs in."""
    if asked.gguf:
        path = str(Path(__file__).with_name("llama_engine.py"))
        yield LLAMA, [asked.llama_python, path, str(asked.gguf), str(asked.threads), str(context)]
    for label, folder, name, _ in artifacts(asked.bundles):
        here = [sys.executable, "-m", "tools.bench_speculation", "--serve"]
        yield label, [*here, str(folder), name, str(asked.threads)]


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE[:ARTIFACT]")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--each", type=int, default=40, help="questions of each task")
    parser.add_argument("--no-code-edits", action="store_true", help="Spec-Bench's tasks alone")
    parser.add_argument("--threads", type=int, default=host.cores())
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--json", type=Path, help="keep every answer; go on where a run stopped")
    parser.add_argument(
        "--tables", type=Path, metavar="FILE", help="those of a --json, run nothing"
    )
    asked = parser.parse_args()
    if not asked.tables and not (asked.bundles and asked.questions):
        parser.error("give bundles and --questions, or --tables FILE")
    return asked


def main() -> None:
    """Two tables for each artifact that is asked, and each grade that drafts."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    asked = arguments()
    if asked.tables:
        return print(tables(json.loads(asked.tables.read_text("utf-8"))))
    _, folder, name, _ = artifacts(asked.bundles)[0]
    words = TextModel(folder, name)
    own = () if asked.no_code_edits else edits()
    chosen = [(t, fitted(words, text)) for t, text in questions(asked.questions, asked.each, own)]
    with ExitStack() as stack:
        engines = {
            label: stack.enter_context(engine(command))
            for label, command in commands(asked, words.context + 64)
        }
        known: dict[str, Any] = {
            label: {"ways": ["plain", "lookup"], "file": asked.gguf.name, "plans": {}}
            if label == LLAMA
            else ask({"do": "about"})
            for label, ask in engines.items()
        }
        run = {
            "machine": host.describe(),
            "threads": asked.threads,
            "count": len(chosen),
            "questions": hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16],
            "engines": known,
        }
        record = opened(asked.json, run)
        measured(engines, chosen, words.stops, record, asked.json)
    return print(tables(record))


if __name__ == "__main__":
    main()
