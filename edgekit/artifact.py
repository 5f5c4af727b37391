"""What lowering returns: the files one target needs, their tensor specs, where they came from."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    target: str
    recipe: Recipe
    main: str
    files: Mapping[str, bytes | Path]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provenance: Mapping[str, object] = field(default_factory=dict)

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
        return sum(
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
            if not name.endswith(".py")
        )
