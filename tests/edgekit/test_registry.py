"""Names lead to one adapter or model each, and a wrong name or a gap says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest

from edgekit import registry
from edgekit.contract import Configurable, Option
from edgekit.errors import EdgekitError, MissingRuntime, UnknownName, UnsupportedRecipe
from edgekit.model import Model
from edgekit.recipe import FP16, FP32, PRECISIONS, Recipe
from edgekit.registry import (
    BACKENDS,
    ZOOS,
    backend,
    backend_names,
    backend_options,
    configured,
    distance,
    find_backend,
    load_zoo_model,
    missing_modules,
    recipes_of,
    supported_recipe,
    zoo_models,
)
from edgekit.testing import ReplayBackend


@dataclass
class Tuned(ReplayBackend):
    """A backend with settings, which remembers what it was given."""

    name: str = "tuned"
    values: tuple[tuple[str, str], ...] = ()
    options: tuple[Option, ...] = (
        Option("minimum", "3", "the least"),
        Option("seconds", "9", "the longest"),
    )

    def with_options(self, values: Mapping[str, str]) -> Tuned:
        return replace(self, values=tuple(values.items()))


TUNED = Tuned()
READY = ReplayBackend()
MISSING = ReplayBackend("absent", needs=("edgekit_no_such_runtime",))
MISSING_INNER = ReplayBackend("inner", needs=("json", "edgekit_no_such_runtime.inner"))


@dataclass
class ExampleZoo:
    """A zoo of one model, which remembers what it was asked for."""

    models: Mapping[str, str] = field(default_factory=lambda: {"double": "twice its input"})
    asked: list[tuple[str, object, object]] = field(default_factory=list)

    def load(self, name: str, *, weights: object = None, inputs: object = ()) -> Model:
        self.asked.append((name, weights, inputs))
        module: Any = None
        return Model(module, ())


ZOO = ExampleZoo()


@dataclass
class Fast(ReplayBackend):
    """A backend with preferences."""

    recipes: tuple[Recipe, ...] = (FP16, FP32)
    form: str = "concat"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """The entry points of an imagined environment; a test may add to them."""
    module = SimpleNamespace(
        READY=READY, MISSING=MISSING, INNER=MISSING_INNER, TUNED=TUNED, ZOO=ZOO
    )
    monkeypatch.setitem(sys.modules, "edgekit_imagined", module)
    points = [
        EntryPoint("replay", "edgekit_imagined:READY", BACKENDS),
        EntryPoint("absent", "edgekit_imagined:MISSING", BACKENDS),
        EntryPoint("inner", "edgekit_imagined:INNER", BACKENDS),
        EntryPoint("mine", "edgekit_imagined:ZOO", ZOOS),
    ]
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [point for point in points if point.group == group]
    )
    return points


def test_names_are_listed_in_order_whether_or_not_they_can_run() -> None:
    assert backend_names() == ("absent", "inner", "replay")


def test_listing_names_loads_nothing(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("broken", "edgekit_no_such_module:BACKEND", BACKENDS))
    assert "broken" in backend_names()


def test_a_name_leads_to_its_adapter() -> None:
    assert backend("replay") is READY


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    for find in (backend, find_backend):
        with pytest.raises(
            UnknownName,
            match=r"unknown target 'reply'; did you mean 'replay'\? There is: absent, inner, rep",
        ):
            find("reply")


@pytest.mark.parametrize("name", ["absent", "inner"])
def test_a_missing_runtime_is_answered_with_the_line_that_installs_it(name: str) -> None:
    with pytest.raises(
        MissingRuntime,
        match=rf"{name} needs the module 'edgekit_no_such_.*pip install 'edgekit-sdk\[{name}\]'",
    ):
        backend(name)
    assert find_backend(name).name == name


def test_what_is_missing_is_listed_by_module() -> None:
    assert missing_modules(READY) == []
    assert missing_modules(MISSING_INNER) == ["edgekit_no_such_runtime.inner"]


def test_two_packages_that_claim_one_name_are_both_named(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("replay", "other_package:BACKEND", BACKENDS))
    with pytest.raises(
        EdgekitError,
        match=r"two packages claim the target 'replay': edgekit_imagined:READY, other_package:BACK"
        r"END; uninstall one of them",
    ):
        backend("replay")
    assert backend_names() == ("absent", "inner", "replay")


def test_one_package_that_is_found_twice_is_one(installed: list[EntryPoint]) -> None:
    installed.append(installed[0])
    assert backend("replay") is READY


def test_a_backend_without_preferences_makes_float32() -> None:
    assert recipes_of(READY) == (FP32,)
    assert supported_recipe(READY, None) == FP32


def test_a_backend_with_preferences_is_asked_for_its_best_first() -> None:
    assert recipes_of(Fast()) == (FP16, FP32)
    assert supported_recipe(Fast(), None) == FP16
    assert supported_recipe(Fast(), FP32) == FP32


def test_a_precision_that_the_backend_cannot_make_is_answered_with_those_it_can() -> None:
    with pytest.raises(
        UnsupportedRecipe, match=r"replay cannot make int4 in this version; it can make: fp16, fp32"
    ):
        supported_recipe(Fast(), PRECISIONS["int4"])


def test_zoo_models_are_listed_and_loaded_with_what_the_user_gave() -> None:
    assert zoo_models() == {"double": "twice its input"}
    model = load_zoo_model("double")
    assert replace(model, name="x").name == "x"
    assert ZOO.asked == [("double", None, ())]


def test_an_unknown_model_is_answered_with_the_nearest_and_how_to_give_ones_own() -> None:
    with pytest.raises(
        UnknownName,
        match=r"unknown model 'duble'; did you mean 'double'\? There is: double\. "
        r"For your own model write path/to/file\.py:factory\.",
    ):
        load_zoo_model("duble")


def test_what_ships_is_registered() -> None:
    code = "from edgekit.registry import *; print(backend_names(), len(zoo_models()) > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "('coreml', 'executorch', 'onnxruntime', 'tensorrt') True\n"


@pytest.fixture
def tuned(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("tuned", "edgekit_imagined:TUNED", BACKENDS))


@pytest.mark.usefixtures("tuned")
def test_settings_are_listed_by_target_and_name_though_some_cannot_run() -> None:
    assert not isinstance(READY, Configurable)
    assert backend_options() == {
        "tuned-minimum": Option("minimum", "3", "the least"),
        "tuned-seconds": Option("seconds", "9", "the longest"),
    }


@pytest.mark.usefixtures("tuned")
def test_a_backend_is_set_by_its_own_options_alone() -> None:
    given = {"tuned-minimum": "5", "tunedly-minimum": "6", "other-minimum": "7"}
    found = configured("tuned", given)
    assert isinstance(found, Tuned)
    assert found.values == (("minimum", "5"),)
    assert TUNED.values == ()


@pytest.mark.usefixtures("tuned")
def test_a_backend_without_options_of_its_own_stays_as_it_is() -> None:
    assert configured("tuned", {"other-minimum": "7"}) is TUNED
    assert configured("replay", {"replay-minimum": "7"}) is READY
    with pytest.raises(MissingRuntime, match="absent needs the module"):
        configured("absent", {})


@dataclass
class Imitation(ReplayBackend):
    name: str = "imitation"
    emulation: str = "copy the bundle to the device"


@pytest.mark.parametrize(("emulation", "steps"), [("", 0), ("copy the bundle", 1)])
def test_an_interpreter_is_farther_than_the_vendors_runtime_and_nearer_than_none(
    installed: list[EntryPoint], monkeypatch: pytest.MonkeyPatch, emulation: str, steps: int
) -> None:
    monkeypatch.setattr(
        sys.modules["edgekit_imagined"], "COPY", Imitation(emulation=emulation), False
    )
    installed.append(EntryPoint("imitation", "edgekit_imagined:COPY", BACKENDS))
    assert distance("imitation") == steps
    assert (distance("replay"), distance("absent"), distance("unheard-of")) == (0, 2, 2)
