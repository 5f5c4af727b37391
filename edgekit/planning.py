"""What was asked for, made definite before any work: each target with the recipe to make it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekit import host
from edgekit.accuracy import Labelled, Metric
from edgekit.calibration import Calibration
from edgekit.contract import Backend
from edgekit.errors import BadRecipe, UnknownName, UsageError
from edgekit.gate import Budget
from edgekit.recipe import (
    CPUS,
    METHODS,
    Recipe,
    customised,
    recipe_from_precision,
    recipe_from_toml,
)
from edgekit.registry import (
    backend_names,
    backend_options,
    configured,
    recipes_of,
    supported_recipe,
)

AUTO = "auto"


@dataclass(frozen=True)
class Quantization:
    """How ``export`` quantizes and judges what it made.

    ``calibration`` is a folder of images, an ``.npz`` of stacked inputs, or the data itself;
    ``labelled`` likewise, with the true classes. ``metric`` is ``top1``, ``sqnr``, or ``auto``:
    top-1 where there are labels. ``method``, ``cpu`` and ``keep_float`` are a recipe's (see
    ``edgekit.Recipe``); ``recipe`` is a TOML file with all of it.
    """

    calibration: str | Path | Calibration | None = None
    labelled: str | Path | Labelled | None = None
    metric: Metric = "auto"
    budget: Budget = field(default_factory=Budget)
    method: str | None = None
    cpu: str = AUTO
    keep_float: tuple[str, ...] = ()
    recipe: Path | None = None


@dataclass(frozen=True)
class Plan:
    """One artifact to make. With ``candidates``, the best of them and of ``recipe``, its float."""

    backend: Backend
    recipe: Recipe
    candidates: tuple[Recipe, ...] = ()


def plan(
    targets: Sequence[str | Backend],
    precision: str = AUTO,
    options: Mapping[str, str] | None = None,
    quantization: Quantization | None = None,
) -> list[Plan]:
    """Every target in every precision asked for: ``auto``, or names joined by commas.

    Raises ``UnknownName``, ``MissingRuntime``, ``UnsupportedRecipe`` or ``UsageError``, before
    any work.
    """
    options, quantization = options or {}, quantization or Quantization()
    names = target_names(targets, options)
    asked = _recipes(precision, quantization)
    backends = [configured(name, options) if isinstance(name, str) else name for name in names]
    _check_cpu(quantization.cpu, backends)
    plans = [_plan(each, recipe, quantization) for each in backends for recipe in asked]
    return list({(p.backend.name, p.recipe.precision, p.candidates): p for p in plans}.values())


def target_names(
    targets: Sequence[str | Backend], options: Mapping[str, str]
) -> list[str | Backend]:
    """The targets asked for, ``all`` spelled out; each of ``options`` is one of theirs.

    Raises ``UsageError`` where there is none, or for a setting of another; ``UnknownName``.
    """
    names: list[str | Backend] = list(targets)
    if names == ["all"]:
        names = list(backend_names())
    if not names:
        raise UsageError("no target was named; see edgekit list targets.")
    _check_options(options, names)
    return names


def _plan(adapter: Backend, recipe: Recipe | None, quantization: Quantization) -> Plan:
    supported = supported_recipe(adapter, recipe)
    if recipe is not None:
        own = next(each for each in recipes_of(adapter) if each.precision == recipe.precision)
        return Plan(adapter, _for_processor(own, recipe, quantization.cpu))
    # Without data there is nothing to judge a quantized recipe by: the target's float one it is.
    search = quantization.calibration is not None
    if not search and (quantization.keep_float or quantization.method):
        raise UsageError(
            "--precision auto quantizes nothing without --calibration, so --keep-float and "
            "--calibration-method mean nothing; give data, or say --precision int8."
        )
    candidates = [
        _for_processor(each, _customised(replace(each, cpu=""), quantization), quantization.cpu)
        for each in recipes_of(adapter)[1:]
        if search and not each.weights.startswith("any")  # to switch is not to be best
    ]
    return Plan(adapter, supported, tuple(candidates))


def _customised(recipe: Recipe, quantization: Quantization) -> Recipe:
    """A candidate with what the user set, as far as it applies."""
    method = quantization.method if recipe.calibrated else None
    keep = quantization.keep_float if recipe.quantized else ()
    return customised(recipe, method=method, keep_float=keep)


def _for_processor(supported: Recipe, recipe: Recipe, cpu: str) -> Recipe:
    """With the kind of processor filled in, where the target's own recipe names one."""
    if not supported.cpu:
        return replace(recipe, cpu="")
    if recipe.cpu and cpu == AUTO:
        return recipe
    here = host.int8_kernels()
    # On a processor of no known kind, what cannot saturate is the safe choice.
    kind = (here if here in CPUS else "avx2") if cpu == AUTO else cpu
    return customised(replace(recipe, cpu=""), cpu=kind)


def _recipes(precision: str, quantization: Quantization) -> list[Recipe | None]:
    """The recipes asked for; None stands for ``auto``."""
    if quantization.method is not None and quantization.method not in METHODS:
        raise UnknownName("calibration method", quantization.method, METHODS)
    if quantization.recipe is not None:
        found = recipe_from_toml(quantization.recipe)
        if precision not in (AUTO, found.precision):
            raise BadRecipe(
                f"--precision {precision} contradicts {quantization.recipe}, which says "
                f"{found.precision}; leave one of them out."
            )
        return [_custom(found, quantization)]
    names = precision.split(",")
    recipes = [None if name == AUTO else recipe_from_precision(name) for name in names]
    if len(recipes) > 1 and any(each is None or each.quantized for each in recipes):
        # Of several precisions, what is said of quantization is for those that it means something.
        return [each and _customised(each, quantization) for each in recipes]
    return [each and _custom(each, quantization) for each in recipes]


def _custom(recipe: Recipe, quantization: Quantization) -> Recipe:
    method = quantization.method
    keep = (*recipe.keep_float, *quantization.keep_float)
    changed = customised(recipe, method=method, keep_float=keep)
    return changed if method else replace(changed, method=recipe.method)


def _check_cpu(cpu: str, backends: Sequence[Backend]) -> None:
    if cpu == AUTO:
        return
    if cpu not in CPUS[1:]:
        raise UnknownName("processor", cpu, (AUTO, *CPUS[1:]))
    if not any(recipe.cpu for adapter in backends for recipe in recipes_of(adapter)):
        listed = ", ".join(adapter.name for adapter in backends)
        raise UsageError(f"--cpu {cpu} changes nothing for {listed}; leave it out.")


def _check_options(options: Mapping[str, str], names: Sequence[str | Backend]) -> None:
    known = backend_options()
    for option in options:
        if option not in known:
            raise UnknownName("option", option, known)
        if not any(isinstance(name, str) and option.startswith(f"{name}-") for name in names):
            listed = ", ".join(name for name in names if isinstance(name, str))
            raise UsageError(
                f"--{option} is a setting of a target that was not asked for; asked for: "
                f"{listed or 'backends that were passed ready-made'}. Add it to --target, or "
                "leave the setting out."
            )
