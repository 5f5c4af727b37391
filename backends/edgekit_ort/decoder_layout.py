"""What a decoder's artifact says about itself. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from edgekit.decoder import DecoderSpec
from edgekit.errors import DamagedFile

DATA = "weights.bin"


@dataclass(frozen=True)
class Expanded:
    """4-bit codes of the file that become 8-bit ones when it is opened.

    ``name`` is the initializer that they are for, ``offset`` where they begin in the file,
    ``shape`` that of the packed bytes: [rows, blocks, block / 2].
    """

    name: str
    offset: int
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """What the stepper has to know of a graph.

    ``capacity`` is how many tokens the buffers hold; ``padded``: attention takes a row more
    where the pass has one; ``exact_from`` is the fewest tokens of a pass that is equal to the
    bit to every wider one.
    """

    spec: DecoderSpec
    capacity: int
    padded: bool
    exact_from: int
    expand: tuple[Expanded, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Every field."""
        return {
            "spec": self.spec.to_json(),
            "capacity": self.capacity,
            "padded": self.padded,
            "exact_from": self.exact_from,
            "expand": [[each.name, each.offset, list(each.shape)] for each in self.expand],
        }

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` wrote under ``decoder``. Raises ``DamagedFile``."""
        try:
            facts = provenance["decoder"]
            return cls(
                DecoderSpec.from_json(facts["spec"]),
                int(facts["capacity"]),
                bool(facts["padded"]),
                int(facts["exact_from"]),
                tuple(
                    Expanded(str(name), int(offset), (int(rows), int(blocks), int(width)))
                    for name, offset, (rows, blocks, width) in facts["expand"]
                ),
            )
        except (KeyError, TypeError, ValueError) as cause:
            raise DamagedFile(
                f"the artifact does not say how its decoder is to be run: {cause!r}; export again."
            ) from cause
