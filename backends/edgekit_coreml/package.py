"""Reads a saved ``.mlpackage`` into plain values: ``Package.read(files)``; start there.

Three files matter: ``Manifest.json`` names the model, ``model.mlmodel`` is one protobuf, and
``weights/weight.bin`` holds the large constants. Nothing in a package carries a checksum, and the
vendor's loader believes what a record says, so everything that can be checked is checked here:
what does not fit raises ``RuntimeFailed``. One file of over 400 lines, since it is one format; the
weight file's is in ``weights.py``.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from google.protobuf.message import DecodeError

from edgekit.graph import quiet
from edgekit.spec import Array
from edgekit_coreml.weights import DTYPES, Dtype, Weights, damaged, shown, unpack

with quiet():
    from coremltools.proto import FeatureTypes_pb2, Model_pb2


_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
_NUMBERS = frozenset(_BY_NAME) - {"string", "bool"}
# Which field of a TensorValue holds which type; any number may also come as "bytes".
_FIELDS = {
    "floats": {"fp32"},
    "doubles": {"fp64"},
    "ints": {"int8", "int16", "int32", "uint8", "uint16"},
    "longInts": {"int64", "uint64", "uint32"},
    "bools": {"bool"},
    "strings": {"string"},
}
_MAX_ELEMENTS = 1 << 40
_MAX_STATE = 1 << 32


@dataclass(frozen=True, slots=True)
class Variable:
    """A value's name and declared type; a list's, dictionary's or state's is that of its content.

    A dimension that the program leaves open is None.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    kind: Literal["tensor", "list", "dictionary", "state"] = "tensor"


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A value written into the package: packed bytes until ``value`` is asked for."""

    dtype: str
    shape: tuple[int, ...]
    packed: Array | None = None  # uint8, a view of the file where the file holds it
    texts: tuple[str, ...] = ()
    items: tuple[Constant, ...] | None = None  # of a list

    @property
    def value(self) -> Array | str | tuple[Any, ...]:
        """An array; a ``str`` or a tuple of them; a tuple of plain values for a list."""
        if self.items is not None:
            return tuple(item.plain for item in self.items)
        if self.packed is None:
            return self.texts if self.shape else self.texts[0]
        dtype = _BY_NAME[self.dtype]
        if dtype.bits < 8:
            flat = unpack(self.packed, dtype.bits, prod(self.shape), signed=dtype.signed)
        else:
            flat = self.packed.view(dtype.numpy)
        return flat.reshape(self.shape)

    @property
    def plain(self) -> Any:
        """As ``value``, and a scalar as Python's own."""
        value = self.value
        return value.item() if isinstance(value, np.ndarray) and not value.shape else value


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation; an input is a tuple of variable names and constants, most often of one."""

    type: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[Variable, ...]
    attributes: Mapping[str, Constant]
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """The name in the program, or the first output's."""
        name = self.attributes.get("name")
        if name is not None and name.texts:
            return name.texts[0]
        return self.outputs[0].name if self.outputs else ""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Operations in order; it sees the variables of the block around it."""

    inputs: tuple[Variable, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Feature:
    """What a user of the model sees: an input, an output or a state."""

    name: str
    kind: Literal["multiarray", "image", "state", "string", "int64", "double", "dictionary"]
    dtype: str = ""  # numpy's name; of a dictionary's keys: "string" or "int64"
    shape: tuple[int, ...] = ()  # the default one; an image's is 1xCxHxW
    ranges: tuple[tuple[int, int], ...] = ()  # of each dimension, -1 for no upper end
    shapes: tuple[tuple[int, ...], ...] = ()  # if only these are allowed
    colour: str = ""  # "RGB", "BGR", "GRAYSCALE", "GRAYSCALE_FLOAT16"
    optional: bool = False
    default: float = 0.0  # of every element, when an optional input is left out
    description: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """One function: its variables, its body, and the features that its users see."""

    opset: str
    inputs: tuple[Variable, ...]
    states: tuple[Variable, ...]
    block: Block
    input_features: tuple[Feature, ...]
    output_features: tuple[Feature, ...]
    state_features: tuple[Feature, ...]

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.block.operations


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the author wrote about the model."""

    author: str = ""
    license: str = ""
    description: str = ""
    version: str = ""
    user_defined: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Package:
    """A whole package. Its arrays stay valid as long as it lives."""

    specification_version: int
    functions: Mapping[str, Function]
    default_function: str
    metadata: Metadata

    @classmethod
    def read(cls, files: Mapping[str, bytes | Path]) -> Package:
        """The package whose files are ``files``, by their paths in it. Raises ``RuntimeFailed``."""
        path = _model_path(files)
        model = _parsed(_content(files, path))
        reader = _Reader(files, posixpath.dirname(path))
        description = model.description
        described = {one.name: one for one in description.functions}
        default = description.defaultFunctionName if described else "main"
        programs = model.mlProgram.functions
        described = described or {default: description}
        for name in sorted({default, *described, *programs}):
            if name not in described or name not in programs:
                missing = "description" if name in programs else "program"
                raise damaged(f"its {missing} lacks the function {shown(name)}")
        functions = {name: reader.function(programs[name], described[name]) for name in programs}
        reader.check_counts()
        return cls(model.specificationVersion, functions, default, _metadata(description.metadata))

    @property
    def inputs(self) -> tuple[Feature, ...]:
        """Of the default function."""
        return self.functions[self.default_function].input_features

    @property
    def outputs(self) -> tuple[Feature, ...]:
        """Of the default function."""
        return self.functions[self.default_function].output_features

    @property
    def states(self) -> tuple[Feature, ...]:
        """Of the default function."""
        return self.functions[self.default_function].state_features


