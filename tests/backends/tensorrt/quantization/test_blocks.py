"""int4: codes and scales of blocks, which layers have them, what refuses them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.errors import LoweringFailed
from edgekit.onnx_export import (
    Exported,
    float16_from_float32,
    onnx_from_program,
    opsets,
    serialized,
)
from edgekit.program import Program
from edgekit.recipe import PRECISIONS
from edgekit_tensorrt import BACKEND, VERSIONS
from edgekit_tensorrt.blocks import BLOCK, block_codes, with_int4_weights
from edgekit_tensorrt.choice import answers, sqnr_db
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.lower import _refused_by_version
from edgekit_tensorrt.processes import parse_onnx
from edgekit_tensorrt.quantize import models_in_precision
from tests.backends.tensorrt.quantization.conftest import IMAGE, calibrated_program

INT4 = PRECISIONS["int4"]


class Products(nn.Module):
    """Gemm with its weights transposed, MatMul with a weight that two share, and what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 1)
        self.flat = nn.Linear(32, 64)
        self.tied = nn.Parameter(torch.randn(64, 64) / 8)
        self.odd = nn.Linear(64, 48)
        self.uneven = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.flat(self.conv(x).mean((2, 3))))
        h = F.relu(F.relu(h @ self.tied) @ self.tied)
        y: Tensor = self.uneven(F.relu(self.odd(h)))
        return y


@pytest.fixture(scope="module")
def products() -> Program:
    return calibrated_program(Products, IMAGE)


def exported_of(program: Program) -> Exported:
    return onnx_from_program(program, "tensorrt")


@pytest.mark.parametrize("axis", [0, 1])
def test_every_code_is_the_nearest_and_every_scale_is_above_0(axis: int) -> None:
    """TensorRT takes scales above 0 alone; a block of zeros has one too."""
    weight = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    weight[:BLOCK] *= 1e-5
    weight[:, :BLOCK] *= 1e-3
    weight[64:, 32:] = 0
    codes, scales = block_codes(weight, axis)
    assert [each.dtype.name for each in (codes, scales)] == ["int8", "float16"]
    assert codes.shape == weight.shape
    assert scales.shape[axis] == weight.shape[axis] // BLOCK
    assert (scales > 0).all()
    assert np.abs(codes).max() == 7
    spread = np.repeat(scales.astype(np.float64), BLOCK, axis)
    error = np.abs(codes * spread - weight)
    assert (error <= spread / 2 + 1e-12).all()
    assert (codes[64:, 32:] == 0).all()


def test_a_weight_that_has_only_codes_comes_back_exactly() -> None:
    codes = np.random.default_rng(0).integers(-7, 8, (64, 8)).astype(np.int8)
    codes[0] = codes[32] = 7
    found, scales = block_codes(codes.astype(np.float32) * np.float32(0.25), 0)
    np.testing.assert_array_equal(found, codes)
    assert (scales == 0.25).all()


@pytest.mark.usefixtures("tensorrt")
def test_products_with_constant_weights_have_blocks_and_the_rest_is_float16(
    products: Program,
) -> None:
    exported = exported_of(products)
    model, names = with_int4_weights(exported, ())
    # 48 features are no multiple of 32.
    origins = {exported.origins[name].name for name in names}
    assert origins == {"linear", "matmul", "matmul_1", "linear_1"}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    blocks = [tensor for tensor in held.values() if tensor.data_type == TensorProto.INT4]
    assert len(blocks) == 3  # two products share one weight
    floats = {tensor.data_type for tensor in held.values()}
    assert floats <= {TensorProto.FLOAT16, TensorProto.INT4, TensorProto.INT64}
    parsed = parse_onnx(serialized(model))
    assert (parsed.errors, parsed.warnings) == ((), ())
    assert parsed.network is not None
    network = NetworkInterpreter(parsed.network)
    assert products.calibration is not None
    samples = products.calibration.samples
    found = [list(network.run(sample).values()) for sample in samples]
    assert sqnr_db(answers(serialized(model), samples), found) > 55
    assert sqnr_db(answers(serialized(exported.model), samples), found) > 12


