"""One store of codes gives every width, for all layers or for some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.artifact import Artifact
from edgekit.errors import DamagedFile, UnknownName, UsageError
from edgekit.recipe import ANY, FP32, PRECISIONS
from edgekit.rounding import in_container
from edgekit.widths import Bits, Store, bits_from_text, places_to_json

LAYERS = ("stem", "blocks.0.conv", "blocks.1.conv", "blocks.10.conv")
CODES = np.random.default_rng(0).integers(-127, 128, 64).astype(np.int8)


def artifact(**changes: Any) -> Artifact:
    """Four layers of 8 codes each, with 8 other bytes before each."""
    places = [
        {"layer": layer, "file": "m.bin", "offset": 16 * index + 8, "count": 8}
        for index, layer in enumerate(LAYERS)
    ]
    codes = {**places_to_json(places), **changes}
    files: dict[str, bytes | Path] = {"m.bin": CODES.tobytes(), "other": b"plain"}
    recipe = replace(
        PRECISIONS["any"], method="percentile", cpu="avx2", keep_float=("head", "softmax")
    )
    provenance = {"made": "by hand", "codes": codes}
    return Artifact("fake", recipe, "m.bin", files, (), (), provenance)


def codes_of(made: Artifact) -> list[list[int]]:
    """What each layer's codes are, in the file."""
    content = made.files["m.bin"]
    assert isinstance(content, bytes)
    found: list[list[int]] = np.frombuffer(content, np.int8).reshape(4, 16)[:, 8:].tolist()
    return found


def test_a_width_is_one_for_all_layers_and_nothing_else_changes() -> None:
    made = Store(artifact()).at(4)
    original = CODES.reshape(4, 16)
    np.testing.assert_array_equal(codes_of(made), in_container(original[:, 8:], 4))
    content = made.files["m.bin"]
    assert isinstance(content, bytes)
    np.testing.assert_array_equal(
        np.frombuffer(content, np.int8).reshape(4, 16)[:, :8], original[:, :8]
    )
    assert made.files["other"] == b"plain"
    assert made.recipe == artifact().recipe


def test_widths_always_come_from_the_stored_codes() -> None:
    store = Store(artifact())
    store.at(4)
    assert codes_of(store.at(2)) == codes_of(Store(artifact()).at(2))
    assert store.at(8).files["m.bin"] == CODES.tobytes()


def test_a_file_on_disk_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(CODES.tobytes())
    store = Store(replace(artifact(), files={"m.bin": path, "other": b"plain"}))
    path.unlink()
    assert store.at(4).files == Store(artifact()).at(4).files


@pytest.mark.parametrize(
    ("bits", "widths"),
    [
        (6, [6, 6, 6, 6]),
        ({"*": 4}, [4, 4, 4, 4]),
        ({"stem": 2}, [2, 8, 8, 8]),
        ({"*": 4, "stem": 8}, [8, 4, 4, 4]),
        ({"*": 2, "blocks": 4}, [2, 4, 4, 4]),
        ({"blocks": 4, "blocks.1": 6}, [8, 4, 6, 4]),
        ({"blocks.1": 6, "blocks": 4}, [8, 4, 6, 4]),
        ({"blocks.1.conv": 2, "*": 6}, [6, 6, 2, 6]),
        ({}, [8, 8, 8, 8]),
    ],
)
def test_a_name_is_a_layer_and_those_inside_it_the_longest_wins(
    bits: Bits, widths: list[int]
) -> None:
    store = Store(artifact())
    assert store.layers == LAYERS
    assert store.widths(bits) == dict(zip(LAYERS, widths, strict=True))


def test_layers_may_have_widths_of_their_own() -> None:
    mixed = codes_of(Store(artifact()).at({"*": 4, "stem": 8, "blocks.1": 2}))
    by_width = {bits: codes_of(Store(artifact()).at(bits)) for bits in (8, 4, 2)}
    assert mixed == [by_width[8][0], by_width[4][1], by_width[2][2], by_width[4][3]]


@pytest.mark.parametrize("bits", [5, 0, 16, {"stem": 3}, {"*": 1}])
def test_a_width_that_is_none_is_answered_with_those_there_are(bits: Bits) -> None:
    with pytest.raises(UsageError, match=r"\d+ bits were asked for .*; there is: 8, 6, 4, 2\."):
        Store(artifact()).at(bits)


@pytest.mark.parametrize("name", ["stme", "block", "blocks.1.con", "stem.conv"])
def test_a_layer_that_does_not_exist_is_answered_with_the_nearest(name: str) -> None:
    with pytest.raises(UnknownName, match=rf"unknown layer '{name}'; .*stem, blocks\.0\.conv"):
        Store(artifact()).widths({name: 4})


@pytest.mark.parametrize("recipe", ANY[1:])
def test_an_artifact_of_one_width_is_made_from_that_of_all(recipe: Any) -> None:
    fixed = Store(artifact()).fixed(recipe.width)
    assert fixed.name == f"fake-{recipe.precision}"
    assert fixed.recipe == replace(
        recipe, method="percentile", cpu="avx2", keep_float=("head", "softmax")
    )
    assert fixed.files == Store(artifact()).at(recipe.width).files
    assert fixed.provenance == {"made": "by hand"}
    with pytest.raises(UsageError, match=rf"{fixed.name} has one bit-width; export the model wit"):
        Store(fixed)


def test_an_artifact_without_codes_has_one_width() -> None:
    plain = Artifact("fake", FP32, "m.bin", {"m.bin": b""}, (), ())
    with pytest.raises(UsageError, match=r"fake-fp32 has one bit-width; .*--precision any"):
        Store(plain)


def place(**changes: object) -> list[dict[str, object]]:
    return [{"layer": "stem", "file": "m.bin", "offset": 0, "count": 8, **changes}]


@pytest.mark.parametrize(
    "changes",
    [
        {"places": place(offset=60)},
        {"places": place(offset=-8)},
        {"places": place(count=0)},
        {"places": place(count=-1)},
        {"places": place(file="absent")},
        {"places": place(offset="far")},
        {"places": [{"layer": "stem"}]},
        {"places": []},
        {"places": None},
        {"places": "m.bin"},
        {"places": 7},
        {"rounding": "up"},
    ],
)
def test_codes_that_do_not_lie_in_the_files_are_damage(changes: dict[str, object]) -> None:
    with pytest.raises(DamagedFile, match="fake-any does not say where its codes lie"):
        Store(artifact(**changes))


def test_codes_up_to_the_last_byte_are_codes() -> None:
    assert Store(artifact(places=place(offset=56))).layers == ("stem",)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("4", 4),
        ("4,head=8", {"*": 4, "head": 8}),
        ("head=8", {"head": 8}),
        ("*=4,a.b=2", {"*": 4, "a.b": 2}),
    ],
)
def test_a_text_says_a_width_or_widths_of_layers(text: str, bits: Bits) -> None:
    assert bits_from_text(text) == bits


@pytest.mark.parametrize("text", ["", "four", "4,4", "head=", "head=8,head=4", "-4", "4,", "²"])
def test_a_text_that_is_no_width_is_answered_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not understood; write a width such as 4, or widths"):
        bits_from_text(text)
