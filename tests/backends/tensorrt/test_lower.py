"""Programs to typed ONNX, engines and plans: versions, GPUs, ranges, refusals with their lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.capture import capture, reference_from
from edgekit.errors import LoweringFailed, RuntimeFailed, UnsupportedModel, UsageError
from edgekit.onnx_export import Exported
from edgekit.program import Program
from edgekit.recipe import FP16, FP32
from edgekit.source import resolve
from edgekit.spec import Dim, TensorSpec
from edgekit_tensorrt import BACKEND, VERSIONS, build_engine
from edgekit_tensorrt.lower import MAIN, _refused_by_version, profiles_from_specs
from edgekit_tensorrt.plan import engine_header
from edgekit_tensorrt.processes import Parsed, parse_onnx
from edgekit_tensorrt.versions import PARSERS

pytestmark = pytest.mark.usefixtures("tensorrt")


def program(make: Callable[[], nn.Module], *inputs: str) -> Program:
    torch.manual_seed(0)
    model = resolve(make(), list(inputs))
    return capture(model, reference_from(model))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(F.relu(self.conv(x)).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def small() -> Program:
    return program(Small, "x=1x3x6x6")


@pytest.fixture(scope="module")
def lowered(small: Program) -> Artifact:
    """In half precision, for two GPUs."""
    backend = BACKEND.with_options({"compute-capability": "sm86, SM75"})
    return backend.lower(small, FP16)


def content(artifact: Artifact, name: str) -> bytes:
    found = artifact.files[name]
    assert isinstance(found, bytes)
    return found


def test_each_gpu_has_an_engine_and_a_plan(lowered: Artifact) -> None:
    assert [name for name in lowered.files if name.endswith(".engine")] == [
        *("model.sm86.engine", "model.sm75.engine")
    ]
    for name in ("sm86", "sm75"):
        header = engine_header(content(lowered, f"model.{name}.engine"))
        assert header.compute_capabilities == (name,)
    written = json.loads(content(lowered, "plan.json"))
    assert written["runtime"].startswith("tensorrt_rtx 1.7")
    assert set(written["plans"]) == {"sm86", "sm75"}
    for name, plan in written["plans"].items():
        assert 0 < plan["layer_count"] <= len(plan["layers"])
        assert plan["moved_bytes"] > 3 * 6 * 6 * 2
        assert "Half" in plan["dtypes"]
        kernels = lowered.provenance["kernels"][name]  # type: ignore[index]
        keys = ("layer_count", "dtypes", "moved_bytes")
        assert kernels == {key: plan[key] for key in keys}


def test_the_scripts_for_the_device_go_with_it(lowered: Artifact) -> None:
    for name, source in (("build_engine.py", build_engine), ("evidence.py", evidence)):
        assert content(lowered, name) == Path(str(source.__file__)).read_bytes()


def test_half_precision_is_in_the_file_and_float32_at_its_edge(lowered: Artifact) -> None:
    graph = onnx.load_from_string(content(lowered, "model.onnx")).graph
    floats = {tensor.data_type for tensor in graph.initializer} - {TensorProto.INT64}
    assert floats == {TensorProto.FLOAT16}
    edges = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert edges == {TensorProto.FLOAT}


def test_the_same_program_gives_the_same_bytes(small: Program, lowered: Artifact) -> None:
    backend = BACKEND.with_options({"compute-capability": "sm86"})
    again = backend.lower(program(Small, "x=1x3x6x6"), FP16)
    assert set(lowered.files) - set(again.files) == {"model.sm75.engine"}
    for name in ("model.onnx", "model.sm86.engine"):
        assert content(again, name) == content(lowered, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_file_is_one_that_each_version_takes(
    small: Program, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit_tensorrt.lower._engines", lambda *_: {})  # the slow part
    backend = BACKEND.with_options({"version": version})
    artifact = backend.lower(small, FP32)
    opset = artifact.provenance["opsets"]["ai.onnx"]  # type: ignore[index]
    assert opset <= PARSERS[version].opset
    assert artifact.provenance["version"] == version
    edgekit.verify(backend, artifact, small.reference).require()


def test_a_version_that_is_too_old_for_the_opset_is_named(
    small: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = PARSERS["10.3"].__class__(opset=17, lacks=frozenset())
    monkeypatch.setitem(PARSERS, "10.3", old)
    with pytest.raises(LoweringFailed, match=r"needs ONNX opset 20; TensorRT 10.3 takes 17"):
        BACKEND.lower(small, FP32)
    (finding,) = BACKEND.check(small, FP32)
    assert (finding.op, finding.effect) == ("the graph", "refused")


def test_an_op_that_an_old_version_cannot_import_is_named_with_its_line(small: Program) -> None:
    (linear,) = (node for node in small.exported.graph.nodes if node.name == "linear")
    nodes = [
        helper.make_node("RMSNormalization", ["x"], ["y"], name="norm"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    exported = Exported(model, {"norm": linear})
    (finding,) = _refused_by_version(model, exported, "10.3")
    assert finding.op == "RMSNormalization (aten.linear.default)"
    assert "self.head(F.relu(self.conv(x))" in finding.source
    assert "TensorRT 10.3 cannot import it" in finding.remedy
    assert _refused_by_version(model, exported, "rtx") == []


class Unknown(nn.Module):
    """Two ops of ONNX that NVIDIA's parser has no importer for."""

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.linalg.det(x)
        return volume, torch.bitwise_and(ids, 3)


