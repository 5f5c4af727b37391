"""The doctor compares what is installed with what was tried, and gives the line that repairs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from edgekit import doctor
from edgekit.doctor import Check, Target, examine, targets

LISTED = [
    "numpy>=2.0",
    "onnx==1.23.0; extra == 'export'",
    'onnxruntime<1.33,>=1.23.2; extra == "onnxruntime"',
    "torch==2.13.0; extra == 'export'",
    "pillow>=11; extra == 'images'",
    "ruff==0.17.6; extra == 'dev'",
    "plain",
]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions of an imagined environment in which all is well."""
    found = {
        "numpy": "2.0.1",
        "onnx": "1.23.0",
        "onnxruntime": "1.32.0",
        "torch": "2.13.0+cu126",
        "pillow": "12.0",
        "plain": "1",
    }
    monkeypatch.setattr(doctor, "installed_version", found.get)
    monkeypatch.setattr(doctor, "requires", lambda name: LISTED)
    return found


def examined() -> dict[str, Check]:
    return {check.name: check for check in examine()}


def test_where_all_is_well_there_is_nothing_to_repair(versions: dict[str, str]) -> None:
    found = examined()
    assert sorted(found) == sorted(versions)  # and ruff is for developers
    assert all(check.repair == "" for check in found.values())
    assert found["plain"].wanted == "any"
    assert found["onnx"].to_json() == {
        "name": "onnx",
        "extra": "export",
        "installed": "1.23.0",
        "wanted": "==1.23.0",
        "repair": "",
    }


@pytest.mark.parametrize(
    ("name", "version", "repair"),
    [
        ("onnx", "1.22.0", "pip install 'onnx==1.23.0'"),
        ("onnx", "1.23.1", "pip install 'onnx==1.23.0'"),
        ("onnxruntime", "1.33.0", "pip install 'onnxruntime<1.33,>=1.23.2'"),
        ("onnxruntime", "1.23.1", "pip install 'onnxruntime<1.33,>=1.23.2'"),
        ("numpy", "1.26.4", "pip install 'numpy>=2.0'"),
        ("onnxruntime", "1.23.2", ""),
        ("onnxruntime", "1.32.99", ""),
        ("numpy", "2", ""),
        ("numpy", "10.0", ""),
    ],
)
def test_a_version_that_does_not_fit_is_answered_with_one_that_does(
    versions: dict[str, str], name: str, version: str, repair: str
) -> None:
    versions[name] = version
    assert examined()[name].repair == repair


@pytest.mark.parametrize(
    ("name", "repair"),
    [
        ("torch", "pip install 'edgekit-sdk[export]'"),
        ("onnxruntime", "pip install 'edgekit-sdk[onnxruntime]'"),
        ("numpy", "pip install numpy"),
    ],
)
def test_a_missing_package_is_answered_with_the_line_that_installs_it(
    versions: dict[str, str], name: str, repair: str
) -> None:
    del versions[name]
    check = examined()[name]
    assert (check.installed, check.repair) == (None, repair)


def test_without_metadata_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", not_installed)
    assert examine() == []


def test_every_requirement_of_this_distribution_can_be_read() -> None:
    assert {"numpy", "onnxruntime", "executorch", "torch"} <= set(examined())
    assert not {"ruff", "mypy", "pytest"} & set(examined())


@pytest.mark.parametrize(
    ("installed", "clause", "fits"),
    [
        ("1.2.3", "==1.2.3", True),
        ("1.2.0", "==1.2", True),
        ("1.2.3", "<=1.2.3", True),
        ("1.2.4", "<=1.2.3", False),
        ("1.2.4", ">1.2.3", True),
        ("1.2.3", ">1.2.3", False),
        ("1.10", ">= 1.9", True),
    ],
)
def test_versions_are_compared_number_by_number(installed: str, clause: str, fits: bool) -> None:
    assert doctor._fits(installed, clause) is fits


def test_a_target_says_what_it_needs_and_how_to_get_it() -> None:
    assert Target("onnxruntime", ("fp32",), ()).state == "ready"
    missing = Target("executorch", ("fp32",), ("executorch", "torch"))
    assert missing.state == "needs executorch, torch: pip install 'edgekit-sdk[executorch]'"
    assert missing.to_json()["state"] == missing.state


def test_every_adapter_is_a_target() -> None:
    found = {target.name: target for target in targets()}
    assert sorted(found) == ["executorch", "onnxruntime"]
    assert all(target.precisions for target in found.values())
