"""The gate: what a quantized artifact may cost, what it must win, and how both are said."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgekit.accuracy import Accuracy
from edgekit.artifact import Artifact
from edgekit.errors import DamagedFile
from edgekit.evidence import Deviation
from edgekit.gate import Attempt, Budget, inaccurate, summary, unprofitable, worst_sqnr
from edgekit.recipe import INT8
from edgekit.speed import Speed
from edgekit.testing import example_reference
from edgekit.verify import Proof, prove

TOP1 = Accuracy("top1", 97.0, 98.25, 400, "val.npz")
FASTER = Speed(4.0, 2.0, 2.0, 1.9, 2.1, 1.0, 2)
SLOWER = Speed(4.0, 5.0, 0.8, 0.7, 0.9, 0.0, 2)
MEASURED = Attempt(
    artifact="fake-int8",
    recipe=replace(INT8, keep_float=("head",), cpu="avx2"),
    level="executed",
    sqnr_db=31.25,
    accuracy=TOP1,
    speed=FASTER,
    size_bytes=1000,
    float_bytes=4000,
    seconds=1.26,
    verdict="chosen",
    reason="the fastest within the budget",
)
BARE = Attempt("fake-int8", INT8, "executed", sqnr_db=31.25, size_bytes=1000, float_bytes=4000)


def proof(*, failures: tuple[str, ...] = ()) -> Proof:
    reference = example_reference()
    artifact = Artifact("fake", INT8, "", {}, (), ())
    return replace(
        prove(artifact, ["scores"], reference, reference.expected), failures=tuple(failures)
    )


@pytest.mark.parametrize(("lost", "within"), [(-1.0, True), (0.5, True), (0.51, False)])
def test_labelled_data_decides_by_the_points_that_are_lost(lost: float, within: bool) -> None:
    attempt = replace(BARE, sqnr_db=11.0, accuracy=replace(TOP1, percent=98.25 - lost))
    assert (inaccurate(attempt, proof(), Budget(max_drop=0.5)) == "") is within


def test_a_drop_is_said_with_all_its_figures() -> None:
    assert inaccurate(replace(BARE, accuracy=TOP1), proof(), Budget()) == (
        "top-1 falls from 98.25 % to 97.00 % on 400 images of val.npz, 1.25 points, the budget is "
        "0.5."
    )


@pytest.mark.parametrize(
    ("db", "within"), [(math.inf, True), (20.0, True), (19.9, False), (math.nan, False)]
)
def test_without_labels_the_outputs_must_be_close(db: float, within: bool) -> None:
    why = inaccurate(replace(BARE, sqnr_db=db), proof(), Budget())
    assert (why == "") is within
    if db == 19.9:
        assert why == (
            "the outputs are 19.9 dB from the float model's, the budget is 20 dB (no labelled data "
            "was given)."
        )


def test_where_nothing_ran_the_proof_alone_can_fail() -> None:
    unmeasured = replace(BARE, level="static", sqnr_db=None)
    assert inaccurate(unmeasured, proof(), Budget()) == ""
    assert inaccurate(unmeasured, proof(failures=("It", "lacks.")), Budget()) == "It lacks."


def test_what_is_faster_pays_whatever_its_size() -> None:
    assert unprofitable(replace(BARE, speed=FASTER, size_bytes=9000), Budget()) == ""


def test_what_is_not_faster_does_not_pay_however_small() -> None:
    assert unprofitable(replace(BARE, speed=SLOWER), Budget()) == (
        "it is not faster than float here: 5.000 ms against 4.000 ms, 0.80x (0.70 to 0.90), 2 "
        "threads."
    )


def test_a_difference_within_the_noise_is_said_to_be_one() -> None:
    noisy = replace(FASTER, ratio=1.34, low=0.93, high=1.47, agreeing=0.7)
    assert unprofitable(replace(BARE, speed=noisy), Budget()).startswith(
        "it is not faster than float here by more than the noise: 2.000 ms against 4.000 ms, 1.34x"
    )


@pytest.mark.parametrize("speed", [None, SLOWER])
def test_size_decides_where_it_is_preferred_or_time_says_nothing(speed: Speed | None) -> None:
    budget = Budget(prefer="size" if speed else "latency")
    attempt = replace(BARE, speed=speed)
    assert unprofitable(attempt, budget) == ""
    for size in (4000, 12345):
        assert unprofitable(replace(attempt, size_bytes=size), budget) == (
            f"it is not smaller than float: {size:,} bytes against 4,000."
        )


def deviation(db: float | None) -> Deviation:
    return Deviation("y", 0.0, 0.0, 1.0, db, None, None)


@pytest.mark.parametrize(
    ("measured", "worst"),
    [((), None), ((None,), None), ((30.0, None, 25.0), 25.0), ((math.inf,), math.inf)],
)
def test_the_worst_output_counts(measured: tuple[float | None, ...], worst: float | None) -> None:
    assert worst_sqnr([deviation(db) for db in measured]) == worst


def test_a_summary_says_what_was_measured_and_no_more() -> None:
    assert summary(MEASURED) == (
        "top-1 97.00 % (float 98.25 %), 31.2 dB, 2.00x (1.90 to 2.10) of float's speed, 25% of "
        "float's size"
    )
    assert summary(Attempt("fake-int8", INT8)) == ""
    assert "dB" not in summary(replace(BARE, sqnr_db=math.inf))


def test_an_attempt_survives_json_but_for_the_parts_of_a_second() -> None:
    text = json.dumps(MEASURED.to_json(), allow_nan=False)
    assert Attempt.from_json(json.loads(text)) == replace(MEASURED, seconds=1.3)
    bare = replace(BARE, sqnr_db=None)
    assert Attempt.from_json(json.loads(json.dumps(bare.to_json()))) == bare


@pytest.mark.parametrize("db", [math.inf, -math.inf, math.nan])
def test_an_sqnr_that_json_cannot_say_becomes_null(db: float) -> None:
    assert replace(BARE, sqnr_db=db).to_json()["sqnr_db"] is None


def test_a_judgement_changes_nothing_that_was_measured() -> None:
    judged = BARE.judged("refused", "it is slow")
    assert replace(judged, verdict="", reason="") == BARE
    assert (judged.verdict, judged.reason) == ("refused", "it is slow")


def changed(**changes: object) -> dict[str, object]:
    return {**MEASURED.to_json(), **changes}


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "text",
        [],
        {},
        changed(recipe="int8"),
        changed(recipe=None),
        changed(accuracy={"percent": 1.0}),
        changed(accuracy=7),
        changed(speed={"ratio": 2.0}),
        changed(speed=[]),
        changed(more=1),
        {key: each for key, each in MEASURED.to_json().items() if key != "accuracy"},
        {key: each for key, each in MEASURED.to_json().items() if key != "artifact"},
        changed(artifact=7),
        changed(reason=None),
        changed(sqnr_db="31 dB"),
        changed(size_bytes="<script>"),
        changed(accuracy={**TOP1.to_json(), "percent": "97"}),
        changed(speed={**FASTER.to_json(), "low": None}),
    ],
)
def test_a_malformed_attempt_is_damage(value: object) -> None:
    with pytest.raises(DamagedFile, match=r"is malformed|names a recipe that does not exist"):
        Attempt.from_json(value)


def test_every_field_is_in_the_json() -> None:
    written: Mapping[str, Any] = MEASURED.to_json()
    assert list(written) == list(Attempt.__dataclass_fields__)
    assert written["accuracy"]["drop"] == 1.25
    assert written["speed"]["ratio"] == 2.0
    assert isinstance(written["recipe"]["keep_float"], list | tuple)
    assert np.isfinite(written["seconds"])
