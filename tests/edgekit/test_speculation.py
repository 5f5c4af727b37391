"""Plans of speculation: the certificate, the costs, the choice, and ``generate`` going by it.

One file, since every test reads the same bundle with its plan of each grade, which take seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit import cli
from edgekit.decode.draft import Draft, Verified, chain
from edgekit.decode.drafters import NAMES
from edgekit.decode.recycling import Recycling
from edgekit.errors import DamagedFile, UnknownName, UsageError
from edgekit.exactness import GRADES, Grade
from edgekit.report import html_report
from edgekit.speculation import OFF, TIMED, SpeculationPlan, measured_costs, plan_speculation, plans
from edgekit.testing import HashStepper, example_bundle

pytest.importorskip("onnxruntime")

# Text that copies itself: drafters have something to find.
COPY = "the cat sat on the mat and the cat sat on the mat and the cat sat on the mat and the cat"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> edgekit.Bundle:
    out = tmp_path_factory.mktemp("speculation") / "tiny"
    targets = ["onnxruntime"]
    return edgekit.export("tiny-llama", targets=targets, precision="int4", context=192, out=out)


@pytest.fixture(scope="module")
def plan(bundle: edgekit.Bundle) -> SpeculationPlan:
    return plan_speculation(bundle, threads=1)


@pytest.fixture(scope="module")
def numerical(bundle: edgekit.Bundle, plan: SpeculationPlan) -> SpeculationPlan:
    return plan_speculation(bundle, grade="numerical", threads=1)


@pytest.fixture
def text(bundle: edgekit.Bundle, plan: SpeculationPlan) -> Iterator[edgekit.TextModel]:
    with edgekit.TextModel(bundle, threads=1) as model:
        yield model


def test_the_certificate_is_bitwise_and_says_on_what(plan: SpeculationPlan) -> None:
    proof = plan.certificate
    assert proof.grade == "bitwise"
    assert proof.granted
    assert proof.prompts == 50
    assert proof.equal == proof.texts == 100
    assert proof.drafted > 100
    assert proof.widths[0] == 2


def test_costs_are_of_exact_widths_and_grow(plan: SpeculationPlan) -> None:
    assert [width for width, _ in plan.costs.passes] == [w for w in TIMED if w >= 2]
    assert plan.costs.seconds(16) > plan.costs.seconds(2) > 0
    assert plan.single_seconds > 0


def test_every_drafter_was_tried(plan: SpeculationPlan) -> None:
    assert tuple(each.drafter for each in plan.candidates) == NAMES
    for each in plan.candidates:
        assert each.predicted.low <= each.predicted.speedup <= each.predicted.high
        assert list(each.fixed) == [width for width in TIMED if width >= 2]
        assert each.tokens_per_pass >= 1
        assert each.measured > 0
    assert plan.chosen in (OFF, *NAMES)
    chosen = plan.candidate
    if chosen is not None:
        assert chosen.predicted.low > 1
        assert chosen.measured > 1


def test_a_plan_survives_the_bundle(bundle: edgekit.Bundle, plan: SpeculationPlan) -> None:
    kept = plans(edgekit.open_bundle(bundle.folder), plan.artifact)
    assert kept["bitwise"] == plan
    with pytest.raises(DamagedFile, match=r"malformed.*; run edgekit spec plan again"):
        SpeculationPlan.from_json({**plan.to_json(), "costs": {}})


def test_plans_of_both_grades_lie_side_by_side(
    bundle: edgekit.Bundle, plan: SpeculationPlan, numerical: SpeculationPlan
) -> None:
    kept = plans(bundle, plan.artifact)
    assert kept == {"bitwise": plan, "numerical": numerical}
    assert numerical.certificate.granted
    assert numerical.certificate.widths[0] == 1
    assert numerical.costs.passes[0][0] == 1
    deviation = numerical.certificate.deviation
    assert deviation is not None
    assert deviation.rows > 100
    assert 0 < deviation.plain_from_eager.nats < 0.5


def test_a_plan_of_an_earlier_edgekit_is_replaced(bundle: edgekit.Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")
    old = edgekit.open_bundle(copy)
    (name,) = old.artifacts
    old.write_speculation(name, {"artifact": name, "chosen": "lookup"})
    with pytest.raises(DamagedFile, match="run edgekit spec plan again"):
        edgekit.TextModel(copy)
    plan_speculation(old, threads=1, prompts=[[1, 2, 3]])
    assert list(plans(old, name)) == ["bitwise"]


def test_a_plan_that_was_altered_is_found(bundle: edgekit.Bundle, plan: SpeculationPlan) -> None:
    path = bundle.folder / plan.artifact / "speculation.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"threads": 1', b'"threads": 2'))
    with pytest.raises(DamagedFile, match="run edgekit spec plan again"):
        edgekit.open_bundle(bundle.folder)
    path.write_bytes(before)


def test_a_plan_is_for_its_machine_and_threads(plan: SpeculationPlan) -> None:
    assert plan.holds_here(1)
    assert not plan.holds_here(2)
    elsewhere = replace(plan, host={**plan.host, "processor": "another"})
    assert not elsewhere.holds_here(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_with_any_drafter_the_text_is_that_of_exact_plain_decoding(
    text: edgekit.TextModel, name: str, temperature: float
) -> None:
    sampling = edgekit.Sampling(temperature, seed=3)
    prompt = text.encoded(COPY)
    first = list(text.tokens(prompt, limit=60, sampling=sampling, drafter=name))
    assert text.answer is not None
    assert text.answer.drafter == name
    second = list(text.tokens(prompt, limit=60, sampling=sampling, drafter=name))
    assert first == second
    for other in NAMES:
        assert list(text.tokens(prompt, limit=60, sampling=sampling, drafter=other)) == first


def test_where_the_text_copies_passes_bring_several_tokens(text: edgekit.TextModel) -> None:
    prompt = [40, 41, 42, 43, 44, 45, 46, 47] * 12
    list(text.tokens(prompt, limit=40, drafter="lookup"))
    assert text.answer is not None
    assert text.answer.passes < text.answer.tokens


def test_auto_is_what_the_plan_chose_and_off_elsewhere(
    bundle: edgekit.Bundle, plan: SpeculationPlan, text: edgekit.TextModel
) -> None:
    assert text.drafter() == plan.chosen
    with edgekit.TextModel(bundle, threads=2) as model:
        assert model.drafter() == OFF
        assert model.plan() is None
    with pytest.raises(UnknownName, match="unknown drafter 'lookupp'; did you mean 'lookup'"):
        text.drafter("lookupp")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_numerical_texts_are_those_of_plain_decoding_while_rows_agree(
    text: edgekit.TextModel, numerical: SpeculationPlan, name: str, temperature: float
) -> None:
    prompt = text.encoded(COPY)
    words = {"limit": 40, "sampling": edgekit.Sampling(temperature, seed=3)}
    plain = list(text.tokens(prompt, drafter="off", **words))  # type: ignore[arg-type]
    found = list(text.tokens(prompt, drafter=name, grade="numerical", **words))  # type: ignore[arg-type]
    assert found[:4] == plain[:4]
    answer = text.answer
    assert answer is not None
    assert answer.tokens == len(found)
    assert (answer.drafter, answer.grade) == (name, "numerical")
    assert sum(answer.widths.values()) == answer.passes
    assert 1 in answer.widths  # which bitwise passes of this kernel never have
    assert 0 < answer.drafting_seconds < answer.decode_seconds


def test_numerical_drafters_propose_trees_and_bitwise_ones_chains(
    text: edgekit.TextModel, numerical: SpeculationPlan
) -> None:
    ranks = {}
    for grade in GRADES:
        list(text.tokens([1, 2, 3], limit=3, drafter="recycling", grade=grade))
        recycling = text._drafters["recycling", grade]
        assert isinstance(recycling, Recycling)
        ranks[grade] = recycling.successors.shape[1]
    assert ranks == {"bitwise": 1, "numerical": 8}


def test_numerical_is_measured_before_it_is_used(
    bundle: edgekit.Bundle, numerical: SpeculationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgekit.TextModel(bundle, threads=1) as model:
        assert model.drafter("auto", "numerical") == numerical.chosen
    with edgekit.TextModel(bundle, threads=2) as model:
        for name in ("auto", "lookup"):
            with pytest.raises(UsageError, match="run edgekit spec plan --grade numerical here"):
                model.drafter(name, "numerical")
        assert model.drafter("off", "numerical") == OFF


@pytest.mark.parametrize("grade", GRADES)
def test_where_the_certificate_was_refused_no_drafter_runs(
    text: edgekit.TextModel, numerical: SpeculationPlan, grade: Grade
) -> None:
    plan = text.plan(grade)
    assert plan is not None
    refused = replace(plan, certificate=replace(plan.certificate, granted=False), chosen=OFF)
    text._plans[grade] = refused
    with pytest.raises(UsageError, match=f"failed the {grade} certificate"):
        text.drafter("lookup", grade)
    assert text.drafter("auto", grade) == OFF


def test_a_stream_left_early_with_a_drafter_harms_nothing(text: edgekit.TextModel) -> None:
    prompt = text.encoded(COPY)
    wanted = list(text.tokens(prompt, limit=24, drafter="merged"))
    for count, _ in enumerate(text.tokens([*prompt, 9], limit=24, drafter="merged")):
        if count == 3:
            break
    assert list(text.tokens(prompt, limit=24, drafter="merged")) == wanted
    assert list(text.tokens(prompt, limit=1, drafter="merged")) == wanted[:1]


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", ["lookup", "merged"])
def test_an_interrupt_in_a_pass_loses_nothing_but_the_rest_of_the_answer(
    text: edgekit.TextModel,
    numerical: SpeculationPlan,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    grade: Grade,
) -> None:
    prompt = text.encoded(COPY)
    wanted = list(text.tokens(prompt, limit=8, drafter=name, grade=grade))
    step, passes = text.stepper.step, []

    def interrupted(*words: Any, **more: Any) -> Any:
        passes.append(len(words[0]))
        answer = step(*words, **more)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(text.stepper, "step", interrupted)
    said: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        said.extend(text.tokens([*prompt[:-1], 9], limit=40, drafter=name, grade=grade))
    monkeypatch.undo()
    assert said
    again = list(text.tokens(prompt, limit=8, drafter=name, grade=grade))
    assert len(again) == len(wanted)
    if grade == "bitwise":
        assert again == wanted
        whole = text.tokens([*prompt[:-1], 9], limit=len(said), drafter=name)
        assert said == list(whole)


class Oracle:
    """Foresees every token of an answer."""

    name = "lookup"

    def __init__(self, answer: list[int]) -> None:
        self._answer, self._done = answer, 0

    def start(self, prompt: Sequence[int]) -> None:
        self._done = 0

    def observe(self, verified: Verified) -> None:
        self._done += len(verified.emitted)

    def propose(self, budget: int) -> Draft:
        return chain(self._answer[self._done : self._done + budget])


@pytest.mark.parametrize("grade", GRADES)
def test_a_stop_token_in_an_accepted_draft_ends_the_answer(
    text: edgekit.TextModel,
    numerical: SpeculationPlan,
    monkeypatch: pytest.MonkeyPatch,
    grade: Grade,
) -> None:
    prompt = text.encoded(COPY)
    monkeypatch.setattr(text, "_switch", lambda *_: None)
    monkeypatch.setattr(text, "_entry", replace(text._entry, stops=()))
    whole = list(text.tokens(prompt, limit=20, drafter="lookup", grade=grade))
    text._drafters["lookup", grade] = Oracle(whole)
    for place in range(2, 12):
        if whole[place] in whole[:place]:
            continue
        monkeypatch.setattr(text, "_entry", replace(text._entry, stops=(whole[place],)))
        found = list(text.tokens(prompt, limit=20, drafter="lookup", grade=grade))
        assert found == whole[: place + 1]
        answer = text.answer
        assert answer is not None
        assert answer.stopped == "stop token"
        assert answer.passes == 1  # the rest of the draft was right too, and is gone
        assert text.stepper.length == len(prompt) + place


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", NAMES)
def test_one_token_and_a_prompt_without_any_n_gram_are_answered(
    text: edgekit.TextModel, numerical: SpeculationPlan, name: str, grade: Grade
) -> None:
    for prompt in ([5], [5, 6], [5, 6, 7]):
        whole = list(text.tokens(prompt, limit=6, drafter=name, grade=grade))
        for limit in (1, 2, 6):
            found = list(text.tokens(prompt, limit=limit, drafter=name, grade=grade))
            assert len(found) == limit or found[-1] in text.stops
            if grade == "bitwise":
                assert found == whole[:limit]


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("name", NAMES)
def test_up_to_the_last_token_of_the_context(
    text: edgekit.TextModel, numerical: SpeculationPlan, name: str, grade: Grade
) -> None:
    for room in (1, 2, 3, 9):
        prompt = ([40, 41, 42, 43, 44, 45] * 40)[: text.context - room]
        found = list(text.tokens(prompt, limit=50, drafter=name, grade=grade))
        assert 1 <= len(found) <= room
        assert text.answer is not None
        assert text.answer.stopped in ("context", "stop token")


def test_a_prompt_that_leaves_no_room_is_refused_with_a_drafter_too(
    text: edgekit.TextModel,
) -> None:
    with pytest.raises(edgekit.UsageError, match="has 192 tokens"):
        next(text.tokens([40] * 192, drafter="lookup"))


def test_a_pass_of_one_token_is_timed_also_where_it_is_not_exact() -> None:
    stepper = HashStepper(exact_widths=(4, 8))
    single, costs = measured_costs(stepper, stepper.exact_widths, 20)
    assert single > 0
    assert [width for width, _ in costs.passes] == [4, 8]


def test_the_command_says_what_was_certified_and_chosen(
    bundle: edgekit.Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "prompts.txt"
    own.write_text("What is a file?\n\nWhat is a folder?\n")
    words = ["spec", "plan", str(bundle.folder), "--threads", "1"]
    assert cli.main([*words, "--prompts", str(own)]) == 0
    out = capsys.readouterr().out
    assert "bitwise: 100 of 100 speculative texts on 50 prompts" in out
    assert "speculation: " in out
    assert cli.main([*words, "--json"]) == 0
    (value,) = json.loads(capsys.readouterr().out)
    assert value["certificate"]["grade"] == "bitwise"
    assert cli.main([*words, "--grade", "numerical"]) == 0
    out = capsys.readouterr().out
    assert "numerical: tokens on side branches of trees differ from plain ones by 0.0" in out
    own.write_text("\n\n")
    assert cli.main([*words, "--prompts", str(own)]) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_generate_says_tokens_a_pass_and_what_plain_would_have_been(
    bundle: edgekit.Bundle,
    plan: SpeculationPlan,
    numerical: SpeculationPlan,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    words = ["generate", str(bundle.folder), "--prompt", COPY, "--threads", "1"]
    assert cli.main([*words, "--drafter", "merged", "--max-tokens", "30"]) == 0
    err = capsys.readouterr().err
    assert " with merged, " in err
    assert "tokens a pass, plain would have been " in err
    words_ = [*words, "--grade", "numerical", "--drafter", "merged", "--max-tokens", "9"]
    assert cli.main(words_) == 0
    assert " with merged (numerical), " in capsys.readouterr().err
    assert cli.main([*words, "--drafter", "off", "--max-tokens", "5"]) == 0
    assert "tokens a pass" not in capsys.readouterr().err
    off = edgekit.open_bundle(shutil.copytree(bundle.folder, tmp_path / "off"))
    off.write_speculation(plan.artifact, {"bitwise": {**plan.to_json(), "chosen": OFF}})
    there = ["generate", str(off.folder), *words[2:]]
    assert cli.main([*there, "--max-tokens", "5"]) == 0
    assert ", plain: speculation was measured not to pay here; " in capsys.readouterr().err
    assert cli.main([*there, "--max-tokens", "5", "--drafter", "off"]) == 0
    assert "not to pay" not in capsys.readouterr().err
    assert cli.main([*words, "--drafter", "nope"]) == 2
    assert "unknown drafter 'nope'" in capsys.readouterr().err


def test_the_report_draws_what_was_planned(
    bundle: edgekit.Bundle, numerical: SpeculationPlan
) -> None:
    page = html_report([bundle])
    table = page[page.index("<h3>Speculation</h3>") :]
    for each in plans(bundle, numerical.artifact)["numerical"].candidates:
        speed = each.predicted
        words = f"{speed.speedup:.2f}x ({speed.low:.2f} to {speed.high:.2f})"
        assert f"</svg><small>{words}</small></td><td>{each.measured:.2f}x</td>" in table
    assert table.count("<td>numerical</td>") == table.count("<td>bitwise</td>") == len(NAMES)


def test_prompts_without_room_for_an_answer_are_refused(bundle: edgekit.Bundle) -> None:
    with pytest.raises(edgekit.UsageError, match="none of 2 prompts leaves room for an answer of"):
        plan_speculation(bundle, threads=1, prompts=[[1] * 190, [2] * 150])


def test_a_plan_for_a_bundle_of_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example_bundle(tmp_path / "images")
    assert cli.main(["spec", "plan", str(tmp_path / "images")]) == 2
    assert "is no language model" in capsys.readouterr().err


def test_where_no_width_is_exact_nothing_is_planned(
    bundle: edgekit.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit_ort.stepper import OrtStepper

    monkeypatch.setattr(OrtStepper, "exact_widths", ())
    with pytest.raises(UsageError, match="claims no widths"):
        plan_speculation(bundle, threads=1)
    with (
        edgekit.TextModel(bundle, threads=1) as model,
        pytest.raises(UsageError, match="use --drafter off"),
    ):
        model.drafter("lookup")
