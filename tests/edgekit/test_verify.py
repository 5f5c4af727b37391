"""A proof holds for honest rounding and for nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.artifact import Artifact
from edgekit.contract import AsWritten, Evidence
from edgekit.errors import DamagedFile, NotProven
from edgekit.evidence import Deviation, Limits
from edgekit.program import Reference
from edgekit.recipe import PRECISIONS, Recipe
from edgekit.spec import Array, Arrays, TensorSpec
from edgekit.testing import ReplayBackend, ReplaySession, example_reference, replay_file
from edgekit.verify import (
    LIMITS,
    MIN_SQNR_DB,
    Proof,
    limits_of,
    prove,
    quantized_limits,
    verify,
)

quick = settings(deadline=None, max_examples=60, derandomize=True)
NORMAL = np.random.default_rng(1).standard_normal((4, 250), dtype=np.float32)


def compare(
    expected: Sequence[Array], got: Sequence[Array], *, precision: str = "fp32", name: str = "y"
) -> Proof:
    """The proof of one output ``y`` whose answers on each sample are ``got``."""
    specs = (TensorSpec("y", (), "float32"),)
    artifact = Artifact("replay", PRECISIONS[precision], "m", {}, (), specs)
    samples = tuple({"x": np.zeros(1)} for _ in expected)
    reference = Reference(samples, tuple({"y": array} for array in expected), "made here")
    return prove(artifact, ["y"], reference, [{name: array} for array in got])


def only(proof: Proof) -> Deviation:
    (deviation,) = proof.outputs
    return deviation


@quick
@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]),
    scale=st.sampled_from([0.0, 1e-38, 1e-5, 1.0, 1e4, 1e30]),
    precision=st.sampled_from(sorted(LIMITS)),
    seed=st.integers(0, 100),
)
def test_an_array_equals_itself(
    shape: tuple[int, ...], dtype: str, scale: float, precision: str, seed: int
) -> None:
    values = np.random.default_rng(seed).standard_normal(shape)
    array = (values * min(scale, 100.0) if dtype != "float32" else values * scale).astype(
        dtype if dtype != "uint8" else "int8"
    )
    proof = compare([array], [array.copy()], precision=precision)
    assert proof.passed, proof.failures
    assert proof.max_abs_error == proof.max_rel_error == 0


@quick
@given(
    place=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_one_value_that_is_not_finite_fails_wherever_it_is(
    place: tuple[int, int, int], value: float
) -> None:
    expected = [np.ones((4, 5), np.float32) for _ in range(3)]
    got = [array.copy() for array in expected]
    got[place[0]][place[1:]] = value
    with pytest.raises(
        NotProven, match=f"Output 'y' on sample {place[0]} holds NaN or infinity; eager does not"
    ):
        compare(expected, got).require()


def test_where_the_eager_model_is_not_finite_the_sentence_blames_it() -> None:
    broken = np.array([1, math.nan], np.float32)
    for got in (broken, np.ones(2, np.float32)):
        assert compare([broken], [got]).failures == (
            "The eager output 'y' on sample 0 holds NaN or infinity.",
        )


@settings(quick, max_examples=8)
@given(place=st.integers(0, 999_999), size=st.sampled_from([1e-3, 1e-6]), sign=st.booleans())
def test_one_wrong_element_among_a_million_small_ones_fails(
    place: int, size: float, sign: bool
) -> None:
    expected = np.full(1_000_000, size, np.float32)
    got = expected.copy()
    got[place] *= 1.01 if sign else 0.99
    proof = compare([expected], [got])
    assert only(proof).max_rel_error == pytest.approx(0.01, rel=1e-2)
    with pytest.raises(
        NotProven, match=r"'y': maximum relative error is 0\.0\d+, the limit is 0\.0"
    ):
        proof.require()


def test_a_few_huge_elements_do_not_hide_the_errors_of_the_rest() -> None:
    expected = np.ones(10_000, np.float32)
    expected[:3] = 1e30
    got = expected.copy()
    got[3:] *= np.float32(1.01)
    assert only(compare([expected], [got])).cosine == 1  # and SQNR too says that all is well
    assert any("maximum relative error" in text for text in compare([expected], [got]).failures)


def test_a_near_zero_among_larger_numbers_is_held_to_their_size() -> None:
    expected = NORMAL.copy()
    expected[0, 0] = 1e-9
    got = expected.copy()
    got[0, 0] = 3e-8
    assert compare([expected], [got]).passed


@pytest.mark.parametrize(("precision", "step"), [("fp32", 6e-8), ("fp16", 5e-4)])
def test_a_few_roundings_pass_and_an_error_of_the_next_precision_fails(
    precision: str, step: float
) -> None:
    noise = np.random.default_rng(2).uniform(-1, 1, NORMAL.shape)
    for size, passes in ((4 * step, True), (1000 * step**0.9, False)):
        got = (NORMAL * (1 + size * noise)).astype(np.float32)
        assert compare([NORMAL], [got], precision=precision).passed is passes


def test_an_approximation_spread_over_all_elements_fails_by_its_sqnr() -> None:
    got = (NORMAL + 3e-4 * np.sin(1e3 * NORMAL)).astype(np.float32)
    failures = compare([NORMAL], [got]).failures
    assert len(failures) == 1
    assert failures[0].startswith("Output 'y': SQNR in dB is 7")
    assert failures[0].endswith("the limit is 80.")


def test_the_worst_sample_counts_and_not_the_mean() -> None:
    got = [NORMAL, NORMAL, NORMAL * np.float32(1.01)]
    proof = compare([NORMAL] * 3, got)
    assert only(proof).sqnr_db == pytest.approx(40, abs=0.1)
    assert not proof.passed


def test_measures_are_those_of_the_text() -> None:
    expected, got = np.array([3.0, 4.0, 0.0], np.float32), np.array([3.0, 4.5, 0.0], np.float32)
    deviation = only(compare([expected], [got]))
    assert deviation.max_abs_error == 0.5
    assert deviation.max_rel_error == 0.5 / 4
    assert deviation.cosine == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 4.5**2)))
    assert deviation.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))


def test_zeros_need_exact_zeros() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert compare([zeros], [zeros]).passed
    almost = zeros.copy()
    almost[1, 1] = 1e-30
    failures = " ".join(compare([zeros], [almost]).failures)
    for measure in ("maximum relative error", "cosine is 0", "SQNR in dB is -999"):
        assert measure in failures


@pytest.mark.parametrize("shape", [(0,), (0, 10), (2, 0), (3, 0, 2)])
def test_an_output_without_elements_is_equal_to_itself(shape: tuple[int, ...]) -> None:
    for dtype in ("float32", "int64"):
        assert compare([np.zeros(shape, dtype)], [np.zeros(shape, dtype)]).passed


def test_another_winner_fails_although_every_number_is_close() -> None:
    expected = np.zeros((1, 1000), np.float32)
    expected[0, :2] = 100, 99.8
    got = expected.copy()
    got[0, :2] = 99.75, 99.85
    deviation = only(compare([expected], [got]))
    assert deviation.top1_agreement == 0
    assert any(
        "top-1 agreement is 0, the limit is 1" in t for t in compare([expected], [got]).failures
    )


@pytest.mark.parametrize("second", [1, 0.9995])
def test_a_tie_of_the_eager_model_may_be_broken_either_way(second: float) -> None:
    expected = np.array([[1, second, 0], [5, 0, 0]], np.float32)
    got = np.array([[1, 1.00001, 0], [5, 0, 0]], np.float32)
    assert only(compare([expected], [got])).top1_agreement == 1
    assert only(compare([expected[:1]], [got[:1]])).top1_agreement is None


@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (2, 3, 4)])
def test_only_class_scores_have_a_winner(shape: tuple[int, ...]) -> None:
    ones = np.ones(shape, np.float32)
    assert only(compare([ones], [ones])).top1_agreement is None


def test_integers_must_be_equal_one_by_one() -> None:
    expected = np.arange(10)
    got = expected.copy()
    got[3] += 1
    deviation = only(compare([expected], [got]))
    assert (deviation.equal, deviation.max_abs_error, deviation.max_rel_error) == (0.9, 1.0, None)
    with pytest.raises(NotProven, match=r"share of equal elements is 0\.9, the limit is 1"):
        compare([expected], [got]).require()


def test_large_integers_that_float64_cannot_tell_apart_still_differ() -> None:
    expected = np.array([2**53])
    assert only(compare([expected], [expected + 1])).equal == 0


def test_booleans_are_compared() -> None:
    expected = np.array([True, False])
    assert only(compare([expected], [~expected])).equal == 0


@pytest.mark.parametrize(
    "got", [np.ones((2, 3), np.float32), np.ones(6, np.float32), np.ones((3, 2))]
)
def test_another_shape_or_dtype_is_said_with_both(got: Array) -> None:
    with pytest.raises(
        NotProven,
        match=r"Output 'y' on sample 0 is float\d\d \(.*\), eager gives float32 \(3, 2\)\.",
    ):
        compare([np.ones((3, 2), np.float32)], [got]).require()


def test_a_missing_output_is_named() -> None:
    ones = np.ones(2, np.float32)
    assert compare([ones], [ones], name="z").failures == ("Output 'y' is missing.",)


def test_nothing_to_compare_is_no_proof() -> None:
    assert compare([], []).failures == ("There is no sample to compare on.",)
    artifact = Artifact("replay", PRECISIONS["fp32"], "m", {}, (), ())
    proof = prove(artifact, [], example_reference(1), [{}])
    assert proof.failures == ("There is no output to compare.",)


def test_every_failure_is_in_the_sentence() -> None:
    got = -NORMAL
    with pytest.raises(NotProven) as caught:
        compare([NORMAL], [got]).require()
    text = str(caught.value)
    assert text.startswith("replay-fp32 is not proven: ")
    for measure in ("relative error", "cosine is -1", "SQNR", "top-1 agreement"):
        assert measure in text


def test_a_proof_survives_json_and_equality_to_the_bit_becomes_null() -> None:
    for got in (NORMAL * np.float32(1.001), NORMAL):
        proof = compare([NORMAL], [got])
        text = json.dumps(proof.to_json(), allow_nan=False)
        again = Proof.from_json(json.loads(text))
        assert json.dumps(again.to_json()) == text
        assert again.passed is proof.passed
        assert (only(again).sqnr_db is None) is (got is NORMAL)


@pytest.mark.parametrize(
    "change", [{"outputs": None}, {"outputs": [3]}, {"limits": {}}, {"failures": 3}, {"more": 1}]
)
def test_a_malformed_proof_is_damage(change: dict[str, Any]) -> None:
    fields = compare([NORMAL], [NORMAL]).to_json()
    with pytest.raises(DamagedFile, match="a proof in the bundle is malformed"):
        Proof.from_json({**fields, **change})
    values: tuple[object, ...] = (None, [], "text", 3)
    for value in values:
        with pytest.raises(DamagedFile, match="a proof in the bundle is malformed"):
            Proof.from_json(value)


@pytest.mark.parametrize(("drift", "passes"), [(0.0, True), (1e-2, False)])
def test_an_artifact_is_opened_run_and_compared(drift: float, passes: bool) -> None:
    reference = example_reference()
    inputs = (TensorSpec("x", (1, 4), "float32"),)
    outputs = (TensorSpec("scores", (1, 4), "float32"),)
    files = {"replay.npz": replay_file(reference, drift)}
    artifact = Artifact("replay", PRECISIONS["fp32"], "replay.npz", files, inputs, outputs)
    proof = verify(ReplayBackend(), artifact, reference)
    assert proof.passed is passes
    assert (proof.level, proof.samples, proof.samples_source) == (
        "executed",
        3,
        "random, seed 0",
    )
    assert proof.max_abs_error == pytest.approx(drift, rel=1e-4)


def test_an_offset_common_to_all_classes_does_not_excuse_a_flip() -> None:
    eager = np.array([[1000.0, 1000.5, 999.0]], np.float32)
    flipped = np.array([[1000.6, 1000.5, 999.0]], np.float32)
    (deviation,) = compare([eager], [flipped]).outputs
    assert deviation.top1_agreement == 0.0


class WitnessSession(ReplaySession):
    """Says what it was told to say, and counts what it is asked to run."""

    def __init__(self, artifact: Artifact, told: Witness) -> None:
        super().__init__(artifact)
        self._told, self._ran = told, 0

    @property
    def level(self) -> Literal["static", "emulated", "executed"]:
        return self._told.level

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._told.notes, f"{self._ran} runs")

    @property
    def faults(self) -> tuple[str, ...]:
        return self._told.faults

    @property
    def cause(self) -> str:
        return self._told.cause if self._ran else ""

    def run(self, arrays: Arrays) -> dict[str, Array]:
        self._ran += 1
        return super().run(arrays)


@dataclass
class Witness(ReplayBackend):
    """A backend whose sessions say themselves what their answers are worth."""

    level: Literal["static", "emulated", "executed"] = "emulated"
    notes: tuple[str, ...] = ("It was told so.",)
    faults: tuple[str, ...] = ()
    cause: str = ""

    def open(self, artifact: Artifact, *, threads: int | None = None) -> WitnessSession:
        return WitnessSession(artifact, self)


def witnessed(backend: Witness, *, precision: str = "fp32") -> Proof:
    """The proof of an artifact that is off by the backend's drift."""
    reference = example_reference()
    specs = (TensorSpec("x", (1, 4), "float32"),), (TensorSpec("scores", (1, 4), "float32"),)
    files = {"replay.npz": replay_file(reference, backend.drift)}
    artifact = Artifact("replay", PRECISIONS[precision], "replay.npz", files, *specs)
    assert isinstance(backend.open(artifact), Evidence)
    return verify(backend, artifact, reference)


