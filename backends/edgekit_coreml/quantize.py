"""Recipes to the converter's own settings."""

from __future__ import annotations

from typing import Any

from edgekit.graph import quiet
from edgekit.recipe import FP16, Recipe

with quiet():  # it warns of every torch newer than it was tried with
    import coremltools

__all__ = ["compute_precision", "coremltools"]


def compute_precision(recipe: Recipe) -> Any:
    """The precision inside; inputs and outputs stay float32."""
    return coremltools.precision.FLOAT16 if recipe == FP16 else coremltools.precision.FLOAT32
