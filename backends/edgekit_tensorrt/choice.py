"""Which kind of scales int8 gets: what the compiled plan says is faster, if it costs little."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnxruntime

from edgekit import evidence
from edgekit.errors import RuntimeFailed
from edgekit.graph import first_line
from edgekit.spec import Array, Arrays
from edgekit_tensorrt.plan import Plan
from edgekit_tensorrt.quantize import PER_CHANNEL, PER_TENSOR

MOST_SAMPLES = 32
MOST_LOSS_DB = 3.0
# For ranking alone. To start a kernel costs some microseconds on every GPU; the memory is that of
# a Jetson Orin, 204 GB/s.
_MICROSECONDS_A_KERNEL, _BYTES_A_MICROSECOND = 3.0, 204e3
# What the builder's log calls the codes that a recipe's weights are held in.
CODES = {"int8": "Int8", "any": "Int8", "int4": "Int4"}


def chosen(figures: Mapping[str, Mapping[str, float | None]]) -> str:
    """Scales for each channel, unless one for a weight is faster by the plan and as good.

    ``figures`` are those of ``figures_of``, by the kind of scales; one that could not be built
    has none.
    """
    if len(figures) == 1:
        return next(iter(figures))
    channels, whole = figures[PER_CHANNEL], figures[PER_TENSOR]
    if None in (channels["estimate_us"], whole["estimate_us"]):
        return PER_CHANNEL
    loss = _number(channels["sqnr_db"]) - _number(whole["sqnr_db"])
    # Neither has noise where both are infinite, and their difference is no number.
    as_good = whole["sqnr_db"] is None or loss <= MOST_LOSS_DB
    faster = _number(whole["estimate_us"]) < _number(channels["estimate_us"])
    return PER_TENSOR if faster and as_good else PER_CHANNEL


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def figures_of(plan: Plan | None, sqnr_db: float) -> dict[str, float | None]:
    """What a variant is judged by, as JSON; no noise at all is an SQNR of None."""
    noise = None if math.isinf(sqnr_db) else round(sqnr_db, 2)
    if plan is None:  # TensorRT proper builds on the device alone
        return {"estimate_us": None, "sqnr_db": noise}
    kernels, moved = plan.to_json()["layer_count"], plan.moved_bytes + plan.constant_bytes
    estimate = kernels * _MICROSECONDS_A_KERNEL + moved / _BYTES_A_MICROSECOND
    return {
        "kernels": kernels,
        "moved_bytes": plan.moved_bytes,
        "constant_bytes": plan.constant_bytes,
        "estimate_us": round(estimate, 1),
        "sqnr_db": noise,
    }


def answers(model: bytes, samples: Sequence[Arrays]) -> list[list[Array]]:
    """Outputs of each sample by ONNX Runtime, its fusions off. Raises ``RuntimeFailed``."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return [session.run(None, dict(sample)) for sample in samples]
    except Exception as cause:  # onnxruntime's own classes have no common base
        raise RuntimeFailed(
            f"onnxruntime could not run the model to compare kinds of scales: {first_line(cause)}"
        ) from cause


def sqnr_db(exact: Sequence[Sequence[Array]], found: Sequence[Sequence[Array]]) -> float:
    """The worst output's, over all samples together; infinite where no output is float.

    What is not finite counts as nothing but noise.
    """
    ratios = [math.inf]
    for wanted, got in zip(zip(*exact, strict=True), zip(*found, strict=True), strict=True):
        if wanted[0].dtype.kind == "f":
            pairs = [
                np.concatenate([each.ravel() for each in side]).astype(np.float64)
                for side in (wanted, got)
            ]
            finite = bool(np.isfinite(pairs).all())
            ratios.append(evidence.sqnr_db(*pairs) if finite else evidence.WORST_SQNR_DB)
    return min(ratios)


def left_in_float(plan: Plan, quantized: Collection[str], codes: str) -> list[str]:
    """Those of ``quantized``, ONNX nodes, that no kernel of ``plan`` computes from ``codes``."""
    done: set[str] = set()
    for layer in plan.layers:
        weights = any(tensor.dtype == codes for tensor in layer.constants)
        # int4 is of weights alone.
        inputs = codes == "Int4" or any(tensor.dtype == codes for tensor in layer.inputs)
        if weights and inputs:
            done |= set(layer.nodes)
    return sorted(set(quantized) - done)
