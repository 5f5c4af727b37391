"""Marks for gaps: ``todo``, ``upstream`` and ``never`` name a backend and the error expected.

A gap must keep failing with that error; once it closes, the suite is red until the mark goes.
"""

from __future__ import annotations

import os

import pytest

import edgekit

SHIPPED = ("coreml", "executorch", "onnxruntime", "tensorrt")  # written out on purpose
GAPS = ("todo", "upstream", "never")
# Names whose runtime is installed for sure: there a skip would hide that nothing ran.
REQUIRED = tuple(filter(None, os.environ.get("EDGEKIT_REQUIRED", "").split(",")))


@pytest.fixture(params=SHIPPED)
def backend(request: pytest.FixtureRequest) -> edgekit.Backend:
    name: str = request.param
    try:
        return edgekit.backend(name)
    except edgekit.MissingRuntime as missing:
        if name in REQUIRED:
            raise
        pytest.skip(str(missing))  # only this reason skips


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in [mark for gap in GAPS for mark in item.iter_markers(gap)]:
            _apply(item, mark)


def _apply(item: pytest.Item, mark: pytest.Mark) -> None:
    (name,) = mark.args
    if name not in SHIPPED:
        raise pytest.UsageError(f"{item.nodeid} marks {name!r}; there is: {', '.join(SHIPPED)}")
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == name:
        item.add_marker(pytest.mark.xfail(raises=mark.kwargs["raises"], strict=True))
