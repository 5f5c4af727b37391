"""One file at many bit-widths: a switch is equal to the bit to a file made at that width."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit.artifact import Artifact
from edgekit.contract import Switchable
from edgekit.errors import UnknownName, UsageError
from edgekit.program import Program
from edgekit.recipe import INT8, PRECISIONS
from edgekit.spec import Array
from edgekit.widths import Bits, Store
from edgekit_ort.optimized import optimized_artifact
from edgekit_ort.session import OrtSession

BACKEND = edgekit.backend("onnxruntime")


@pytest.fixture(scope="module")
def made(residual: Program) -> Artifact:
    return BACKEND.lower(residual, replace(PRECISIONS["any"], cpu="vnni"))


def answer(session: edgekit.Session, program: Program) -> Array:
    return session.run(program.reference.samples[0])["logits"]


def fresh(artifact: Artifact, program: Program) -> Array:
    with BACKEND.open(artifact) as session:
        return answer(session, program)


def test_every_layer_has_its_codes_and_eight_bits_are_int8(
    made: Artifact, residual: Program
) -> None:
    assert Store(made).layers == ("stem", "inner", "outer", "head")
    int8 = BACKEND.lower(residual, replace(INT8, cpu="vnni"))
    assert int8.source == made.source


@pytest.mark.parametrize("bits", [4, 2, 6])
def test_a_switch_is_equal_to_a_file_of_that_width_and_can_be_undone(
    made: Artifact, residual: Program, bits: int
) -> None:
    with BACKEND.open(made) as session:
        assert isinstance(session, OrtSession)
        assert session.switches_fast
        first = answer(session, residual)
        session.set_bits(bits)
        switched = answer(session, residual)
        written = session.run_as_written(residual.reference.samples[0])["logits"]
        session.set_bits(8)
        again = answer(session, residual)
    np.testing.assert_array_equal(switched, fresh(Store(made).fixed(bits), residual))
    np.testing.assert_array_equal(first, again)
    assert (switched != first).any()
    assert np.abs(written - switched).max() < np.abs(written - first).max()


def test_layers_can_have_widths_of_their_own(made: Artifact, residual: Program) -> None:
    results = {}
    widths: dict[str, Bits] = {"8": 8, "4": 4, "mixed": {"*": 4, "head": 8}}
    with BACKEND.open(made) as session:
        assert isinstance(session, Switchable)
        for name, bits in widths.items():
            session.set_bits(bits)
            results[name] = answer(session, residual)
    assert (results["mixed"] != results["4"]).any()
    assert (results["mixed"] != results["8"]).any()
    expected = replace(Store(made).at({"*": 4, "head": 8}), recipe=INT8, provenance={})
    np.testing.assert_array_equal(results["mixed"], fresh(expected, residual))


def test_a_width_can_be_set_before_the_session_is_opened(made: Artifact, residual: Program) -> None:
    session = BACKEND.open(made)
    assert isinstance(session, Switchable)
    session.set_bits(4)
    with session:
        np.testing.assert_array_equal(
            answer(session, residual), fresh(Store(made).fixed(4), residual)
        )


def test_the_file_is_not_read_again(made: Artifact, residual: Program, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert isinstance(made.source, bytes)
    path.write_bytes(made.source)
    with BACKEND.open(replace(made, files={"model.onnx": path})) as session:
        assert isinstance(session, Switchable)
        session.set_bits(6)
        path.unlink()
        session.set_bits(4)
        switched = answer(session, residual)
    np.testing.assert_array_equal(switched, fresh(Store(made).fixed(4), residual))


def test_where_codes_are_not_found_in_the_optimized_file_a_switch_is_slow_and_right(
    made: Artifact, residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit_ort.session.optimized_artifact", lambda *_: None)
    with BACKEND.open(made) as session:
        assert isinstance(session, OrtSession)
        assert not session.switches_fast
        session.set_bits(4)
        switched = answer(session, residual)
    np.testing.assert_array_equal(switched, fresh(Store(made).fixed(4), residual))


@pytest.mark.parametrize(
    "optimize",
    [
        lambda content: content[::-1],  # codes changed
        lambda content: content + content,  # codes copied
        lambda content: bytes(len(content)),  # codes gone
    ],
)
def test_codes_that_an_optimization_touched_are_not_trusted(
    made: Artifact, optimize: object
) -> None:
    assert isinstance(made.source, bytes)
    assert optimized_artifact(made, made.source, lambda content: content) is not None
    assert optimized_artifact(made, made.source, optimize) is None  # type: ignore[arg-type]


def test_codes_that_only_look_like_the_files_own_are_not_trusted(made: Artifact) -> None:
    content = made.source
    assert isinstance(content, bytes)
    # They stand in the result, and the result does not depend on them.
    assert optimized_artifact(made, content, lambda _: content) is None


def test_an_artifact_of_one_width_does_not_switch(residual: Program, made: Artifact) -> None:
    session = BACKEND.open(BACKEND.lower(residual, replace(INT8, cpu="vnni")))
    assert isinstance(session, Switchable)
    with pytest.raises(UsageError, match="has one bit-width; export the model with --precision an"):
        session.set_bits(4)
    switching = BACKEND.open(made)
    assert isinstance(switching, Switchable)
    with pytest.raises(UsageError, match="5 bits were asked for"):
        switching.set_bits(5)
    with pytest.raises(UnknownName, match=r"unknown layer 'neck'.*stem, inner, outer, head"):
        switching.set_bits({"neck": 4})


def test_a_switch_takes_a_moment(made: Artifact) -> None:
    with BACKEND.open(made, threads=1) as session:
        assert isinstance(session, Switchable)
        times = []
        for bits in (4, 8, 2, 6, 4):
            start = time.perf_counter()
            session.set_bits(bits)
            times.append(time.perf_counter() - start)
    assert min(times) < 0.05
