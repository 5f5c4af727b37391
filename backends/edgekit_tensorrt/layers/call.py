"""What a layer's function gets: the layer, its input values, the dtypes it must return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgekit_tensorrt.layers.values import tensor_from_weights
from edgekit_tensorrt.network import Layer


@dataclass(frozen=True)
class Call:
    """One layer about to run. Inputs are in the form of ``values.py``; floats are float32."""

    layer: Layer
    inputs: tuple[Tensor | None, ...]
    dtypes: tuple[str, ...]  # declared, of the outputs
    shapes: tuple[tuple[int, ...], ...]  # declared, of the outputs; -1 where unknown

    def __getitem__(self, attribute: str) -> Any:
        return self.layer.attributes[attribute]

    def value(self, index: int) -> Tensor:
        """An input that must be there."""
        value = self.optional(index)
        if value is None:
            raise ValueError(f"input {index} is missing")
        return value

    def optional(self, index: int) -> Tensor | None:
        """An input, or None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def integers(self, index: int, attribute: str) -> list[int] | None:
        """Sizes or positions: from the input where it is given, else from the attribute."""
        value = self.optional(index)
        if value is not None:
            return [int(one) for one in value.reshape(-1).tolist()]
        given = self.layer.attributes.get(attribute)
        return None if given is None else [int(one) for one in given]

    def weights(self, role: str) -> Tensor | None:
        """Flat weights inside the layer; None where it has none."""
        held = self.layer.weights.get(role)
        return None if held is None else tensor_from_weights(held)


Run = Callable[[Call], Tensor | tuple[Tensor, ...]]
# Why a layer of a known kind cannot run, from its attributes alone; "" where it can.
Lacks = Callable[[Layer], str]


def axes_from_bits(bits: int, rank: int) -> list[int]:
    """The axes packed into one integer."""
    return [axis for axis in range(rank) if bits >> axis & 1]
