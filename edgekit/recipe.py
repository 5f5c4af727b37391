"""Recipes: how an artifact holds its numbers, as plain values, and their names for users."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from edgekit.errors import BadRecipe, DamagedFile, UnknownName

# "any" holds 8-bit codes that 6, 4 and 2 bits derive from; "any4" is the same, fixed at 4 bits.
Weights = Literal[
    "float32", "float16", "int8", "int6", "int4", "int2", "any", "any8", "any6", "any4", "any2"
]
# "float": as the target computes where nothing is quantized, float32 or float16.
Activations = Literal["float32", "float16", "int8", "float"]
Form = Literal["linear", "palette"]
Method = Literal["min-max", "entropy", "percentile"]
# What 8-bit products are added up by, which decides what is exact and what is fast.
Cpu = Literal["", "avx2", "vnni", "arm64"]
WIDTHS = (8, 6, 4, 2)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How numbers are held.

    ``weights`` and ``activations`` are their precisions; ``form`` says whether the codes of
    weights are multiples of a scale or indices of a palette. ``method`` is how the ranges of
    activations are found on the calibration data, ``cpu`` the kind of processor that an
    artifact is for where that changes it ("" where it does not). ``keep_float`` names what
    stays float: nodes of the captured graph, modules by path, or ops (``softmax``).
    """

    weights: Weights
    activations: Activations
    form: Form = "linear"
    method: Method = "min-max"
    cpu: Cpu = ""
    keep_float: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """The name users type: ``fp32``, ``int8``, ``palette4``, ``any`` and so on."""
        plain = Recipe(self.weights, self.activations, self.form)
        names = (name for name, recipe in PRECISIONS.items() if recipe == plain)
        return next(names, f"{self.weights}-{self.activations}")

    @property
    def quantized(self) -> bool:
        """Whether it holds integers: what the gate is for."""
        return not self.weights.startswith("float")

    @property
    def calibrated(self) -> bool:
        """Whether it needs the ranges of activations, so calibration data."""
        return self.activations == "int8"

    @property
    def switchable(self) -> bool:
        """Whether its artifact can run at every width of ``WIDTHS``."""
        return self.weights == "any"

    @property
    def width(self) -> int | None:
        """The width that an ``any`` recipe is fixed at, or None."""
        fixed = self.weights.removeprefix("any")
        return int(fixed) if self.weights.startswith("any") and fixed else None

    def to_json(self) -> dict[str, object]:
        """Every field that says something, and the precision's name."""
        fields = {name: value for name, value in asdict(self).items() if value not in ("", ())}
        if not self.calibrated:
            del fields["method"]
        return {"precision": self.precision, **fields}

    @classmethod
    def from_json(cls, value: object) -> Recipe:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        try:
            fields = dict(value)  # type: ignore[call-overload]
            if list(fields) == ["weights", "activations"]:  # schema 1 had no more
                fields |= {"precision": cls(**fields).precision, "form": "linear"}
            name, _ = fields.pop("precision"), fields["form"]
            kept = fields.get("keep_float", [])
            fields["keep_float"] = tuple(kept)
            recipe = cls(**fields)
            known = name in PRECISIONS and name == recipe.precision
            listed = isinstance(kept, list | tuple)
            texts = listed and all(isinstance(each, str) for each in kept)
            if known and texts and recipe.method in METHODS and recipe.cpu in CPUS:
                return recipe
        except (TypeError, ValueError, KeyError, AttributeError):
            pass
        raise DamagedFile(f"the manifest names a recipe that does not exist: {value!r}")


METHODS: tuple[Method, ...] = get_args(Method)
CPUS: tuple[Cpu, ...] = get_args(Cpu)
PRECISIONS: dict[str, Recipe] = {
    "fp32": Recipe("float32", "float32"),
    "fp16": Recipe("float16", "float16"),
    "int8": Recipe("int8", "int8"),
    "int8-weights": Recipe("int8", "float"),
    "int4": Recipe("int4", "float"),
    "palette8": Recipe("int8", "float", "palette"),
    "palette6": Recipe("int6", "float", "palette"),
    "palette4": Recipe("int4", "float", "palette"),
    "palette2": Recipe("int2", "float", "palette"),
    "any": Recipe("any", "int8"),
    "any8": Recipe("any8", "int8"),
    "any6": Recipe("any6", "int8"),
    "any4": Recipe("any4", "int8"),
    "any2": Recipe("any2", "int8"),
}

