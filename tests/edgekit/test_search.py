"""The search refuses what does not pay, names the guilty, and finds what does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.accuracy import Labelled
from edgekit.calibration import checked_calibration
from edgekit.contract import Preferences, Quantizes, Switchable
from edgekit.errors import DoesNotPay, NotProven
from edgekit.gate import Budget
from edgekit.making import Captures, silent
from edgekit.model import Model
from edgekit.recipe import FP16, FP32, INT8, PRECISIONS, Recipe
from edgekit.search import Candidates, Evaluation
from edgekit.spec import Array, Arrays, TensorSpec
from edgekit.testing import Outcome, QuantizingBackend

INT4, ANY = PRECISIONS["int4"], PRECISIONS["any"]
FLOAT = Outcome(milliseconds=4.0, size=4000)
GOOD = Outcome(drift=0.01, milliseconds=2.0, size=1000)
DRIFTS = Outcome(drift=0.5, milliseconds=1.0, size=1000)  # 7.9 dB on these samples
SLOW = Outcome(drift=0.01, milliseconds=5.0, size=1000)


class Outlier(nn.Module):
    """Classes by the largest input; between the layers one channel is far larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.loud, self.head = (nn.Linear(4, 4, bias=False) for _ in range(3))
        with torch.no_grad():
            scale = torch.tensor([1000.0, 1.0, 1.0, 1.0])
            self.body.weight[:] = torch.eye(4)
            self.loud.weight[:] = torch.diag(scale)
            self.head.weight[:] = torch.diag(1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        scores: Tensor = self.head(self.loud(x))
        return scores


def eager(arrays: Arrays) -> Mapping[str, Array]:
    return {"output": np.maximum(arrays["x"], 0)}


@pytest.fixture(scope="module")
def captures() -> Captures:
    generator = np.random.default_rng(0)
    drawn = [{"x": generator.random((1, 4), np.float32)} for _ in range(9)]
    model = Model(
        Outlier().eval(),
        (TensorSpec("x", (1, 4), "float32"),),
        outputs=("output",),
        samples=tuple(drawn[:3]),
        samples_source="files",
    )
    return Captures(model, calibration=checked_calibration(drawn, "drawn"))


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """400 inputs of four classes; of every hundredth the first value is above 2."""
    generator = np.random.default_rng(1)
    truth = np.arange(400) % 4
    inputs = (generator.random((400, 4)) * 0.5 + np.eye(4)[truth]).astype(np.float32)
    inputs[::100, 0] = 3.0
    samples = tuple({"x": row[None]} for row in inputs)
    return Evaluation(Labelled(samples, truth, "val.npz"), truth)


def told(
    outcomes: Mapping[str, Outcome], mixed: Outcome | None = None
) -> Callable[[Recipe], Outcome]:
    """By precision; a recipe that keeps something float comes to ``mixed``."""

    def outcome(recipe: Recipe) -> Outcome:
        if recipe.keep_float and mixed is not None:
            return mixed
        return outcomes.get(recipe.precision, FLOAT)

    return outcome


def search(
    captures: Captures,
    outcome: Callable[[Recipe], Outcome],
    *recipes: Recipe,
    budget: Budget | None = None,
    evaluation: Evaluation | None = None,
    emulation: str = "",
) -> Candidates:
    backend = QuantizingBackend(
        outcome, (FP32, *recipes), eager=eager, emulation=emulation, name="fake"
    )
    return Candidates(backend, captures, silent, budget=budget or Budget(), evaluation=evaluation)


def table(candidates: Candidates) -> list[tuple[str, str]]:
    assert all(attempt.reason for attempt in candidates.attempts)
    return [(attempt.artifact, attempt.verdict) for attempt in candidates.attempts]


def test_the_fake_is_all_that_a_quantizing_backend_may_be(captures: Captures) -> None:
    backend = QuantizingBackend(recipes=(FP32, ANY), eager=eager)
    assert isinstance(backend, Preferences)
    assert isinstance(backend, Quantizes)
    artifact = backend.lower(captures.program(backend, ANY), ANY)
    sample = {"x": np.full((1, 4), 0.5, np.float32)}
    with backend.open(artifact) as session:
        assert isinstance(session, Switchable)
        at_8 = session.run(sample)["output"]
        np.testing.assert_allclose(at_8, 0.5)
        session.set_bits(2)
        assert not np.array_equal(session.run(sample)["output"], at_8)
        session.set_bits(8)
        assert np.array_equal(session.run(sample)["output"], at_8)


def test_what_pays_is_kept_as_asked_with_all_that_was_measured(
    captures: Captures, races: list[str]
) -> None:
    candidates = search(captures, told({"int8": GOOD}))
    made, override = candidates.required(INT8)
    assert override == ""
    assert made.artifact.name == "fake-int8"
    assert made.proof.passed
    (attempt,) = candidates.attempts
    assert (attempt.verdict, attempt.reason) == ("kept", "as asked")
    assert attempt.speed is not None
    assert attempt.speed.ratio == 2
    assert attempt.sqnr_db == pytest.approx(40, abs=3)
    assert attempt.float_bytes - attempt.size_bytes == pytest.approx(3000, abs=20)
    assert races == ["fake-int8"]


def test_what_loses_answers_is_refused_with_the_figures(
    captures: Captures, evaluation: Evaluation, races: list[str]
) -> None:
    outcome = told({"int8": replace(GOOD, fails_above=2.0)})
    candidates = search(captures, outcome, evaluation=evaluation)
    with pytest.raises(
        DoesNotPay,
        match=r"^fake-int8 does not pay: top-1 falls from 100\.00 % to 99\.00 % on 400 images of "
        r"val\.npz, 1\.00 points, the budget is 0\.5\. It is lost in ",
    ):
        candidates.required(INT8)
    assert races == []  # what is not accurate is not timed
    kept, override = candidates.required(INT8, keep_anyway=True)
    assert kept.attempt.accuracy is not None
    assert override == (
        "fake-int8 was kept although top-1 falls from 100.00 % to 99.00 % on 400 images of "
        "val.npz, 1.00 points, the budget is 0.5."
    )
    assert candidates.attempts[-1].reason.startswith("although top-1 falls")


def test_a_budget_that_allows_the_loss_lets_it_through(
    captures: Captures, evaluation: Evaluation, races: list[str]
) -> None:
    outcome = told({"int8": replace(GOOD, fails_above=2.0)})
    candidates = search(captures, outcome, evaluation=evaluation, budget=Budget(max_drop=1.0))
    made, _ = candidates.required(INT8)
    assert made.attempt.accuracy is not None
    assert made.attempt.accuracy.drop == pytest.approx(1.0)


def test_labels_decide_in_place_of_distance_but_another_model_is_no_lowering(
    captures: Captures, evaluation: Evaluation, races: list[str]
) -> None:
    for drift, decibels in ((0.1, 20), (0.2, 14)):  # below the 20 dB that unlabelled data demands
        outcome = told({"int8": replace(GOOD, drift=drift)})
        candidates = search(
            captures, outcome, evaluation=evaluation, budget=Budget(max_drop=20, min_sqnr_db=30)
        )
        made, _ = candidates.required(INT8)
        assert made.proof.limits.sqnr_db == 10
        assert made.attempt.sqnr_db == pytest.approx(decibels, abs=4)
    with pytest.raises(DoesNotPay, match=r"signal-to-noise|SQNR"):
        search(
            captures, told({"int8": DRIFTS}), evaluation=evaluation, budget=Budget(max_drop=90)
        ).required(INT8)


def test_the_guilty_layer_is_named_and_the_mixed_recipe_that_was_tried(
    captures: Captures, races: list[str]
) -> None:
    candidates = search(captures, told({"int8": DRIFTS}, GOOD))
    with pytest.raises(DoesNotPay) as refused:
        candidates.required(INT8)
    text = str(refused.value)
    assert "the outputs are 7.9 dB from" in text
    assert "the budget is 20 dB (no labelled data was given)" in text
    assert "It is lost in 'loud' (linear, alone 0.1 dB), 'head' (linear, alone 0.1 dB)." in text
    keep = text.partition("Remedy: --keep-float ")[2].partition(" (tried: ")[0]
    assert {"loud", "head"} >= set(keep.split(",")) > set()
    assert "2.00x (1.80 to 2.20) of float's speed" in text
    # What the sentence says can be typed as it stands.
    again = replace(INT8, keep_float=tuple(keep.split(",")))
    assert search(captures, told({"int8": DRIFTS}, GOOD)).required(again)[1] == ""


def test_other_ranges_are_tried_before_any_layer_is_kept_float(
    captures: Captures, races: list[str]
) -> None:
    def outcome(recipe: Recipe) -> Outcome:
        if recipe.keep_float or not recipe.quantized:
            return FLOAT
        return GOOD if recipe.method == "percentile" else DRIFTS

    with pytest.raises(
        DoesNotPay,
        match=r"lost in 'loud' .*'head' .*\. Remedy: --calibration-method percentile \(tr",
    ):
        search(captures, outcome).required(INT8)
    assert search(captures, outcome, INT8).best([INT8]).artifact.recipe.method == "percentile"
    entropy = replace(INT8, method="entropy")
    with pytest.raises(DoesNotPay, match=r"None of \d mixed recipes tried pays"):
        search(captures, outcome).required(entropy)  # who chose a method wants that one


def test_where_no_mixed_recipe_helps_float_is_the_remedy(
    captures: Captures, races: list[str]
) -> None:
    with pytest.raises(
        DoesNotPay,
        match=r"It is lost in .* None of \d mixed recipes tried pays\. Remedy: --precision fp32\.$",
    ):
        search(captures, told({"int8": DRIFTS}, DRIFTS)).required(INT8)


def test_a_mixed_recipe_that_cannot_be_made_is_not_the_end(
    captures: Captures, races: list[str]
) -> None:
    outcome = told({"int8": DRIFTS}, Outcome(refusal="no mixing here."))
    candidates = search(captures, outcome)
    with pytest.raises(DoesNotPay, match=r"the outputs are 7\.9 dB .* Remedy: --precision fp32\."):
        candidates.required(INT8)
    assert candidates.attempts[-1].reason == "no mixing here."
    assert candidates.attempts[-1].verdict == "not tried"
    found = search(captures, outcome, INT8)
    assert found.best([INT8]).artifact.recipe == FP32


def test_what_is_slower_is_refused_with_both_times(captures: Captures, races: list[str]) -> None:
    with pytest.raises(
        DoesNotPay,
        match=r"does not pay: it is not faster than float here: 5\.000 ms against 4\.000 ms, "
        r"0\.80x \(0\.72 to 0\.88\), 2 threads\..*Remedy: --precision fp32\.",
    ):
        search(captures, told({"int8": SLOW})).required(INT8)


def test_what_costs_the_time_is_kept_float_where_that_pays(
    captures: Captures, races: list[str]
) -> None:
    backend = QuantizingBackend(
        told({"int8": SLOW}, GOOD), eager=eager, ops=frozenset({"linear", "relu"})
    )
    candidates = Candidates(backend, captures, silent, budget=Budget())
    with pytest.raises(DoesNotPay, match=r"not faster.*Remedy: --keep-float relu \(tried: "):
        candidates.required(INT8)


def test_where_times_say_nothing_size_is_what_it_must_win(
    captures: Captures, races: list[str]
) -> None:
    emulated = "run it on the device"
    made, _ = search(captures, told({"int8": SLOW}), emulation=emulated).required(INT8)
    assert made.attempt.speed is None
    with pytest.raises(
        DoesNotPay, match=r"it is not smaller than float: \S+ bytes against \S+\. Remedy: --precisi"
    ):
        search(captures, told({"int8": replace(SLOW, size=5000)}), emulation=emulated).required(
            INT8
        )
    assert races == []


def test_auto_takes_the_fastest_within_the_budget_and_says_why_of_each(
    captures: Captures, races: list[str]
) -> None:
    outcomes = {
        "fp16": replace(GOOD, drift=0, milliseconds=3.0, size=2000),
        "int8": GOOD,
        "int4": DRIFTS,
        "palette4": Outcome(refusal="there is no such kernel\nand more lines"),
    }
    recipes = (FP16, INT8, INT4, PRECISIONS["palette4"])
    candidates = search(captures, told(outcomes), *recipes)
    assert candidates.best(recipes).artifact.name == "fake-int8"
    assert table(candidates) == [
        ("fake-int4", "refused"),
        ("fake-palette4", "not tried"),
        ("fake-fp32", "beaten"),
        ("fake-fp16", "beaten"),
        ("fake-int8", "chosen"),
    ]
    reasons = {attempt.artifact: attempt.reason for attempt in candidates.attempts}
    assert reasons["fake-int4"].startswith("the outputs are 7.9 dB")
    assert reasons["fake-palette4"] == "there is no such kernel"
    assert reasons["fake-fp16"] == "within the budget, but fake-int8 is faster"
    assert reasons["fake-int8"] == "the fastest within the budget"
    assert races == ["fake-fp16", "fake-int8"]


def test_auto_takes_the_smallest_where_size_is_preferred(
    captures: Captures, races: list[str]
) -> None:
    outcomes = {"int8": GOOD, "int4": replace(SLOW, size=500)}
    candidates = search(captures, told(outcomes), INT8, INT4, budget=Budget(prefer="size"))
    assert candidates.best([INT8, INT4]).artifact.name == "fake-int4"
    reasons = {attempt.artifact: attempt.reason for attempt in candidates.attempts}
    assert reasons["fake-int4"] == "the smallest within the budget"
    assert reasons["fake-int8"] == "within the budget, but fake-int4 is smaller"


def test_auto_takes_the_smallest_where_times_say_nothing(
    captures: Captures, races: list[str]
) -> None:
    outcomes = {"int8": GOOD, "int4": replace(SLOW, size=500)}
    candidates = search(captures, told(outcomes), INT8, INT4, emulation="on the device")
    assert candidates.best([INT8, INT4]).artifact.name == "fake-int4"
    assert races == []


def test_auto_keeps_float_where_nothing_wins(captures: Captures, races: list[str]) -> None:
    candidates = search(captures, told({"int4": SLOW}), INT4)
    assert candidates.best([INT4]).artifact.name == "fake-fp32"
    assert table(candidates) == [("fake-int4", "refused"), ("fake-fp32", "chosen")]
    assert candidates.attempts[-1].reason == (
        "the fastest within the budget; nothing else within it wins anything"
    )


def test_auto_finds_a_mixed_recipe_and_keeps_what_it_replaces_in_the_table(
    captures: Captures, races: list[str]
) -> None:
    candidates = search(captures, told({"int8": DRIFTS}, GOOD), INT8)
    made = candidates.best([INT8])
    assert made.artifact.name == "fake-int8"
    assert set(made.artifact.recipe.keep_float) <= {"loud", "head"}
    assert table(candidates) == [
        ("fake-int8", "refused"),
        ("fake-int8", "refused"),
        ("fake-fp32", "beaten"),
        ("fake-int8", "chosen"),
    ]
    refused, other_ranges, _, chosen = candidates.attempts
    assert refused.recipe == INT8
    assert other_ranges.recipe == replace(INT8, method="percentile")
    assert chosen.recipe.keep_float == made.artifact.recipe.keep_float


def test_auto_does_not_look_for_layers_where_only_weights_are_integers(
    captures: Captures, races: list[str]
) -> None:
    heard: list[str] = []
    backend = QuantizingBackend(told({"int4": DRIFTS}, GOOD), (FP32, INT4), eager=eager)
    candidates = Candidates(backend, captures, heard.append, budget=Budget())
    assert candidates.best([INT4]).artifact.recipe == FP32
    assert not any("looking for the layers" in step for step in heard)


def test_a_float_artifact_that_is_not_proven_ends_the_search(
    captures: Captures, races: list[str]
) -> None:
    candidates = search(captures, told({"fp32": replace(FLOAT, drift=0.1), "int8": GOOD}), INT8)
    with pytest.raises(NotProven, match="fake-fp32 is not proven"):
        candidates.best([INT8])


def test_an_artifact_is_made_once_however_often_it_is_asked_for(
    captures: Captures, races: list[str]
) -> None:
    made: list[str] = []

    def outcome(recipe: Recipe) -> Outcome:
        made.append(recipe.precision)
        return told({"int8": GOOD})(recipe)

    candidates = search(captures, outcome, INT8)
    candidates.best([INT8])
    candidates.required(INT8)
    assert sorted(made) == ["fp32", "int8"]


def test_a_backend_that_does_not_say_what_it_quantizes_is_refused_without_a_search(
    captures: Captures, races: list[str]
) -> None:
    backend = _Hidden(QuantizingBackend(told({"int8": DRIFTS}, GOOD)))
    candidates = Candidates(backend, captures, silent, budget=Budget())
    with pytest.raises(DoesNotPay, match=r"was given\)\. Remedy: --precision fp32\.$"):
        candidates.required(INT8)


class _Hidden:
    """A backend with what a backend must have, and no more."""

    def __init__(self, backend: QuantizingBackend) -> None:
        self.name, self.needs = backend.name, backend.needs
        self.check, self.lower, self.open = backend.check, backend.lower, backend.open


def test_the_narrower_widths_of_one_file_are_in_the_table(
    captures: Captures, evaluation: Evaluation, races: list[str]
) -> None:
    candidates = search(captures, told({"any": GOOD}), evaluation=evaluation)
    made, _ = candidates.required(ANY)
    assert table(candidates) == [
        ("fake-any", "kept"),
        *((f"fake-any at {bits} bits", "held") for bits in (6, 4, 2)),
    ]
    whole, *narrower = candidates.attempts
    assert all(each.size_bytes == whole.size_bytes for each in narrower)
    distances = [each.sqnr_db or 0.0 for each in candidates.attempts]
    assert distances == sorted(distances, reverse=True)
    assert all(each.accuracy is not None and each.speed is None for each in narrower)
    assert made.artifact.recipe.switchable
