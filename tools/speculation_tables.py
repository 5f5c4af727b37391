"""The tables of ``bench_speculation.py``, from what it recorded; nothing is run here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

LLAMA = "llama.cpp"
OWN = "code_edit"  # the task that is not Spec-Bench's
ALL = "Spec-Bench"  # its tasks together
LOOP = 0.2  # share of an answer's 4-grams that stood in it before: from here on it is a loop

Answer = dict[
    str, Any
]  # tokens, seconds behind the first, passes; predicted and plain where planned
Question = dict[str, Any]  # task, and answers: engine -> way -> Answer
Pair = tuple[Answer, Answer]  # the faster way, and what it is held against


def behind(answer: Answer) -> int:
    """Tokens behind the first, the stop token included: those that the seconds brought."""
    return len(answer["tokens"]) - 1


def repetition(tokens: Sequence[int], size: int = 4) -> float:
    """The share of the n-grams that stood in the same answer before."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def given(question: Question, name: str, way: str) -> Answer:
    """What a way answered; single tokens where it would have been the same and was not run."""
    answers = question["answers"][name]
    found: Answer = answers.get(way, answers.get("single"))
    return found


def pairs(chosen: Sequence[Question], fast: tuple[str, str], slow: tuple[str, str]) -> list[Pair]:
    """Both answers to each question; without those where either is a single token."""
    both = [(given(each, *fast), given(each, *slow)) for each in chosen]
    return [(a, b) for a, b in both if behind(a) > 0 and behind(b) > 0]


def ratios(both: Sequence[Pair]) -> list[float]:
    """How often faster, for each question, by time a token."""
    return [(b["seconds"] / behind(b)) / (a["seconds"] / behind(a)) for a, b in both]


def pooled(both: Sequence[Pair]) -> float:
    """The same of all seconds over all tokens: long answers count for more."""
    if not both:
        return math.nan
    fast, slow = (
        sum(each["seconds"] for each in side) / sum(map(behind, side))
        for side in zip(*both, strict=True)
    )
    return float(slow / fast)


def predictions(answers: Sequence[Answer]) -> tuple[list[float], float]:
    """What the plan's seconds give for the passes taken: for each answer, and of the totals."""
    told = [each for each in answers if each.get("predicted") and behind(each) > 0]
    plain = [each["plain"] * behind(each) for each in told]
    fast = [each["predicted"] for each in told]
    return [a / b for a, b in zip(plain, fast, strict=True)], sum(plain) / sum(fast) if fast else 0


def mean(values: Sequence[float], form: str = ".2f") -> str:
    """Of no values, a dash."""
    return f"{statistics.fmean(values):{form}}" if values else "-"


def shown(values: Sequence[float]) -> str:
    """The mean, with the middle half."""
    if len(values) < 2:
        return mean(values)
    low, _, high = statistics.quantiles(values, n=4)
    return f"{mean(values)} ({low:.2f} to {high:.2f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that can be read both before and after it is rendered."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    drawn = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(drawn)


def grouped(found: Sequence[Question]) -> dict[str, list[Question]]:
    """By task; Spec-Bench's together, and our own behind them."""
    tasks = dict.fromkeys(each["task"] for each in found)
    groups = {task: [q for q in found if q["task"] == task] for task in tasks if task != OWN}
    groups[ALL] = [each for each in found if each["task"] != OWN]
    groups[OWN] = [each for each in found if each["task"] == OWN]
    return {task: chosen for task, chosen in groups.items() if chosen}


def held_to(way: str) -> str:
    """The plain decoding whose text a way should give."""
    return "single" if way == "numerical" else "exact"


def speeds(name: str, way: str, found: Sequence[Question], llama: bool) -> str:
    """How often faster: means over questions, with the middle half of them."""
    header = ["task", "(a) exact", "(b) single", "(b) predicted", *[LLAMA] * llama]
    rows = []
    for task, chosen in grouped(found).items():
        against = [(name, "exact"), (name, "single"), *[(LLAMA, "plain")] * llama]
        cells = [shown(ratios(pairs(chosen, (name, way), slow))) for slow in against]
        cells.insert(2, shown(predictions([given(each, name, way) for each in chosen])[0]))
        rows.append([task, *cells])
    return markdown(header, rows)


def texts(name: str, way: str, found: Sequence[Question], llama: bool) -> str:
    """What the texts are like, and the ratios of totals."""
    same = held_to(way)
    header = ["task", "equal", "a pass", "repeats", "(b) steady"]
    header += ["(a)", "(b)", "predicted", *[LLAMA, "lookup"] * llama]
    rows = []
    for task, chosen in grouped(found).items():
        answers = [given(each, name, way) for each in chosen]
        equal = sum(
            a["tokens"] == given(each, name, same)["tokens"]
            for a, each in zip(answers, chosen, strict=True)
        )
        passes = [behind(each) / each["passes"] for each in answers if each["passes"]]
        steady = [q for q in chosen if repetition(given(q, name, way)["tokens"]) < LOOP]
        few = ratios(pairs(steady, (name, way), (name, "single")))
        against = [(name, "exact"), (name, "single")]
        against += [(LLAMA, "plain"), (LLAMA, "lookup")] if llama else []
        totals = [f"{pooled(pairs(chosen, (name, way), slow)):.2f}" for slow in against]
        told = predictions(answers)[1]
        totals.insert(2, f"{told:.2f}" if told else "-")
        repeats = mean([repetition(each["tokens"]) for each in answers], ".0%")
        count = f"{mean(few)} ({len(few)})"
        rows.append([task, f"{equal}/{len(chosen)}", mean(passes), repeats, count, *totals])
    return markdown(header, rows)


def heading(name: str, way: str, engine: dict[str, Any]) -> str:
    """Which engine and way, and what its plan says."""
    plan = engine["plans"].get(way)
    what = "not planned here, so by single tokens"
    if plan:
        what = "off by its plan, so by single tokens"
        if way in engine["ways"]:
            what = plan["chosen"]
    narrow = engine["narrowest"]
    exact = f"exact passes hold {narrow} or more" if narrow else "no width is exact"
    if narrow == 1:
        exact = "single tokens are exact: (a) is (b)"
    return f"{name}, {way}: {what}; {exact}"


def tables(record: dict[str, Any]) -> str:
    """Two for each artifact's ``auto``, and for its ``numerical`` where that drafts."""
    about, found = record["about"], record["questions"]
    machine, engines = about["machine"], about["engines"]
    parts = [
        f"{machine['processor']}; {' '.join(machine['features'])}; {about['threads']} threads; "
        f"{len(found)} of {about['count']} questions"
    ]
    for name, engine in engines.items():
        drafts = [way for way in ("auto", "numerical") if way == "auto" or way in engine["ways"]]
        for way in drafts if name != LLAMA and found else ():
            parts.append(heading(name, way, engine))
            parts.append(speeds(name, way, found, LLAMA in engines))
            parts.append(
                f"Texts equal to {held_to(way)}, tokens a pass, share of 4-grams that stood in the "
                f"answer before,\n(b) over answers where that is below {LOOP:.0%} (how many), and "
                "ratios of all seconds over all tokens:"
            )
            parts.append(texts(name, way, found, LLAMA in engines))
    return "\n\n".join(parts)
