"""What NVIDIA's parser changed without saying so: inputs it dropped, types it replaced.

Each is found by comparing the network it made with the ONNX file, value by value.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from edgekit.errors import RuntimeFailed
from edgekit_tensorrt.network import Network, lost_inputs
from edgekit_tensorrt.processes import Parsed

# ONNX's element types as TensorRT names them.
_TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
# A warning that is an error: the numbers would be others.
_RETYPED = "Defaulting to INT8"


def faults_of(model: onnx.ModelProto, network: Network, warnings: tuple[str, ...]) -> list[str]:
    """A sentence for each thing that the network no longer says as the file does."""
    found = [*_dropped(model, network), *_retyped(model, network)]
    return found + [
        f"NVIDIA's parser warns: {' '.join(text.split())}" for text in warnings if _RETYPED in text
    ]


def faults_of_file(path: Path, parsed: Parsed) -> tuple[str, ...]:
    """The same for a file that the parser took, whose weights may lie beside it.

    Raises ``RuntimeFailed``.
    """
    assert parsed.network is not None
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as cause:
        raise RuntimeFailed(f"tensorrt could not load the model: {cause}.") from cause
    return tuple(faults_of(model, parsed.network, parsed.warnings))


def _dropped(model: onnx.ModelProto, network: Network) -> list[str]:
    read = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    given = [value.name for value in model.graph.input]
    missing = {name for name in given if name not in network.inputs} | set(lost_inputs(network))
    faults = [
        f"NVIDIA's parser dropped the input {name!r}: the file uses it, the network does not."
        for name in given
        if name in missing and name in read
    ]
    wanted = [value.name for value in model.graph.output]
    return faults + [
        f"NVIDIA's parser dropped the output {name!r}."
        for name in wanted
        if name not in network.outputs
    ]


def _retyped(model: onnx.ModelProto, network: Network) -> list[str]:
    return [
        f"NVIDIA's parser reads {name!r} as {found}, the file says {wanted}; the numbers would "
        "be others. Quantize to INT8 with an explicit zero point of 0."
        if "INT8" in (found, wanted)
        else f"NVIDIA's parser reads {name!r} as {found}, the file says {wanted}."
        for name, wanted in _declared(model).items()
        if name in network.tensors and (found := network.tensors[name].dtype) != wanted
    ]


def _declared(model: onnx.ModelProto) -> dict[str, str]:
    """The element type of every value that the file, or ONNX's own inference, gives one."""
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {
        value.name: _TYPES[value.type.tensor_type.elem_type]
        for value in values
        if value.type.tensor_type.elem_type in _TYPES
    }
