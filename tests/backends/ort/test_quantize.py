"""int8 on ONNX Runtime: the style for each processor, what stays float, what the run computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.artifact import Artifact
from edgekit.contract import AsWritten, Quantizes
from edgekit.errors import LoweringFailed, UsageError
from edgekit.evidence import sqnr_db
from edgekit.program import Program
from edgekit.recipe import FP32, INT8, PRECISIONS, Cpu, Recipe
from edgekit.spec import Array
from edgekit_ort import quantize
from edgekit_ort.nodes import float_nodes, products
from tests.backends.ort.conftest import calibrated

BACKEND = edgekit.backend("onnxruntime")


def lowered(program: Program, cpu: Cpu = "vnni", **other: object) -> Artifact:
    return BACKEND.lower(program, replace(INT8, cpu=cpu, **other))  # type: ignore[arg-type]


def model_of(artifact: Artifact) -> onnx.ModelProto:
    assert isinstance(artifact.source, bytes)
    return onnx.load_from_string(artifact.source)


def fused(artifact: Artifact, folder: Path) -> Counter[str]:
    """The ops that the runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "fused.onnx")
    onnxruntime.InferenceSession(artifact.source, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


def codes_of(model: onnx.ModelProto) -> list[Array]:
    """The codes of weights, those of float layers aside."""
    reads = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in reads and len(tensor.dims) > 1
    ]


def test_int8_runs_in_integer_kernels_and_stays_close(residual: Program, tmp_path: Path) -> None:
    made = lowered(residual)
    ops = fused(made, tmp_path)
    assert (ops["QLinearConv"], ops["QGemm"], ops["QLinearAdd"]) == (3, 1, 1)
    assert ops["Conv"] == 0
    assert made.size < 0.65 * BACKEND.lower(residual, FP32).size
    edgekit.verify(BACKEND, made, residual.reference).require()
    assert made.provenance["style"] == "U8S8"
    onnx.checker.check_model(model_of(made), full_check=True)