@pytest.mark.parametrize("level", ["emulated", "executed"])
def test_a_session_that_runs_gives_its_own_level_to_the_numbers(
    level: Literal["emulated", "executed"],
) -> None:
    proof = witnessed(Witness(level=level))
    assert (proof.level, proof.passed) == (level, True)
    assert (proof.samples, proof.samples_source) == (3, "random, seed 0")
    assert only(proof).sqnr_db == math.inf
    assert proof.notes == ("It was told so.", "3 runs")


def test_a_session_that_lacks_an_op_runs_nothing_and_proves_no_number() -> None:
    proof = witnessed(Witness(level="static", drift=0.5, notes=("It lacks conv.",)))
    assert (proof.level, proof.passed, proof.outputs) == ("static", True, ())
    assert proof.notes == ("It lacks conv.", "0 runs")
    assert proof.errors() == ("-", "-")
    assert Proof.from_json(json.loads(json.dumps(proof.to_json()))) == proof


@pytest.mark.parametrize("level", ["static", "emulated", "executed"])
def test_a_fault_of_the_artifact_fails_the_proof_whatever_its_numbers(
    level: Literal["static", "emulated", "executed"],
) -> None:
    proof = witnessed(Witness(level=level, faults=("Its name is wrong.",), cause="Half sums."))
    assert proof.failures == ("Its name is wrong.",)
    with pytest.raises(NotProven, match=r"replay-fp32 is not proven: Its name is wrong\.$"):
        proof.require()


