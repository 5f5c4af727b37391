"""Recipes keep their names through JSON, and an unknown one is answered with the nearest."""

from __future__ import annotations

import pytest

from edgekit.errors import DamagedFile, UnknownName
from edgekit.recipe import PRECISIONS, Recipe, recipe_from_precision


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_names_its_recipe_and_the_recipe_its_precision(name: str) -> None:
    recipe = recipe_from_precision(name)
    assert recipe.precision == name
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_an_unknown_precision_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(
        UnknownName,
        match=r"unknown precision 'fp61'; did you mean 'fp16'\? There is: auto, fp32, fp16, int8",
    ):
        recipe_from_precision("fp61")


@pytest.mark.parametrize(
    "value",
    [
        None,
        "fp32",
        [],
        {},
        {"weights": "float32"},
        {"weights": "float32", "activations": "int4"},
        {"weights": "float32", "activations": "float32", "per": "channel"},
        {"weights": ["float32"], "activations": "float32"},
    ],
)
def test_a_recipe_that_does_not_exist_is_damage(value: object) -> None:
    with pytest.raises(DamagedFile, match="names a recipe that does not exist"):
        Recipe.from_json(value)
