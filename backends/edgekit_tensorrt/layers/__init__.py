"""One function per layer kind, in files by what the layers do. Loops and branches: ``control``."""

from __future__ import annotations

from edgekit_tensorrt.layers import (
    convolution,
    elementwise,
    indexing,
    matrix,
    quantization,
    reduction,
    sampling,
    shapes,
)
from edgekit_tensorrt.layers.call import Call, Lacks, Run

RUN: dict[str, Run] = (
    convolution.RUN
    | elementwise.RUN
    | indexing.RUN
    | matrix.RUN
    | quantization.RUN
    | reduction.RUN
    | sampling.RUN
    | shapes.RUN
)
LACKS: dict[str, Lacks] = (
    convolution.LACKS
    | elementwise.LACKS
    | indexing.LACKS
    | matrix.LACKS
    | reduction.LACKS
    | shapes.LACKS
)

__all__ = ["LACKS", "RUN", "Call", "Lacks", "Run"]