def test_the_likely_cause_is_told_where_the_numbers_are_wrong_and_only_there() -> None:
    cause = "Sums are in float16."
    assert witnessed(Witness(cause=cause)).failures == ()
    wrong = witnessed(Witness(cause=cause, drift=0.5, faults=("And it is late.",)))
    assert wrong.failures[0].startswith("Output 'scores': maximum relative error is")
    assert wrong.failures[-2:] == (cause, "And it is late.")
    assert "" not in witnessed(Witness(drift=0.5)).failures


def test_what_was_compared_is_shown_in_as_many_digits_as_asked() -> None:
    proof = compare([np.ones(4, np.float32)], [np.full(4, 1.25, np.float32)])
    assert proof.errors() == ("2.5e-01", "2.5e-01")
    assert proof.errors(3) == ("2.500e-01", "2.500e-01")


def test_a_precision_without_limits_cannot_be_proven() -> None:
    odd = Recipe("float16", "float32")
    artifact = Artifact("replay", odd, "replay.npz", {}, (), ())
    with pytest.raises(
        NotProven,
        match=r"replay-float16-float32 cannot be proven: this version has limits for fp32, fp16\.",
    ):
        verify(ReplayBackend(), artifact, example_reference())


def test_a_proof_made_before_there_were_notes_is_read_without_them() -> None:
    fields = compare([NORMAL], [NORMAL]).to_json()
    del fields["notes"]
    assert Proof.from_json(fields).notes == ()


