"""What is read from a package, and that no damage gets further than one sentence."""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import BadInput, RuntimeFailed
from edgekit.graph import quiet
from edgekit.spec import Array
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.package import Constant, Feature, Package, Variable
from edgekit_coreml.weights import DTYPES, unpack

with quiet():
    import coremltools as ct
    from coremltools.libmilstoragepython import _BlobStorageWriter
    from coremltools.optimize import _utils as oracle
    from coremltools.proto import Model_pb2

Files = dict[str, bytes]
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


class Net(nn.Module):
    """Has a state, a weight in the file, and constants in the program."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("kept", torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.add_(x)
        return F.relu(self.linear(self.kept)).reshape(5, 1)


def _saved(model: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "m.mlpackage"
        model.save(str(path))
        return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def _converted(module: nn.Module, example: Tensor, **options: Any) -> Any:
    with quiet():
        exported = torch.export.export(module.eval(), (example,)).run_decompositions({})
        return ct.convert(exported, minimum_deployment_target=ct.target.iOS18, **options)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def files(net: Net) -> Files:
    model = _converted(
        net,
        torch.zeros(1, 6),
        inputs=[ct.TensorType("x", (1, 6), dtype=np.float32)],
        outputs=[ct.TensorType("y", dtype=np.float32)],
    )
    model.author, model.license, model.version = "A. Author", "Apache-2.0", "3"
    model.short_description = "Adds up."
    model.user_defined_metadata["com.example"] = "value"
    model.input_description["x"] = "What is added."
    return _saved(model)


def _edited(files: Mapping[str, bytes], edit: Callable[[Any], object]) -> Files:
    """The package with its protobuf changed."""
    model = Model_pb2.Model()
    model.ParseFromString(files[MODEL])
    edit(model)
    return {**files, MODEL: model.SerializeToString()}


def _main(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def test_what_is_read(files: Files, net: Net) -> None:
    package = Package.read(files)
    assert package.specification_version == 9
    assert package.default_function == "main"
    function = package.functions["main"]
    assert function.opset == "CoreML8"
    assert function.inputs == (Variable("x", "fp32", (1, 6)),)
    assert function.states == (Variable("kept", "fp16", (1, 6), "state"),)
    assert package.inputs == (
        Feature("x", "multiarray", "float32", (1, 6), description="What is added."),
    )
    assert package.outputs == (Feature("y", "multiarray", "float32", (5, 1)),)
    assert package.states == (Feature("kept", "state", "float16", (1, 6)),)
    metadata = package.metadata
    assert (metadata.author, metadata.license, metadata.version) == ("A. Author", "Apache-2.0", "3")
    assert metadata.description == "Adds up."
    assert metadata.user_defined["com.example"] == "value"
    by_type = {one.type: one for one in function.operations}
    reshape = by_type["reshape"]
    assert reshape.outputs[0].shape == (5, 1)
    assert by_type["write_state"].inputs["input"] == ("kept",)
    values = {
        one.outputs[0].name: one.attributes["val"].value
        for one in function.operations
        if one.type == "const"
    }
    (shape,) = reshape.inputs["shape"]
    assert isinstance(shape, str)
    assert np.asarray(values[shape]).tolist() == [5, 1]
    (weight,) = by_type["linear"].inputs["weight"]
    assert isinstance(weight, str)
    np.testing.assert_array_equal(
        np.asarray(values[weight]), net.linear.weight.detach().numpy().astype(np.float16)
    )


def test_files_on_disk_are_mapped(files: Files, tmp_path: Path) -> None:
    weights = tmp_path / "weight.bin"
    weights.write_bytes(files[WEIGHTS])
    constants = [
        one.attributes["val"]
        for source in (files[WEIGHTS], weights)
        for one in Package.read({**files, WEIGHTS: source}).functions["main"].operations
        if one.type == "const" and one.outputs[0].shape == (5, 6)
    ]
    in_memory, mapped = (one.value for one in constants)
    np.testing.assert_array_equal(in_memory, mapped)
    assert isinstance(constants[1].packed, np.memmap)
    assert isinstance(mapped, np.ndarray)
    assert np.shares_memory(mapped, constants[1].packed)
    assert mapped.flags.writeable  # or torch would need a copy


def _image(**options: Any) -> Feature:
    options = {"shape": (1, 3, 4, 6), **options}
    example = torch.zeros(1, options.pop("channels", 3), 4, 6)
    image = ct.ImageType("x", **options)
    return Package.read(_saved(_converted(nn.ReLU(), example, inputs=[image]))).inputs[0]


def test_images() -> None:
    assert _image() == Feature("x", "image", "uint8", (1, 3, 4, 6), colour="RGB")
    assert _image(color_layout=ct.colorlayout.BGR).colour == "BGR"
    half = ct.colorlayout.GRAYSCALE_FLOAT16
    assert _image(shape=(1, 1, 4, 6), channels=1, color_layout=half) == Feature(
        "x", "image", "float16", (1, 1, 4, 6), colour="GRAYSCALE_FLOAT16"
    )


def test_sizes_that_may_vary(files: Files) -> None:
    def feature(edit: Callable[[Any], object]) -> Feature:
        return Package.read(_edited(files, edit)).inputs[0]

    def ranged(model: Any) -> None:
        sizes = model.description.input[0].type.multiArrayType.shapeRange.sizeRanges
        for low, high in ((1, 1), (6, -1)):
            sizes.add(lowerBound=low, upperBound=high)

    def enumerated(model: Any) -> None:
        shapes = model.description.input[0].type.multiArrayType.enumeratedShapes.shapes
        shapes.add(shape=[1, 6])
        shapes.add(shape=[2, 6])

    assert feature(ranged).ranges == ((1, 1), (6, -1))
    assert feature(enumerated).shapes == ((1, 6), (2, 6))
    image = Model_pb2.Model()
    image.ParseFromString(_saved_image())
    sizes = image.description.input[0].type.imageType.imageSizeRange
    sizes.widthRange.lowerBound, sizes.widthRange.upperBound = 3, 7
    sizes.heightRange.lowerBound, sizes.heightRange.upperBound = 4, -1
    found = Package.read({**_manifest(), MODEL: image.SerializeToString()}).inputs[0]
    assert found.ranges == ((1, 1), (3, 3), (4, -1), (3, 7))


def _saved_image() -> bytes:
    image = ct.ImageType("x", (1, 3, 4, 6))
    return _saved(_converted(nn.ReLU(), torch.zeros(1, 3, 4, 6), inputs=[image]))[MODEL]


def _manifest(path: str = "com.apple.CoreML/model.mlmodel") -> Files:
    entries = f'{{"1": {{"path": "{path}"}}}}'
    return {
        "Manifest.json": f'{{"rootModelIdentifier": "1", "itemInfoEntries": {entries}}}'.encode()
    }


# Constants of every type, in the program and in the file, written by coremltools' own writer.
IN_FILE: dict[str, tuple[str, Array]] = {
    "fp16": ("fp16", np.array([1.5, -2, 65504, 6e-8], np.float16)),
    "fp32": ("float", np.array([1.5, -2, 3e38, 1e-40], np.float32)),
    "int4": ("int4", np.array([-8, 7, -1, 0, 3], np.int8)),
    "int8": ("int8", np.array([-128, 127, -1], np.int8)),
    "int16": ("int16", np.array([-32768, 32767], np.int16)),
    "int32": ("int32", np.array([-(2**31), 2**31 - 1], np.int32)),
    "uint1": ("uint1", np.array([1, 0, 1, 1, 0, 0, 0, 1, 1], np.uint8)),
    "uint2": ("uint2", np.array([3, 0, 1, 2, 3], np.uint8)),
    "uint3": ("uint3", np.array([7, 1, 2, 5, 6], np.uint8)),
    "uint4": ("uint4", np.array([15, 1, 2], np.uint8)),
    "uint6": ("uint6", np.array([63, 1, 2], np.uint8)),
    "uint8": ("uint8", np.array([255, 7, 1], np.uint8)),
    "uint16": ("uint16", np.array([65535, 7], np.uint16)),
    "uint32": ("uint32", np.array([2**32 - 1, 7], np.uint32)),
}
CODES = {dtype.name: number for number, dtype in DTYPES.items()}


def _with_constant(files: Files, dtype: str, shape: tuple[int, ...], fill: Any) -> Files:
    """The package with one constant more, at its end."""

    def edit(model: Any) -> None:
        operation = _main(model).operations.add(type="const")
        output = operation.outputs.add(name="extra")
        for tensor in (output.type.tensorType, operation.attributes["val"].type.tensorType):
            tensor.dataType, tensor.rank = CODES[dtype], len(shape)
            for size in shape:
                tensor.dimensions.add().constant.size = size
        fill(operation.attributes["val"])

    return _edited(files, edit)


def _extra(files: Files) -> Constant:
    return Package.read(files).functions["main"].operations[-1].attributes["val"]


@pytest.mark.parametrize("dtype", IN_FILE)
def test_constants_in_the_file(dtype: str, files: Files, tmp_path: Path) -> None:
    method, values = IN_FILE[dtype]
    path = tmp_path / "extra.bin"
    writer = _BlobStorageWriter(str(path))
    data = values.view(np.uint16) if dtype == "fp16" else values
    offset = getattr(writer, f"write_{method}_data")(data)
    del writer  # it writes when it goes

    def fill(value: Any) -> None:
        value.blobFileValue.fileName = "@model_path/weights/extra.bin"
        value.blobFileValue.offset = offset

    extra = _with_constant(files, dtype, (1, values.size), fill)
    extra["Data/com.apple.CoreML/weights/extra.bin"] = path.read_bytes()
    constant = _extra(extra)
    assert constant.dtype == dtype
    found = np.asarray(constant.value)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[None])


def _bytes(packed: bytes) -> Callable[[Any], None]:
    def fill(value: Any) -> None:
        value.immediateValue.tensor.bytes.values = packed

    return fill


def _listed(name: str, values: list[Any]) -> Callable[[Any], None]:
    def fill(value: Any) -> None:
        field = getattr(value.immediateValue.tensor, name)
        field.SetInParent()
        field.values.extend(values)

    return fill


@pytest.mark.parametrize(
    ("dtype", "fill", "expected"),
    [
        ("fp16", _bytes(np.array([1.5, -2], np.float16).tobytes()), [1.5, -2]),
        ("fp32", _listed("floats", [1.5, -2]), [1.5, -2]),
        ("fp64", _listed("doubles", [1e300, -2]), [1e300, -2]),
        ("int8", _bytes(b"\x80\x7f"), [-128, 127]),
        ("int4", _bytes(b"\x78"), [-8, 7]),
        ("uint3", _bytes(b"\x2f"), [7, 5]),
        ("uint1", _bytes(b"\x02"), [0, 1]),
        ("uint8", _bytes(b"\x80\x7f"), [128, 127]),
        ("int16", _listed("ints", [-32768, 5]), [-32768, 5]),
        ("uint16", _listed("ints", [65535, 5]), [65535, 5]),
        ("int32", _listed("ints", [-(2**31), 5]), [-(2**31), 5]),
        ("int64", _listed("longInts", [-(2**40), 5]), [-(2**40), 5]),
        ("bool", _listed("bools", [True, False]), [True, False]),
        ("string", _listed("strings", ["a", "ä"]), ["a", "ä"]),
    ],
)
def test_constants_in_the_program(
    dtype: str, fill: Callable[[Any], None], expected: list[Any], files: Files
) -> None:
    constant = _extra(_with_constant(files, dtype, (2,), fill))
    assert list(np.asarray(constant.value).tolist()) == expected


def test_scalars_and_empty_constants(files: Files) -> None:
    assert _extra(_with_constant(files, "string", (), _listed("strings", ["same"]))).value == "same"
    scalar = _extra(_with_constant(files, "int32", (), _listed("ints", [7])))
    assert np.asarray(scalar.value).shape == ()
    assert scalar.plain == 7
    empty = _extra(_with_constant(files, "fp32", (0, 3), _listed("floats", [])))
    assert np.asarray(empty.value).shape == (0, 3)


@pytest.mark.parametrize(
    ("dtype", "shape", "fill", "why"),
    [
        ("fp32", (2,), _listed("floats", [1]), "lacks values"),
        ("fp32", (1 << 30,), _listed("floats", [1]), "lacks values"),
        ("fp32", (1 << 62, 1 << 62), _listed("floats", [1]), "absurd shape"),
        ("int4", (3,), _bytes(b"\x78"), "lacks values"),
        ("fp32", (1,), _listed("ints", [1]), "values of another type"),
        ("string", (1,), _bytes(b"a"), "values of another type"),
        ("bool", (1,), _bytes(b"\x02"), "values of another type"),
        ("int8", (1,), _listed("ints", [400]), "a value beyond it"),
        ("string", (2,), _listed("strings", ["a"]), "lacks values"),
        ("fp32", (1,), lambda value: None, "has no value"),
    ],
)
def test_constants_that_contradict_themselves(
    dtype: str, shape: tuple[int, ...], fill: Any, why: str, files: Files
) -> None:
    with pytest.raises(RuntimeFailed, match=f"^coreml could not load the model: .*{why}"):
        Package.read(_with_constant(files, dtype, shape, fill))


@given(
    bits=st.sampled_from((1, 2, 3, 4, 6, 8)),
    signed=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_unpacking(bits: int, signed: bool, data: st.DataObject) -> None:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    values = data.draw(st.lists(st.integers(low, high), max_size=40))
    number = sum((one & (1 << bits) - 1) << bits * at for at, one in enumerate(values))
    packed = np.frombuffer(number.to_bytes(-(-len(values) * bits // 8), "little"), np.uint8)
    found = unpack(packed, bits, len(values), signed=signed)
    assert found.dtype == (np.int8 if signed else np.uint8)
    assert found.tolist() == values
    if values:
        theirs = oracle.pack_elements_into_bits(np.array(values, found.dtype), bits)
        np.testing.assert_array_equal(theirs.view(np.uint8), packed)
    with pytest.raises(ValueError, match="hold less than"):
        unpack(packed, bits, len(values) + 8, signed=signed)


def _without(name: str) -> Callable[[Files], Files]:
    return lambda files: {path: one for path, one in files.items() if path != name}


def _with(name: str, content: Callable[[bytes], bytes] | bytes) -> Callable[[Files], Files]:
    return lambda files: {
        **files,
        name: content(files.get(name, b"")) if callable(content) else content,
    }


def _record(at: int, form: str, value: int) -> Callable[[Files], Files]:
    """A change to the first record of the weight file: it starts at 64."""

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        struct.pack_into(form, changed, 64 + at, value)
        return bytes(changed)

    return _with(WEIGHTS, change)


def _larger(files: Files) -> Files:
    """One byte more, declared unused: what coremltools' writer never does."""
    return _record(24, "<Q", 8)(_record(8, "<Q", 61)(files))