def _content(files: Mapping[str, bytes | Path], path: str) -> bytes:
    content = files.get(path)
    if content is None:
        raise damaged(f"the package has no file {shown(path)}")
    if isinstance(content, bytes):
        return content
    try:
        return content.read_bytes()
    except OSError as cause:
        raise damaged(f"{shown(path)} cannot be read: {cause.strerror}") from cause


def _model_path(files: Mapping[str, bytes | Path]) -> str:
    """Where the manifest says the model is; only a name in ``files`` is ever opened."""
    try:
        manifest = json.loads(_content(files, "Manifest.json"))
    except (ValueError, RecursionError) as cause:
        raise damaged("Manifest.json is not JSON") from cause
    match manifest:
        case {"rootModelIdentifier": str(root), "itemInfoEntries": dict(entries)}:
            match entries.get(root):
                case {"path": str(path)}:
                    return "Data/" + path
    raise damaged("Manifest.json does not say which item is the model")


def _parsed(content: bytes) -> Any:
    model = Model_pb2.Model()
    try:
        model.ParseFromString(content)
    except (DecodeError, ValueError) as cause:
        raise damaged("the model file is cut off, or is not a Core ML model") from cause
    kind = model.WhichOneof("Type")
    if kind is None:
        raise damaged("the model file holds no model")
    if kind != "mlProgram":
        raise damaged(f"it is a {kind}, and only an ML Program can be run here")
    return model


def _metadata(found: Any) -> Metadata:
    return Metadata(
        found.author,
        found.license,
        found.shortDescription,
        found.versionString,
        dict(found.userDefined),
    )