def test_weights_are_signed_in_7_bits_without_vnni_and_in_8_with_it(
    residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_WORTH_DB", 100.0)
    full, reduced = (codes_of(model_of(lowered(residual, cpu))) for cpu in ("vnni", "avx2"))
    assert {array.dtype.name for array in (*full, *reduced)} == {"int8"}
    assert max(np.abs(array).max() for array in full) == 127
    assert max(np.abs(array).max() for array in reduced) <= 64


def test_the_measured_variants_for_avx2_stand_in_the_provenance(residual: Program) -> None:
    provenance = lowered(residual, "avx2").provenance
    variants = provenance["variants"]
    assert isinstance(variants, dict)
    assert set(variants) == {"U8S8 reduce_range", "U8U8"}
    assert all(20 < value < 60 for value in variants.values())
    better = variants["U8U8"] > variants["U8S8 reduce_range"] + 3
    assert provenance["style"] == ("U8U8" if better else "U8S8 reduce_range")


def test_u8u8_is_taken_where_it_is_better_by_enough(
    residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_WORTH_DB", -100.0)
    made = lowered(residual, "avx2")
    assert made.provenance["style"] == "U8U8"
    assert {array.dtype.name for array in codes_of(model_of(made))} == {"uint8"}


def test_activations_are_signed_on_arm(residual: Program) -> None:
    model = model_of(lowered(residual, "arm64"))
    zeros = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types = {zeros[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert types == {onnx.TensorProto.INT8}


def test_a_kept_layer_stays_float_in_the_file_and_in_the_run(
    residual: Program, tmp_path: Path
) -> None:
    made = lowered(residual, keep_float=("inner",))
    sizes = {tuple(array.shape) for array in codes_of(model_of(made))}
    assert (16, 16, 3, 3) not in sizes
    assert (16, 3, 3, 3) in sizes
    ops = fused(made, tmp_path)  # onnxruntime would quantize its weights itself
    assert ops["QLinearConv"] == 2
    assert ops["Conv"] + ops["FusedConv"] == 1
    edgekit.verify(BACKEND, made, residual.reference).require()


def test_an_op_can_be_kept_float(residual: Program) -> None:
    everything = lowered(residual, keep_float=("conv2d",))
    assert [array.shape for array in codes_of(model_of(everything))] == [(32, 40)]


def test_nothing_left_to_quantize_is_a_sentence(residual: Program) -> None:
    with pytest.raises(LoweringFailed, match=r"int8 would quantize nothing.*--precision fp32"):
        lowered(residual, keep_float=("conv2d", "linear"))


def test_int8_without_calibration_data_is_a_sentence(residual: Program) -> None:
    assert BACKEND.check(replace(residual, calibration=None), INT8) == []
    with pytest.raises(UsageError, match=r"needs calibration data.*--calibration"):
        lowered(replace(residual, calibration=None))


def test_the_file_as_written_is_the_run_but_for_rounding(residual: Program) -> None:
    made, sample = lowered(residual), residual.reference.samples[0]
    with BACKEND.open(made) as session:
        assert isinstance(session, AsWritten)
        written, run = session.run_as_written(sample)["logits"], session.run(sample)["logits"]
    assert sqnr_db(written, run) > 30
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(made.source, options)
    np.testing.assert_array_equal(plain.run(None, dict(sample))[0], written)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (replace(INT8, cpu="vnni"), "export with --cpu avx2"),
        (replace(INT8, cpu="avx2"), ""),
        (PRECISIONS["int8-weights"], ""),
        (FP32, ""),
    ],
)
def test_the_remedy_for_saturation_is_said_where_it_can_happen(
    residual: Program, recipe: Recipe, said: str
) -> None:
    session = BACKEND.open(BACKEND.lower(residual, recipe))
    assert isinstance(session, AsWritten)
    assert said in session.saturation
    assert bool(session.saturation) == bool(said)


class Gates(nn.Module):
    """Hard-sigmoid gates of two sizes, attention, and a sum of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 64, 3, padding=1)
        self.gate = nn.Conv2d(64, 64, 1)
        self.capped = nn.Conv2d(64, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        gate = torch.clamp(self.gate(y.mean((2, 3), keepdim=True)) + 3, 0, 6) / 6
        y = nn.functional.relu6(self.capped(y * gate)).flatten(2)
        scores = torch.softmax(y @ y.transpose(1, 2), -1)
        gelus = nn.functional.gelu(y) + nn.functional.gelu(y * 2)
        return scores @ gelus


def test_small_products_gates_and_attention_stay_float() -> None:
    torch.manual_seed(0)
    program = calibrated(Gates(), (1, 3, 48, 48))
    model = model_of(lowered(program))
    makers = {name: node for node in model.graph.node for name in node.output}
    integers = [
        node.op_type
        for node in model.graph.node
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear")
        and any(
            name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input
        )
    ]
    assert integers.count("Conv") == 2  # the gate has 4 thousand products, the others millions
    assert "MatMul" not in integers
    exported = onnx.shape_inference.infer_shapes(model_of(BACKEND.lower(program, FP32)))
    floats = float_nodes(exported, ())
    kinds = Counter(node.op_type for node in exported.graph.node if node.name in floats)
    assert kinds["Conv"] == 1
    assert kinds["MatMul"] == 2
    assert kinds["Add"] == 2
    assert kinds["Clip"] == 1  # the one behind a convolution is folded into it
    assert sorted(products(exported).values())[-1] == 48 * 48 * 64 * 27


def test_the_ops_that_it_quantizes_are_told_by_recipe() -> None:
    assert isinstance(BACKEND, Quantizes)
    assert {"conv2d", "linear", "add"} <= BACKEND.quantized_ops(INT8)
    assert "softmax" not in BACKEND.quantized_ops(INT8)
    assert "add" not in BACKEND.quantized_ops(PRECISIONS["int4"])
    assert BACKEND.quantized_ops(FP32) == frozenset()
