"""What the ONNX parser of each TensorRT takes, as far as it differs from the one tried here.

The parser that every model is given to is that of TensorRT-RTX 1.7. An older one takes less: ops
that its importers lack, and opsets beyond those it documents.
"""

from __future__ import annotations

from dataclasses import dataclass

# Importers that came with the parser of TensorRT 11 and RTX; they need opset 23 or 24.
_NEW = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter"})


@dataclass(frozen=True)
class Version:
    """One TensorRT: the newest opset it documents, and ops of ONNX that it does not import.

    ``int4_opset`` is the newest of a file with 4-bit weights, where it is another: ONNX has them
    from opset 21 on, and TensorRT since 10.0, when it documented opset 20 for the rest.
    """

    opset: int
    lacks: frozenset[str]
    int4_opset: int | None = None


PARSERS = {
    "10.3": Version(opset=20, lacks=_NEW, int4_opset=21),
    "10.13": Version(opset=22, lacks=_NEW),
    "11": Version(opset=26, lacks=frozenset()),
    "rtx": Version(opset=26, lacks=frozenset()),
}