FP32, FP16, INT8 = PRECISIONS["fp32"], PRECISIONS["fp16"], PRECISIONS["int8"]
ANY = tuple(recipe for name, recipe in PRECISIONS.items() if name.startswith("any"))


def recipe_from_precision(name: str) -> Recipe:
    """The recipe called ``name``. Raises ``UnknownName`` with the nearest one."""
    if name not in PRECISIONS:
        raise UnknownName("precision", name, ("auto", *PRECISIONS))
    return PRECISIONS[name]


_KEYS = ("precision", "calibration", "cpu", "keep-float")


def recipe_from_toml(path: Path) -> Recipe:
    """A mixed recipe as a user writes it.

    ::

        precision = "int8"
        calibration = "percentile"              # min-max, entropy or percentile
        cpu = "avx2"                            # avx2, vnni or arm64
        keep-float = ["head", "softmax"]        # modules, ops, or nodes of the graph: "%conv2d"

    Raises ``BadRecipe``, or ``UnknownName`` for a key or a value that does not exist.
    """
    try:
        body = tomllib.loads(path.read_text())
    except FileNotFoundError as cause:
        raise BadRecipe(f"there is no recipe file {path}.") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise BadRecipe(f"{path} cannot be read as TOML: {cause}.") from cause
    for key in body:
        if key not in _KEYS:
            raise UnknownName("recipe key", key, _KEYS, hint=f"It stands in {path}.")
    if "precision" not in body:
        raise BadRecipe(f'{path} names no precision; add a line such as precision = "int8".')
    keep = body.get("keep-float", [])
    if not isinstance(keep, list) or not all(isinstance(each, str) and each for each in keep):
        raise BadRecipe(f'{path}: keep-float is a list of names, such as ["head", "softmax"].')
    recipe = recipe_from_precision(_text(body, "precision", path))
    return customised(
        recipe,
        method=_choice(body, "calibration", METHODS, path),
        cpu=_choice(body, "cpu", CPUS[1:], path),
        keep_float=tuple(keep),
        origin=f"{path}: ",
    )


def customised(
    recipe: Recipe,
    *,
    method: str | None = None,
    cpu: str | None = None,
    keep_float: tuple[str, ...] = (),
    origin: str = "",
) -> Recipe:
    """``recipe`` with what the user set otherwise. Raises ``BadRecipe`` for a contradiction.

    ``origin`` opens the sentence of an error.
    """
    name = recipe.precision
    if not recipe.quantized and (method or keep_float):
        asked = "keep-float" if keep_float else "a calibration method"
        raise BadRecipe(
            f"{origin}{name} quantizes nothing, so {asked} means nothing there; leave it out, or "
            "choose int8."
        )
    if method and not recipe.calibrated:
        raise BadRecipe(
            f"{origin}{name} quantizes weights alone and calibrates nothing, so the method "
            f"{method!r} means nothing there; leave it out, or choose int8."
        )
    twice = sorted({each for each in keep_float if keep_float.count(each) > 1})
    if twice:
        raise BadRecipe(f"{origin}keep-float names {twice[0]!r} twice; once is enough.")
    changes: dict[str, Any] = {"method": method, "cpu": cpu, "keep_float": tuple(keep_float)}
    return replace(recipe, **{key: value for key, value in changes.items() if value})


def _text(body: Mapping[str, Any], key: str, path: Path) -> str:
    value = body[key]
    if not isinstance(value, str):
        raise BadRecipe(f"{path}: {key} is {value!r}, which should be a text in quotes.")
    return value


def _choice(body: Mapping[str, Any], key: str, known: tuple[str, ...], path: Path) -> str | None:
    if key not in body:
        return None
    value = _text(body, key, path)
    if value not in known:
        raise UnknownName(key, value, known, hint=f"It stands in {path}.")
    return value
