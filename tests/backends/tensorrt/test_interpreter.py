"""The interpreter on whole models, loops, branches, and values beyond float16."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn

from edgekit.errors import BadInput, RuntimeFailed
from edgekit_tensorrt.interpreter import NetworkInterpreter, _Execution
from edgekit_tensorrt.network import Layer, Network, Weights
from edgekit_tensorrt.network import Tensor as Value

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

Array = NDArray[Any]
Parse = Callable[[bytes], Network]
Check = Callable[..., Network]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.Hardswish(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8),
            nn.GELU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.AvgPool2d(3, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
            nn.Softmax(-1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


class Segmenter(nn.Module):
    """A transposed convolution, both ways to resize, pixel shuffle, both grouped norms."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.norms = nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True))
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1)
        self.head = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.norms(self.down(x))
        linear = nn.functional.interpolate(low, scale_factor=2.0, mode="bilinear")
        cubic = nn.functional.interpolate(low, scale_factor=2.0, mode="bicubic", align_corners=True)
        y: Tensor = nn.functional.pixel_shuffle(self.head(self.up(low) + linear + cubic), 2)
        return y


def floats(values: list[float]) -> Array:
    return np.array(values, np.float32)


def exported(module: nn.Module, *inputs: Tensor, opset: int = 18) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            module.eval(), inputs, dynamo=True, opset_version=opset, verbose=False
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def feeds(model: bytes, *inputs: Tensor) -> dict[str, Array]:
    names = [one.name for one in onnx.load_from_string(model).graph.input]
    return dict(zip(names, (one.numpy() for one in inputs), strict=True))


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Classifier(), (2, 3, 33, 33)),
        (Segmenter(), (1, 3, 32, 32)),
        (transformer(), (2, 7, 16)),
        (nn.GRU(3, 4, num_layers=2, bidirectional=True), (5, 2, 3)),
        (nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
        (nn.RNN(3, 4), (5, 2, 3)),
    ],
    ids=["cnn", "u-net", "transformer", "gru", "lstm", "rnn"],
)
def test_a_model_from_torch(module: nn.Module, shape: tuple[int, ...], check_model: Check) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = exported(module, x)
    check_model(model, feeds(model, x), 1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_layers_of_every_direction(ops: type[Ops], direction: str) -> None:
    graph = ops()
    ways, x = 2 if direction == "bidirectional" else 1, ops.normal(6, 2, 3)
    for operator, gates, outputs, more in (
        ("RNN", 1, 2, {}),
        ("GRU", 3, 2, {"linear_before_reset": 0}),
        ("GRU", 3, 2, {"linear_before_reset": 1}),  # as torch computes it
        ("LSTM", 4, 3, {}),
    ):
        weights = (ops.constant(ops.normal(ways, gates * 4, size)) for size in (3, 4))
        bias = ops.constant(ops.normal(ways, 2 * gates * 4))
        first = ops.normal(ways, 2, 4)
        states = [first] * (outputs - 1)
        common = {"hidden_size": 4, "direction": direction, **more}
        graph.add(operator, x, *weights, bias, None, *states, outputs=outputs, **common)
    graph.check()


def test_attention_as_one_op(check_model: Check) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 16)
    model = exported(transformer(), x, opset=23)
    assert any(node.op_type == "Attention" for node in onnx.load_from_string(model).graph.node)
    network = check_model(model, feeds(model, x), 1e-5)
    assert "ATTENTION_INPUT" in {layer.kind for layer in network.layers}


def test_half_precision_is_near_single(parse_network: Parse) -> None:
    torch.manual_seed(0)
    module, x = Classifier(), torch.randn(2, 3, 33, 33)
    single = onnx.load_from_string(exported(module, x))
    half = convert_float_to_float16(single, keep_io_types=True).SerializeToString()
    network = parse_network(half)
    assert "HALF" in {tensor.dtype for tensor in network.tensors.values()}
    interpreter = NetworkInterpreter(network)
    (found,) = interpreter.run(feeds(half, x)).values()
    with torch.no_grad():
        expected = module(x).numpy()
    difference = np.abs(found - expected).max()
    assert 0 < difference < 2e-3
    assert interpreter.overflow is None


