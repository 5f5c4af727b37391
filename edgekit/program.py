"""A captured model: the graph, its tensor specs, and the eager outputs it is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.spec import Array, Arrays, TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Reference:
    """Sample inputs with what the eager model answers: the truth of every proof.

    ``source`` says in words where the samples come from.
    """

    samples: tuple[Arrays, ...]
    expected: tuple[dict[str, Array], ...]
    source: str


@dataclass(frozen=True)
class Program:
    """A model captured by ``torch.export``, in float32.

    Its graph takes ``inputs`` and returns ``outputs``, each in this order.
    """

    exported: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reference: Reference
