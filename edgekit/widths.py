"""One artifact at many bit-widths: the codes are held once, each width is derived in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.artifact import Artifact
from edgekit.errors import DamagedFile, UnknownName, UsageError
from edgekit.recipe import PRECISIONS, WIDTHS
from edgekit.rounding import RULES, STORED, rewritten

Bits = int | Mapping[str, int]


def places_to_json(places: list[dict[str, Any]], rule: str = "rne") -> dict[str, object]:
    """What an adapter puts into an artifact's provenance under ``codes``.

    Each place has ``layer`` (the module's path, or the node's name), ``file`` (in the artifact),
    ``offset`` and ``count`` (bytes); one byte a code, in any order of axes.
    """
    return {"stored_bits": STORED, "rounding": rule, "widths": list(WIDTHS), "places": places}


class Store:
    """The codes of an artifact made with ``any``, read once; ``at`` derives a width.

    Raises ``UsageError`` for an artifact without codes, ``DamagedFile`` for one whose places do
    not lie in its files.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        codes = artifact.provenance.get("codes")
        if not isinstance(codes, Mapping):
            raise UsageError(
                f"{artifact.name} has one bit-width; export the model with --precision any to "
                "switch between widths."
            )
        try:
            self._rule = str(codes["rounding"])
            self._places: list[dict[str, Any]] = [
                {
                    "layer": str(place["layer"]),
                    "file": str(place["file"]),
                    "offset": int(place["offset"]),
                    "count": int(place["count"]),
                }
                for place in codes["places"]
            ]
            self._files = {
                name: _content(artifact, name) for name in {each["file"] for each in self._places}
            }
            self._check()
        except (KeyError, TypeError, ValueError) as cause:
            raise DamagedFile(
                f"{artifact.name} does not say where its codes lie ({cause!r}); export it again."
            ) from cause

    def _check(self) -> None:
        if self._rule not in RULES or not self._places:
            raise ValueError(f"rounding {self._rule!r}, {len(self._places)} places")
        for place in self._places:
            end = place["offset"] + place["count"]
            if not 0 <= place["offset"] < end <= len(self._files[place["file"]]):
                raise ValueError(f"{place} lies outside its file")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose width can be set, in the order of the graph."""
        return tuple(dict.fromkeys(place["layer"] for place in self._places))

    def widths(self, bits: Bits) -> dict[str, int]:
        """The width of every layer: one for all, or a mapping that names layers.

        A name means the layer and those inside it; ``*`` means all that no other name does, 8
        bits where it is left out. Raises ``UsageError`` or ``UnknownName``.
        """
        asked = {"*": bits} if isinstance(bits, int) else {"*": STORED, **bits}
        for name, width in asked.items():
            if width not in WIDTHS:
                raise UsageError(
                    f"{width!r} bits were asked for {name}; there is: "
                    f"{', '.join(map(str, WIDTHS))}."
                )
            if name != "*" and not any(_inside(layer, name) for layer in self.layers):
                raise UnknownName("layer", name, self.layers)
        return {layer: _width(layer, asked) for layer in self.layers}

    def at(self, bits: Bits) -> Artifact:
        """The artifact with its codes at ``bits``, its changed files in memory."""
        files = rewritten(self._files, self._places, self.widths(bits), self._rule)
        if set(self.widths(bits).values()) == {STORED}:
            return replace(self._artifact, files={**self._artifact.files, **files})
        # What was built from the stored codes, an engine, is not of these.
        whole = {
            name: content
            for name, content in self._artifact.files.items()
            if name not in self._artifact.derived
        }
        return replace(self._artifact, files={**whole, **files}, derived=frozenset())

    def fixed(self, bits: int) -> Artifact:
        """The artifact as exported at one width alone: ``any4`` from ``any``."""
        plain = replace(
            PRECISIONS[f"any{bits}"],
            method=self._artifact.recipe.method,
            cpu=self._artifact.recipe.cpu,
            keep_float=self._artifact.recipe.keep_float,
        )
        kept = {key: value for key, value in self._artifact.provenance.items() if key != "codes"}
        return replace(self.at(bits), recipe=plain, provenance=kept)


def _content(artifact: Artifact, name: str) -> bytes:
    content = artifact.files[name]
    return content.read_bytes() if isinstance(content, Path) else content


def _inside(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def _width(layer: str, asked: Mapping[str, int]) -> int:
    """That of the longest name that the layer lies in."""
    names = [name for name in asked if name != "*" and _inside(layer, name)]
    return asked[max(names, key=len)] if names else asked["*"]


def bits_from_text(text: str) -> Bits:
    """``4``, or ``4,head=8``: a width for all layers, and for some by name.

    Raises ``UsageError``.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, width = part.rpartition("=")
        if not width.isdecimal() or (name or "*") in found:
            raise UsageError(
                f"--bits {text!r} is not understood; write a width such as 4, or widths of layers "
                "such as 4,head=8."
            )
        found[name or "*"] = int(width)
    return found["*"] if list(found) == ["*"] else found
