"""The bench of speculation: which questions, what its tables say, and a run that goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools import bench_speculation as bench
from tools import speculation_tables as drawn
from tools.bench_llm import Ask

PLAN = {"chosen": "lookup"}
ENGINE: dict[str, Any] = {
    "ways": ["single", "exact", "auto"],
    "narrowest": 2,
    "plans": {"auto": PLAN},
}


def made(tokens: list[int], seconds: float, passes: int, **more: object) -> drawn.Answer:
    return {"tokens": tokens, "seconds": seconds, "passes": passes, **more}


def question(task: str, auto: drawn.Answer, single: drawn.Answer) -> drawn.Question:
    return {"task": task, "answers": {"it": {"auto": auto, "single": single}}}


COUNTED = list(range(9))  # no 4-gram twice
FAST = question(
    "qa", made(COUNTED, 1.0, 4, predicted=2.0, plain=0.5), made([*COUNTED, 9, 10], 5.0, 10)
)
LOOPING = question("rag", made([7] * 5, 1.0, 2, predicted=1.0, plain=0.5), made([7] * 5, 6.0, 4))
LONE = question("qa", made([1], 0.0, 0), made([1], 0.0, 0))


def row(table: str, task: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {task} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_our_edits_are_parted_as_spec_plan_takes_them() -> None:
    prompts = bench.edits()
    assert len(prompts) == len(set(prompts)) == 20
    for prompt in prompts:
        instruction, *code = prompt.splitlines()
        assert "ive back the whole code" in instruction
        assert 8 <= len(code) <= 25
        assert all(line.strip() for line in code)


def test_tasks_take_turns_and_are_spread_over_their_lines(tmp_path: Path) -> None:
    lines = [{"category": c, "turns": [f"{c} {i}"]} for c in ("qa", "rag") for i in range(4)]
    lines.append({"category": "writing", "turns": ["a poem", "a longer one"]})
    file = tmp_path / "questions"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert bench.questions(file, 2, ["edit"]) == [
        ("qa", "qa 0"),
        ("rag", "rag 0"),
        ("conversation", "a poem"),
        ("code_edit", "edit"),
        ("qa", "qa 2"),
        ("rag", "rag 2"),
    ]


def test_a_loop_repeats_and_a_count_does_not() -> None:
    assert drawn.repetition(COUNTED) == 0
    assert drawn.repetition([1, 2, 3, 1, 2, 3, 1]) == 0.25  # of 4 the last is the first
    assert drawn.repetition([5] * 8) == 0.8
    assert drawn.repetition([5] * 3) == 0


def test_ratios_are_by_time_a_token_behind_the_first() -> None:
    both = drawn.pairs([FAST, LOOPING, LONE], ("it", "auto"), ("it", "single"))
    assert len(both) == 2
    assert drawn.ratios(both) == [4.0, 6.0]
    assert drawn.pooled(both) == pytest.approx((11 / 14) / (2 / 12))
    assert math.isnan(drawn.pooled(drawn.pairs([LONE], ("it", "auto"), ("it", "single"))))


def test_what_was_not_run_is_what_single_tokens_gave() -> None:
    single = FAST["answers"]["it"]["single"]
    assert drawn.given(FAST, "it", "exact") == single
    assert drawn.given(FAST, "it", "auto") != single


def test_predictions_are_held_against_single_passes() -> None:
    answers = [each["answers"]["it"]["auto"] for each in (FAST, LOOPING, LONE)]
    assert drawn.predictions(answers) == ([2.0, 2.0], 2.0)
    unplanned = [each["answers"]["it"]["single"] for each in (FAST, LOOPING)]
    assert drawn.predictions(unplanned) == ([], 0)


def test_loops_are_left_out_of_the_steady_speed_up() -> None:
    table = drawn.texts("it", "auto", [FAST, LOOPING], llama=False)
    assert row(table, "qa")[1:6] == ["0/1", "2.00", "0%", "4.00 (1)", "4.00"]
    assert row(table, "rag")[1:5] == ["1/1", "2.00", "50%", "- (0)"]
    assert row(table, "Spec-Bench")[1:5] == ["1/2", "2.00", "25%", "4.00 (1)"]


def test_our_own_task_is_no_part_of_spec_benchs_mean() -> None:
    own = question("code_edit", made(COUNTED, 1.0, 8), made(COUNTED, 100.0, 8))
    table = drawn.speeds("it", "auto", [own, FAST], llama=False)
    assert row(table, "Spec-Bench")[2] == "4.00"
    assert row(table, "code_edit")[2] == "100.00"
    assert table.splitlines()[-1].startswith("| code_edit")


@pytest.mark.parametrize(
    ("way", "engine", "said"),
    [
        ("auto", ENGINE, "lookup; exact passes hold 2 or more"),
        ("auto", {**ENGINE, "ways": ["single"]}, "off by its plan"),
        ("auto", {**ENGINE, "plans": {}}, "not planned here"),
        ("auto", {**ENGINE, "narrowest": 1}, "(a) is (b)"),
        ("auto", {**ENGINE, "narrowest": None}, "no width is exact"),
    ],
)
def test_the_heading_says_what_auto_came_to(way: str, engine: dict[str, Any], said: str) -> None:
    assert said in drawn.heading("it", way, engine)


def test_tables_fit_a_page() -> None:
    both = {"plain": made(COUNTED, 10.0, 8), "lookup": made(COUNTED, 9.0, 0)}
    answers = {"it": FAST["answers"]["it"], drawn.LLAMA: both}
    found = [{"task": task, "answers": answers} for task in (*bench.TASKS, drawn.OWN) * 40]
    engines = {"it": ENGINE, drawn.LLAMA: {"ways": ["plain", "lookup"], "plans": {}}}
    machine = {"processor": "a processor", "features": ["avx2"]}
    about = {"machine": machine, "threads": 2, "count": 300, "engines": engines}
    text = drawn.tables({"about": about, "questions": found})
    assert "280 of 300 questions" in text
    assert max(map(len, text.splitlines())) <= 110


class Engines:
    """One engine that answers at once, until it is told to break."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self._breaks_at = breaks_at

    def __call__(self, request: dict[str, Any]) -> Any:
        if request["do"] == "fill":
            return []
        if request["prompt"] == [self._breaks_at] and request["limit"] == bench.TOKENS:
            raise KeyboardInterrupt
        self.asked.append((request["mode"], str(request["prompt"]), request["limit"]))
        return made(COUNTED, 1.0, 8)


