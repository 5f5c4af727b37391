"""Faults planted in artifacts, behind valid hashes: each proof must fail, and say where and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import edgekit
from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, open_bundle
from edgekit.capture import capture, reference_from
from edgekit.diagnosis import deviations_of
from edgekit.errors import DamagedFile, NotProven
from edgekit.files import sha256
from edgekit.layers import first_divergence
from edgekit.manifest import read_manifest
from edgekit.program import Program, Reference
from edgekit.recipe import FP16, FP32
from edgekit.source import resolve
from edgekit.spec import TensorSpec
from edgekit.verify import Proof

Edit = Callable[[Path], None]
ONNX_TARGETS = ("onnxruntime", "tensorrt")
PROTO = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
HOLDS_WEIGHTS = {
    "coreml": WEIGHTS,
    "executorch": "model.pte",
    "onnxruntime": "model.onnx",
    "tensorrt": "model.onnx",
}


class Net(nn.Module):
    """Everything square, so that an axis can be taken for another and no size tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(self.first(x).transpose(2, 3), 1)
        z: Tensor = self.second(y).relu() + 1
        return z


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def bundle(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One export for all targets; each test breaks a copy."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    targets = [name for name in HOLDS_WEIGHTS if _installed(name)]
    return edgekit.export(net, ["x=1x4x4x4"], targets=targets, precision="fp32", out=folder)


def _installed(name: str) -> bool:
    try:
        edgekit.backend(name)
    except edgekit.MissingRuntime:
        return False
    return True


@pytest.fixture
def plant(bundle: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """A copy of the bundle with one file edited, and hash and digest made to fit it."""

    def edited(target: str, file: str, edit: Edit) -> Bundle:
        if f"{target}-fp32" not in bundle.artifacts:
            edgekit.backend(target)  # says what is missing
        folder = tmp_path / "bundle"
        shutil.copytree(bundle.folder, folder)
        name = f"{target}-fp32/{file}"
        before = (folder / name).read_bytes()
        edit(folder / name)
        assert (folder / name).read_bytes() != before
        manifest = read_manifest(folder)
        files = {**manifest.files, name: sha256(folder / name)}
        (folder / "manifest.json").write_text(manifest.with_files(files).to_text())
        return open_bundle(folder)

    return edited


def proof_of(backend: edgekit.Backend, bundle: Bundle) -> Proof:
    return edgekit.verify(backend, bundle.artifact(backend.name), bundle.reference())


def first_off(backend: edgekit.Backend, bundle: Bundle) -> tuple[str, str]:
    """The node and the module of the first layer that is not eager's."""
    artifact = bundle.artifact(backend.name)
    found = deviations_of(backend, artifact, bundle.layers(artifact.name), bundle.reference())
    first = first_divergence(found)
    assert first is not None
    return first.node, first.module


def test_the_whole_bundle_is_proven_again(backend: edgekit.Backend, bundle: Bundle) -> None:
    proof_of(backend, bundle).require()


def quadrupled(value: float) -> Edit:
    """Flips the lowest but one bit of a float32's exponent, wherever the file holds it."""
    old = np.float32(value).tobytes()

    def edit(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, old[:3] + bytes([old[3] ^ 1])))

    return edit


@pytest.mark.parametrize("module", ["first", "second"])
def test_a_flipped_weight_byte_is_found_and_its_module_named(
    backend: edgekit.Backend, net: Net, plant: Callable[..., Bundle], module: str
) -> None:
    weight = net.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    value = float(weight.detach().flatten()[5])
    broken = plant(backend.name, HOLDS_WEIGHTS[backend.name], quadrupled(value))
    proof = proof_of(backend, broken)
    assert not proof.passed
    assert "SQNR" in " ".join(proof.failures)
    if backend.name != "executorch":  # its runtime shows nothing of its inside
        node, found = first_off(backend, broken)
        assert found == module
        assert node.startswith("conv2d")


def test_a_flipped_weight_byte_without_a_fitting_hash_is_not_even_opened(
    backend: edgekit.Backend, net: Net, bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    file = f"{backend.name}-fp32/{HOLDS_WEIGHTS[backend.name]}"
    quadrupled(float(net.first.weight.detach().flatten()[5]))(folder / file)
    with pytest.raises(DamagedFile, match=r"hash|altered|damaged"):
        open_bundle(folder)


def _mil(path: Path, change: Callable[[Any], None]) -> None:
    """Edit the operations of the one function of a package."""
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString(path.read_bytes())
    (function,) = model.mlProgram.functions.values()
    change(function.block_specializations[function.opset])
    path.write_bytes(model.SerializeToString())


def _constant(block: Any, operation: Any, name: str) -> Any:
    """The integers of an operation's constant input, wherever they lie."""
    (binding,) = operation.inputs[name].arguments
    value = binding.value
    if binding.WhichOneof("binding") == "name":
        (source,) = (one for one in block.operations if one.outputs[0].name == binding.name)
        value = source.attributes["val"]
    return value.immediateValue.tensor.ints.values


def softmax_along_rows(path: Path) -> None:
    def change(block: Any) -> None:
        (softmax,) = (one for one in block.operations if one.type == "softmax")
        _constant(block, softmax, "axis")[0] = 2

    _mil(path, change)


def columns_for_rows(path: Path) -> None:
    """(0, 1, 3, 2) in the file; here two other axes change places."""

    def change(block: Any) -> None:
        transpose = next(one for one in block.operations if one.type == "transpose")
        _constant(block, transpose, "perm")[:] = [0, 3, 2, 1]

    _mil(path, change)


def onnx_softmax_along_rows(path: Path) -> None:
    model = onnx.load(path)
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 2
    path.write_bytes(model.SerializeToString())


def onnx_columns_for_rows(path: Path) -> None:
    model = onnx.load(path)
    transpose = next(node for node in model.graph.node if node.op_type == "Transpose")
    transpose.attribute[0].ints[:] = [0, 3, 2, 1]
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("target", "file", "edit", "node"),
    [
        ("coreml", PROTO, softmax_along_rows, "softmax"),
        ("coreml", PROTO, columns_for_rows, "transpose"),
        *((name, "model.onnx", onnx_softmax_along_rows, "softmax") for name in ONNX_TARGETS),
        *((name, "model.onnx", onnx_columns_for_rows, "transpose") for name in ONNX_TARGETS),
    ],
)
def test_a_swapped_axis_is_found_and_its_node_named(
    plant: Callable[..., Bundle], target: str, file: str, edit: Edit, node: str
) -> None:
    broken = plant(target, file, edit)
    backend = edgekit.backend(target)
    proof = proof_of(backend, broken)
    assert not proof.passed
    assert proof.outputs[0].sqnr_db is not None
    assert proof.outputs[0].sqnr_db < 40
    assert first_off(backend, broken)[0] == node


def quantized(dtype: type[np.integer[Any]]) -> tuple[onnx.ModelProto, Reference]:
    """relu(x) through 8 bits and back, with a zero point of ``dtype``; ONNX Runtime's answers."""
    point = numpy_helper.from_array(np.array(0, dtype), "zero")
    scale = numpy_helper.from_array(np.array(0.02, np.float32), "scale")
    nodes = [
        helper.make_node("Relu", ["x"], ["relu"], name="node_relu"),
        helper.make_node("QuantizeLinear", ["relu", "scale", "zero"], ["codes"], name="quantize"),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], name="back"),
    ]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "quantized", edges[:1], edges[1:], [scale, point])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    samples = [
        {"x": 3 * np.random.default_rng(seed).standard_normal((1, 64), np.float32)}
        for seed in range(3)
    ]
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = [{"y": np.asarray(session.run(["y"], sample)[0])} for sample in samples]
    return model, Reference(tuple(samples), tuple(expected), "random")