class Shifted(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids << 1


class Smoothed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.interpolate(x, (2, 2), mode="bilinear", antialias=True)
        return y


def test_all_that_the_parser_refuses_is_named_at_once_with_its_lines() -> None:
    captured = program(Unknown, "x=1x3x3", "ids=4:int64")
    findings = BACKEND.check(captured, FP32)
    assert [finding.op for finding in findings] == [
        "Det (aten.linalg_det.default)",
        "BitwiseAnd (aten.bitwise_and.Scalar)",
    ]
    for finding, line in zip(findings, ("volume = torch.lin", "return volume, "), strict=True):
        assert "test_lower.py:" in finding.source
        assert line in finding.source
        assert finding.remedy == "NVIDIA's parser does not know it; write it with simpler ops"
    with pytest.raises(UnsupportedModel, match=r"(?s)Det \(.*BitwiseAnd \("):
        BACKEND.lower(captured, FP32)


def test_a_constant_that_the_parser_cannot_read_is_named_by_what_reads_it() -> None:
    (finding,) = BACKEND.check(program(Shifted, "ids=4:int64"), FP32)
    assert "ids << 1" in finding.source
    assert "Failed to import initializer" in finding.remedy


def test_an_attribute_that_the_parser_refuses_is_a_finding() -> None:
    (finding,) = BACKEND.check(program(Smoothed, "x=1x1x4x4"), FP32)
    assert "antialias=True" in finding.source
    assert "Antialiasing is not supported currently" in finding.remedy


def test_what_onnx_has_no_op_for_is_found_before_the_parser() -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.special.bessel_j0(x)
            return y

    (finding,) = BACKEND.check(program(Bessel, "x=1x4"), FP32)
    assert "torch.special.bessel_j0(x)" in finding.source
    assert "ONNX has no op for it" in finding.remedy


def test_float32_products_on_turing_are_refused_with_nvidias_reason(small: Program) -> None:
    backend = BACKEND.with_options({"compute-capability": "sm75"})
    (finding,) = backend.check(small, FP32)
    assert "self.head(F.relu(self.conv(x))" in finding.source
    assert finding.op == "aten.linear.default"
    assert finding.remedy.startswith("for sm75, tensorrt could not build the engine: ")
    assert "Turing (SM75): FP32 GEMM is not supported" in finding.remedy
    assert finding.remedy.endswith("Try --precision fp16.")
    with pytest.raises(UnsupportedModel, match="FP32 GEMM is not supported"):
        backend.lower(small, FP32)


def test_a_build_that_fails_without_a_node_says_for_which_gpu(
    small: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeFailed("tensorrt could not build the engine: it gave no reason.")

    monkeypatch.setattr("edgekit_tensorrt.lower.build_engine", fail)
    with pytest.raises(LoweringFailed, match=r"^for sm86, tensorrt could not .* no reason\.$"):
        BACKEND.lower(small, FP32)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"version": "9"}, r"--tensorrt-version '9' is not one of 10\.3, 10\.13, 11, rtx"),
        ({"compute-capability": "sm87"}, r"no target sm87 \(Jetson Orin\).*python3 build_engine"),
        ({"compute-capability": "sm86,sm1"}, r"unknown compute capability 'sm1'; there is: sm75"),
        ({"build-seconds": "soon"}, r"--tensorrt-build-seconds 'soon' is not a number above 0"),
        ({"build-seconds": "nan"}, r"--tensorrt-build-seconds 'nan' is not a number above 0"),
        ({"build-memory": "-1"}, r"--tensorrt-build-memory '-1' is not a number above 0"),
    ],
)
def test_an_option_that_makes_no_sense_is_a_sentence(
    options: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        BACKEND.with_options(options)


def test_options_add_up() -> None:
    backend = BACKEND.with_options({"build-seconds": "5"}).with_options({"build-memory": "0.5"})
    assert (backend.settings.build_seconds, backend.settings.build_memory_gb) == (5.0, 0.5)
    assert backend.settings.compute_capabilities == ("sm86",)
    twice = BACKEND.with_options({"compute-capability": "sm89,SM89,sm120"})
    assert twice.settings.compute_capabilities == ("sm89", "sm120")


def test_named_dims_become_the_range_of_a_profile() -> None:
    batch, length = Dim("batch", 1, 8), Dim("length", 3, 10)
    specs = (
        TensorSpec("x", (batch, 4, length), "float32"),
        TensorSpec("fixed", (2, 2), "float32"),
        TensorSpec("mask", (batch,), "bool"),
    )
    assert profiles_from_specs(specs) == {
        "x": ((1, 4, 3), (4, 4, 6), (8, 4, 10)),
        "mask": ((1,), (4,), (8,)),
    }


class Dtypes(nn.Module):
    """A range of batches, and every dtype that has one at the edge."""

    def forward(self, x: Tensor, ids: Tensor, small: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {
            "x": torch.where(mask, x, 0.5) * 2,
            "ids": ids + small,
            "int32": small * 2,
            "bool": mask & (x > 0),
            "best": x.argmax(1),
        }


def test_dtypes_and_a_range_of_batches_are_built_and_proven() -> None:
    captured = program(
        Dtypes, "x=n:1..4x3", "ids=n:1..4x3:int64", "small=n:1..4x3:int32", "mask=n:1..4x3:bool"
    )
    artifact = BACKEND.lower(captured, FP32)
    proof = edgekit.verify(BACKEND, artifact, captured.reference).require()
    assert proof.level == "emulated"
    assert {d.equal for d in proof.outputs if d.equal is not None} == {1.0}
    assert {sample["x"].shape[0] for sample in captured.reference.samples} == {1, 2, 4}
    assert "model.sm86.engine" in artifact.files


def test_a_log_softmax_of_scores_far_apart_is_written_out() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(x * 100, 1)

    captured = program(Log, "x=2x8")
    for recipe in (FP32, FP16):
        artifact = BACKEND.lower(captured, recipe)
        edgekit.verify(BACKEND, artifact, captured.reference).require()


def test_lowering_leaves_the_program_as_it_was(small: Program, lowered: Artifact) -> None:
    before = [node.name for node in small.exported.graph.nodes]
    BACKEND.check(small, FP16)
    assert [node.name for node in small.exported.graph.nodes] == before


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, small: Program) -> None:
    def find(name: str) -> Any:
        return None if name == "onnxscript" else object()

    monkeypatch.setattr("edgekit_tensorrt.find_spec", find)
    with pytest.raises(edgekit.MissingRuntime, match=r"'onnxscript'.*edgekit-sdk\[export\]"):
        BACKEND.lower(small, FP32)
    with pytest.raises(edgekit.MissingRuntime, match="onnxscript"):
        BACKEND.check(small, FP32)


def test_where_tensorrt_proper_is_installed_no_engine_is_built_for_another_gpu(
    small: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can build for the GPU it runs on alone, which the session does."""

    def parse(model: bytes) -> Parsed:
        return replace(parse_onnx(model), runtime="tensorrt 10.13.3.9")

    monkeypatch.setattr("edgekit_tensorrt.lower.parse_onnx", parse)
    monkeypatch.delattr("edgekit_tensorrt.lower.build_engine")
    artifact = BACKEND.lower(small, FP32)
    assert set(artifact.files) == {MAIN, "plan.json", "build_engine.py", "evidence.py"}
    assert artifact.provenance["runtime"] == "tensorrt 10.13.3.9"
    assert artifact.provenance["kernels"] == {}
