"""Packages opened: features and dtypes at the edge, layers inside, what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from edgekit.graph import quiet
from edgekit.image import ImageInput
from edgekit.model import Model
from edgekit.program import Program
from edgekit.recipe import FP16, FP32
from edgekit.source import resolve
from edgekit_coreml import BACKEND
from edgekit_coreml.lower import MAIN
from edgekit_coreml.ops import OPS
from edgekit_coreml.session import InterpreterSession

with quiet():
    from coremltools.proto import Model_pb2


class Two(nn.Module):
    """Two inputs, of which the second may add nothing; three named results."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.head(x))
        return {"sum": y + ids, "next": ids + 1, "positive": x > 0}


@pytest.fixture(autouse=True, scope="module")
def _seeded() -> None:
    torch.manual_seed(0)


def program(module: nn.Module, *inputs: str) -> Program:
    torch.manual_seed(0)
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


@pytest.fixture(scope="module")
def two() -> Program:
    return program(Two(), "x=1x4", "ids=1x4:int64")


@pytest.fixture(scope="module")
def artifact(two: Program) -> Artifact:
    return BACKEND.lower(two, FP32)


def session_of(artifact: Artifact) -> InterpreterSession:
    session = BACKEND.open(artifact)
    assert isinstance(session, InterpreterSession)
    return session


def test_the_session_says_what_it_is(artifact: Artifact) -> None:
    with BACKEND.open(artifact) as session:
        assert isinstance(session, Evidence)
        assert isinstance(session, Inside)
        assert (session.level, session.notes, session.faults) == ("emulated", (), ())
        assert (session.inputs, session.outputs) == (artifact.inputs, artifact.outputs)


def test_outputs_have_the_dtypes_of_the_model(two: Program, artifact: Artifact) -> None:
    with BACKEND.open(artifact) as session:
        answer = session.run(two.reference.samples[0])
    assert {name: array.dtype.name for name, array in answer.items()} == {
        "sum": "float32",
        "next": "int64",
        "positive": "bool",
    }


def test_files_on_disk_are_opened_as_bytes_are(
    two: Program, artifact: Artifact, tmp_path: Path
) -> None:
    paths = {}
    for index, (name, content) in enumerate(artifact.files.items()):
        assert isinstance(content, bytes)
        paths[name] = tmp_path / str(index)
        paths[name].write_bytes(content)
    sample = two.reference.samples[0]
    with BACKEND.open(artifact) as one, BACKEND.open(replace(artifact, files=paths)) as other:
        np.testing.assert_array_equal(one.run(sample)["sum"], other.run(sample)["sum"])


def test_an_integer_that_core_ml_cannot_hold_is_refused(two: Program, artifact: Artifact) -> None:
    sample = dict(two.reference.samples[0])
    for largest in (2**31, -(2**31) - 1):
        sample["ids"] = np.full((1, 4), largest)
        with (
            BACKEND.open(artifact) as session,
            pytest.raises(BadInput, match="input 'ids' holds integers beyond int32"),
        ):
            session.run(sample)
    sample["ids"] = np.full((1, 4), 2**31 - 1)
    with BACKEND.open(artifact) as session:
        session.run(sample)


def test_layers_have_the_names_of_the_graphs_nodes(two: Program, artifact: Artifact) -> None:
    for made in (artifact, BACKEND.lower(two, FP16)):
        with session_of(made) as session:
            layers = session.layers(two.reference.samples[0])
        graph = {node.name for node in two.exported.graph.nodes if node.op == "call_function"}
        assert graph == {"linear", "relu", "add", "add_1", "gt"}
        assert graph <= set(layers)
        assert layers["relu"].shape == (1, 4)
        assert layers["relu"].min() >= 0


def changed(artifact: Artifact, change: Callable[[Any], None]) -> Artifact:
    """The artifact with another program in its package."""
    model, content = Model_pb2.Model(), artifact.files[MAIN]
    assert isinstance(content, bytes)
    model.ParseFromString(content)
    change(model)
    return replace(artifact, files={**artifact.files, MAIN: model.SerializeToString()})


def body(model: Any) -> Any:
    (function,) = model.mlProgram.functions.values()
    return function.block_specializations[function.opset]


def rename_uses(block: Any, old: str, new: str) -> None:
    for operation in block.operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.name == old:
                    binding.name = new


