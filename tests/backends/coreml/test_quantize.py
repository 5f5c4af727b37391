"""Quantized packages: what becomes integer, what stays float, how well, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.artifact import Artifact
from edgekit.calibration import checked_calibration
from edgekit.capture import capture, reference_from
from edgekit.contract import Evidence, Inside
from edgekit.errors import LoweringFailed, MissingRuntime, UsageError
from edgekit.evidence import sqnr_db
from edgekit.graph import quiet
from edgekit.program import Program
from edgekit.recipe import PRECISIONS, Recipe, customised
from edgekit.registry import supported_recipe
from edgekit.source import resolve
from edgekit_coreml import BACKEND
from edgekit_coreml.lower import MAIN, WEIGHTS
from edgekit_coreml.names import graph_name
from edgekit_coreml.package import Operation, Package
from edgekit_coreml.quantize import palette_mode
from edgekit_coreml.session import PREFIX

with quiet():
    from coremltools.proto import Model_pb2

WEIGHTS_ALONE = ["int8-weights", "int4", "palette8", "palette6", "palette4", "palette2"]
SMALLEST = 2.0**-14


class Residual(nn.Module):
    """A ResNet in small: a stem with its norm and pool, a block with a sum, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 80)
        self.norm.running_mean = torch.linspace(-1, 1, 32)
        self.norm.running_var = torch.linspace(0.5, 2, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        y = F.relu(y + self.second(F.gelu(self.first(y))))
        scores: Tensor = self.head(y.mean((2, 3)))
        return scores


class Attention(nn.Module):
    """One head, and a gate: products of activations, a softmax, sums with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.out, self.gate = nn.Linear(64, 64), nn.Linear(64, 64)
        self.shift = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8
        y = x + self.out(torch.softmax(scores, -1) @ self.value(x)) + self.shift
        gated: Tensor = y * torch.sigmoid(self.gate(y)) * 0.255
        return gated


def calibrated(module: nn.Module, *inputs: str) -> Program:
    torch.manual_seed(0)
    model = resolve(module.eval(), list(inputs))
    captured = capture(model, reference_from(model))
    generator = np.random.default_rng(0)
    samples = [
        {spec.name: generator.standard_normal(spec.sizes(), np.float32) for spec in model.inputs}
        for _ in range(8)
    ]
    return replace(captured, calibration=checked_calibration(samples, "random, seed 0"))


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.fixture(scope="module")
def residual() -> Program:
    return calibrated(seeded(Residual), "x=1x3x16x16")


@pytest.fixture(scope="module")
def attention() -> Program:
    return calibrated(seeded(Attention), "x=1x6x64")


@pytest.fixture(scope="module")
def int8(residual: Program) -> Artifact:
    return BACKEND.lower(residual, PRECISIONS["int8"])


def worst_sqnr(artifact: Artifact, program: Program) -> float:
    with BACKEND.open(artifact) as session:
        got = [session.run(sample)["output"] for sample in program.reference.samples]
        assert isinstance(session, Evidence)
        assert session.level == "emulated"
    wanted = [expected["output"] for expected in program.reference.expected]
    pairs = zip(wanted, got, strict=True)
    return min(sqnr_db(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs)


def operations(artifact: Artifact) -> list[Operation]:
    files = {name.removeprefix(PREFIX): content for name, content in artifact.files.items()}
    package = Package.read({name: files[name] for name in files if not name.endswith(".py")})
    return list(package.functions["main"].operations)


def integer_readers(artifact: Artifact) -> set[str]:
    """The graph nodes that read a dequantized value."""
    return _readers(artifact, "dequantize")


def compressed_readers(artifact: Artifact) -> set[str]:
    """The graph nodes whose weights are compressed."""
    return _readers(artifact, "constexpr_")


def _readers(artifact: Artifact, kind: str) -> set[str]:
    found = operations(artifact)
    made = {one.outputs[0].name for one in found if one.type.startswith(kind)}
    variables = [one.outputs[0].name for one in found if made & set(_read(one))]
    nodes: dict[str, str] = dict(artifact.provenance["nodes"])  # type: ignore[call-overload]
    # "linear_0" is made where the output's cast took the name.
    return {nodes.get(one) or graph_name(one).removesuffix("_0") for one in variables}


def _read(operation: Operation) -> Iterator[str]:
    for bindings in operation.inputs.values():
        yield from (one for one in bindings if isinstance(one, str))


def test_convolutions_sums_and_pools_take_integers_and_nothing_else(int8: Artifact) -> None:
    readers = {"batch_norm", "max_pool2d", "conv2d_1", "conv2d_2", "add", "linear"}
    assert integer_readers(int8) == readers
    assert compressed_readers(int8) == {"batch_norm", "conv2d_1", "conv2d_2", "linear"}


def test_products_of_activations_constants_and_scalars_stay_float(attention: Program) -> None:
    artifact = BACKEND.lower(attention, PRECISIONS["int8"])
    readers = integer_readers(artifact)
    assert readers == {"linear", "linear_1", "linear_2", "linear_3", "linear_4", "add"}
    assert worst_sqnr(artifact, attention) > 35


def test_integers_come_close_to_eager(residual: Program, int8: Artifact) -> None:
    assert worst_sqnr(int8, residual) > 35
    assert edgekit.verify(BACKEND, int8, residual.reference).passed


def test_another_method_finds_ranges_too(residual: Program) -> None:
    recipe = customised(PRECISIONS["int8"], method="entropy")
    assert worst_sqnr(BACKEND.lower(residual, recipe), residual) > 30


def test_a_value_that_is_never_negative_has_unsigned_codes_and_no_zero_point(
    int8: Artifact,
) -> None:
    dtypes = {one.outputs[0].dtype for one in operations(int8) if one.type == "quantize"}
    assert dtypes == {"int8", "uint8"}
    for one in operations(int8):
        if one.type == "quantize" and one.outputs[0].dtype == "uint8":
            assert "zero_point" not in one.inputs


def test_every_scale_is_one_that_float16_holds_in_full(int8: Artifact) -> None:
    scales = [_number(int8, one) for one in operations(int8) if one.type == "quantize"]
    assert scales
    assert min(scales) >= SMALLEST


def _number(artifact: Artifact, operation: Operation) -> float:
    (bound,) = operation.inputs["scale"]
    if isinstance(bound, str):
        (const,) = (one for one in operations(artifact) if one.outputs[0].name == bound)
        bound = const.attributes["val"]
    assert bound.dtype == "fp16"
    return float(np.max(bound.value))


def test_a_kept_layer_is_float_with_its_inputs(residual: Program) -> None:
    recipe = customised(PRECISIONS["int8"], keep_float=("first", "add"))
    artifact = BACKEND.lower(residual, recipe)
    assert integer_readers(artifact) == {"batch_norm", "max_pool2d", "conv2d_2", "linear"}
    assert "conv2d_1" not in compressed_readers(artifact)


class Tiny(nn.Module):
    """One layer's weights are so small that float16 has no scale for their codes."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.zero, self.large = (nn.Linear(8, 8, bias=False) for _ in range(3))
        with torch.no_grad():
            self.small.weight.mul_(1e-3)
            self.zero.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.large(x) + self.small(x) * 1000 + self.zero(x)
        return y


def test_weights_too_small_for_a_float16_scale_stay_float() -> None:
    program = calibrated(seeded(Tiny), "x=2x8")
    artifact = BACKEND.lower(program, PRECISIONS["int8"])
    assert compressed_readers(artifact) == {"linear"}
    assert worst_sqnr(artifact, program) > 30


def test_an_activation_too_small_for_a_float16_scale_has_the_smallest_one() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x * 1e-4)
            return y

    artifact = BACKEND.lower(calibrated(seeded(Faint), "x=2x8"), PRECISIONS["int8"])
    scales = [_number(artifact, one) for one in operations(artifact) if one.type == "quantize"]
    assert scales == [SMALLEST]


