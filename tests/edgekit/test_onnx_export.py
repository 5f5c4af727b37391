"""The ONNX file that two targets start from: what it computes, what it names, what it hides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from edgekit import onnx_export
from edgekit.capture import capture, reference_from
from edgekit.errors import LoweringFailed, UnsupportedModel
from edgekit.evidence import sqnr_db
from edgekit.onnx_export import (
    Exported,
    findings_from_program,
    float16_from_float32,
    onnx_from_program,
    opsets,
    serialized,
)
from edgekit.program import Program
from edgekit.source import resolve


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(x)
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.gru(x)[0]
        return result


class Shifted(nn.Module):
    """Constants within float16 and beyond it, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.tensor([20_000.0, -60_000.0, 1e9, -1e9]))
        self.shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + self.shift


class Chain(nn.Module):
    """Two outputs, one of them from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x))
        return {"scores": self.second(hidden).softmax(-1), "hidden": hidden}


def captured(module: nn.Module, *inputs: str) -> Program:
    torch.manual_seed(0)
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


def constants(model: onnx.ModelProto) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]


def agreement_db(program: Program, model: onnx.ModelProto) -> float:
    """The lowest SQNR of any output on any sample, as ONNX's own evaluator computes the file."""
    session = ReferenceEvaluator(model)
    worst = np.inf
    for sample, expected in zip(program.reference.samples, program.reference.expected, strict=True):
        answers = session.run(None, dict(sample))
        for answer, wanted in zip(answers, expected.values(), strict=True):
            assert answer.dtype == wanted.dtype
            distance = sqnr_db(wanted.astype(np.float64), np.asarray(answer, np.float64))
            worst = min(worst, distance)
    return worst


@pytest.fixture(scope="module")
def chain() -> Program:
    return captured(Chain(), "x=batch:1..3x4")


@pytest.fixture(scope="module")
def chain_file(chain: Program) -> Exported:
    return onnx_from_program(chain, "imagined")


@pytest.fixture
def model(chain_file: Exported) -> onnx.ModelProto:
    """A copy that a test may change."""
    copy = onnx.ModelProto()
    copy.CopyFrom(chain_file.model)
    return copy


def test_the_file_computes_what_the_model_does(chain: Program, model: onnx.ModelProto) -> None:
    assert agreement_db(chain, model) > 110


def test_a_gru_multiplies_by_its_reset_gate_after_the_matrix_product() -> None:
    program = captured(Recurrent(), "x=1x5x4")
    model = onnx_from_program(program, "imagined").model
    assert "GRU" in {node.op_type for node in model.graph.node}
    assert agreement_db(program, model) > 110


def test_every_node_of_the_file_leads_to_its_node_of_the_graph(
    chain: Program, chain_file: Exported
) -> None:
    found = chain_file
    graph = {node.name: node for node in chain.exported.graph.nodes}
    assert {node.name for node in found.model.graph.node} >= set(found.origins)
    assert all(graph[origin.name] is origin for origin in found.origins.values())
    by_op = {node.op_type: found.origins[node.name].name for node in found.model.graph.node}
    assert (by_op["Tanh"], by_op["Softmax"]) == ("tanh", "softmax")


def test_values_keep_the_names_of_the_graph_and_outputs_the_users(model: onnx.ModelProto) -> None:
    assert [value.name for value in model.graph.output] == ["scores", "hidden"]
    assert {"linear", "linear_1"} <= {name for node in model.graph.node for name in node.output}


def test_the_users_names_of_dims_stand_everywhere(model: onnx.ModelProto) -> None:
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    free = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim}
    assert free - {""} == {"batch"}


def test_the_file_holds_no_path_of_its_maker(model: onnx.ModelProto) -> None:
    content = serialized(model)
    for path in (Path(__file__), Path(torch.__file__).parent, Path.cwd()):
        assert str(path).encode() not in content
    assert b"Traceback" not in content
    assert b".py" not in content
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_the_same_program_gives_the_same_bytes(chain: Program, model: onnx.ModelProto) -> None:
    assert serialized(onnx_from_program(chain, "imagined").model) == serialized(model)


def test_opsets_are_listed_by_domain(model: onnx.ModelProto) -> None:
    assert opsets(model) == {"ai.onnx": 20}
    model.opset_import.add(domain="com.example", version=3)
    assert opsets(model) == {"ai.onnx": 20, "com.example": 3}


