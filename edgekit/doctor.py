"""What is installed, what this release was tried with, and the line that repairs each gap."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from edgekit.contract import Decodes
from edgekit.errors import DISTRIBUTION
from edgekit.host import installed_version
from edgekit.registry import backend_names, find_backend, missing_modules, recipes_of


@dataclass(frozen=True, slots=True)
class Check:
    """One package: what is there, what is wanted, and what to run; ``repair`` is "" if fine."""

    name: str
    extra: str
    installed: str | None
    wanted: str
    repair: str

    @property
    def conflicts(self) -> bool:
        """Whether it is there in a version that was not tried."""
        return bool(self.installed and self.repair)

    @property
    def why(self) -> str:
        """Why this version and no other."""
        return _REASONS.get(self.name, "these versions were tried together, others were not")

    def to_json(self) -> dict[str, object]:
        """Every field."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Conflict:
    """An installed package that another installed one cannot work with."""

    package: str
    requirement: str
    name: str
    installed: str

    def __str__(self) -> str:
        return (
            f"{self.package} requires {self.requirement}, and {self.name} {self.installed} is "
            "installed; install what edgekit pins for both, or keep them in two environments."
        )

    def to_json(self) -> dict[str, object]:
        """Every field."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Target:
    """One target and whether it can run here."""

    name: str
    precisions: tuple[str, ...]
    missing: tuple[str, ...]
    language: tuple[str, ...] = ()  # precisions of language models

    @property
    def state(self) -> str:
        """``ready``, or what to run."""
        if not self.missing:
            return "ready"
        return f"needs {', '.join(self.missing)}: pip install '{DISTRIBUTION}[{self.name}]'"

    def to_json(self) -> dict[str, object]:
        """Every field and the state."""
        return {**asdict(self), "state": self.state}


def targets() -> list[Target]:
    """Every installed adapter."""
    found = []
    for name in backend_names():
        adapter = find_backend(name)
        precisions = tuple(recipe.precision for recipe in recipes_of(adapter))
        decoders = adapter.decoder_recipes if isinstance(adapter, Decodes) else ()
        language = tuple(recipe.precision for recipe in decoders)
        found.append(Target(name, precisions, tuple(missing_modules(adapter)), language))
    return found


# "onnx==1.23.0; extra == 'export'", as the wheel's metadata has it.
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?P<wanted>[^;]*?)\s*(;\s*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?\s*"
)
_DEVELOPERS = ("dev",)
_REASONS = {
    "torch": "ExecuTorch's wheel is built for it, and the preflight for ONNX asks its own names",
    "onnx": "the exporter of this torch writes for it",
    "onnxscript": "the exporter of this torch calls it",
    "onnxruntime": "newer ones were not tried; on ARM64 boards 1.23.2 runs and 1.32 crashed",
    "executorch": "its program format and its Python names change with every version",
    "coremltools": "the interpreter was proven on what this converter writes",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "it carries TensorRT-RTX 1.7.1, which the bindings name",
    "tensorrt-rtx-cu13-bindings": "they load the libraries of exactly this build",
}


def examine() -> list[Check]:
    """Every package that edgekit can use, against the version it was tried with.

    The versions are read from this distribution's own metadata: pyproject.toml is the one place.
    """
    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        listed = []
    checks = []
    for text in listed:
        match = _REQUIREMENT.fullmatch(text)
        if match and match["extra"] not in _DEVELOPERS:
            checks.append(_check(match["name"], match["wanted"].strip(), match["extra"] or ""))
    return checks


def conflicts() -> list[Conflict]:
    """Installed packages among ours whose own requirements another installed one does not meet.

    Needs ``packaging``, which every runtime brings along; without it nothing is known.
    """
    if find_spec("packaging") is None:
        return []
    from packaging.requirements import Requirement

    found = []
    for entry in examine():
        for text in (requires(entry.name) or []) if entry.installed else []:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            installed = installed_version(wanted.name)
            # A local part, as in 2.13.0+cpu, is the same version for this purpose.
            if installed and not wanted.specifier.contains(installed, prereleases=True):
                package = f"{entry.name} {entry.installed}"
                found.append(
                    Conflict(package, f"{wanted.name}{wanted.specifier}", wanted.name, installed)
                )
    return found


def making(target: Target) -> str:
    """``ready``, or what making artifacts for ``target`` needs beyond running them."""
    missing = [entry.name for entry in examine() if entry.extra == "export" and not entry.installed]
    if not missing:
        return target.state
    line = f"pip install '{DISTRIBUTION}[export,{target.name}]'"
    return f"needs {', '.join(missing)}: {line}"


def _check(name: str, wanted: str, extra: str) -> Check:
    installed = installed_version(name)
    if installed is None:
        line = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {name}"
        return Check(name, extra, None, wanted or "any", line)
    fits = all(_fits(installed, clause) for clause in wanted.split(",") if clause)
    return Check(
        name, extra, installed, wanted or "any", "" if fits else f"pip install '{name}{wanted}'"
    )


def _fits(installed: str, clause: str) -> bool:
    """Whether a version satisfies ``==1.2.3``, ``>=1.2`` or ``<2``, local parts aside."""
    operator, version = re.fullmatch(r"\s*(==|>=|<=|<|>)\s*([\w.]+)\s*", clause).groups()  # type: ignore[union-attr]
    have, want = _numbers(installed), _numbers(version)
    length = max(len(have), len(want))
    have, want = (numbers + (0,) * (length - len(numbers)) for numbers in (have, want))
    return {
        "==": have == want,
        ">=": have >= want,
        "<=": have <= want,
        "<": have < want,
        ">": have > want,
    }[operator]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))
