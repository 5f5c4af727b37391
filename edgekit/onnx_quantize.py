"""QDQ rewriting of ONNX models by onnxruntime.quantization, shared by targets that start there."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from edgekit.calibration import Calibration
from edgekit.errors import EdgekitError, LoweringFailed
from edgekit.graph import first_line, node_source, quiet
from edgekit.onnx_export import serialized
from edgekit.onnx_ranges import measured_ranges
from edgekit.recipe import Method

with quiet():
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import save_tensors_data
    from onnxruntime.quantization.shape_inference import quant_pre_process

METHODS = {
    "min-max": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Style:
    """What a runtime wants of a QDQ file: see the adapters' quantize.py for why."""

    activations: Literal["int8", "uint8"]
    weights: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    ops: tuple[str, ...] | None = None  # None: every op that the library quantizes
    options: Mapping[str, object] | None = None  # its extra_options


@dataclass(frozen=True)
class Measured:
    """A float model ready to be rewritten, and the ranges of its values, an object of the library.

    Ranges cost time, rewriting does not: several styles can be made of one measurement.
    """

    model: onnx.ModelProto
    ranges: Any
    method: Method


def quantized(
    model: onnx.ModelProto,
    calibration: Calibration,
    style: Style,
    *,
    method: Method,
    keep_float: Collection[str],
    doing: str,
) -> onnx.ModelProto:
    """``model`` with QuantizeLinear and DequantizeLinear put in; ``keep_float`` are node names.

    Nodes keep their names. ``doing`` names the work on the progress line. Raises
    ``LoweringFailed``.
    """
    ready = measured(model, calibration, method=method, keep_float=keep_float, doing=doing)
    return rewritten(ready, style, keep_float=keep_float)


def measured(
    model: onnx.ModelProto,
    calibration: Calibration,
    *,
    method: Method,
    keep_float: Collection[str],
    doing: str,
) -> Measured:
    """Infer shapes, fold what folds, and measure the ranges. Raises ``LoweringFailed``."""
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            ready = _prepared(model, frozenset(keep_float), Path(folder))
            ranges = measured_ranges(ready, calibration, METHODS[method], doing, Path(folder))
        return Measured(ready, ranges, method)
    except EdgekitError:
        raise
    except Exception as cause:  # the tool raises whatever it trips over
        raise LoweringFailed(
            f"onnxruntime.quantization could not measure the model's ranges: {first_line(cause)} "
            "Use --precision fp32, or int8-weights, which needs none."
        ) from cause


def rewritten(ready: Measured, style: Style, *, keep_float: Collection[str]) -> onnx.ModelProto:
    """The measured model in ``style``. Raises ``LoweringFailed``."""
    names = {node.name for node in ready.model.graph.node}
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            plain, cache, done = (Path(folder) / name for name in ("a.onnx", "b.json", "c.onnx"))
            onnx.save(ready.model, plain)
            save_tensors_data(ready.ranges, cache)
            quantize_static(
                plain,
                done,
                quant_format=QuantFormat.QDQ,
                activation_type=TYPES[style.activations],
                weight_type=TYPES[style.weights],
                per_channel=style.per_channel,
                reduce_range=style.reduce_range,
                op_types_to_quantize=list(style.ops) if style.ops is not None else None,
                nodes_to_exclude=sorted(names.intersection(keep_float)),
                calibrate_method=METHODS[ready.method],
                calibration_cache_path=cache,
                extra_options=dict(style.options or {}),
            )
            model = onnx.load(done)
    except Exception as cause:  # the tool raises whatever it trips over
        raise LoweringFailed(
            f"onnxruntime.quantization could not quantize the model: {first_line(cause)} Use "
            "--precision fp32, or int8-weights."
        ) from cause
    _tidy(model)
    return model