def noisy(expected: Array, decibels: float) -> Array:
    """``expected`` with noise that leaves ``decibels`` of it."""
    noise = np.random.default_rng(2).standard_normal(expected.shape)
    noise *= np.linalg.norm(expected) / np.linalg.norm(noise) * 10 ** (-decibels / 20)
    return (expected + noise).astype(np.float32)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if PRECISIONS[name].quantized])
def test_integers_are_held_to_the_distance_of_all_elements_together(precision: str) -> None:
    assert only(compare([NORMAL], [noisy(NORMAL, 25)], precision=precision)).sqnr_db == (
        pytest.approx(25, abs=0.01)
    )
    assert compare([NORMAL], [noisy(NORMAL, 20.1)], precision=precision).passed
    failed = compare([NORMAL], [noisy(NORMAL, 19.9)], precision=precision)
    assert failed.failures == ("Output 'y': SQNR in dB is 19.9, the limit is 20.",)


def test_a_small_value_that_integers_lose_is_no_failure() -> None:
    expected = np.array([[1e-6, 1e-6, 5.0]], np.float32)
    got = np.array([[0.02, 0.0, 5.0]], np.float32)
    assert compare([expected], [got], precision="int8").passed
    assert not compare([expected], [got], precision="fp16").passed


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_integers_excuse_no_value_that_is_not_finite(wrong: float) -> None:
    got = NORMAL.copy()
    got[0, 0] = wrong
    assert not compare([NORMAL], [got], precision="int8").passed