class _Reader:
    """From the protobuf's messages to our values."""

    def __init__(self, files: Mapping[str, bytes | Path], folder: str) -> None:
        self._files, self._folder = files, folder
        self._weights: dict[str, Weights] = {}

    def check_counts(self) -> None:
        for weights in self._weights.values():
            weights.check_count()

    def function(self, found: Any, description: Any) -> Function:
        if found.opset not in found.block_specializations:
            raise damaged(f"a function has no body for its opset, {shown(found.opset)}")
        variables = tuple(_variable(one.name, one.type) for one in found.inputs)
        states = tuple(one for one in variables if one.kind == "state")
        for state in states:
            if None in state.shape or prod(one or 0 for one in state.shape) > _MAX_STATE:
                raise damaged(f"the state {shown(state.name)} has no usable size")
        function = Function(
            opset=found.opset,
            inputs=tuple(one for one in variables if one.kind != "state"),
            states=states,
            block=self._block(found.block_specializations[found.opset]),
            input_features=_features(description.input),
            output_features=_features(description.output),
            state_features=_features(description.state),
        )
        _check_names(function.block, {one.name for one in variables})
        _check_features(function)
        return function

    def _block(self, found: Any) -> Block:
        return Block(
            tuple(_variable(one.name, one.type) for one in found.inputs),
            tuple(self._operation(one) for one in found.operations),
            tuple(found.outputs),
        )

    def _operation(self, found: Any) -> Operation:
        operation = Operation(
            type=found.type,
            inputs={
                name: tuple(self._binding(one, name) for one in argument.arguments)
                for name, argument in found.inputs.items()
            },
            outputs=tuple(_variable(one.name, one.type) for one in found.outputs),
            attributes={name: self._constant(one) for name, one in found.attributes.items()},
            blocks=tuple(self._block(one) for one in found.blocks),
        )
        if operation.type == "const":
            _check_const(operation)
        return operation

    def _binding(self, found: Any, name: str) -> str | Constant:
        match found.WhichOneof("binding"):
            case "name":
                return str(found.name)
            case "value":
                return self._constant(found.value)
        raise damaged(f"the input {shown(name)} of an operation is bound to nothing")

    def _constant(self, found: Any) -> Constant:
        variable = _variable("a constant", found.type)
        shape = tuple(size for size in variable.shape if size is not None)
        if len(shape) != len(variable.shape):
            raise damaged("a constant has an open shape")
        dtype = _BY_NAME[variable.dtype]
        if found.WhichOneof("value") == "blobFileValue" and dtype.blob:
            weights = self._file(found.blobFileValue.fileName)
            packed = weights.read(found.blobFileValue.offset, dtype, prod(shape))
            return Constant(dtype.name, shape, packed)
        match found.immediateValue.WhichOneof("value"):
            case "tensor" if variable.kind == "tensor":
                return _immediate(found.immediateValue.tensor, dtype, shape)
            case "list" if variable.kind == "list":
                items = tuple(self._constant(one) for one in found.immediateValue.list.values)
                return Constant(dtype.name, shape, items=items)
        raise damaged(f"a constant of type {dtype.name} has no value")

    def _file(self, name: str) -> Weights:
        if name not in self._weights:
            path = posixpath.normpath(name.replace("@model_path", self._folder, 1))
            self._weights[name] = Weights(self._files, path)
        return self._weights[name]


def _variable(name: str, found: Any) -> Variable:
    kind = found.WhichOneof("type")
    if kind == "tensorType":
        tensor = found.tensorType
        dtype = DTYPES.get(tensor.dataType)
        if dtype is None:
            raise damaged(f"{shown(name)} has the dtype {tensor.dataType}, which is unknown here")
        if tensor.rank != len(tensor.dimensions):
            raise damaged(f"{shown(name)} has {len(tensor.dimensions)} sizes for its rank")
        shape = tuple(_size(name, one) for one in tensor.dimensions)
        if prod(size for size in shape if size is not None) > _MAX_ELEMENTS:
            raise damaged(f"{shown(name)} has an absurd shape")
        return Variable(name, dtype.name, shape)
    if kind == "listType":
        element = _variable(name, found.listType.type)
        return Variable(name, element.dtype, element.shape, "list")
    if kind == "dictionaryType":
        return Variable(name, _variable(name, found.dictionaryType.keyType).dtype, (), "dictionary")
    if kind == "stateType":
        wrapped = _variable(name, found.stateType.wrappedType)
        return Variable(name, wrapped.dtype, wrapped.shape, "state")
    raise damaged(f"{shown(name)} has no type, or one that is unknown here")