def _program(edit: Callable[[Any], object]) -> Callable[[Files], Files]:
    return lambda files: _edited(files, edit)


def _network(model: Any) -> None:
    model.neuralNetwork.SetInParent()


def _rename_output(model: Any) -> None:
    _main(model).operations[-1].outputs[0].name = "elsewhere"


def _define_twice(model: Any) -> None:
    operations = _main(model).operations
    operations.append(operations[0])


def _cycle(model: Any) -> None:
    """The first operation takes the last one's result."""
    operations = _main(model).operations
    first = next(one for one in operations if one.type == "read_state")
    argument = first.inputs["input"].arguments[0]
    argument.name = operations[-1].outputs[0].name


def _bind_nothing(model: Any) -> None:
    operation = next(one for one in _main(model).operations if one.inputs)
    operation.inputs["more"].arguments.add()


def _described(field: str, value: Any) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        setattr(model.description.input[0].type.multiArrayType, field, value)

    return edit


def _shape_of_input(model: Any) -> None:
    model.description.input[0].type.multiArrayType.shape[1] = 7


def _add_input(model: Any) -> None:
    model.description.input.add(name="z").type.multiArrayType.dataType = 65568


def _state_size(model: Any) -> None:
    state = next(
        one for one in model.mlProgram.functions["main"].inputs if one.type.HasField("stateType")
    )
    state.type.stateType.wrappedType.tensorType.dimensions[0].constant.size = 1 << 37


