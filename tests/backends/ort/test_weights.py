"""Integers for weights alone: the file shrinks, the arithmetic stays float."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

import edgekit
from edgekit.contract import AsWritten, OpTimings
from edgekit.program import Program
from edgekit.recipe import FP32, PRECISIONS
from edgekit.verify import verify
from tests.backends.ort.conftest import calibrated

BACKEND = edgekit.backend("onnxruntime")


def model_of(program: Program, precision: str, **other: object) -> onnx.ModelProto:
    recipe = replace(PRECISIONS[precision], **other)  # type: ignore[arg-type]
    content = BACKEND.lower(program, recipe).source
    assert isinstance(content, bytes)
    return onnx.load_from_string(content)


def types(model: onnx.ModelProto) -> Counter[int]:
    return Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1)


@pytest.fixture(scope="module")
def wide() -> Program:
    """Of every kind of product, with channels that no block divides."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=64), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 40, 2), nn.Flatten(2), nn.Linear(49, 70), nn.Flatten()),
        nn.Linear(2800, 10),
    ]
    return calibrated(nn.Sequential(*layers), (1, 3, 10, 10), "input")


@pytest.mark.parametrize(
    ("precision", "share", "least"), [("int8-weights", 0.3, 35), ("int4", 0.25, 17)]
)
def test_weights_in_the_file_are_integers_and_answers_stay_close(
    wide: Program, precision: str, share: float, least: float
) -> None:
    made = BACKEND.lower(wide, PRECISIONS[precision])
    assert made.size < share * BACKEND.lower(wide, FP32).size
    proof = verify(BACKEND, made, wide.reference)
    (deviation,) = proof.outputs
    assert deviation.sqnr_db is not None
    assert deviation.sqnr_db > least
    onnx.checker.check_model(model_of(wide, precision))


def test_eight_bits_have_a_scale_for_each_output_channel(wide: Program) -> None:
    model = model_of(wide, "int8-weights")
    assert types(model) == {TensorProto.INT8: 5}
    scales = {
        node.input[0]: node.input[1]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
    }
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert sorted(sizes[scale] for scale in scales.values()) == [(10,), (40,), (64,), (64,), (70,)]


def test_matrix_products_of_four_bits_are_the_runtimes_own_op(wide: Program) -> None:
    model = model_of(wide, "int4")
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["MatMulNBits"] == 2
    assert ops["Gemm"] == ops["MatMul"] == 0
    assert types(model)[TensorProto.UINT4] >= 3
    assert types(model)[TensorProto.FLOAT] == 5  # the scales of blocks


def test_kept_layers_keep_their_float_weights(wide: Program) -> None:
    before, after = (
        model_of(wide, "int4"),
        model_of(wide, "int4", keep_float=("module.6", "module.8")),
    )
    ops = Counter(node.op_type for node in after.graph.node)
    assert ops["MatMulNBits"] == 0
    assert ops["Gemm"] + ops["MatMul"] == 2
    assert (
        types(after)[TensorProto.FLOAT] == types(before)[TensorProto.FLOAT]
    )  # not scales but weights


def test_a_session_dequantizes_once_when_it_loads(wide: Program) -> None:
    made = BACKEND.lower(wide, PRECISIONS["int4"])
    sample = wide.reference.samples[0]
    with BACKEND.open(made, threads=1) as session:
        assert isinstance(session, OpTimings)
        assert "DequantizeLinear" not in {time.op for time in session.op_timings(sample, 2)}
        assert isinstance(session, AsWritten)
        (run,), (written,) = session.run(sample).values(), session.run_as_written(sample).values()
    np.testing.assert_allclose(run, written, atol=1e-5)
    assert made.provenance["session_options"] == {"session.disable_quant_qdq": "1"}


def test_pruned_weights_stay_zero_in_four_bits() -> None:
    layer = nn.Conv2d(40, 8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(8, 40, 1, 1) + 1)  # all of one sign, far from zero
        layer.weight[:, ::2] = 0
    program = calibrated(layer, (1, 40, 4, 4), "input")
    sample = {"input": np.zeros((1, 40, 4, 4), np.float32)}
    sample["input"][:, ::2] = 1
    with BACKEND.open(BACKEND.lower(program, PRECISIONS["int4"])) as session:
        (result,) = session.run(sample).values()
    assert (result == 0).all()
