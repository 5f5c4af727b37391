"""What is particular to ONNX Runtime: the file it gets, its errors, its profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import Tensor, nn

import edgekit
from edgekit.capture import capture, reference_from
from edgekit.contract import Inside
from edgekit.errors import RuntimeFailed, UnsupportedModel
from edgekit.onnx_export import findings_from_program
from edgekit.program import Program
from edgekit.recipe import FP16, FP32
from edgekit.source import resolve
from edgekit_ort.session import ERRORS


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(x)
        return y


def program(module: nn.Module, *inputs: str) -> Program:
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


def model_of(captured: Program, recipe: edgekit.Recipe = FP32) -> onnx.ModelProto:
    content = edgekit.backend("onnxruntime").lower(captured, recipe).source
    assert isinstance(content, bytes)
    return onnx.load_from_string(content)


def test_an_op_without_onnx_form_is_found_with_its_line_and_refused() -> None:
    captured = program(Bessel(), "x=1x4")
    (finding,) = findings_from_program(captured)
    assert finding.effect == "refused"
    assert "test_ort.py:28: y: Tensor = torch.special.bessel_j0(x)" in finding.source
    with pytest.raises(UnsupportedModel, match=r"bessel_j0.*test_ort\.py:28.*simpler ones"):
        edgekit.backend("onnxruntime").lower(captured, FP32)


def test_the_file_uses_the_users_names() -> None:
    model = model_of(program(nn.Linear(3, 2), "input=batch:1..4x3"))
    (given,), (returned,) = model.graph.input, model.graph.output
    assert (given.name, returned.name) == ("input", "output")
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert returned.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_an_output_called_like_an_input_gets_a_name_of_its_own() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x * 2}

    captured = program(Echo(), "x=1x4")
    backend = edgekit.backend("onnxruntime")
    assert model_of(captured).graph.output[0].name == "x_output"
    edgekit.verify(backend, backend.lower(captured, FP32), captured.reference).require()


def test_half_precision_halves_the_weights() -> None:
    captured = program(nn.Linear(64, 64), "input=1x64")
    types = {tensor.data_type for tensor in model_of(captured, FP16).graph.initializer}
    assert types == {onnx.TensorProto.FLOAT16}
    backend = edgekit.backend("onnxruntime")
    assert backend.lower(captured, FP16).size < 0.6 * backend.lower(captured, FP32).size


def test_every_exception_of_the_runtime_is_translated() -> None:
    raised = {
        value
        for value in vars(state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert raised == set(ERRORS)


def test_a_file_that_is_no_model_is_a_sentence() -> None:
    backend = edgekit.backend("onnxruntime")
    good = backend.lower(program(nn.Linear(3, 2), "input=1x3"), FP32)
    bad = replace(good, files={good.main: b"hello"})
    with (
        pytest.raises(RuntimeFailed, match=r"onnxruntime could not load the model: .*protobuf"),
        backend.open(bad),
    ):
        pass


def test_times_of_ops_are_sorted_and_belong_to_the_graph() -> None:
    backend = edgekit.backend("onnxruntime")
    captured = program(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softmax(1)), "input=1x1x16x16")
    with backend.open(backend.lower(captured, FP32), threads=1) as session:
        times = session.op_timings({"input": np.zeros((1, 1, 16, 16), np.float32)}, 5)  # type: ignore[attr-defined]
    assert {time.op for time in times} >= {"Conv", "Softmax"}
    assert [t.microseconds for t in times] == sorted((t.microseconds for t in times), reverse=True)


@pytest.mark.parametrize("recipe", [FP32, FP16])
def test_the_file_passes_the_full_check_of_onnx(recipe: edgekit.Recipe) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = model_of(program(layer, "src=batch:1..4xlength:2..9x16"), recipe)
    onnx.checker.check_model(model, full_check=True)


class Squares(nn.Module):
    """x * x goes beyond float16 on the way to a result within it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 600) * (x * 600) * 1e-5


def test_an_overflow_that_the_cpu_hides_is_noted_in_the_proof(tmp_path: Path) -> None:
    exported = edgekit.export(
        Squares(),
        ["x=1x64"],
        targets=["onnxruntime"],
        precision="fp32,fp16",
        out=tmp_path / "squares",
    )
    assert exported.proof("onnxruntime-fp32").notes == ()
    half = exported.proof("onnxruntime-fp16")
    assert half.passed
    (note,) = half.notes
    assert "Node 'mul_2' (aten.mul.Tensor)" in note
    assert "--precision fp32" in note


def test_every_value_is_shown_by_the_name_of_its_graph_node() -> None:
    captured = program(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "input=1x3")
    backend = edgekit.backend("onnxruntime")
    sample = captured.reference.samples[0]
    with backend.open(backend.lower(captured, FP32)) as session:
        assert isinstance(session, Inside)
        values = session.layers(sample)
        outputs = session.run(sample)
    names = [node.name for node in captured.exported.graph.nodes if node.op == "call_function"]
    assert set(names[:-1]) <= set(values)  # the last one is called like the output
    assert (values["relu"] >= 0).all()
    np.testing.assert_array_equal(values["output"], outputs["output"])
