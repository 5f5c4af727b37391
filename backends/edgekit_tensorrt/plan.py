"""Reads what the builder compiled: the kernels of an engine and the header of its file.

An engine can be inspected only on a machine with its GPU. The builder's log, though, lists every
kernel with its tensors while it compiles, and that list answers here how many kernels there are,
in which dtypes they compute and how many bytes they move.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from edgekit.errors import DamagedFile

# In the order of the header's bits.
COMPUTE_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
_LATER = 0x40  # the engine also runs on GPUs that came after it

_BITS = {"Float": 32, "Half": 16, "BFloat16": 16, "FP8": 8, "Int8": 8, "UInt8": 8, "Bool": 8}
_BITS |= {"Int4": 4, "FP4E2M1": 4, "Int32": 32, "Int64": 64, "E8M0": 8}


@dataclass(frozen=True)
class PlanTensor:
    """A value that a kernel reads or writes; -1 is a size that varies."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as the builder spells it: Float, Half, Int8

    @property
    def size(self) -> int:
        """Bytes; a size that varies counts as 1."""
        elements = 1
        for size in self.shape:
            elements *= max(size, 1)
        return (elements * _BITS.get(self.dtype, 32) + 7) // 8


@dataclass(frozen=True)
class PlanLayer:
    """One kernel, or one call into a library of kernels."""

    name: str
    kind: str  # kgen, gemm, correlation, runtime_fusion, ...
    tactic: str
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    constants: tuple[PlanTensor, ...]
    nodes: tuple[str, ...]  # names of the ONNX nodes it does


@dataclass(frozen=True)
class Plan:
    """All kernels of an engine."""

    layers: tuple[PlanLayer, ...]

    @property
    def dtypes(self) -> dict[str, int]:
        """How many layers write each dtype first."""
        return dict(Counter(layer.outputs[0].dtype for layer in self.layers if layer.outputs))

    @property
    def kinds(self) -> dict[str, int]:
        return dict(Counter(layer.kind for layer in self.layers))

    @property
    def moved_bytes(self) -> int:
        """Bytes of values read and written between kernels."""
        return sum(_bytes(layer.inputs) + _bytes(layer.outputs) for layer in self.layers)

    @property
    def constant_bytes(self) -> int:
        """Bytes of weights and scales."""
        return sum(_bytes(layer.constants) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The totals, and every layer."""
        return {
            "layer_count": sum(layer.kind not in _BETWEEN for layer in self.layers),
            "kinds": self.kinds,
            "dtypes": self.dtypes,
            "moved_bytes": self.moved_bytes,
            "constant_bytes": self.constant_bytes,
            "layers": [asdict(layer) for layer in self.layers],
        }


# Lines of the plan that start no kernel: streams that wait for each other, sizes worked out.
_BETWEEN = ("signal", "wait", "shape_call")


def _bytes(tensors: Iterable[PlanTensor]) -> int:
    """A kernel lists a tensor once per slice that it reads; it is counted once."""
    return sum({tensor.name: tensor.size for tensor in tensors}.values())


_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>\[.*?\]), "
    r"(?:Constants: (?P<constants>.*?), )?Outputs: (?P<outputs>\[.*?\]), "
    r"TacticName: (?P<tactic>.*?), StreamId: \d+, (?:EventId: \d+, )?Metadata: ?(?P<metadata>.*)"
)
_TENSOR = re.compile(r"Name: ([^,]+), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def plan_from_dump(text: str) -> Plan:
    """Read the log message that starts with ``Layers:``; a line of another form has no tensors."""
    lines = text.partition("\n")[2].partition("\n\n")[0].splitlines()
    return Plan(tuple(_layer(line) for line in lines if line.strip()))


def _layer(line: str) -> PlanLayer:
    match = _LINE.match(line)
    if match is None:
        return PlanLayer(line, "unknown", "", (), (), (), ())
    return PlanLayer(
        name=match["name"],
        kind=match["kind"],
        tactic=match["tactic"],
        inputs=_tensors(match["inputs"]),
        outputs=_tensors(match["outputs"]),
        constants=_tensors(match["constants"] or ""),
        nodes=tuple(_NODE.findall(match["metadata"])),
    )


def _tensors(text: str) -> tuple[PlanTensor, ...]:
    return tuple(
        PlanTensor(name, tuple(int(size) for size in sizes.split(",") if size.strip()), dtype)
        for name, sizes, dtype in _TENSOR.findall(text)
    )


@dataclass(frozen=True)
class EngineHeader:
    """What the first 64 bytes of a TensorRT-RTX engine say."""

    version: str  # the runtime must have exactly this version
    compute_capabilities: tuple[str, ...]
    later: bool  # whether GPUs newer than the builder may load it
    weight_bytes: int


def engine_header(content: bytes) -> EngineHeader:
    """Check that ``content`` is a whole engine, without the GPU that could load it.

    The format is not documented; this is how 1.7 writes it. Raises ``DamagedFile``.
    """
    if len(content) < 64 or content[:4] != b"vtrt":
        raise DamagedFile("this is not a TensorRT-RTX engine: its first bytes are not 'vtrt'.")
    (length,) = struct.unpack_from("<Q", content, 16)
    if length != len(content):
        raise DamagedFile(
            f"the TensorRT-RTX engine is damaged: it has {len(content)} bytes and says {length}."
        )
    (mask,) = struct.unpack_from("<Q", content, 32)
    (weights,) = struct.unpack_from("<Q", content, 56)
    return EngineHeader(
        version=".".join(str(byte) for byte in content[24:28]),
        compute_capabilities=tuple(
            name for bit, name in enumerate(COMPUTE_CAPABILITIES) if mask >> bit & 1
        ),
        later=bool(mask & _LATER),
        weight_bytes=weights,
    )