def test_a_range_beyond_float16_is_refused() -> None:
    from edgekit_coreml.scales import check_scales

    spec = Model_pb2.Model()
    function = spec.mlProgram.functions["main"]
    function.opset = "CoreML7"
    step = function.block_specializations["CoreML7"].operations.add(type="quantize")
    step.outputs.add(name="y")
    value = step.inputs["scale"].arguments.add().value
    value.immediateValue.tensor.bytes.values = np.float16(1e-5).tobytes()
    with pytest.raises(LoweringFailed, match=r"scale of 'y' is 1e-05.*--keep-float"):
        check_scales(spec, PRECISIONS["int8"])
    value.immediateValue.tensor.bytes.values = np.float16(np.inf).tobytes()
    with pytest.raises(LoweringFailed, match="scale of 'y' is inf"):
        check_scales(spec, PRECISIONS["int8"])


@pytest.mark.parametrize("precision", ["int8", "any"])
def test_integer_activations_need_ios17(residual: Program, precision: str) -> None:
    backend = BACKEND.with_options({"minimum": "iOS16"})
    for act in (backend.lower, backend.check):
        with pytest.raises(UsageError, match=rf"coreml {precision} .* iOS17 .*is iOS16; leave"):
            act(residual, PRECISIONS[precision])


def test_int4_asks_for_ios18_by_name(residual: Program) -> None:
    with pytest.raises(UsageError, match=r"minimum is iOS17; add --coreml-minimum iOS18, or"):
        BACKEND.lower(residual, PRECISIONS["int4"])