def test_a_model_that_one_file_cannot_hold_is_refused(
    model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_MODEL", model.ByteSize())
    assert len(serialized(model)) == model.ByteSize()
    monkeypatch.setattr(onnx_export, "LARGEST_MODEL", model.ByteSize() - 1)
    with pytest.raises(LoweringFailed, match=r"larger than 2 GB, the most that one \.onnx file"):
        serialized(model)


def test_an_op_without_onnx_form_is_refused_in_the_targets_name_with_the_users_line() -> None:
    program = captured(Bessel(), "x=1x4")
    (finding,) = findings_from_program(program)
    assert finding.op.endswith("bessel_j0.default")
    assert finding.effect == "refused"
    assert "test_onnx_export.py:34: y: Tensor = torch.special.bessel_j0(x)" in finding.source
    with pytest.raises(UnsupportedModel, match=r"imagined cannot take this model:\n.*bessel_j0"):
        onnx_from_program(program, "imagined")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("advice\n## Exception summary\n\n<class 'X'>: no\nmore", "model: <class 'X'>: no$"),
        ("plain words\nmore", "model: plain words$"),
        ("", r"model: no reason given\.$"),
    ],
)
def test_an_exporter_that_fails_is_quoted_without_its_advice(
    chain: Program, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(onnx_export, "findings_from_program", lambda program: [])
    with pytest.raises(LoweringFailed, match=rf"torch\.onnx could not export the {reason}"):
        onnx_from_program(chain, "imagined")


def test_half_precision_keeps_the_ends_in_float32_and_the_numbers_near(
    chain: Program, model: onnx.ModelProto
) -> None:
    half = float16_from_float32(model)
    ends = [*half.graph.input, *half.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}
    assert {array.dtype.name for array in constants(half) if array.dtype.kind == "f"} == {"float16"}
    assert 50 < agreement_db(chain, half) < 90


def test_half_precision_leaves_no_note_of_a_type_that_no_longer_holds(
    model: onnx.ModelProto,
) -> None:
    assert model.graph.value_info
    half = float16_from_float32(model)
    assert not half.graph.value_info
    onnx.checker.check_model(half, full_check=True)


def test_half_precision_leaves_every_value_made_before_it_is_used(model: onnx.ModelProto) -> None:
    graph = float16_from_float32(model).graph
    made = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        assert set(node.input) <= made
        made |= set(node.output)


def test_constants_are_held_at_the_largest_half_and_not_before() -> None:
    program = captured(Shifted(), "x=1x4")
    half = float16_from_float32(onnx_from_program(program, "imagined").model)
    (shift,) = (array for array in constants(half) if array.size == 4 and abs(array).max() > 1e4)
    assert shift.ravel().tolist() == [20_000, -60_000, 65_504, -65_504]


def test_a_converter_that_fails_is_quoted_with_the_way_out(
    model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: onnx.ModelProto, **options: Mapping[str, object]) -> None:
        raise KeyError("node")

    monkeypatch.setattr(onnx_export, "convert_float_to_float16", fail)
    with pytest.raises(LoweringFailed, match=r"converted to fp16: 'node'\. Use --precision fp32"):
        float16_from_float32(model)


class Collisions(nn.Module):
    """Results named like nodes, like the input, and like a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, relu: Tensor) -> dict[str, Tensor]:
        y = torch.relu(relu) @ self.weight
        return {"mul": y + 1, "add": y * 2, "relu": y - 1, "weight": y + 3}


def test_names_of_results_may_be_those_of_nodes_weights_and_inputs() -> None:
    collisions = captured(Collisions(), "relu=1x4")
    model = onnx_from_program(collisions, "onnxruntime").model
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["relu"]
    names = [value.name for value in model.graph.output]
    assert names == ["mul", "add", "relu_output", "weight"]
    sample, expected = collisions.reference.samples[0], collisions.reference.expected[0]
    results = ReferenceEvaluator(model).run(None, dict(sample))
    for result, wanted in zip(results, expected.values(), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-6)


def test_two_results_that_onnx_could_not_tell_apart_are_refused() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x + 1, "x_output": x + 2}

    with pytest.raises(LoweringFailed, match=r"both be called 'x_output' in ONNX.*otherwise"):
        onnx_from_program(captured(Both(), "x=1x4"), "onnxruntime")


def test_a_scale_stays_exact_in_half_precision() -> None:
    class Resize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.interpolate(x, scale_factor=1.3, mode="bilinear")

    model = float16_from_float32(onnx_from_program(captured(Resize(), "x=1x1x10x10"), "t").model)
    (resize,) = (node for node in model.graph.node if node.op_type == "Resize")
    scales = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}[resize.input[2]]
    np.testing.assert_array_equal(scales, np.array([1, 1, 1.3, 1.3], np.float32))