def test_a_size_that_varies(parse_network: Parse, check_model: Check) -> None:
    node = helper.make_node("Flatten", ["x"], ["y"])
    graph = helper.make_graph(
        [node],
        "varying",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])],
    )
    model = _model(graph)
    assert parse_network(model).tensors["x"].shape == (-1, 2, 3)
    for batch in (1, 4):
        check_model(model, {"x": np.ones((batch, 2, 3), np.float32)})


def _model(graph: onnx.GraphProto, opset: int = 18) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def _info(name: str, dtype: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def test_only_the_branch_taken_is_run(check_model: Check) -> None:
    branches = {}
    for name, operator in (("then", "Add"), ("else", "Mul")):
        node = helper.make_node(operator, ["x", "x"], [f"{name}_y"])
        output = _info(f"{name}_y", TensorProto.FLOAT, [3])
        branches[f"{name}_branch"] = helper.make_graph([node], name, [], [output])
    graph = helper.make_graph(
        [helper.make_node("If", ["condition"], ["y"], **branches)],
        "branches",
        [_info("x", TensorProto.FLOAT, [3]), _info("condition", TensorProto.BOOL, [])],
        [_info("y", TensorProto.FLOAT, [3])],
    )
    x = floats([1, 2, 3])
    for condition in (True, False):
        check_model(_model(graph), {"x": x, "condition": np.array(condition)})


def test_a_loop_that_ends_by_its_own_condition(parse_network: Parse, check_model: Check) -> None:
    """The sum doubles until it exceeds 20; each round's sum is an output as well."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["sum", "sum"], ["doubled"]),
            helper.make_node("Identity", ["doubled"], ["seen"]),
            helper.make_node("Less", ["doubled", "limit"], ["on"]),
        ],
        "body",
        [
            _info("round", TensorProto.INT64, []),
            _info("before", TensorProto.BOOL, []),
            _info("sum", TensorProto.FLOAT, []),
        ],
        [
            _info("on", TensorProto.BOOL, []),
            _info("doubled", TensorProto.FLOAT, []),
            _info("seen", TensorProto.FLOAT, []),
        ],
    )
    graph = helper.make_graph(
        [
            # The parser renames a network input that is the first condition itself.
            helper.make_node("Not", ["stop"], ["start"]),
            helper.make_node("Loop", ["rounds", "start", "x"], ["y", "all"], body=body),
        ],
        "loop",
        [
            _info("rounds", TensorProto.INT64, []),
            _info("stop", TensorProto.BOOL, []),
            _info("x", TensorProto.FLOAT, []),
        ],
        [_info("y", TensorProto.FLOAT, []), _info("all", TensorProto.FLOAT, [None])],
        [helper.make_tensor("limit", TensorProto.FLOAT, [], [20.0])],
    )
    model = _model(graph)
    common = {"stop": np.array(False), "x": np.array(3, np.float32)}
    for rounds in (2, 3):  # the first ends by the count
        check_model(model, {"rounds": np.array(rounds), **common})
    found = NetworkInterpreter(parse_network(model)).run({"rounds": np.array(10), **common})
    assert found["y"] == 24
    assert found["all"].tolist() == [6, 12, 24]


def test_a_loop_within_a_loop(check_model: Check) -> None:
    """Three times: x = 2x + 1, where the doubling is itself a loop that adds x twice to zero."""
    loop = [("round", TensorProto.INT64), ("on", TensorProto.BOOL)]
    inner = helper.make_graph(
        [
            helper.make_node("Add", ["part", "x"], ["more"]),
            helper.make_node("Identity", ["inner_on"], ["inner_on_after"]),
        ],
        "inner",
        [_info(f"inner_{name}", dtype, []) for name, dtype in loop]
        + [_info("part", TensorProto.FLOAT, [2])],
        [_info("inner_on_after", TensorProto.BOOL, []), _info("more", TensorProto.FLOAT, [2])],
    )
    outer = helper.make_graph(
        [
            helper.make_node("Loop", ["two", "always", "zero"], ["doubled"], body=inner),
            helper.make_node("Add", ["doubled", "one"], ["next"]),
            helper.make_node("Identity", ["outer_on"], ["outer_on_after"]),
        ],
        "outer",
        [_info(f"outer_{name}", dtype, []) for name, dtype in loop]
        + [_info("x", TensorProto.FLOAT, [2])],
        [_info("outer_on_after", TensorProto.BOOL, []), _info("next", TensorProto.FLOAT, [2])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["three", "always", "start"], ["y"], body=outer)],
        "nested",
        [_info("start", TensorProto.FLOAT, [2])],
        [_info("y", TensorProto.FLOAT, [2])],
        [
            helper.make_tensor("always", TensorProto.BOOL, [], [1]),
            helper.make_tensor("two", TensorProto.INT64, [], [2]),
            helper.make_tensor("three", TensorProto.INT64, [], [3]),
            helper.make_tensor("zero", TensorProto.FLOAT, [2], [0.0, 0.0]),
            helper.make_tensor("one", TensorProto.FLOAT, [2], [1.0, 1.0]),
        ],
    )
    check_model(_model(graph), {"start": floats([1, 2])})


def test_a_scan_goes_over_slices(check_model: Check) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["sum", "x_i"], ["total"]),
            helper.make_node("Mul", ["total", "x_i"], ["y_i"]),
        ],
        "body",
        [_info("sum", TensorProto.FLOAT, [2]), _info("x_i", TensorProto.FLOAT, [2])],
        [_info("total", TensorProto.FLOAT, [2]), _info("y_i", TensorProto.FLOAT, [2])],
    )
    node = helper.make_node("Scan", ["zero", "x"], ["sum", "y"], num_scan_inputs=1, body=body)
    graph = helper.make_graph(
        [node],
        "scan",
        [_info("zero", TensorProto.FLOAT, [2]), _info("x", TensorProto.FLOAT, [4, 2])],
        [_info("sum", TensorProto.FLOAT, [2]), _info("y", TensorProto.FLOAT, [4, 2])],
    )
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    check_model(_model(graph), {"zero": np.zeros(2, np.float32), "x": x})


def test_an_overflow_is_named_where_it_begins(ops: type[Ops], parse_network: Parse) -> None:
    graph = ops()
    x = np.full(3, 60000, np.float16)
    (total,) = graph.inner("Add", x, x)
    (name,) = graph.add("Mul", total, ops.constant(0.01, "float16"))
    graph.add("Mul", x, x)  # another, later
    interpreter = NetworkInterpreter(parse_network(graph.model()))
    seen: dict[str, Tensor] = {}
    found = interpreter.run(graph.inputs, trace=lambda key, value: seen.update({key: value}))
    assert np.isinf(found[name]).all()
    overflow = interpreter.overflow
    assert overflow is not None
    assert (overflow.layer, overflow.kind, overflow.output) == ("Add0", "ELEMENTWISE", total)
    assert overflow.largest == 120000
    assert "'Add0'" in str(overflow)
    assert "65504" in str(overflow)
    assert {total, name} <= set(seen)
    for array in graph.inputs.values():
        array[:] = 1
    interpreter.run(graph.inputs)
    assert interpreter.overflow is None  # of the last run


def test_an_infinity_that_was_given_is_no_overflow(ops: type[Ops], parse_network: Parse) -> None:
    graph = ops()
    mask = ops.constant([0, -np.inf], "float16")
    graph.add("Add", np.ones(2, np.float16), mask)
    interpreter = NetworkInterpreter(parse_network(graph.model()))
    interpreter.run(graph.inputs)
    assert interpreter.overflow is None


def test_brain_floats_come_as_single(parse_network: Parse) -> None:
    dtype = TensorProto.BFLOAT16
    weight = helper.make_tensor("w", dtype, [3], [1.0, 2.0, 3.0])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "brain",
        [_info("x", dtype, [3])],
        [_info("y", dtype, [3])],
        [weight],
    )
    x = floats([1.001, 1.01, 3])
    (found,) = NetworkInterpreter(parse_network(_model(graph))).run({"x": x}).values()
    expected = (torch.from_numpy(x).bfloat16() * torch.tensor([1, 2, 3]).bfloat16()).float()
    np.testing.assert_array_equal(found, expected.numpy())


def network(*layers: Layer, dtype: str = "FLOAT") -> Network:
    """Layers over tensors of two numbers; the input is x and the output y."""
    names = {"x", *(name for layer in layers for name in layer.outputs)}
    tensors = {name: Value(name, dtype, (2,)) for name in names}
    return Network("made", ("x",), ("y",), tensors, layers)


def relu(source: str = "x", name: str = "y", **attributes: object) -> Layer:
    values = {"type": "RELU", "alpha": 0.0, "beta": 0.0} | attributes
    return Layer("ACTIVATION", name, (source,), (name,), values)


def test_what_it_cannot_run_is_known_before_it_runs() -> None:
    made = network(
        Layer("NMS", "nms", ("x",), ("a",), {}),
        relu("a", "b", type="NEW"),
        Layer("FILL", "noise", (), ("c",), {"operation": "RANDOM_NORMAL"}),
        Layer("NMS", "again", ("x",), ("y",), {}),
    )
    interpreter = NetworkInterpreter(made)
    assert interpreter.unknown == ("NMS", "ACTIVATION NEW", "FILL random_normal")
    with pytest.raises(RuntimeFailed, match="it has no NMS, ACTIVATION NEW, FILL random_normal"):
        interpreter.run({"x": np.zeros(2, np.float32)})


def test_a_constant_that_could_not_be_read_may_be_given() -> None:
    hidden = Layer(
        "CONSTANT", "k", (), ("y",), {"shape": [2]}, {"weights": Weights("FP8", 2, None)}
    )
    made = network(hidden, dtype="FP8")
    assert NetworkInterpreter(made).unknown == ("value of the FP8 constant k",)
    interpreter = NetworkInterpreter(made, constants={"k": floats([1, 1000])})
    assert interpreter.unknown == ()
    assert interpreter.run({"x": np.zeros(2, np.float32)})["y"].tolist() == [1, 448]


def test_inputs_must_fit() -> None:
    interpreter = NetworkInterpreter(network(relu()))
    with pytest.raises(BadInput, match="takes x; it was given z"):
        interpreter.run({"z": np.zeros(2, np.float32)})
    with pytest.raises(BadInput, match="'x' has dtype float64; it takes float32"):
        interpreter.run({"x": np.zeros(2)})
    with pytest.raises(BadInput, match=r"'x' has shape \[3\]; it takes \[2\]"):
        interpreter.run({"x": np.zeros(3, np.float32)})


def test_inputs_stay_the_callers_and_outputs_too() -> None:
    interpreter = NetworkInterpreter(network(Layer("IDENTITY", "same", ("x",), ("y",), {})))
    x = floats([1, 2])
    x.flags.writeable = False
    found = interpreter.run({"x": x})["y"]
    found[:] = 7
    assert x.tolist() == [1, 2]
    assert interpreter.run({"x": x})["y"].tolist() == [1, 2]


def test_layers_may_stand_in_any_order_and_many_of_them() -> None:
    count = 3000  # more than Python can nest
    chain = [relu("x" if i == 0 else f"t{i - 1}", f"t{i}") for i in range(count)]
    made = network(relu(f"t{count - 1}"), *chain[::-1])
    assert NetworkInterpreter(made).run({"x": floats([-1, 2])})["y"].tolist() == [0, 2]


def test_values_are_forgotten_once_all_have_read_them() -> None:
    made = network(relu("x", "a"), relu("a", "b"), relu("b", "y"))
    run = _Execution(NetworkInterpreter(made), {"x": torch.ones(2)}, None)
    run.evaluate(["y"])
    assert set(run.frames[0].values) == {"y"}
