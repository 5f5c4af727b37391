"""Parsed networks opened: names, layers, the level of what they answer, what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.artifact import Artifact
from edgekit.capture import capture, reference_from
from edgekit.contract import Evidence, Inside
from edgekit.errors import BadInput, RuntimeFailed
from edgekit.program import Program
from edgekit.recipe import FP16, FP32
from edgekit.source import resolve
from edgekit_tensorrt import BACKEND
from edgekit_tensorrt.layers import RUN
from edgekit_tensorrt.processes import Parsed, parse_onnx
from edgekit_tensorrt.session import NetworkSession

pytestmark = pytest.mark.usefixtures("tensorrt")


class Two(nn.Module):
    """Two inputs, an output that is named like one of them, one of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.head(x))
        return {"x": y + ids, "ids": ids + 1, "positive": y > 0}


def program(make: Callable[[], nn.Module], *inputs: str) -> Program:
    torch.manual_seed(0)
    model = resolve(make(), list(inputs))
    return capture(model, reference_from(model))


@pytest.fixture(scope="module")
def two() -> Program:
    return program(Two, "x=1x4", "ids=1x4:int64")


@pytest.fixture(scope="module")
def artifact(two: Program) -> Artifact:
    return BACKEND.lower(two, FP32)


def session_of(artifact: Artifact) -> NetworkSession:
    session = BACKEND.open(artifact)
    assert isinstance(session, NetworkSession)
    return session


def test_the_session_says_what_it_is(artifact: Artifact) -> None:
    with BACKEND.open(artifact) as session:
        assert isinstance(session, Evidence)
        assert isinstance(session, Inside)
        assert (session.level, session.faults, session.cause) == ("emulated", (), "")
        (note,) = session.notes
        assert note.startswith("Parsed by tensorrt")
        assert note.endswith("its network interpreted.")


def test_outputs_come_back_under_the_models_names(two: Program, artifact: Artifact) -> None:
    with BACKEND.open(artifact) as session:
        answer = session.run(two.reference.samples[0])
    expected = two.reference.expected[0]
    assert list(answer) == ["x", "ids", "positive"]
    assert {name: a.dtype for name, a in answer.items()} == {
        name: a.dtype for name, a in expected.items()
    }
    np.testing.assert_allclose(answer["x"], expected["x"], rtol=1e-6)
    np.testing.assert_array_equal(answer["ids"], expected["ids"])


def test_a_file_on_disk_is_opened_as_bytes_are(
    two: Program, artifact: Artifact, tmp_path: Path
) -> None:
    source = artifact.source
    assert isinstance(source, bytes)
    path = tmp_path / "model.onnx"
    path.write_bytes(source)
    on_disk = replace(artifact, files={**artifact.files, artifact.main: path})
    with BACKEND.open(on_disk) as session:
        answer = session.run(two.reference.samples[0])
    np.testing.assert_allclose(answer["x"], two.reference.expected[0]["x"], rtol=1e-6)


def test_layers_have_the_names_of_the_graphs_nodes(two: Program, artifact: Artifact) -> None:
    with session_of(artifact) as session:
        layers = session.layers(two.reference.samples[0])
    assert {"linear", "relu"} <= set(layers)
    assert layers["relu"].min() >= 0


def test_wrong_input_is_a_sentence(artifact: Artifact) -> None:
    with (
        BACKEND.open(artifact) as session,
        pytest.raises(BadInput, match="input 'ids' is missing; the model takes: x=1x4"),
    ):
        session.run({"x": np.zeros((1, 4), np.float32)})


def test_a_layer_that_the_interpreter_lacks_makes_a_static_proof(
    two: Program, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(RUN, "MATRIX_MULTIPLY")
    proof = edgekit.verify(BACKEND, artifact, two.reference)
    assert (proof.level, proof.passed, proof.outputs) == ("static", True, ())
    (note,) = proof.notes
    assert "The interpreter has no MATRIX_MULTIPLY; the model was parsed and built by" in note
    assert "Run build_engine.py on the device" in note
    with (
        BACKEND.open(artifact) as session,
        pytest.raises(RuntimeFailed, match=r"could not run the model here: .*MATRIX_MULTIPLY"),
    ):
        session.run(two.reference.samples[0])


def test_a_file_that_the_parser_refuses_is_a_sentence(artifact: Artifact) -> None:
    source = artifact.source
    assert isinstance(source, bytes)
    cut = replace(artifact, files={artifact.main: source[: len(source) // 2]})
    with (
        pytest.raises(RuntimeFailed, match=r"tensorrt could not load the model: .*DESERIALIZE"),
        BACKEND.open(cut),
    ):
        pass


def test_a_file_that_only_the_parser_can_read_is_a_sentence(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = artifact.source
    assert isinstance(source, bytes)
    parsed = parse_onnx(source)
    monkeypatch.setattr("edgekit_tensorrt.session.parse_onnx", lambda _: parsed)
    cut = replace(artifact, files={artifact.main: source[:-3]})
    with pytest.raises(RuntimeFailed, match="could not load the model: "), BACKEND.open(cut):
        pass


def test_what_the_parser_dropped_fails_the_proof_whatever_the_numbers(
    two: Program, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = artifact.source
    assert isinstance(source, bytes)
    parsed = parse_onnx(source)
    assert parsed.network is not None
    network = replace(
        parsed.network,
        layers=tuple(
            replace(layer, inputs=tuple("x" if name == "ids" else name for name in layer.inputs))
            for layer in parsed.network.layers
        ),
    )
    monkeypatch.setattr(
        "edgekit_tensorrt.session.parse_onnx",
        lambda _: Parsed(network, (), (), parsed.runtime),
    )
    with BACKEND.open(artifact) as session:
        assert isinstance(session, Evidence)
        (fault,) = session.faults
    assert "dropped the input 'ids'" in fault


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        large = x * 300
        return (large * large).mean(1) * 1e-4


def test_the_first_value_beyond_float16_is_named_and_stays_named() -> None:
    captured = program(Squares, "x=1x8")
    with session_of(BACKEND.lower(captured, FP16)) as session:
        session.run({"x": np.full((1, 8), 0.1, np.float32)})
        assert session.cause == ""
        answer = session.run({"x": np.full((1, 8), 2.0, np.float32)})
        assert not math.isfinite(float(answer["output"][0]))
        said = session.cause
        session.run({"x": np.full((1, 8), 3.0, np.float32)})
    assert session.cause == said
    assert said.startswith("The first value beyond float16: layer 'node_mul_1'")
    assert "'mul_1' = 360000, and float16 ends at 65504" in said
    assert said.endswith("Keep it in float32: export with --precision fp32.")
