"""int8 from the program to the proof: files, the choice by the plan, what each GPU really runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import edgekit
from edgekit.artifact import Artifact
from edgekit.contract import Quantizes
from edgekit.errors import LoweringFailed, RuntimeFailed
from edgekit.onnx_export import onnx_from_program
from edgekit.program import Program
from edgekit.recipe import FP16, INT8, PRECISIONS
from edgekit_tensorrt import BACKEND, lower
from edgekit_tensorrt.plan import Plan
from edgekit_tensorrt.quantize import PER_CHANNEL, PER_TENSOR
from tests.backends.tensorrt.quantization.conftest import producers

pytestmark = pytest.mark.usefixtures("tensorrt")
SM75 = BACKEND.with_options({"compute-capability": "sm75"})
ANY = PRECISIONS["any"]
SCRIPTS = {"build_engine.py", "evidence.py"}


@pytest.fixture(scope="module")
def artifact(mixed: Program) -> Artifact:
    return BACKEND.lower(mixed, INT8)


def test_the_files_and_those_that_a_device_makes_again(artifact: Artifact) -> None:
    assert set(artifact.files) == {"model.onnx", "model.sm86.engine", "plan.json", *SCRIPTS}
    assert artifact.derived == {"model.sm86.engine", "plan.json"}
    assert isinstance(artifact.source, bytes)
    assert artifact.model_size == len(artifact.source)


def test_both_kinds_of_scales_are_judged_and_the_figures_kept(artifact: Artifact) -> None:
    variants: Any = artifact.provenance["variants"]
    assert set(variants) == {"chosen", PER_CHANNEL, PER_TENSOR}
    for name in (PER_CHANNEL, PER_TENSOR):
        figures = variants[name]
        assert figures["kernels"] > 10
        assert figures["moved_bytes"] > 0
        assert 20 < figures["sqnr_db"] < 60
    kernels: Any = artifact.provenance["kernels"]
    assert kernels["sm86"]["layer_count"] == variants[variants["chosen"]]["kernels"]
    assert kernels["sm86"]["moved_bytes"] == variants[variants["chosen"]]["moved_bytes"]


@pytest.mark.parametrize("name", [PER_CHANNEL, PER_TENSOR])
def test_the_chosen_one_is_the_one_that_is_shipped(
    mixed: Program, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower, "chosen", lambda _figures: name)
    monkeypatch.setattr(lower, "_engines", lambda *_: {})  # the slow part
    made = lower._made_best(mixed, INT8, BACKEND.settings)[1]
    weights = {
        len(tensor.dims)
        for node in made.typed.model.graph.node
        if node.op_type == "DequantizeLinear"
        for tensor in made.typed.model.graph.initializer
        if tensor.name == node.input[1] and node.input[0].endswith("_quantized")
    }
    assert weights == ({1} if name == PER_CHANNEL else {0})


def test_every_layer_asked_for_is_int8_in_the_plan_and_the_proof_holds(
    mixed: Program, artifact: Artifact
) -> None:
    assert artifact.provenance["quantized"] == 5
    assert artifact.provenance["notes"] == []
    proof = edgekit.verify(BACKEND, artifact, mixed.reference).require()
    assert proof.level == "emulated"
    assert proof.outputs[0].sqnr_db is not None
    assert proof.outputs[0].sqnr_db > 25


def test_turing_would_run_convolutions_in_float_and_is_refused(mixed: Program) -> None:
    """It has no float32 products, so no islands; of the rest its convolutions are float16."""
    convolutions = replace(ANY, keep_float=("linear",))
    with pytest.raises(
        LoweringFailed,
        match=r"For sm75, .* runs 2 of the 2 layers that are int8 .* in float: dense, point\. "
        r"Keep them in float \(--keep-float\).*compute-capability sm86\)\. Or use --precision fp16",
    ):
        SM75.lower(mixed, convolutions)


def test_a_variant_that_cannot_be_built_leaves_the_other(mixed: Program) -> None:
    """With a scale for each channel products need float32, which Turing has not."""
    artifact = SM75.lower(mixed, replace(INT8, keep_float=("point",)))
    variants: Any = artifact.provenance["variants"]
    assert variants["chosen"] == PER_TENSOR
    assert "FP32 GEMM is not supported" in variants[PER_CHANNEL]
    notes: Any = artifact.provenance["notes"]
    (note,) = notes
    assert "runs 1 of the 4 layers that are int8 in the file in float: dense." in note
    (finding,) = SM75.check(mixed, replace(INT8, keep_float=("point",)))
    assert (finding.op, finding.effect) == ("aten.conv2d.default", "outside")
    assert finding.module == "dense"
    assert "self.dense(x)" in finding.source
    assert finding.remedy.startswith("for sm75 it runs in float; keep it in float")


def test_where_none_can_be_built_the_reason_is_told(
    mixed: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeFailed("tensorrt could not build the engine: it gave no reason.")

    monkeypatch.setattr(lower, "build_engine", fail)
    with pytest.raises(LoweringFailed, match=r"^for sm86, .*it gave no reason"):
        BACKEND.lower(mixed, INT8)


def test_the_second_gpu_gets_an_engine_of_the_chosen_variant_alone(
    mixed: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, ...]] = []

    def engines(_content: bytes, _exported: object, _program: object, settings: Any) -> Any:
        built.append(settings.compute_capabilities)
        return {name: _Built() for name in settings.compute_capabilities}

    class _Built:
        plan, engine = Plan(()), b""

    monkeypatch.setattr(lower, "_engines", engines)
    monkeypatch.setattr(lower, "left_in_float", lambda *_: [])
    backend = BACKEND.with_options({"compute-capability": "sm86,sm89"})
    artifact = backend.lower(mixed, INT8)
    assert built == [("sm86",), ("sm86",), ("sm89",)]
    assert artifact.derived == {"model.sm86.engine", "model.sm89.engine", "plan.json"}


def test_without_calibration_data_it_is_checked_as_float16_and_never_made(mixed: Program) -> None:
    blank = replace(mixed, calibration=None)
    assert BACKEND.check(blank, INT8) == []
    for name in ("int8", "any"):
        with pytest.raises(LoweringFailed, match=f"{name} needs calibration data"):
            BACKEND.lower(blank, PRECISIONS[name])


def test_a_kept_layer_is_float_in_the_plan(mixed: Program) -> None:
    made = lower._made_best(mixed, replace(ANY, keep_float=("dense",)), BACKEND.settings)[1]
    exported = onnx_from_program(mixed, "tensorrt")
    (kept,) = (name for name, node in exported.origins.items() if node.name == "conv2d_2")
    for layer in made.built["sm86"].plan.layers:
        if kept in layer.nodes:
            assert "Int8" not in {t.dtype for t in (*layer.inputs, *layer.constants)}
    sources = producers(made.typed.model)
    (node,) = (node for node in made.typed.model.graph.node if node.name == kept)
    assert sources[node.input[0]].op_type == "Relu"


def test_the_backend_says_which_ops_become_integers(mixed: Program) -> None:
    assert isinstance(BACKEND, Quantizes)
    assert {"conv2d", "linear", "matmul"} <= BACKEND.quantized_ops(INT8)
    assert "conv2d" not in BACKEND.quantized_ops(PRECISIONS["int4"])
    assert "softmax" not in BACKEND.quantized_ops(INT8)
    assert BACKEND.recipes[:2] == (FP16, INT8)