LIMITS = {"int8-weights": 35, "int4": 18, "palette8": 35, "palette6": 25, "palette4": 14}
MINIMUMS = {"int4": "iOS18", "palette6": "iOS16"}


@pytest.mark.parametrize("precision", WEIGHTS_ALONE)
def test_weights_alone_are_smaller_and_run(residual: Program, precision: str) -> None:
    backend = BACKEND.with_options({"minimum": MINIMUMS.get(precision, "iOS17")})
    artifact = backend.lower(residual, PRECISIONS[precision])
    values = sum(weight.numel() for weight in residual.exported.state_dict.values())
    assert len(_bytes(artifact, WEIGHTS)) < 0.65 * 2 * values
    assert worst_sqnr(artifact, residual) > LIMITS.get(precision, 2)
    assert compressed_readers(artifact) == {"conv2d_1", "conv2d_2", "linear"}
    assert not integer_readers(artifact)


def _bytes(artifact: Artifact, name: str) -> bytes:
    content = artifact.files[name]
    assert isinstance(content, bytes)
    return content


@pytest.mark.parametrize("precision", ["int8-weights", "palette4"])
def test_a_kept_layer_keeps_its_weights(residual: Program, precision: str) -> None:
    recipe = customised(PRECISIONS[precision], keep_float=("first", "head"))
    assert compressed_readers(BACKEND.lower(residual, recipe)) == {"conv2d_2"}


def test_a_palette_is_found_by_kmeans_where_that_takes_no_minute(residual: Program) -> None:
    large = nn.Linear(1100, 1100)
    model = resolve(large.eval(), ["input=1x1100"])
    program = capture(model, reference_from(model))
    assert palette_mode(residual, PRECISIONS["palette8"]) == "kmeans"
    assert palette_mode(program, PRECISIONS["palette8"]) == "kmeans"
    wide = replace(program, exported=cast("Any", _Wide(program.exported.state_dict, 2)))
    assert palette_mode(wide, PRECISIONS["palette8"]) == "uniform"
    assert palette_mode(wide, PRECISIONS["palette4"]) == "kmeans"


class _Wide:
    """A graph with ``times`` as many weights."""

    def __init__(self, state: dict[str, Tensor], times: int) -> None:
        self.state_dict = {f"{name}{i}": held for name, held in state.items() for i in range(times)}