def test_the_limits_of_integers_say_how_close_scores_may_lie_to_be_a_tie() -> None:
    for least, tie in ((20.0, 0.1), (40.0, 0.01)):
        limits = quantized_limits(least)
        assert limits.sqnr_db == least
        assert limits.undecided == pytest.approx(tie)
        assert (limits.max_rel_error, limits.cosine, limits.agreement) == (None, None, None)
    assert limits_of(Artifact("r", PRECISIONS["int8"], "", {}, (), ())) == quantized_limits()
    assert quantized_limits().sqnr_db == MIN_SQNR_DB


def test_answers_that_flip_between_close_scores_are_undecided() -> None:
    expected = np.array([[0.0, 1.0, 0.95], [0.0, 1.0, 0.2]], np.float32)
    got = np.array([[0.0, 0.95, 1.0], [0.0, 1.0, 0.2]], np.float32)
    assert only(compare([expected], [got], precision="int8")).top1_agreement == 1.0
    expected[0, 2] = 0.85
    assert only(compare([expected], [got], precision="int8")).top1_agreement == 0.5


def test_a_proof_of_integers_survives_json_with_the_limits_it_has_not() -> None:
    proof = compare([NORMAL], [noisy(NORMAL, 25)], precision="int8")
    written = json.loads(json.dumps(proof.to_json(), allow_nan=False))
    assert Proof.from_json(written) == proof
    assert written["limits"]["cosine"] is None