def test_the_codes_in_the_file_are_those_of_the_weight(products: Program) -> None:
    exported = exported_of(products)
    model, _ = with_int4_weights(exported, ())
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {tensor.name: tensor for tensor in exported.model.graph.initializer}
    weight = numpy_helper.to_array(weights["flat.weight"])
    codes, scales = block_codes(weight, 1)
    packed = numpy_helper.to_array(held["flat.weight_axis1_int4"]).astype(np.int8)
    np.testing.assert_array_equal(packed, codes)
    np.testing.assert_array_equal(numpy_helper.to_array(held["flat.weight_axis1_scale"]), scales)


def test_a_layer_that_is_kept_has_no_blocks(products: Program) -> None:
    exported = exported_of(products)
    recipe = replace(INT4, keep_float=("flat", "matmul_1"))
    (typed,) = models_in_precision(exported, products, recipe).values()
    assert {exported.origins[name].name for name in typed.quantized} == {"matmul", "linear_1"}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_the_file(products: Program, version: str) -> None:
    """Opset 21 is the first with 4-bit integers, which TensorRT has since 10.0."""
    exported = exported_of(products)
    model, _ = with_int4_weights(exported, ())
    assert (opsets(model), model.ir_version >= 10) == ({"ai.onnx": 21}, True)
    assert _refused_by_version(model, exported, version) == []
    if version == "10.3":  # which documents no more than opset 20
        exported.model.opset_import[0].version = 21
        with pytest.raises(LoweringFailed, match=r"opset 21; TensorRT 10\.3 takes 20"):
            _refused_by_version(exported.model, exported, version)


@pytest.mark.usefixtures("tensorrt")
def test_lowered_it_is_proven_and_smaller_and_says_what_the_compiler_undid(
    products: Program,
) -> None:
    """Of a weight that two products read it makes floats once, for the second of them."""
    artifact = BACKEND.lower(products, INT4)
    assert artifact.provenance["quantized"] == 4
    notes: Any = artifact.provenance["notes"]
    (note,) = notes
    assert re.match(r"For sm86, .* runs 1 of the 4 layers that are int4 .* in float: matmul", note)
    half = float16_from_float32(exported_of(products).model)
    assert artifact.model_size < 0.7 * len(serialized(half))
    proof = edgekit.verify(BACKEND, artifact, products.reference)
    assert proof.level == "emulated"
    assert proof.notes[1:] == (note,)
    assert proof.outputs[0].sqnr_db is not None
    assert proof.outputs[0].sqnr_db > 10


def test_a_model_without_such_products_is_told(mixed: Program) -> None:
    """Its Linear layers have 16 features."""
    with pytest.raises(
        LoweringFailed,
        match=r"int4 would quantize nothing: .*multiples of 32 .*convolutions stay float16.*int8",
    ):
        with_int4_weights(exported_of(mixed), ())


@pytest.mark.usefixtures("tensorrt")
def test_turing_has_no_4_bit_integers(products: Program) -> None:
    backend = BACKEND.with_options({"compute-capability": "sm75"})
    with pytest.raises(LoweringFailed, match=r"for sm75, .*int4.*Try --precision fp16\."):
        backend.lower(products, INT4)


def test_an_op_that_opset_21_changed_is_refused(products: Program) -> None:
    exported = exported_of(products)
    exported.model.graph.node.append(
        helper.make_node("GroupNormalization", ["a", "b", "c"], ["d"], name="norm")
    )
    with pytest.raises(LoweringFailed, match=r"GroupNormalization means something else"):
        with_int4_weights(exported, ())


def test_products_of_two_activations_or_odd_rows_have_no_blocks() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Parameter(torch.randn(32, 7))
            self.even = nn.Parameter(torch.randn(32, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x @ self.odd, x @ x.transpose(1, 2), x @ self.even

    exported = exported_of(calibrated_program(Plain, "x=1x32x32"))
    _, names = with_int4_weights(exported, ())
    assert {exported.origins[name].name for name in names} == {"matmul_2"}
