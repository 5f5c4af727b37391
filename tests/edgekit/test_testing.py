"""The fakes keep the contracts they stand in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.artifact import Artifact
from edgekit.bundle import open_bundle
from edgekit.contract import Backend, Finding, Session
from edgekit.errors import BadInput
from edgekit.program import Program, Reference
from edgekit.recipe import FP32
from edgekit.spec import TensorSpec
from edgekit.testing import ReplayBackend, example_bundle, example_reference

INPUTS = (TensorSpec("x", (1, 4), "float32"),)
OUTPUTS = (TensorSpec("scores", (1, 4), "float32"),)


def lowered(backend: ReplayBackend, reference: Reference | None = None) -> Artifact:
    exported: Any = None
    return backend.lower(Program(exported, INPUTS, OUTPUTS, reference or example_reference()), FP32)


def test_the_fake_is_a_backend_and_its_session_a_session() -> None:
    backend: Backend = ReplayBackend()
    session: Session = backend.open(lowered(ReplayBackend()), threads=2)
    assert (session.inputs, session.outputs) == (INPUTS, OUTPUTS)


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_it_answers_what_it_saw_plus_the_drift(drift: float) -> None:
    reference, backend = example_reference(), ReplayBackend(drift=drift)
    with backend.open(lowered(backend)) as session:
        for sample, expected in zip(reference.samples, reference.expected, strict=True):
            got = session.run(sample)["scores"]
            assert np.array_equal(got, expected["scores"] + np.float32(drift))


def test_an_answer_belongs_to_the_caller() -> None:
    sample = example_reference().samples[0]
    with ReplayBackend().open(lowered(ReplayBackend())) as session:
        first = session.run(sample)["scores"]
        kept = first.copy()
        first[:] = 0
        assert np.array_equal(session.run(sample)["scores"], kept)


def test_an_input_it_never_saw_is_answered_with_zeros() -> None:
    with ReplayBackend().open(lowered(ReplayBackend())) as session:
        got = session.run({"x": np.full((1, 4), 9, np.float32)})["scores"]
    assert np.array_equal(got, np.zeros((1, 4), np.float32))


def test_it_refuses_inputs_that_do_not_fit() -> None:
    with (
        ReplayBackend().open(lowered(ReplayBackend())) as session,
        pytest.raises(BadInput, match="input 'x' is missing; the model takes: x=1x4"),
    ):
        session.run({})


def test_it_finds_what_it_was_told_to_find() -> None:
    finding = Finding("aten.sort.default", "refused", "net.py:3: x.sort()", "head", "Leave it out.")
    exported: Any = None
    program = Program(exported, INPUTS, OUTPUTS, example_reference())
    assert ReplayBackend(findings=(finding,)).check(program, FP32) == [finding]
    assert str(finding) == (
        "aten.sort.default at net.py:3: x.sort() in module 'head' is refused: Leave it out."
    )


def test_the_example_bundle_is_whole_and_proven(tmp_path: Path) -> None:
    example_bundle(tmp_path / "bundle", labels=("one", "two"))
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.labels == ("one", "two")
    assert bundle.proof("replay-fp32").passed
    with ReplayBackend().open(bundle.artifact()) as session:
        reference = bundle.reference()
        got = session.run(reference.samples[0])["scores"]
    assert np.array_equal(got, reference.expected[0]["scores"])