class Scaled(nn.Module):
    """The converter merges the scale and the shift into the convolution, and drops its name."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.other = nn.Conv2d(48, 48, 1), nn.Conv2d(48, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.gate(x) * 0.5 + 0.25) + self.other(x)
        return y


def test_a_kept_layer_that_the_converter_renames_keeps_its_weights() -> None:
    program = calibrated(seeded(Scaled), "x=1x48x4x4")
    recipe = customised(PRECISIONS["int8-weights"], keep_float=("gate",))
    assert compressed_readers(BACKEND.lower(program, recipe)) == {"conv2d_1"}


@pytest.mark.parametrize("precision", ["int8", "palette4"])
def test_the_same_model_gives_the_same_bytes(residual: Program, precision: str) -> None:
    one, two = (BACKEND.lower(residual, PRECISIONS[precision]) for _ in range(2))
    for name in (MAIN, WEIGHTS):
        assert one.files[name] == two.files[name]


@pytest.mark.parametrize("precision", ["int8", "int8-weights"])
def test_a_classifier_of_pictures_stays_one(precision: str) -> None:
    from edgekit.image import ImageInput

    image = ImageInput("x", 3, 16, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    program = replace(
        calibrated(seeded(Residual), "x=1x3x16x16"),
        image=image,
        labels=tuple(f"class {index}" for index in range(80)),
    )
    artifact = BACKEND.lower(program, PRECISIONS[precision])
    spec = Model_pb2.Model()
    spec.ParseFromString(_bytes(artifact, MAIN))
    assert spec.description.input[0].type.WhichOneof("Type") == "imageType"
    assert spec.description.predictedFeatureName == "classLabel"
    assert worst_sqnr(artifact, program) > 30


def test_a_size_may_vary() -> None:
    program = calibrated(seeded(Residual), "x=1x3xh:8..16xw:8..16")
    artifact = BACKEND.lower(program, PRECISIONS["int8"])
    assert worst_sqnr(artifact, program) > 30


def test_check_needs_no_calibration(residual: Program) -> None:
    for recipe in (PRECISIONS["int8"], PRECISIONS["int8-weights"]):
        assert BACKEND.check(replace(residual, calibration=None), recipe) == []


def test_layers_are_shown_by_the_names_of_the_captured_graph(
    residual: Program, int8: Artifact
) -> None:
    with BACKEND.open(int8) as session:
        assert isinstance(session, Inside)
        values = session.layers(residual.reference.samples[0])
    for name in ("batch_norm", "conv2d_1", "conv2d_2", "add", "gelu", "linear"):
        assert name in values
    module: Any = residual.exported.module()
    eager: dict[str, Any] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            eager[n.name] = super().run_node(n)
            return eager[n.name]

    with torch.no_grad():
        Watch(module).run(torch.from_numpy(residual.reference.samples[0]["x"]))
    for name in ("batch_norm", "conv2d_1", "conv2d_2", "add"):
        assert sqnr_db(eager[name].double().numpy(), values[name].astype(np.float64)) > 25


def test_the_backend_says_what_it_makes_and_what_becomes_integer() -> None:
    for name in ("int8", *WEIGHTS_ALONE, "any", "any4"):
        assert supported_recipe(BACKEND, PRECISIONS[name]) == PRECISIONS[name]
    assert supported_recipe(BACKEND, None) == Recipe("float16", "float16")
    assert {"conv2d", "linear", "add"} <= BACKEND.quantized_ops(PRECISIONS["int8"])
    assert not {"mul", "softmax"} & BACKEND.quantized_ops(PRECISIONS["int8"])
    assert BACKEND.quantized_ops(PRECISIONS["palette4"]) == frozenset()


@pytest.mark.parametrize(("precision", "module"), [("int8", "torchao"), ("palette4", "sklearn")])
def test_a_library_that_is_lacking_is_named(
    residual: Program, monkeypatch: pytest.MonkeyPatch, precision: str, module: str
) -> None:
    monkeypatch.setattr(
        "edgekit_coreml.find_spec", lambda name: None if name == module else object()
    )
    with pytest.raises(MissingRuntime, match=rf"making coreml {precision} .*'{module}'"):
        BACKEND.lower(residual, PRECISIONS[precision])