def test_limits_that_are_given_go_before_those_of_the_precision() -> None:
    reference = example_reference()
    specs = (TensorSpec("x", (1, 4), "float32"),), (TensorSpec("scores", (1, 4), "float32"),)
    files = {"replay.npz": replay_file(reference, 0.3)}
    artifact = Artifact("replay", PRECISIONS["int8"], "replay.npz", files, *specs)
    for least, passes in ((5.0, True), (60.0, False)):
        proof = verify(ReplayBackend(), artifact, reference, limits=quantized_limits(least))
        assert proof.passed is passes
        assert proof.limits.sqnr_db == least


class Fused(ReplaySession):
    """Adds up 8-bit products in too few bits, and can also do what the file says."""

    saturation = "Export it for this processor: --cpu avx2."

    def __init__(self, artifact: Artifact, run_db: float, written_db: float) -> None:
        super().__init__(artifact)
        self._run_db, self._written_db = run_db, written_db

    def run(self, arrays: Arrays) -> dict[str, Array]:
        return {name: noisy(each, self._run_db) for name, each in super().run(arrays).items()}

    def run_as_written(self, arrays: Arrays) -> dict[str, Array]:
        exact = super().run(arrays)
        return {name: noisy(each, self._written_db) for name, each in exact.items()}


@dataclass
class Saturating(ReplayBackend):
    run_db: float = 30.0
    written_db: float = 30.0

    def open(self, artifact: Artifact, *, threads: int | None = None) -> ReplaySession:
        return Fused(artifact, self.run_db, self.written_db)


def run_by(backend: Saturating, precision: str = "int8") -> Proof:
    reference = example_reference()
    specs = (TensorSpec("x", (1, 4), "float32"),), (TensorSpec("scores", (1, 4), "float32"),)
    files = {"replay.npz": replay_file(reference)}
    artifact = Artifact("replay", PRECISIONS[precision], "replay.npz", files, *specs)
    assert isinstance(backend.open(artifact), AsWritten)
    return verify(backend, artifact, reference, limits=quantized_limits())


def test_kernels_that_saturate_fail_the_proof_however_close_they_are() -> None:
    (failure,) = run_by(Saturating(run_db=34.8, written_db=39.0)).failures
    assert failure == (
        "Output 'scores': as run, SQNR is 34.8 dB from eager; by the arithmetic that the file says,"
        " 39.0 dB. Export it for this processor: --cpu avx2."
    )


@pytest.mark.parametrize(
    ("run_db", "written_db"), [(30.0, 30.0), (30.0, 31.9), (33.0, 30.0), (60.0, 20.5)]
)
def test_kernels_that_round_otherwise_either_way_do_not(run_db: float, written_db: float) -> None:
    assert run_by(Saturating(run_db=run_db, written_db=written_db)).passed


def test_what_holds_no_integers_is_run_once() -> None:
    assert run_by(Saturating(run_db=25.0, written_db=90.0), precision="fp16").passed


def test_a_proof_of_integers_says_how_far_the_file_itself_is_from_eager() -> None:
    proof = run_by(Saturating(run_db=34.8, written_db=35.0))
    assert proof.as_written_db == pytest.approx(35.0, abs=0.01)
    assert Proof.from_json(json.loads(json.dumps(proof.to_json()))) == proof
    assert compare([NORMAL], [NORMAL]).as_written_db is None


def test_a_limit_that_is_none_demands_nothing() -> None:
    limits = Limits(None, None, 10.0, None, "for this test")
    reference = Reference(({"x": np.zeros(1)},), ({"y": np.array([1, 2, 3])},), "here")
    artifact = Artifact("replay", PRECISIONS["int8"], "m", {}, (), ())
    assert limits.undecided is None
    proof = prove(artifact, ["y"], reference, [{"y": np.array([1, 2, 3])}])
    assert proof.passed
