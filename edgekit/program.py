"""A captured model: the graph, its tensor specs, and the eager outputs it is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.calibration import Calibration
from edgekit.image import ImageInput
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

    Its graph takes ``inputs`` and returns ``outputs``, each in this order. ``name``, ``licence``,
    ``image`` and ``labels`` are the model's, for artifacts that can carry them; ``calibration``
    is the data for recipes that need ranges of activations.
    """

    exported: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reference: Reference
    name: str = "model"
    licence: str = ""
    image: ImageInput | None = None
    labels: tuple[str, ...] = ()
    calibration: Calibration | None = None
