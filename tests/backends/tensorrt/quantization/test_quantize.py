"""int8 by explicit Q/DQ: which layers, which readers, which types. Each rule is NVIDIA's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import LoweringFailed, UnknownName
from edgekit.onnx_export import Exported, onnx_from_program, serialized
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, INT8, PRECISIONS
from edgekit_tensorrt import quantize
from edgekit_tensorrt.choice import answers, sqnr_db
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.processes import parse_onnx
from edgekit_tensorrt.quantize import (
    PER_CHANNEL,
    PER_TENSOR,
    Typed,
    _both_sides,
    int8_nodes,
    models_in_precision,
)
from tests.backends.tensorrt.quantization.conftest import (
    IMAGE,
    Mixed,
    calibrated_program,
    from_integers,
    producers,
)

ANY = PRECISIONS["any"]


@pytest.fixture(scope="module")
def exported(mixed: Program) -> Exported:
    return onnx_from_program(mixed, "tensorrt")


@pytest.fixture(scope="module")
def models(mixed: Program, exported: Exported) -> dict[str, Typed]:
    return models_in_precision(exported, mixed, INT8)


def of(exported: Exported, names: frozenset[str] | set[str]) -> set[str]:
    """Nodes of the captured graph for ONNX nodes."""
    return {exported.origins[name].name for name in names}


DENSE = {"conv2d_2", "conv2d_3", "linear", "linear_1", "linear_2"}


def test_depthwise_stem_and_attention_stay_float(exported: Exported) -> None:
    """A convolution of fewer than 4 channels is padded to 4; attention in float16 is one kernel."""
    assert of(exported, int8_nodes(exported.model, ())) == DENSE


def test_what_has_no_constant_weights_or_too_many_axes_is_no_candidate() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "flat"], ["a"], name="flat"),
        helper.make_node("MatMul", ["x", "batch"], ["b"], name="batch"),
        helper.make_node("MatMul", ["flat", "x"], ["c"], name="constant left"),
        helper.make_node("MatMul", ["a", "b"], ["d"], name="no constant"),
        helper.make_node("Relu", ["flat"], ["e"], name="no product"),
    ]
    weights = [
        numpy_helper.from_array(np.ones((8, 8), np.float32), "flat"),
        numpy_helper.from_array(np.ones((2, 8, 8), np.float32), "batch"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], weights))
    assert int8_nodes(model, ()) == {"flat"}
    assert int8_nodes(model, {"flat"}) == set()


@pytest.mark.parametrize("scales", [PER_CHANNEL, PER_TENSOR])
def test_only_the_chosen_layers_read_integers(
    models: dict[str, Typed], exported: Exported, scales: str
) -> None:
    typed = models[scales]
    assert of(exported, typed.quantized) == DENSE
    assert from_integers(typed.model) == typed.quantized


@pytest.mark.parametrize("scales", [PER_CHANNEL, PER_TENSOR])
def test_both_operands_are_int8_with_an_explicit_zero_point_of_0(
    models: dict[str, Typed], scales: str
) -> None:
    """Without one, or with uint8, NVIDIA's parser makes int8 of it and says nothing."""
    model = models[scales].model
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    points = [held[node.input[2]] for node in model.graph.node if node.op_type.endswith("eLinear")]
    assert len(points) >= 3 * len(DENSE)
    assert {point.data_type for point in points} == {TensorProto.INT8}
    assert not any(numpy_helper.to_array(point).any() for point in points)


@pytest.mark.parametrize("scales", [PER_CHANNEL, PER_TENSOR])
def test_a_bias_is_float_and_of_the_layers_own_type(models: dict[str, Typed], scales: str) -> None:
    """NVIDIA's parser refuses an int32 bias; strong typing refuses another float."""
    model = models[scales].model
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made = producers(model)
    biased = 0
    for node in model.graph.node:
        if node.name in models[scales].quantized and len(node.input) > 2:
            scale = kinds[made[node.input[1]].input[1]]
            assert kinds[node.input[2]] == scale
            biased += 1
    assert biased >= 2