def _size(name: str, found: Any) -> int | None:
    if found.WhichOneof("dimension") == "constant":
        return int(found.constant.size)
    if found.unknown.variadic:
        raise damaged(f"{shown(name)} has an open number of dimensions")
    return None


def _immediate(found: Any, dtype: Dtype, shape: tuple[int, ...]) -> Constant:
    """A constant that lies in the protobuf itself."""
    which = found.WhichOneof("value")
    count = prod(shape)
    if which is None or dtype.name not in _FIELDS.get(which, _NUMBERS):
        raise damaged(f"a constant of type {dtype.name} has values of another type")
    values = getattr(found, which).values
    needed = -(-count * dtype.bits // 8) if which == "bytes" else count
    if len(values) != needed:
        raise damaged(f"a constant of type {dtype.name} and shape {shape} lacks values")
    if which == "strings":
        return Constant(dtype.name, shape, texts=tuple(values))
    if which == "bytes":
        return Constant(dtype.name, shape, np.frombuffer(bytearray(values), np.uint8))
    array = np.array(values, np.int64 if which in ("ints", "longInts") else dtype.numpy)
    fitting = array.astype(dtype.numpy)
    if which in ("ints", "longInts") and not np.array_equal(array, fitting):
        raise damaged(f"a constant of type {dtype.name} has a value beyond it")
    return Constant(dtype.name, shape, fitting.view(np.uint8))


def _check_const(operation: Operation) -> None:
    value = operation.attributes.get("val")
    if value is None or len(operation.outputs) != 1:
        raise damaged(f"the const {shown(operation.name)} has no value")
    output = operation.outputs[0]
    if (value.dtype, value.shape) != (output.dtype, output.shape):
        raise damaged(f"the const {shown(operation.name)} is not of the type it declares")


def _check_names(block: Block, around: Iterable[str]) -> None:
    """Each variable is defined once, before its first use: no cycle can hide."""
    known = {*around, *(one.name for one in block.inputs)}
    own: set[str] = set()
    for operation in block.operations:
        for name in _used(operation):
            if name not in known:
                raise damaged(f"{shown(operation.name)} uses {shown(name)}, which is not defined")
        for nested in operation.blocks:
            _check_names(nested, known)
        for output in operation.outputs:
            if output.name in own:
                raise damaged(f"the variable {shown(output.name)} is defined twice")
            own.add(output.name)
        known.update(own)
    for name in block.outputs:
        if name not in known:
            raise damaged(f"the output {shown(name)} is not defined")


def _used(operation: Operation) -> Iterator[str]:
    for bindings in operation.inputs.values():
        yield from (one for one in bindings if isinstance(one, str))


def _check_features(function: Function) -> None:
    """What the description says of a variable has to be what the program says."""
    results = {one.name: one for step in function.operations for one in step.outputs}
    variables = {one.name: one for one in (*function.inputs, *function.states)}
    pairs = (
        ("input", function.input_features, [one.name for one in function.inputs]),
        ("state", function.state_features, [one.name for one in function.states]),
        ("output", function.output_features, function.block.outputs),
    )
    for kind, features, names in pairs:
        for name in sorted({one.name for one in features}.symmetric_difference(names)):
            missing = "description" if name in names else "program"
            raise damaged(f"the {kind} {shown(name)} is missing from its {missing}")
        for feature in features:
            variable = results.get(feature.name) or variables[feature.name]
            if not _describes(feature, variable):
                raise damaged(
                    f"the {kind} {shown(feature.name)} is described as {feature.kind} "
                    f"{feature.dtype} {feature.shape}, and the program has another type"
                )


def _describes(feature: Feature, variable: Variable) -> bool:
    if feature.kind in ("dictionary", "string", "int64", "double"):
        return variable.kind == "dictionary" if feature.kind == "dictionary" else True
    if variable.kind not in ("tensor", "state"):
        return False
    if feature.kind == "image":
        return variable.dtype in ("fp16", "fp32") and len(variable.shape) == 4
    # A scalar is described as a vector of one, a result of open shape as without any.
    shaped = bool(feature.shape and variable.shape)
    if shaped and len(feature.shape) != len(variable.shape):
        return False
    return _ARRAY_TYPES[feature.dtype] == variable.dtype and not (
        shaped
        and any(
            size not in (None, described)
            for size, described in zip(variable.shape, feature.shape, strict=True)
        )
    )


def _features(found: Iterable[Any]) -> tuple[Feature, ...]:
    return tuple(_feature(one) for one in found)


def _feature(found: Any) -> Feature:
    kind = found.type.WhichOneof("Type")
    common: dict[str, Any] = {
        "optional": found.type.isOptional,
        "description": found.shortDescription,
    }
    match kind:
        case "multiArrayType":
            return _array_feature(found.name, "multiarray", found.type.multiArrayType, common)
        case "stateType":
            return _array_feature(found.name, "state", found.type.stateType.arrayType, common)
        case "imageType":
            return _image_feature(found.name, found.type.imageType, common)
        case "dictionaryType":
            keys = found.type.dictionaryType.WhichOneof("KeyType") or ""
            return Feature(found.name, "dictionary", keys.removesuffix("KeyType"), **common)
        case "stringType" | "int64Type" | "doubleType":
            return Feature(found.name, kind.removesuffix("Type"), **common)
    raise damaged(f"the feature {shown(found.name)} has no type, or one that is unknown here")


_ARRAY_DTYPES = {
    65552: "float16",
    65568: "float32",
    65600: "float64",
    131080: "int8",
    131104: "int32",
}
_ARRAY_TYPES = {
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "int8": "int8",
    "int32": "int32",
}


def _array_feature(
    name: str, kind: Literal["multiarray", "state"], found: Any, common: Mapping[str, Any]
) -> Feature:
    if found.dataType not in _ARRAY_DTYPES:
        raise damaged(f"the feature {shown(name)} has a dtype that is unknown here")
    default = found.WhichOneof("defaultOptionalValue")
    return Feature(
        name,
        kind,
        dtype=_ARRAY_DTYPES[found.dataType],
        shape=tuple(found.shape),
        ranges=tuple((one.lowerBound, one.upperBound) for one in found.shapeRange.sizeRanges),
        shapes=tuple(tuple(one.shape) for one in found.enumeratedShapes.shapes),
        default=float(getattr(found, default)) if default else 0.0,
        **common,
    )


def _image_feature(name: str, found: Any, common: Mapping[str, Any]) -> Feature:
    spaces = FeatureTypes_pb2.ImageFeatureType.ColorSpace
    colour = spaces.Name(found.colorSpace) if found.colorSpace in spaces.values() else ""
    channels = {"RGB": 3, "BGR": 3, "GRAYSCALE": 1, "GRAYSCALE_FLOAT16": 1}.get(colour)
    if channels is None:
        raise damaged(f"the image {shown(name)} has a colour space that is unknown here")
    size = found.imageSizeRange
    ranges = [(one.lowerBound, one.upperBound) for one in (size.heightRange, size.widthRange)]
    return Feature(
        name,
        "image",
        dtype="float16" if colour == "GRAYSCALE_FLOAT16" else "uint8",
        shape=(1, channels, found.height, found.width),
        ranges=((1, 1), (channels, channels), *ranges) if found.HasField("imageSizeRange") else (),
        shapes=tuple((1, channels, one.height, one.width) for one in found.enumeratedSizes.sizes),
        colour=colour,
        **common,
    )