def quantized_artifact(target: str, model: onnx.ModelProto) -> Artifact:
    specs = [TensorSpec(name, (1, 64), "float32") for name in "xy"]
    files = {"model.onnx": model.SerializeToString()}
    return Artifact(target, FP32, "model.onnx", files, (specs[0],), (specs[1],))


@pytest.mark.parametrize("target", ONNX_TARGETS)
def test_an_unsigned_zero_point_becomes_signed_in_tensorrt_alone_and_its_proof_fails(
    target: str,
) -> None:
    backend = edgekit.backend(target)
    model, reference = quantized(np.uint8)
    proof = edgekit.verify(backend, quantized_artifact(target, model), reference)
    if target == "onnxruntime":
        proof.require()
        return
    assert not proof.passed
    said = " ".join(proof.failures)
    assert "NVIDIA's parser reads 'codes' as INT8, the file says UINT8" in said
    assert "Quantize to INT8 with an explicit zero point of 0." in said
    assert "SQNR" in said  # the numbers are others too


def test_a_signed_zero_point_is_proven() -> None:
    model, reference = quantized(np.int8)
    backend = edgekit.backend("tensorrt")
    edgekit.verify(backend, quantized_artifact("tensorrt", model), reference).require()


class Energy(nn.Module):
    """Sums of squares beyond float16, scaled down again, as hand-written norms do."""

    def forward(self, x: Tensor) -> Tensor:
        loud = x * 400
        return loud * torch.rsqrt((loud * loud).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_an_overflow_of_float16_is_refused_and_the_op_and_the_remedy_named(
    target: str, tmp_path: Path
) -> None:
    edgekit.backend(target)
    with pytest.raises(NotProven) as refused:
        edgekit.export(Energy(), ["x=1x16"], targets=[target], precision="fp16", out=tmp_path / "b")
    said = str(refused.value)
    assert "The first value beyond float16" in said
    assert "'mul_1'" in said
    assert "65504" in said
    assert "export with --precision fp32" in said
    assert "loud * torch.rsqrt(" in said or "(loud * loud)" in said  # the user's line
    assert list(tmp_path.iterdir()) == []
    made = edgekit.export(
        Energy(), ["x=1x16"], targets=[target], precision="fp32", out=tmp_path / "b"
    )
    assert made.proof(f"{target}-fp32").passed


def test_onnxruntime_hides_the_overflow_since_it_computes_float16_in_float32(
    tmp_path: Path,
) -> None:
    made = edgekit.export(
        Energy(), ["x=1x16"], targets=["onnxruntime"], precision="fp16", out=tmp_path / "b"
    )
    assert made.proof("onnxruntime-fp16").passed


def captured(module: nn.Module, *inputs: str) -> Program:
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


class Biased(nn.Module):
    """The second input changes nothing on the samples below, which are zeros."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x * 2 + bias


def without_bias(program: Program) -> Reference:
    reference = program.reference
    samples = tuple({"x": s["x"], "bias": np.zeros_like(s["bias"])} for s in reference.samples)
    expected = tuple({"output": s["x"] * 2} for s in samples)
    return Reference(samples, expected, "zeros")


def test_a_dropped_input_fails_coremls_proof_whatever_the_numbers() -> None:
    backend = edgekit.backend("coreml")
    program = captured(Biased(), "x=1x4", "bias=1x4")
    made, reference = backend.lower(program, FP32), without_bias(program)
    edgekit.verify(backend, made, reference).require()
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    content = made.files[PROTO]
    assert isinstance(content, bytes)
    model.ParseFromString(content)
    (function,) = model.mlProgram.functions.values()
    block = function.block_specializations[function.opset]
    (add,) = (one for one in block.operations if one.type == "add")
    names = {name: argument.arguments[0] for name, argument in add.inputs.items()}
    (bias,) = (binding for binding in names.values() if binding.name == "bias")
    bias.ClearField("binding")
    zeros = bias.value
    zeros.type.tensorType.dataType = 11  # float32
    zeros.immediateValue.tensor.floats.values[:] = [0.0]
    broken = replace(made, files={**made.files, PROTO: model.SerializeToString()})
    proof = edgekit.verify(backend, broken, reference)
    assert [output.max_abs_error for output in proof.outputs] == [0.0]
    assert proof.failures == (
        "The package drops the input 'bias': the model uses it, no operation of the package "
        "reads it.",
    )


def test_an_input_that_nvidias_parser_drops_fails_the_proof() -> None:
    """The lengths of Attention-24, which the parser ignores; here they exclude nothing."""
    backend = edgekit.backend("tensorrt")
    shapes = {"q": (1, 2, 3, 8), "k": (1, 2, 4, 8), "v": (1, 2, 4, 8)}
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"], name="a")
    edges = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    edges.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [1]))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["q"])
    graph = helper.make_graph([node], "attention", edges, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    generator = np.random.default_rng(0)
    sample: dict[str, Any] = {
        name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    q, k, v = (torch.from_numpy(sample[name]) for name in "qkv")
    answer = nn.functional.scaled_dot_product_attention(q, k, v).numpy()
    sample["lengths"] = np.array([4])
    specs = [TensorSpec(name, shape, "float32") for name, shape in shapes.items()]
    artifact = Artifact(
        "tensorrt",
        FP32,
        "model.onnx",
        {"model.onnx": model.SerializeToString()},
        (*specs, TensorSpec("lengths", (1,), "int64")),
        (TensorSpec("y", shapes["q"], "float32"),),
    )
    proof = edgekit.verify(backend, artifact, Reference((sample,), ({"y": answer},), "random"))
    assert proof.failures == (
        "NVIDIA's parser dropped the input 'lengths': the file uses it, the network does not.",
    )


@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_one_module_in_ten_that_is_wrong_is_the_one_that_is_named(
    target: str, tmp_path: Path
) -> None:
    """Weights lie in the file in another order and another precision than in the model."""
    torch.manual_seed(1)
    deep = nn.Sequential(*(nn.Linear(16, 16) for _ in range(10)), nn.Sigmoid())
    backend = edgekit.backend(target)
    program = captured(deep, "input=1x16")
    made = backend.lower(program, FP16)
    from edgekit.trace import layers_from_program

    layers = layers_from_program(program)
    edgekit.verify(backend, made, program.reference).require()
    weight = dict(deep.named_parameters())["6.weight"].detach().numpy().astype(np.float16)
    files: dict[str, bytes | Path] = dict(made.files)
    name = HOLDS_WEIGHTS[target]
    content = files[name]
    assert isinstance(content, bytes)
    row = next(one for one in (weight[3], weight.T[3]) if content.count(one.tobytes()) == 1)
    wrong = row.copy()
    wrong[5] *= np.float16(-64)
    files[name] = content.replace(row.tobytes(), wrong.tobytes())
    broken = replace(made, files=files)
    assert not edgekit.verify(backend, broken, program.reference).passed
    first = first_divergence(deviations_of(backend, broken, layers, program.reference))
    assert first is not None
    assert (first.node, first.module, first.op) == ("linear_6", "module.6", "aten.linear.default")
