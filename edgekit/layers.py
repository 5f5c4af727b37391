"""Where a target first leaves the eager model: intermediate values, by module and graph node.

The captured graph's node names are the words that every target shares: ONNX values, Core ML
variables and TensorRT tensors keep them. A bundle carries some values of each node, as the eager
float32 graph has them on the first sample, so that a finding needs no model and no torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BadInput, DamagedFile
from edgekit.evidence import sqnr_db
from edgekit.samples import read_npz
from edgekit.spec import Array

# Values kept of each node: spread over all of it, enough to see a wrong channel in 64.
KEPT = 256
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly whatever their number


@dataclass(frozen=True)
class Layer:
    """One node of the captured graph: its op, the module it belongs to, and its eager values.

    ``values`` are those at ``positions(size)`` of the flattened result, in float32; ``size`` is
    the number of its elements. ``output`` is the model's name for it where it is returned: files
    know it by that name alone.
    """

    node: str
    op: str
    module: str
    size: int
    values: NDArray[np.float32]
    output: str = ""


@dataclass(frozen=True)
class LayerDeviation:
    """How far one node of an artifact is from the eager one; ``diverges`` beyond the limit."""

    node: str
    op: str
    module: str
    sqnr_db: float
    finite: bool
    diverges: bool

    def to_json(self) -> dict[str, object]:
        """Every field; infinite SQNR (equal to the bit) is null."""
        value = asdict(self)
        return {**value, "sqnr_db": None if np.isinf(self.sqnr_db) else self.sqnr_db}


def positions(size: int) -> NDArray[np.int64]:
    """Up to ``KEPT`` places in a flat array of ``size``: all of them, or spread evenly."""
    if size <= KEPT:
        return np.arange(size)
    fractions = np.modf(np.arange(KEPT) * _GOLDEN)[0]
    spread: NDArray[np.int64] = (fractions * size).astype(np.int64)
    return spread


def layer_from_values(node: str, op: str, module: str, result: Array, output: str = "") -> Layer:
    """Keep what is kept of ``result``."""
    flat = np.ravel(result)
    kept = flat[positions(flat.size)].astype(np.float32)
    return Layer(node, op, module, flat.size, kept, output)


def compare_layers(
    layers: Sequence[Layer], found: Mapping[str, Array], limit_db: float
) -> list[LayerDeviation]:
    """Every layer that ``found`` has by its name and in its size, in the order of the graph."""
    deviations = []
    for layer in layers:
        result = found.get(layer.node, found.get(layer.output))
        if result is None or result.size != layer.size or not layer.size:
            continue  # fused away, or laid out otherwise
        finite = bool(np.isfinite(result).all())
        kept = np.ravel(result)[positions(layer.size)].astype(np.float64)
        distance = sqnr_db(layer.values.astype(np.float64), kept) if finite else -np.inf
        # Written so that a NaN diverges too.
        diverges = not (finite and distance >= limit_db)
        deviations.append(
            LayerDeviation(layer.node, layer.op, layer.module, distance, finite, diverges)
        )
    return deviations


def first_divergence(deviations: Sequence[LayerDeviation]) -> LayerDeviation | None:
    """The first layer beyond the limit."""
    return next((each for each in deviations if each.diverges), None)


def sentence(first: LayerDeviation, precision: str, source: str = "") -> str:
    """What to tell the user of the first layer that diverges, with a remedy where one is known."""
    what = f"is {first.sqnr_db:.1f} dB from eager" if first.finite else "holds NaN or infinity"
    place = f" ({source})" if source else ""
    lower = (
        "Keep it in float32: export with --precision fp32."
        if precision == "fp16"
        else f"Keep it in float: export with --keep-float {first.node}."
    )
    remedy = (
        lower
        if precision != "fp32"
        else "In float32 no layer should differ: the file is not what was exported, or the "
        "target means something else by this op. Export again; else write it with other ops."
    )
    module = first.module or "the model itself"
    return (
        f"It first differs at module {module!r}, {first.op}, node {first.node!r}{place}, which "
        f"{what}. {remedy}"
    )


def by_module(deviations: Sequence[LayerDeviation]) -> list[LayerDeviation]:
    """The last node of each module: what the module returns."""
    return list({each.module: each for each in deviations}.values())


def layers_to_bytes(layers: Sequence[Layer]) -> bytes:
    """An ``.npz`` of all values in a row, and a JSON text that says whose they are."""
    names = [[each.node, each.op, each.module, each.size, each.output] for each in layers]
    content = io.BytesIO()
    values = [each.values for each in layers] or [np.zeros(0, np.float32)]
    np.savez_compressed(
        content,
        names=np.frombuffer(json.dumps(names).encode(), np.uint8),
        values=np.concatenate(values),
    )
    return content.getvalue()


def read_layers(path: Path) -> list[Layer]:
    """Read what ``layers_to_bytes`` wrote. Raises ``DamagedFile``."""
    try:
        arrays = read_npz(path)
        names, values = json.loads(arrays["names"].tobytes()), arrays["values"]
        if values.dtype != np.float32 or values.ndim != 1:
            raise ValueError(f"its values are {values.dtype} {values.shape}")
        layers, start = [], 0
        for node, op, module, size, output in names:
            end = start + len(positions(int(size)))
            kept = values[start:end]
            layers.append(Layer(str(node), str(op), str(module), int(size), kept, str(output)))
            start = end
        if start != len(values):
            raise ValueError(f"it names {start} values and holds {len(values)}")
    except BadInput as cause:
        raise DamagedFile(f"{cause} Export the model again.") from cause
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as cause:
        raise DamagedFile(f"{path} cannot be read: {cause}. Export the model again.") from cause
    return layers