@pytest.mark.parametrize("scales", [PER_CHANNEL, PER_TENSOR])
def test_the_types_of_scales_are_those_of_the_network(
    models: dict[str, Typed], scales: str
) -> None:
    """A dequantized value has the type of its scale, and both operands must have one."""
    model = onnx.shape_inference.infer_shapes(models[scales].model, strict_mode=True)
    onnx.checker.check_model(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for node in model.graph.node:
        if node.name in models[scales].quantized:
            left, right = (kinds[name] for name in node.input[:2])
            assert left == right
            island = node.name in models[scales].islands
            assert left == (TensorProto.FLOAT if island else TensorProto.FLOAT16)


def test_per_channel_has_a_scale_for_each_output_per_tensor_one(models: dict[str, Typed]) -> None:
    for scales, expected in ((PER_CHANNEL, {10, 16, 48}), (PER_TENSOR, {1})):
        model = models[scales].model
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        sizes = {
            held[node.input[1]].size
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in held
        }
        assert sizes == expected


class Shared(nn.Module):
    """Readers that must not get the rounded value: a sum, a shape, an output, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.tied = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = F.relu(self.first(x)) + x
        left, right = torch.matmul(h, self.tied), torch.matmul(y, self.tied)
        return h, self.second(h).reshape(h.shape[0], 2, 4), left, right


def test_every_other_reader_gets_the_float_value() -> None:
    captured = calibrated_program(Shared, "x=n:1..3x8", "y=n:1..3x8")
    exported = onnx_from_program(captured, "tensorrt")
    recipe = replace(INT8, keep_float=("matmul_1",))
    for typed in models_in_precision(exported, captured, recipe).values():
        assert of(exported, typed.quantized) == {"linear", "linear_1", "matmul"}
        assert from_integers(typed.model) == typed.quantized
        made = producers(typed.model)
        (kept,) = (node for node in typed.model.graph.node if node.name == "node_matmul_1")
        # The float weight is back, and the codes are there for the layer that shares it.
        held = {tensor.name: tensor for tensor in typed.model.graph.initializer}
        weight = numpy_helper.to_array(held[kept.input[1]])
        tied = captured.exported.state_dict["tied"].detach().numpy()
        np.testing.assert_array_equal(weight, tied.astype(np.float16))
        for value in typed.model.graph.output:
            assert made[value.name].op_type in ("Cast", "Reshape")
        found = answers(serialized(typed.model), captured.reference.samples)
        exact = answers(serialized(exported.model), captured.reference.samples)
        assert sqnr_db(exact, found) > 30


def test_an_output_that_one_layer_reads_too_stays_float() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.relu(self.first(x))
            return h, self.second(h)

    captured = calibrated_program(Returned, "x=2x8")
    exported = onnx_from_program(captured, "tensorrt")
    for typed in models_in_precision(exported, captured, INT8).values():
        assert of(exported, typed.quantized) == {"linear", "linear_1"}
        assert from_integers(typed.model) == typed.quantized
        found = answers(serialized(typed.model), captured.reference.samples)
        exact = answers(serialized(exported.model), captured.reference.samples)
        assert sqnr_db(exact, found) > 30


def test_of_a_layer_with_one_integer_side_both_stay_float() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "s"], ["w"], name="w"),
        helper.make_node("DequantizeLinear", ["x", "s"], ["y"], name="y"),
        helper.make_node("MatMul", ["y", "w"], ["both"], name="both"),
        helper.make_node("MatMul", ["z", "w"], ["one"], name="one"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert _both_sides(model, {"both", "one"}) == {"both"}
    assert _both_sides(model, {"one"}) == set()


def test_a_layer_that_is_kept_stays_float(mixed: Program, exported: Exported) -> None:
    """By module, by op, by node; and its result is not rounded on its account."""
    everything = models_in_precision(exported, mixed, INT8)[PER_CHANNEL]
    for name, kept in (("point", {"conv2d_3"}), ("linear_1", {"linear_1"}), ("linear", None)):
        recipe = replace(INT8, keep_float=(name,))
        typed = models_in_precision(exported, mixed, recipe)[PER_CHANNEL]
        gone = kept or {node for node in DENSE if node.startswith("linear")}
        assert of(exported, typed.quantized) == DENSE - gone
        assert from_integers(typed.model) == typed.quantized
        assert len(typed.model.graph.node) < len(everything.model.graph.node)


def test_a_name_that_is_no_layer_is_told(mixed: Program, exported: Exported) -> None:
    with pytest.raises(UnknownName, match="layer to keep in float 'neck'"):
        models_in_precision(exported, mixed, replace(INT8, keep_float=("neck",)))


def test_where_nothing_is_left_it_says_so(mixed: Program, exported: Exported) -> None:
    recipe = replace(INT8, keep_float=("conv2d", "linear"))
    with pytest.raises(LoweringFailed, match=r"int8 would quantize nothing: .*--precision fp16"):
        models_in_precision(exported, mixed, recipe)


def test_codes_for_many_widths_have_a_scale_for_each_channel(
    mixed: Program, exported: Exported, models: dict[str, Typed]
) -> None:
    (typed,) = models_in_precision(exported, mixed, ANY).values()
    assert serialized(typed.model) == serialized(models[PER_CHANNEL].model)


def test_without_calibration_data_int8_is_float16(mixed: Program, exported: Exported) -> None:
    blank = replace(mixed, calibration=None)
    (typed,) = models_in_precision(exported, blank, INT8).values()
    (half,) = models_in_precision(exported, mixed, FP16).values()
    assert serialized(typed.model) == serialized(half.model)
    assert not typed.quantized


def test_float32_is_the_export_itself(mixed: Program, exported: Exported) -> None:
    (typed,) = models_in_precision(exported, mixed, FP32).values()
    assert typed.model is exported.model


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("scales", [PER_CHANNEL, PER_TENSOR])
def test_nvidias_network_is_what_the_file_says(
    mixed: Program, models: dict[str, Typed], scales: str
) -> None:
    """In float16 a value near the middle of two codes may fall to either side."""
    assert mixed.calibration is not None
    content = serialized(models[scales].model)
    parsed = parse_onnx(content)
    assert (parsed.errors, parsed.warnings) == ((), ())
    assert parsed.network is not None
    network = NetworkInterpreter(parsed.network)
    samples = mixed.calibration.samples
    found = [list(network.run(sample).values()) for sample in samples]
    assert sqnr_db(answers(content, samples), found) > 35
    assert (
        sqnr_db(
            [[each["output"]] for each in mixed.reference.expected],
            [list(network.run(sample).values()) for sample in mixed.reference.samples],
        )
        > 25
    )


@pytest.mark.usefixtures("tensorrt")
def test_in_float32_nvidias_network_is_onnx_runtimes_to_the_digit(
    exported: Exported, mixed: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rewriting before the cast to float16: no value is near enough to the middle."""
    assert mixed.calibration is not None
    monkeypatch.setattr(quantize, "float16_from_float32", lambda model: model)
    monkeypatch.setattr(quantize, "with_islands", lambda *_: [])
    for typed in models_in_precision(exported, mixed, INT8).values():
        content = serialized(typed.model)
        parsed = parse_onnx(content)
        assert parsed.network is not None
        network = NetworkInterpreter(parsed.network)
        samples = mixed.calibration.samples
        for sample, expected in zip(samples, answers(content, samples), strict=True):
            np.testing.assert_allclose(network.run(sample)["output"], expected[0], atol=1e-6)


def test_the_same_program_gives_the_same_bytes(models: dict[str, Typed]) -> None:
    again = calibrated_program(Mixed, IMAGE)
    fresh = models_in_precision(onnx_from_program(again, "tensorrt"), again, INT8)
    for scales, typed in fresh.items():
        assert serialized(typed.model) == serialized(models[scales].model)