def _two_functions(model: Any) -> None:
    model.mlProgram.functions["other"].CopyFrom(model.mlProgram.functions["main"])


def _declare(field: str, value: Any) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        tensor = _main(model).operations[-1].outputs[0].type.tensorType
        setattr(tensor, field, value)

    return edit


def _const_type(model: Any) -> None:
    const = next(one for one in _main(model).operations if one.type == "const")
    const.outputs[0].type.tensorType.dataType = 11 + (
        const.outputs[0].type.tensorType.dataType == 11
    )


def _other_record(model: Any) -> None:
    """A weight that points to the bias' record."""
    values = [
        one.attributes["val"].blobFileValue
        for one in _main(model).operations
        if one.type == "const" and one.attributes["val"].HasField("blobFileValue")
    ]
    values[0].offset += 64


DAMAGE: dict[str, tuple[Callable[[Files], Files], str]] = {
    "no manifest": (_without("Manifest.json"), "no file 'Manifest.json'"),
    "no JSON": (_with("Manifest.json", b"{"), "not JSON"),
    "deep JSON": (_with("Manifest.json", b"[" * 100_000), "not JSON"),
    "JSON of something else": (_with("Manifest.json", b"[1]"), "which item is the model"),
    "no root": (_with("Manifest.json", b'{"itemInfoEntries": {}}'), "which item is the model"),
    "an escape": (
        lambda files: {**files, **_manifest("../../../../etc/passwd")},
        "no file 'Data/../../../../etc/passwd'",
    ),
    "no model": (_without(MODEL), f"no file '{MODEL}'"),
    "an empty model": (_with(MODEL, b""), "holds no model"),
    "half a model": (_with(MODEL, lambda one: one[: len(one) // 2]), "cut off"),
    "no protobuf": (_with(MODEL, b"\xff" * 99), "cut off, or is not"),
    "a neural network": (_program(_network), "a neuralNetwork, and only an ML Program"),
    "no weights": (_without(WEIGHTS), "where its weights should be"),
    "empty weights": (_with(WEIGHTS, b""), "is empty|too short"),
    "short weights": (_with(WEIGHTS, lambda one: one[:63]), "too short"),
    "weights cut": (_with(WEIGHTS, lambda one: one[:-70]), "outside the file"),
    "weights cut in the data": (_with(WEIGHTS, lambda one: one[:-1]), "outside the file"),
    "another version": (_record(-60, "<I", 3), "not a weight file of version 2"),
    "another count": (_record(-64, "<I", 0), "says it has 0 records"),
    "no sentinel": (_record(0, "<I", 0xDEADBEEE), "does not begin as a record"),
    "another dtype": (_record(4, "<I", 2), "another dtype than the program says, fp16"),
    "another size": (_record(8, "<Q", 62), "holds 62 bytes, and its shape needs"),
    "a byte too many": (_larger, "holds 61 bytes, and its shape needs 60"),
    "a huge size": (_record(8, "<Q", 1 << 60), "its shape needs"),
    "data elsewhere": (_record(16, "<Q", 192), "data outside the file, or not behind"),
    "another record": (_program(_other_record), "does not begin|another|outside"),
    "a name not defined": (_program(_rename_output), "the output 'y' is not defined"),
    "a name defined twice": (_program(_define_twice), "is defined twice"),
    "a cycle": (_program(_cycle), "which is not defined"),
    "bound to nothing": (_program(_bind_nothing), "'more' of an operation is bound to nothing"),
    "an input of another type": (_program(_described("dataType", 65552)), "has another type"),
    "an input of no type": (_program(_described("dataType", 0)), "dtype that is unknown"),
    "an input of another shape": (_program(_shape_of_input), "has another type"),
    "an input too many": (_program(_add_input), "the input 'z' is missing from its program"),
    "an input too few": (
        _program(lambda model: model.description.ClearField("input")),
        "the input 'x' is missing from its description",
    ),
    "a huge state": (_program(_state_size), "the state 'kept' has no usable size"),
    "no opset": (
        _program(lambda model: setattr(model.mlProgram.functions["main"], "opset", "CoreML1")),
        "no body for its opset, 'CoreML1'",
    ),
    "a function too many": (_program(_two_functions), "description lacks the function 'other'"),
    "no function": (
        _program(lambda model: model.mlProgram.functions.clear()),
        "program lacks the function 'main'",
    ),
    "a dtype unknown": (_program(_declare("dataType", 13)), "dtype 13, which is unknown"),
    "a rank too high": (_program(_declare("rank", 5)), "2 sizes for its rank"),
    "a const of another type": (_program(_const_type), "not of the type it declares"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_sentence(case: str, files: Files) -> None:
    damage, why = DAMAGE[case]
    with pytest.raises(RuntimeFailed, match=f"^coreml could not load the model: .*({why})") as info:
        Package.read(damage(files))
    assert "\n" not in str(info.value)


def test_a_long_name_is_shown_short(files: Files) -> None:
    def edit(model: Any) -> None:
        next(one for one in _main(model).operations if one.inputs).inputs["x"].arguments.add(
            name="long" * 1000 + "\n"
        )

    with pytest.raises(RuntimeFailed) as info:
        Package.read(_edited(files, edit))
    assert len(str(info.value)) < 300
    assert "\n" not in str(info.value)


def test_files_that_cannot_be_read(files: Files, tmp_path: Path) -> None:
    for name in (MODEL, WEIGHTS):
        with pytest.raises(RuntimeFailed, match="cannot be read"):
            Package.read({**files, name: tmp_path / "nothing"})
        with pytest.raises(RuntimeFailed, match="cannot be read"):
            Package.read({**files, name: tmp_path})


def _mutated(content: bytes, rng: random.Random) -> bytes:
    """One kind of damage: bits flipped, a cut, a gap, bytes of another place, bytes set."""
    changed = bytearray(content)
    at = rng.randrange(len(changed))
    length = rng.choice((1, 2, 8, 64))
    match rng.randrange(5):
        case 0:
            for _ in range(rng.choice((1, 1, 3, 20))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + length]
        case 3:
            other = rng.randrange(len(changed))
            changed[at : at + length] = changed[other : other + length]
        case _:
            changed[at : at + length] = bytes([rng.choice((0, 0x7F, 0xFF))]) * length
    return bytes(changed)


@pytest.mark.parametrize("name", ["Manifest.json", MODEL, WEIGHTS])
def test_fuzz(name: str, files: Files) -> None:
    rng = random.Random(name)
    x = {"x": np.ones((1, 6), np.float32)}
    loaded, errors = 0, []
    for _ in range({MODEL: 600}.get(name, 150)):
        try:
            package = Package.read({**files, name: _mutated(files[name], rng)})
            loaded += 1
            Interpreter(package).run(x)
        except (RuntimeFailed, BadInput) as error:
            errors.append(str(error))
    assert loaded > 5
    assert len(errors) > 20
    assert not [one for one in errors if len(one.splitlines()) != 1]


def test_fuzzed_weights_never_load_with_a_changed_header(files: Files) -> None:
    """The vendor's loader believes a record's size and place; nothing else would catch them."""
    original = files[WEIGHTS]
    for at in range(64, 64 + 32):
        for bit in range(8):
            changed = bytearray(original)
            changed[at] ^= 1 << bit
            with pytest.raises(RuntimeFailed):
                Package.read({**files, WEIGHTS: bytes(changed)})
