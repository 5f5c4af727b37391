"""What was asked for is made definite, or refused, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit import host
from edgekit.errors import BadRecipe, UnknownName, UnsupportedRecipe, UsageError
from edgekit.planning import Plan, Quantization, plan
from edgekit.recipe import ANY, FP16, FP32, INT8, PRECISIONS, Recipe
from edgekit.testing import QuantizingBackend, ReplayBackend

INT4, PALETTE = PRECISIONS["int4"], PRECISIONS["palette4"]
DATA = Path("calibration")
# One for which the kind of processor changes what is right, and one for which it does not.
PARTICULAR = QuantizingBackend(
    name="particular",
    recipes=(FP32, replace(INT8, cpu="vnni"), INT4, *(replace(each, cpu="vnni") for each in ANY)),
)
PLAIN = QuantizingBackend(name="plain", recipes=(FP16, INT8, PALETTE))


@pytest.fixture(autouse=True)
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "int8_kernels", lambda: "avx2")


def recipes(precision: str, *backends: QuantizingBackend, **changes: Any) -> list[Recipe]:
    targets = backends or (PARTICULAR,)
    return [each.recipe for each in plan(targets, precision, None, Quantization(**changes))]


def test_the_kind_of_this_processor_is_filled_in_where_it_matters() -> None:
    assert recipes("int8") == [replace(INT8, cpu="avx2")]
    assert recipes("any") == [replace(ANY[0], cpu="avx2")]
    assert recipes("any4") == [replace(PRECISIONS["any4"], cpu="avx2")]
    assert recipes("fp32,int4") == [FP32, INT4]
    assert recipes("int8", PLAIN) == [INT8]


@pytest.mark.parametrize(
    ("here", "kind"), [("vnni", "vnni"), ("arm64", "arm64"), ("avx2", "avx2"), ("other", "avx2")]
)
def test_on_a_processor_of_no_known_kind_what_cannot_saturate_is_made(
    monkeypatch: pytest.MonkeyPatch, here: str, kind: str
) -> None:
    monkeypatch.setattr(host, "int8_kernels", lambda: here)
    assert recipes("int8")[0].cpu == kind


def test_another_processor_may_be_asked_for() -> None:
    assert recipes("int8", cpu="arm64")[0].cpu == "arm64"
    both = recipes("int8", PARTICULAR, PLAIN, cpu="vnni")
    assert [recipe.cpu for recipe in both] == ["vnni", ""]


def test_a_processor_that_does_not_exist_or_changes_nothing_is_said() -> None:
    with pytest.raises(
        UnknownName, match=r"unknown processor 'sse'\. There is: auto, avx2, vnni, arm64"
    ):
        recipes("int8", cpu="sse")
    with pytest.raises(UsageError, match=r"--cpu avx2 changes nothing for plain, replay; leave"):
        plan([PLAIN, ReplayBackend()], "auto", None, Quantization(cpu="avx2"))


def test_auto_without_calibration_is_the_float_default_and_searches_nothing() -> None:
    found = plan([PARTICULAR, PLAIN, ReplayBackend()], "auto")
    assert [(each.recipe, each.candidates) for each in found] == [
        (FP32, ()),
        (FP16, ()),
        (FP32, ()),
    ]


def test_auto_with_calibration_has_every_recipe_that_cannot_switch_as_a_candidate() -> None:
    (found,) = plan([PARTICULAR], "auto", None, Quantization(calibration=DATA))
    assert found == Plan(PARTICULAR, FP32, (replace(INT8, cpu="avx2"), INT4))


def test_what_is_set_is_set_for_every_candidate_that_it_means_something_to() -> None:
    backend = replace(PLAIN, recipes=(FP32, FP16, INT8, INT4))
    wanted = Quantization(calibration=DATA, method="entropy", keep_float=("head",))
    (found,) = plan([backend], "auto", None, wanted)
    assert found.candidates == (
        FP16,
        replace(INT8, method="entropy", keep_float=("head",)),
        replace(INT4, keep_float=("head",)),
    )


def test_the_same_thing_asked_for_twice_is_made_once() -> None:
    assert recipes("fp32,fp32,auto") == [FP32]
    found = plan([PARTICULAR], "auto,fp32,auto", None, Quantization(calibration=DATA))
    assert [(each.recipe, bool(each.candidates)) for each in found] == [(FP32, True), (FP32, False)]


def test_what_is_said_of_quantization_is_for_the_precisions_that_quantize() -> None:
    found = recipes("fp32,int8", method="entropy", keep_float=("head",))
    assert found == [FP32, replace(INT8, method="entropy", keep_float=("head",), cpu="avx2")]


@pytest.mark.parametrize(
    ("precision", "changes", "sentence"),
    [
        ("fp32", {"keep_float": ("head",)}, "fp32 quantizes nothing, so keep-float means nothing"),
        ("fp32", {"method": "entropy"}, "fp32 quantizes nothing, so a calibration method means"),
        ("int4", {"method": "entropy"}, "int4 quantizes weights alone and calibrates nothing"),
        ("int8", {"keep_float": ("a", "a")}, "keep-float names 'a' twice; once is enough"),
    ],
)
def test_a_contradiction_is_a_sentence(
    precision: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRecipe, match=sentence):
        recipes(precision, **changes)


def test_a_method_that_does_not_exist_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnknownName, match=r"unknown calibration method 'entropi'; did you mean"):
        recipes("auto", method="entropi", calibration=DATA)


def test_a_precision_that_the_target_cannot_make_names_those_it_can() -> None:
    with pytest.raises(UnsupportedRecipe, match=r"plain cannot make int4.*fp16, int8, palette4"):
        recipes("int4", PLAIN)


def test_no_target_is_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"no target was named; see edgekit list targets"):
        plan([], "auto")


def file(folder: Path, text: str) -> Path:
    path = folder / "mixed.toml"
    path.write_text(text)
    return path


def test_a_file_is_the_recipe(tmp_path: Path) -> None:
    path = file(tmp_path, 'precision = "int8"\ncalibration = "percentile"\nkeep-float = ["a"]')
    expected = replace(INT8, method="percentile", keep_float=("a",), cpu="avx2")
    assert recipes("auto", recipe=path) == recipes("int8", recipe=path) == [expected]


def test_what_is_said_beside_a_file_is_added_to_it(tmp_path: Path) -> None:
    path = file(
        tmp_path, 'precision = "int8"\ncalibration = "percentile"\ncpu = "vnni"\nkeep-float = ["a"]'
    )
    assert recipes("auto", recipe=path)[0].cpu == "vnni"
    found = recipes("auto", recipe=path, method="entropy", keep_float=("b",), cpu="arm64")
    assert found == [replace(INT8, method="entropy", keep_float=("a", "b"), cpu="arm64")]


def test_the_processor_of_a_file_is_for_the_targets_that_it_matters_to(tmp_path: Path) -> None:
    path = file(tmp_path, 'precision = "int8"\ncpu = "vnni"')
    assert [each.cpu for each in recipes("auto", PARTICULAR, PLAIN, recipe=path)] == ["vnni", ""]


def test_a_file_and_a_precision_that_contradict_each_other_are_said(tmp_path: Path) -> None:
    path = file(tmp_path, 'precision = "int8"')
    with pytest.raises(
        BadRecipe, match=r"--precision int4 contradicts .*mixed\.toml, which says int8; leave one"
    ):
        recipes("int4", recipe=path)
