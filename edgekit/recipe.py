"""Recipes: the precisions of an artifact, as plain values, and their names on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekit.errors import DamagedFile, UnknownName

Precision = Literal["float32", "float16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How numbers are held: the precision of weights and of activations."""

    weights: Precision
    activations: Precision

    @property
    def precision(self) -> str:
        """The name users type: ``fp32``, ``fp16``, ``int8`` or ``int4``."""
        names = (name for name, recipe in PRECISIONS.items() if recipe == self)
        return next(names, f"{self.weights}-{self.activations}")

    def to_json(self) -> dict[str, str]:
        """``{"weights": ..., "activations": ...}``."""
        return {"weights": self.weights, "activations": self.activations}

    @classmethod
    def from_json(cls, value: object) -> Recipe:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        for recipe in PRECISIONS.values():
            if value == recipe.to_json():
                return recipe
        raise DamagedFile(f"the manifest names a recipe that does not exist: {value!r}")


PRECISIONS: dict[str, Recipe] = {
    "fp32": Recipe("float32", "float32"),
    "fp16": Recipe("float16", "float16"),
    "int8": Recipe("int8", "int8"),
    "int4": Recipe("int4", "float32"),
}

FP32, FP16 = PRECISIONS["fp32"], PRECISIONS["fp16"]


def recipe_from_precision(name: str) -> Recipe:
    """The recipe called ``name``. Raises ``UnknownName`` with the nearest one."""
    if name not in PRECISIONS:
        raise UnknownName("precision", name, ("auto", *PRECISIONS))
    return PRECISIONS[name]