def _prepared(model: onnx.ModelProto, kept: frozenset[str], folder: Path) -> onnx.ModelProto:
    """With shapes, and folded by the runtime's exact optimizations where no name that counts goes.

    A multiplication folded into the convolution before it is one op less in float. But a fusion
    may rename a layer, or swallow one that is to stay float.
    """
    source, path = folder / "source.onnx", folder / "prepared.onnx"
    onnx.save(model, source)
    counts = {node.name for node in model.graph.node if node.op_type in WEIGHTED} | kept
    for plain in (False, True):
        quant_pre_process(source, path, skip_symbolic_shape=True, skip_optimization=plain)
        ready = onnx.load(path)
        if counts <= {node.name for node in ready.graph.node}:
            break
    return ready


def _tidy(model: onnx.ModelProto) -> None:
    """Drop the domains that the optimizer lists and nothing uses, and the tools' notes."""
    used = {node.domain for node in model.graph.node} | {""}
    known = {each.domain: each.version for each in model.opset_import if each.domain in used}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(*each) for each in known.items())
    model.ClearField("metadata_props")


def serialized_with_codes(
    model: onnx.ModelProto, origins: Mapping[str, torch.fx.Node], file: str
) -> tuple[bytes, list[dict[str, Any]]]:
    """The file's bytes, and where in them the 8-bit codes of each weight lie.

    Each place has ``layer``, ``file`` (as given), ``offset`` and ``count`` in bytes. A layer is
    called by its module's path in the captured graph (``origins``: by the name of the ONNX
    node), by its node's name where modules do not tell. Raises ``LoweringFailed`` where codes
    cannot be found to the byte.
    """
    layers = _layers(model, origins)
    tensors = [each for each in model.graph.initializer if each.name in layers]
    for tensor in tensors:
        _hold_raw(tensor)
    content = serialized(model)
    spans = _spans(model, tensors, content)
    if len(spans) != len(tensors) or any(
        content[start:end] != tensor.raw_data
        for (start, end), tensor in zip(spans, tensors, strict=True)
    ):
        raise LoweringFailed(
            f"the codes of {len(tensors)} weights could not be found in the ONNX file; use "
            "--precision int8 instead of any."
        )
    return content, [
        {"layer": layers[tensor.name], "file": file, "offset": start, "count": end - start}
        for (start, end), tensor in zip(spans, tensors, strict=True)
    ]


def _spans(
    model: onnx.ModelProto, tensors: list[onnx.TensorProto], content: bytes
) -> list[tuple[int, int]]:
    """Where the raw data of ``tensors`` lies, in their order: where inverting it is seen.

    Every byte of it changes and no other does; headers part one tensor from the next.
    """
    for tensor in tensors:
        tensor.raw_data = _inverted(tensor.raw_data)
    other = serialized(model)
    for tensor in tensors:
        tensor.raw_data = _inverted(tensor.raw_data)
    differs = np.frombuffer(content, np.uint8) != np.frombuffer(other, np.uint8)
    edges = np.flatnonzero(np.diff(differs.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _inverted(content: bytes) -> bytes:
    return (~np.frombuffer(content, np.uint8)).tobytes()


def _hold_raw(tensor: onnx.TensorProto) -> None:
    """One byte a code: the typed field of protobuf would hold them as numbers of varying length."""
    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
        )


def _layers(model: onnx.ModelProto, origins: Mapping[str, torch.fx.Node]) -> dict[str, str]:
    """The layer of each initializer that holds 8-bit codes of a weight, by initializer."""
    graph = model.graph
    codes = {
        tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8
    }
    weights = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in codes
    }
    owners: dict[str, tuple[str, str]] = {}
    for node, name in _uses(graph, weights):
        if node.name not in origins:
            raise LoweringFailed(
                f"the ONNX node {node.name!r} has 8-bit weights and no node of the captured graph "
                "that it came from; use --precision int8 instead of any."
            )
        origin = origins[node.name]
        owners.setdefault(weights[name], (node_source(origin)[1], origin.name))
    modules = [module for module, _ in owners.values()]
    return {
        tensor: module if module and modules.count(module) == 1 else name
        for tensor, (module, name) in owners.items()
    }


def _uses(graph: onnx.GraphProto, values: Collection[str]) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in graph.node:
        for name in node.input:
            if name in values:
                yield node, name
