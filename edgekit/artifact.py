"""What lowering returns: the files one target needs, their tensor specs, where they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.recipe import Recipe
from edgekit.spec import TensorSpec


@dataclass(frozen=True)
class Artifact:
    """One model for one target in one precision.

    ``files`` maps a path inside the artifact to its bytes, or to the file on disk that holds
    them once the artifact lies in a bundle; ``main`` is the one that the runtime opens.
    ``provenance`` holds plain JSON values: versions of the tools, options, what was delegated.
    ``derived`` names the files that a device can make again from the others: engines, plans.
    """

    target: str
    recipe: Recipe
    main: str
    files: Mapping[str, bytes | Path]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provenance: Mapping[str, object] = field(default_factory=dict)
    derived: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """``onnxruntime-fp32``: the artifact's folder in a bundle."""
        return f"{self.target}-{self.recipe.precision}"

    @property
    def source(self) -> bytes | Path:
        """The main file: bytes, or a path that a runtime can map into memory."""
        return self.files[self.main]

    @property
    def size(self) -> int:
        """Bytes of all files together, but for the scripts that prove it on the device."""
        return self._bytes(self.files)

    @property
    def model_size(self) -> int:
        """Bytes of the model itself: without what a device can make again from it."""
        return self._bytes(name for name in self.files if name not in self.derived)

    def _bytes(self, names: Iterable[str]) -> int:
        contents = (self.files[name] for name in names if not name.endswith(".py"))
        return sum(
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in contents
        )
