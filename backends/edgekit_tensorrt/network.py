"""A network as NVIDIA's parser understood it: what ``parse_onnx`` returns and the interpreter runs.

It is the parser's ``INetworkDefinition`` as plain values, so it can be read, compared and run where
TensorRT itself is not loaded. On disk it is ``network.json`` and ``weights.npz`` in one folder.

Enumerations are their names as NVIDIA spells them (``"HALF"``, ``"CONVOLUTION"``): the integers
differ between versions. Axes that TensorRT packs into one integer stay so: bit i is axis i.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import DamagedFile
from edgekit.spec import Array

_TEXT, _ARRAYS = "network.json", "weights.npz"


@dataclass(frozen=True)
class Tensor:
    """One value of the network; a size of -1 is known when it runs."""

    name: str
    dtype: str  # FLOAT, HALF, BF16, FP8, FP4, INT4, INT8, UINT8, INT32, INT64 or BOOL
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Weights:
    """An array inside a layer. ``values`` is None where Python could not read it.

    BF16 are held as their bits in uint16, FP8 in uint8, INT4 and FP4 two to a byte, low half first.
    """

    dtype: str
    count: int
    values: Array | None


@dataclass(frozen=True)
class Layer:
    """One operation; an input that is left out is None."""

    kind: str  # NVIDIA's LayerType, such as CONVOLUTION
    name: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    weights: Mapping[str, Weights] = field(default_factory=dict, compare=False, repr=False)
    metadata: str = ""  # where it comes from: "[ONNX Layer: node_conv2d]"


@dataclass(frozen=True)
class Network:
    """All layers, in the parser's order, which is not the order they can run in."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    layers: tuple[Layer, ...]
    # Names that the parser gave to more than one tensor; here the later ones got a suffix.
    duplicates: tuple[str, ...] = ()

    def producer(self) -> dict[str, Layer]:
        """The layer that makes each tensor."""
        return {name: layer for layer in self.layers for name in layer.outputs}


def lost_inputs(network: Network) -> tuple[str, ...]:
    """Network inputs that no layer reads: the parser dropped what they were for."""
    read = {name for layer in network.layers for name in layer.inputs} | set(network.outputs)
    return tuple(name for name in network.inputs if name not in read)


def duplicate_names(network: Network) -> tuple[str, ...]:
    """Names borne by more than one tensor or more than one layer."""
    layers = Counter(layer.name for layer in network.layers)
    repeated = (name for name, count in layers.items() if count > 1)
    return tuple(dict.fromkeys([*network.duplicates, *repeated]))


def topological_order(network: Network) -> tuple[Layer, ...]:
    """The layers so that each comes after what it reads; a loop's way back does not count.

    Raises ``DamagedFile`` where a tensor is read and never made, or waits for itself.
    """
    made = set(network.inputs)
    waiting: dict[str, list[int]] = {}  # tensor to the layers that wait for it
    missing: list[int] = []
    ready: list[int] = []
    for index, layer in enumerate(network.layers):
        needs = {name for name in forward_inputs(layer) if name not in made}
        missing.append(len(needs))
        for name in needs:
            waiting.setdefault(name, []).append(index)
        if not needs:
            ready.append(index)
    order: list[Layer] = []
    for index in ready:  # grows while it is walked
        layer = network.layers[index]
        order.append(layer)
        for name in layer.outputs:
            for reader in waiting.pop(name, ()):
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
    if waiting:
        produced = network.producer()
        names = sorted(name for name in waiting if name not in produced) or sorted(waiting)
        raise DamagedFile(f"the parsed network has no value for: {', '.join(names[:5])}.")
    return tuple(order)


def forward_inputs(layer: Layer) -> tuple[str, ...]:
    """What a layer needs before its first run: of a recurrence the first input alone."""
    inputs = layer.inputs[:1] if layer.kind == "RECURRENCE" else layer.inputs
    return tuple(name for name in inputs if name is not None)


def write_network(network: Network, folder: Path) -> None:
    """Write the two files into ``folder``."""
    arrays: dict[str, Array] = {}
    layers = []
    for index, layer in enumerate(network.layers):
        roles = {}
        for role, weights in layer.weights.items():
            key = f"{index}.{role}" if weights.values is not None else None
            if weights.values is not None:
                arrays[f"{index}.{role}"] = weights.values
            roles[role] = {"dtype": weights.dtype, "count": weights.count, "array": key}
        layers.append(
            {
                "kind": layer.kind,
                "name": layer.name,
                "inputs": layer.inputs,
                "outputs": layer.outputs,
                "attributes": dict(layer.attributes),
                "weights": roles,
                "metadata": layer.metadata,
            }
        )
    value = {
        "name": network.name,
        "inputs": network.inputs,
        "outputs": network.outputs,
        "duplicates": network.duplicates,
        "tensors": [asdict(tensor) for tensor in network.tensors.values()],
        "layers": layers,
    }
    (folder / _TEXT).write_text(json.dumps(value), encoding="utf-8")
    np.savez(folder / _ARRAYS, **arrays)  # type: ignore[arg-type]  # names are not its keywords


def read_network(folder: Path) -> Network:
    """Read what ``write_network`` wrote. Raises ``DamagedFile``."""
    try:
        value = json.loads((folder / _TEXT).read_text(encoding="utf-8"))
        with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
            return _network_from_json(value, arrays)
    except (OSError, KeyError, TypeError, ValueError) as cause:
        raise DamagedFile(f"the parsed network in {folder} is damaged: {cause}") from cause


def _network_from_json(value: dict[str, Any], arrays: Mapping[str, Array]) -> Network:
    return Network(
        name=value["name"],
        inputs=tuple(value["inputs"]),
        outputs=tuple(value["outputs"]),
        tensors={
            tensor["name"]: Tensor(tensor["name"], tensor["dtype"], tuple(tensor["shape"]))
            for tensor in value["tensors"]
        },
        layers=tuple(_layer_from_json(layer, arrays) for layer in value["layers"]),
        duplicates=tuple(value["duplicates"]),
    )


def _layer_from_json(value: dict[str, Any], arrays: Mapping[str, Array]) -> Layer:
    return Layer(
        kind=value["kind"],
        name=value["name"],
        inputs=tuple(value["inputs"]),
        outputs=tuple(value["outputs"]),
        attributes=value["attributes"],
        weights={
            role: Weights(
                one["dtype"], one["count"], arrays[one["array"]] if one["array"] else None
            )
            for role, one in value["weights"].items()
        },
        metadata=value["metadata"],
    )
