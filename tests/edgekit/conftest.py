"""Backends that only a test knows, found by name like those that are installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import pytest

from edgekit import registry
from edgekit.contract import Backend
from edgekit.registry import BACKENDS

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
