"""The error tree is as drawn, and each class builds a sentence that says what to do."""

from __future__ import annotations

import builtins
import re

import pytest

from edgekit import errors
from edgekit.errors import (
    EdgekitError,
    MissingRuntime,
    NewerSchema,
    UnknownName,
    UnsupportedModel,
    UnsupportedRecipe,
)

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, EdgekitError)
]
_LINE = re.compile(r"[│├└─ ]*(?P<name>[A-Z]\w+) +(?:exit code )?(?P<code>\d)\b(?P<rest>.*)")


def drawn() -> dict[str, re.Match[str]]:
    """Each class name in the module's drawing, with its exit code and what follows."""
    lines = (errors.__doc__ or "").splitlines()
    return {match["name"]: match for line in lines if (match := _LINE.fullmatch(line))}


def test_the_drawing_names_every_error_and_no_other() -> None:
    assert sorted(drawn()) == sorted(kind.__name__ for kind in CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_drawing_tells_the_exit_code_and_the_built_in(kind: type[EdgekitError]) -> None:
    line = drawn()[kind.__name__]
    assert kind.exit_code == int(line["code"])
    if also := re.search(r"\(also (\w+)\)", line["rest"]):
        assert issubclass(kind, getattr(builtins, also[1]))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_a_sentence_about_itself(kind: type[EdgekitError]) -> None:
    assert kind.__doc__
    assert kind.__doc__ != EdgekitError.__doc__ or kind is EdgekitError


def test_an_unknown_name_is_answered_with_the_nearest_and_all_there_are() -> None:
    error = UnknownName("target", "OnnxRuntme", ("executorch", "onnxruntime"))
    assert str(error) == (
        "unknown target 'OnnxRuntme'; did you mean 'onnxruntime'? "
        "There is: executorch, onnxruntime."
    )
    assert (error.kind, error.name, error.known) == (
        "target",
        "OnnxRuntme",
        ("executorch", "onnxruntime"),
    )


def test_a_name_near_to_nothing_gets_no_guess() -> None:
    error = UnknownName("model", "zzz", ("partialnet-t0",), hint="Write a path.")
    assert str(error) == "unknown model 'zzz'. There is: partialnet-t0. Write a path."


def test_where_nothing_exists_the_sentence_says_none() -> None:
    assert str(UnknownName("target", "x", ())) == "unknown target 'x'. There is: none."


def test_a_missing_runtime_prints_the_line_that_installs_it() -> None:
    error = MissingRuntime("onnxruntime", "onnxruntime")
    assert "onnxruntime needs the module 'onnxruntime', which is not installed" in str(error)
    assert str(error).endswith("run: pip install 'edgekit-sdk[onnxruntime]'")
    assert error.name == "onnxruntime"


def test_a_missing_module_of_the_host_names_its_own_extra() -> None:
    error = MissingRuntime("making artifacts", "torch", extra="export")
    assert str(error).endswith("run: pip install 'edgekit-sdk[export]'")


def test_an_unsupported_recipe_says_what_can_be_made_and_with_which_option() -> None:
    assert str(UnsupportedRecipe("onnxruntime", "int4", ("fp32", "fp16"))) == (
        "onnxruntime cannot make int4 in this version; it can make: fp32, fp16. "
        "Choose one of these with --precision."
    )


def test_an_unsupported_model_lists_one_finding_a_line() -> None:
    error = UnsupportedModel("executorch", ["aten.sort is refused: a", "aten.fft is refused: b"])
    assert str(error) == (
        "executorch cannot take this model:\n"
        "  - aten.sort is refused: a\n"
        "  - aten.fft is refused: b"
    )


def test_a_newer_schema_gives_the_upgrade_line() -> None:
    assert str(NewerSchema("b/manifest.json", 7, 1)) == (
        "b/manifest.json has schema 7 and this edgekit reads up to 1; "
        "run: pip install --upgrade edgekit-sdk"
    )
