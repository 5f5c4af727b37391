"""Backends and zoo models by name. Names are listed without importing what they name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from edgekit.contract import (
    Backend,
    Configurable,
    Decodes,
    Emulation,
    LoadsLanguage,
    Option,
    Preferences,
    Zoo,
)
from edgekit.errors import (
    BadModel,
    EdgekitError,
    MissingRuntime,
    UnknownName,
    UnsupportedRecipe,
    UsageError,
)
from edgekit.language import LanguageModel
from edgekit.model import Model
from edgekit.recipe import FP32, Recipe
from edgekit.spec import TensorSpec

BACKENDS, ZOOS = "edgekit.backends", "edgekit.zoos"


def backend_names() -> tuple[str, ...]:
    """Every installed adapter's name, in alphabetical order, whether or not it can run."""
    return tuple(sorted({point.name for point in entry_points(group=BACKENDS)}))


def backend(name: str) -> Backend:
    """The adapter called ``name``, its runtime present.

    Raises ``UnknownName``, or ``MissingRuntime`` with the line that installs it.
    """
    found = find_backend(name)
    for module in missing_modules(found):
        raise MissingRuntime(name, module)
    return found


def language_backend(name: str) -> Decodes:
    """The adapter called ``name``, which runs language models. As ``backend``; ``UsageError``."""
    found = backend(name)
    if not isinstance(found, Decodes):
        raise UsageError(f"{name} runs no language models in this version.")
    return found


def configured(name: str, options: Mapping[str, str]) -> Backend:
    """The adapter called ``name``, set by those of ``options`` that are its own.

    ``options`` are by their names on the command line without dashes, ``coreml-minimum``.
    Raises ``UnknownName``, ``MissingRuntime`` or ``UsageError``.
    """
    found = backend(name)
    own = {
        key.removeprefix(f"{name}-"): value
        for key, value in options.items()
        if key.startswith(f"{name}-")
    }
    return found.with_options(own) if own and isinstance(found, Configurable) else found


def backend_options() -> dict[str, Option]:
    """Every setting of every adapter, by its name on the command line without dashes."""
    adapters = {name: find_backend(name) for name in backend_names()}
    return {
        f"{name}-{option.name}": option
        for name, adapter in adapters.items()
        if isinstance(adapter, Configurable)
        for option in adapter.options
    }


def find_backend(name: str) -> Backend:
    """The adapter called ``name``, whether or not its runtime is installed."""
    points = [point for point in entry_points(group=BACKENDS) if point.name == name]
    if not points:
        raise UnknownName("target", name, backend_names())
    adapter: Backend = _only(points).load()
    return adapter


def missing_modules(adapter: Backend) -> list[str]:
    """The modules that ``adapter`` needs to run and that are not installed."""
    return [module for module in adapter.needs if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a dotted name, the package is missing too
        return False


def can_run(name: str) -> bool:
    """Whether the target called ``name`` is known here and its runtime is installed."""
    return name in backend_names() and not missing_modules(find_backend(name))


def distance(name: str) -> int:
    """How far this machine is from running the target: 0 its own runtime, 1 emulated, 2 not."""
    if not can_run(name):
        return 2
    adapter = find_backend(name)
    return int(isinstance(adapter, Emulation) and bool(adapter.emulation))


def recipes_of(adapter: Backend) -> tuple[Recipe, ...]:
    """The recipes a backend makes, best first; float32 alone where it does not say."""
    return adapter.recipes if isinstance(adapter, Preferences) else (FP32,)


def supported_recipe(adapter: Backend, recipe: Recipe | None) -> Recipe:
    """``recipe``, or the backend's first where it is None. Raises ``UnsupportedRecipe``.

    A backend that makes a precision makes it with every method and choice of float layers.
    """
    supported = recipes_of(adapter)
    if recipe is None:
        return supported[0]
    names = [other.precision for other in supported]
    if recipe.precision not in names:
        raise UnsupportedRecipe(adapter.name, recipe.precision, names)
    return recipe


def zoo_models() -> dict[str, str]:
    """Every zoo model's name and its one line."""
    return {name: line for zoo in _zoos() for name, line in zoo.models.items()}


def load_zoo_model(
    name: str, *, weights: Path | None = None, inputs: tuple[TensorSpec, ...] = ()
) -> Model | LanguageModel:
    """The zoo model called ``name``. Raises ``UnknownName``."""
    for zoo in _zoos():
        if name in zoo.models:
            return zoo.load(name, weights=weights, inputs=inputs)
    hint = "For your own model write path/to/file.py:factory."
    raise UnknownName("model", name, zoo_models(), hint=hint)


def language_models() -> dict[str, str]:
    """Those of ``zoo_models`` that are language models."""
    zoos = [zoo for zoo in _zoos() if isinstance(zoo, LoadsLanguage)]
    return {name: line for zoo in zoos for name, line in zoo.language_models.items()}


def load_language(path: Path) -> LanguageModel:
    """A language model as others publish them: a Hugging Face folder, or a GGUF file.

    Raises ``BadModel`` or ``DamagedFile``.
    """
    for zoo in _zoos():
        if isinstance(zoo, LoadsLanguage):
            return zoo.load_language(path)
    raise BadModel(f"no zoo that is installed reads {path}.")


def _zoos() -> list[Zoo]:
    return [point.load() for point in entry_points(group=ZOOS)]


def _only(points: list[EntryPoint]) -> EntryPoint:
    """The one entry point, where two packages must not claim one name."""
    values: Mapping[str, EntryPoint] = {point.value: point for point in points}
    if len(values) > 1:
        raise EdgekitError(
            f"two packages claim the target {points[0].name!r}: {', '.join(values)}; "
            "uninstall one of them."
        )
    return points[0]
