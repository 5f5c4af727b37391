"""Backends that only a test knows, found by name like those that are installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import pytest

from edgekit import registry
from edgekit.artifact import Artifact
from edgekit.contract import Backend
from edgekit.registry import BACKENDS
from edgekit.spec import Arrays
from edgekit.speed import Speed

Install = Callable[[Backend], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a backend one of those that are installed, beside the real ones."""
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "edgekit_imagined", module)
    points: list[EntryPoint] = []

    def listed(group: str) -> list[EntryPoint]:
        return [*entry_points(group=group), *(point for point in points if point.group == group)]

    def add(adapter: Backend) -> None:
        setattr(module, adapter.name, adapter)
        points.append(EntryPoint(adapter.name, f"edgekit_imagined:{adapter.name}", BACKENDS))

    monkeypatch.setattr(registry, "entry_points", listed)
    return add


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every race believes what artifacts say of their time; the names of those that were timed."""
    timed: list[str] = []

    def race(backend: Backend, first: Artifact, second: Artifact, sample: Arrays) -> Speed:
        timed.append(second.name)
        slow, fast = (float(str(each.provenance["milliseconds"])) for each in (first, second))
        ratio = slow / fast
        return Speed(slow, fast, ratio, ratio * 0.9, ratio * 1.1, float(ratio > 1), 2)

    monkeypatch.setattr("edgekit.search.race", race)
    return timed