def run(engine: Ask, about: dict[str, Any], file: Path) -> dict[str, Any]:
    record = bench.opened(file, about)
    asked = [("qa", [number]) for number in range(4)]
    bench.measured({"it": engine}, asked, [0], record, file)
    return record


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REST", 0)
    about, file = {"threads": 2, "engines": {"it": ENGINE}}, tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(Engines(breaks_at=2), about, file)
    assert len(json.loads(file.read_text())["questions"]) == 2
    again = Engines()
    record = run(again, about, file)
    assert [each["prompt"] for each in record["questions"]] == [1, 1, 1, 1]
    assert json.loads(file.read_text()) == record
    kept = [(way, prompt) for way, prompt, limit in again.asked if limit == bench.TOKENS]
    ways = ENGINE["ways"]
    assert kept == [(way, "[2]") for way in reversed(ways)] + [(way, "[3]") for way in ways]
    assert [limit for _, _, limit in again.asked[:3]] == [bench.WARM] * 3


def test_a_run_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text(json.dumps({"about": {"threads": 2, "engines": {}}, "questions": []}))
    assert bench.opened(file, {"threads": 2, "engines": {}})["questions"] == []
    with pytest.raises(SystemExit, match="other threads; go on with the same"):
        bench.opened(file, {"threads": 1, "engines": {}})


def test_time_left_is_by_the_pace_of_this_run() -> None:
    assert bench.progress(30, 90, 20, 100.0) == "30 of 90 questions, about 10 min left"
