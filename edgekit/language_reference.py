"""The truth that language artifacts are held to: what eager answers to prompts and to a text.

Kept in the bundle as one ``.npz``. Needs numpy alone.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import DamagedFile
from edgekit.spec import Array

REFERENCE = "language/reference.npz"
_MALFORMED = (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class LanguageReference:
    """Prompts with eager's greedy continuations, and a text with eager's losses.

    ``margins`` are how far the likeliest token's logit is above the next, for each token of each
    continuation; ``logits`` float32 [prompts, vocabulary] follow each prompt. ``losses`` are nats,
    [text - 1]; ``likeliest`` eager's next tokens there.
    """

    prompts: tuple[tuple[int, ...], ...]
    continuations: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    logits: Array
    text: tuple[int, ...]
    losses: Array
    likeliest: Array
    source: str

    @property
    def perplexity(self) -> float:
        """Eager's, of the text."""
        return math.exp(float(np.mean(self.losses)))

    def to_bytes(self) -> bytes:
        """The ``.npz``."""
        arrays = {
            **_ragged("prompts", self.prompts, np.int64),
            **_ragged("continuations", self.continuations, np.int64),
            **_ragged("margins", self.margins, np.float32),
            "logits": self.logits.astype(np.float32),
            "text": np.asarray(self.text, np.int64),
            "losses": self.losses.astype(np.float64),
            "likeliest": self.likeliest.astype(np.int64),
            "source": np.asarray(self.source),
        }
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]  # its stub: the flag first
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> LanguageReference:
        """Read what ``to_bytes`` wrote. Raises ``DamagedFile``."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            return cls(
                prompts=_rows(found, "prompts"),
                continuations=_rows(found, "continuations"),
                margins=_rows(found, "margins"),
                logits=found["logits"],
                text=tuple(found["text"].tolist()),
                losses=found["losses"],
                likeliest=found["likeliest"],
                source=str(found["source"]),
            )
        except _MALFORMED as cause:
            raise DamagedFile(f"{REFERENCE} is malformed: {cause!r}.") from cause


def _ragged(name: str, rows: Sequence[Sequence[float]], dtype: type) -> dict[str, Array]:
    flat: Array = np.asarray([value for row in rows for value in row], dtype)
    return {name: flat, f"{name}.lengths": np.asarray([len(row) for row in rows], np.int64)}


def _rows(arrays: dict[str, Array], name: str) -> tuple[tuple[Any, ...], ...]:
    ends = np.cumsum(arrays[f"{name}.lengths"])[:-1]
    return tuple(tuple(part.tolist()) for part in np.split(arrays[name], ends))
