"""Recipes keep their names through JSON and TOML; an unknown one is answered with the nearest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import BadRecipe, DamagedFile, UnknownName
from edgekit.recipe import (
    ANY,
    CPUS,
    FP16,
    FP32,
    INT8,
    METHODS,
    PRECISIONS,
    WIDTHS,
    Recipe,
    customised,
    recipe_from_precision,
    recipe_from_toml,
)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_names_its_recipe_and_the_recipe_its_precision(name: str) -> None:
    recipe = recipe_from_precision(name)
    assert recipe.precision == name
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.to_json()["precision"] == name


@pytest.mark.parametrize("name", [name for name, recipe in PRECISIONS.items() if recipe.quantized])
def test_a_recipe_with_every_choice_made_survives_json(name: str) -> None:
    plain = PRECISIONS[name]
    for cpu in CPUS:
        for method in METHODS if plain.calibrated else METHODS[:1]:
            recipe = replace(plain, method=method, cpu=cpu, keep_float=("head", "softmax"))
            assert Recipe.from_json(recipe.to_json()) == recipe
            assert recipe.precision == name


def test_two_precisions_are_never_one_recipe() -> None:
    assert len(set(PRECISIONS.values())) == len(PRECISIONS)


@pytest.mark.parametrize(
    ("name", "quantized", "calibrated", "switchable", "width"),
    [
        ("fp32", False, False, False, None),
        ("fp16", False, False, False, None),
        ("int8", True, True, False, None),
        ("int8-weights", True, False, False, None),
        ("int4", True, False, False, None),
        ("palette6", True, False, False, None),
        ("any", True, True, True, None),
        ("any8", True, True, False, 8),
        ("any2", True, True, False, 2),
    ],
)
def test_a_recipe_says_what_it_needs(
    name: str, quantized: bool, calibrated: bool, switchable: bool, width: int | None
) -> None:
    recipe = PRECISIONS[name]
    said = (recipe.quantized, recipe.calibrated, recipe.switchable, recipe.width)
    assert said == (quantized, calibrated, switchable, width)


def test_any_has_every_width_fixed_too() -> None:
    assert [recipe.width for recipe in ANY] == [None, *WIDTHS]


def test_a_recipe_of_the_first_schema_is_read() -> None:
    assert Recipe.from_json({"weights": "float32", "activations": "float32"}) == FP32
    assert Recipe.from_json({"weights": "float16", "activations": "float16"}) == FP16


def test_a_method_that_means_nothing_is_not_written() -> None:
    assert "method" not in FP32.to_json()
    assert "method" not in PRECISIONS["int4"].to_json()
    assert INT8.to_json()["method"] == "min-max"


def test_an_unknown_precision_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(
        UnknownName,
        match=r"unknown precision 'fp61'; did you mean 'fp16'\? There is: auto, fp32, fp16, int8",
    ):
        recipe_from_precision("fp61")


WHOLE = {"precision": "int8", "weights": "int8", "activations": "int8", "form": "linear"}


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
        {**WHOLE, "precision": "fp32"},
        {**WHOLE, "precision": "int3"},
        {**WHOLE, "form": "cubic"},
        {**WHOLE, "weights": "int3"},
        {**WHOLE, "method": "mean"},
        {**WHOLE, "method": ["min-max"]},
        {**WHOLE, "cpu": "sse"},
        {**WHOLE, "keep_float": [1]},
        {**WHOLE, "keep_float": 1},
        {**WHOLE, "keep_float": "head"},
        {**WHOLE, "keep_float": {"head": 1}},
        {**WHOLE, "group": 32},
        {key: value for key, value in WHOLE.items() if key != "form"},
        {key: value for key, value in WHOLE.items() if key != "precision"},
    ],
)
def test_a_recipe_that_does_not_exist_is_damage(value: object) -> None:
    with pytest.raises(DamagedFile, match="names a recipe that does not exist"):
        Recipe.from_json(value)


def toml(folder: Path, text: str) -> Path:
    path = folder / "mixed.toml"
    path.write_text(text)
    return path


def test_a_file_says_all_of_a_recipe(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        'precision = "int8"\ncalibration = "percentile"\ncpu = "avx2"\n'
        'keep-float = ["head", "softmax"]\n',
    )
    assert recipe_from_toml(path) == Recipe(
        "int8", "int8", "linear", "percentile", "avx2", ("head", "softmax")
    )


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_alone_is_a_recipe(name: str, tmp_path: Path) -> None:
    assert recipe_from_toml(toml(tmp_path, f'precision = "{name}"')) == PRECISIONS[name]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('precison = "int8"', r"unknown recipe key 'precison'; did you mean 'precision'\?.*\.toml"),
        ('precision = "int8"\nbits = 4', r"unknown recipe key 'bits'.*It stands in .*mixed\.toml"),
        ('precision = "int9"', r"unknown precision 'int9'; did you mean 'int8'"),
        ('precision = "auto"', r"unknown precision 'auto'"),
        ('precision = "int8"\ncalibration = "entropi"', r"unknown calibration 'entropi'; did you"),
        ('precision = "int8"\ncpu = "avx3"', r"unknown cpu 'avx3'; did you mean 'avx2'"),
        ('precision = "int8"\ncpu = ""', r"unknown cpu ''"),
    ],
)
def test_a_name_that_does_not_exist_says_where_it_stands(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(UnknownName, match=sentence):
        recipe_from_toml(toml(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r'names no precision; add a line such as precision = "int8"'),
        ('cpu = "avx2"', r"names no precision"),
        ("precision = 8", r"precision is 8, which should be a text in quotes"),
        ('precision = ["int8"]', r"precision is \['int8'\], which should be a text"),
        ('precision = "int8"\ncalibration = 1', r"calibration is 1, which should be a text"),
        ('precision = "int8"\nkeep-float = "head"', r"keep-float is a list of names"),
        ('precision = "int8"\nkeep-float = [1]', r"keep-float is a list of names"),
        ('precision = "int8"\nkeep-float = [""]', r"keep-float is a list of names"),
        (
            'precision = "fp32"\nkeep-float = ["head"]',
            r"mixed\.toml: fp32 quantizes nothing, so keep-float means nothing there; leave it out",
        ),
        (
            'precision = "fp16"\ncalibration = "entropy"',
            r"fp16 quantizes nothing, so a calibration method means nothing there",
        ),
        (
            'precision = "int4"\ncalibration = "entropy"',
            r"int4 quantizes weights alone and calibrates nothing, so the method 'entropy' means",
        ),
        (
            'precision = "palette4"\ncalibration = "min-max"',
            r"palette4 quantizes weights alone and calibrates nothing",
        ),
        (
            'precision = "int8"\nkeep-float = ["b", "a", "b"]',
            r"mixed\.toml: keep-float names 'b' twice; once is enough",
        ),
        ("precision = int8", r"cannot be read as TOML: "),
        ("precision", r"cannot be read as TOML: "),
        ('precision = "int8"\nprecision = "int8"', r"cannot be read as TOML: "),
        pytest.param(f"a = {'[' * 5000}", r"cannot be read as TOML: ", id="deep"),
    ],
)
def test_a_recipe_that_contradicts_itself_or_cannot_be_read_is_a_sentence(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(BadRecipe, match=sentence):
        recipe_from_toml(toml(tmp_path, text))


def test_a_file_that_is_not_there_or_no_text_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"there is no recipe file .*none\.toml"):
        recipe_from_toml(tmp_path / "none.toml")
    with pytest.raises(BadRecipe, match=r"cannot be read as TOML: "):
        recipe_from_toml(tmp_path)
    (tmp_path / "b.toml").write_bytes(b'precision = "\xff\xfe"')
    with pytest.raises(BadRecipe, match=r"b\.toml cannot be read as TOML: "):
        recipe_from_toml(tmp_path / "b.toml")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, INT8),
        ({"method": "entropy"}, replace(INT8, method="entropy")),
        ({"cpu": "vnni"}, replace(INT8, cpu="vnni")),
        ({"keep_float": ("a",)}, replace(INT8, keep_float=("a",))),
    ],
)
def test_what_is_not_set_otherwise_stays(changes: dict[str, Any], expected: Recipe) -> None:
    assert customised(INT8, **changes) == expected


def test_a_contradiction_without_a_file_has_no_file_in_its_sentence() -> None:
    with pytest.raises(BadRecipe, match=r"^fp32 quantizes nothing, so keep-float means nothing"):
        customised(FP32, keep_float=("head",))