def test_an_input_that_nothing_reads_is_a_fault(two: Program, artifact: Artifact) -> None:
    broken = changed(artifact, lambda model: rename_uses(body(model), "x", "ids"))
    with session_of(broken) as session:
        (fault,) = session.faults
    assert fault == (
        "The package drops the input 'x': the model uses it, no operation of the package reads it."
    )


def test_an_input_that_is_not_declared_is_a_fault_and_not_fed(
    two: Program, artifact: Artifact
) -> None:
    def undeclare(model: Any) -> None:
        rename_uses(body(model), "x", "ids")
        (function,) = model.mlProgram.functions.values()
        for fields in (function.inputs, model.description.input):
            (index,) = (index for index, one in enumerate(fields) if one.name == "x")
            del fields[index]

    proof = edgekit.verify(BACKEND, changed(artifact, undeclare), two.reference)
    assert not proof.passed
    assert "drops the input 'x'" in proof.failures[-1]


def test_an_input_that_the_model_does_not_use_is_no_fault() -> None:
    class Ignores(nn.Module):
        def forward(self, x: Tensor, unused: Tensor) -> Tensor:
            return x * 2

    captured = program(Ignores(), "x=1x4", "unused=1x4")
    made = BACKEND.lower(captured, FP32)
    assert edgekit.verify(BACKEND, made, captured.reference).require().passed


def test_an_output_that_the_package_lacks_is_named(two: Program, artifact: Artifact) -> None:
    features = dict(artifact.provenance["features"])  # type: ignore[call-overload]
    features["output.sum"] = "elsewhere"
    lacking = replace(artifact, provenance={**artifact.provenance, "features": features})
    with (
        BACKEND.open(lacking) as session,
        pytest.raises(RuntimeFailed, match="it returns no 'elsewhere'"),
    ):
        session.run(two.reference.samples[0])


def test_an_op_that_the_interpreter_lacks_makes_a_static_proof(
    two: Program, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit_coreml.ops.OPS", {k: v for k, v in OPS.items() if k != "linear"})
    proof = edgekit.verify(BACKEND, artifact, two.reference)
    assert (proof.level, proof.passed, proof.outputs) == ("static", True, ())
    (note,) = proof.notes
    assert "The MIL interpreter has no linear; the package was converted" in note
    assert "Run predict_on_mac.py on a Mac" in note
    with (
        BACKEND.open(artifact) as session,
        pytest.raises(RuntimeFailed, match="has no linear"),
    ):
        session.run(two.reference.samples[0])


def test_a_static_proof_still_finds_a_dropped_input(
    two: Program, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit_coreml.ops.OPS", {k: v for k, v in OPS.items() if k != "linear"})
    broken = changed(artifact, lambda model: rename_uses(body(model), "x", "ids"))
    proof = edgekit.verify(BACKEND, broken, two.reference)
    assert (proof.level, proof.passed) == ("static", False)
    assert "drops the input 'x'" in proof.failures[0]


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        large = x * 300
        return (large * large).mean(1) * 1e-4


def test_the_first_value_beyond_float16_is_named_and_stays_named() -> None:
    captured = program(Squares(), "x=1x8")
    with session_of(BACKEND.lower(captured, FP16)) as session:
        session.run({"x": np.full((1, 8), 0.1, np.float32)})
        assert session.cause == ""
        answer = session.run({"x": np.full((1, 8), 2.0, np.float32)})
        assert not math.isfinite(float(answer["output"][0]))
        said = session.cause
        session.run({"x": np.full((1, 8), 3.0, np.float32)})
    assert session.cause == said
    assert said == (
        "The first value beyond float16 is 'mul_1', made by mul: 3.6e+05, where 65504 is the "
        "most. Keep it in float32: export with --precision fp32."
    )


def test_a_picture_is_fed_as_pixels() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    image = ImageInput("x", 3, 4, 4, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    model = resolve(Model(Mean(), (edgekit.TensorSpec("x", (1, 3, 4, 4), "float32"),), image=image))
    captured = capture(model, reference_from(model))
    made = BACKEND.lower(captured, FP32)
    pixels = np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4) * 5
    with session_of(made) as session:
        fed = session._fed("x", image.normalise(pixels))
        np.testing.assert_array_equal(fed, pixels)
        answer = session.run({"x": image.normalise(pixels)})["output"]
    np.testing.assert_allclose(answer, image.normalise(pixels).mean((2, 3)), rtol=1e-4, atol=1e-6)
