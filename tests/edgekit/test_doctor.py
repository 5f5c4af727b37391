"""The doctor compares what is installed with what was tried, and gives the line that repairs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from edgekit import doctor
from edgekit.doctor import Check, Target, conflicts, examine, making, targets

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
    assert sorted(found) == ["coreml", "executorch", "onnxruntime", "tensorrt"]
    assert all(target.precisions for target in found.values())


def test_only_what_is_there_in_another_version_conflicts(versions: dict[str, str]) -> None:
    versions["onnx"] = "1.22.0"
    del versions["torch"]
    found = examined()
    assert [name for name, check in found.items() if check.conflicts] == ["onnx"]


def test_every_version_that_is_fixed_has_its_own_reason(versions: dict[str, str]) -> None:
    found = examined()
    assert found["onnx"].why == "the exporter of this torch writes for it"
    assert found["plain"].why == "these versions were tried together, others were not"


def test_every_reason_is_given_for_a_package_that_is_listed() -> None:
    assert doctor._REASONS.keys() <= examined().keys()


REQUIRED = {
    "edgekit-sdk": LISTED,
    "torch": ["plain>=1", "numpy<2; extra == 'old'", "onnx==9; python_version < '3'"],
    "onnx": ["numpy>=1.23", "protobuf>=4", "torch==2.13.0"],
    "onnxruntime": ["numpy>=3", "no-such-package==1"],
    "pillow": None,
}


@pytest.fixture
def required(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> dict[str, str]:
    """What the packages of that environment require themselves."""
    monkeypatch.setattr(doctor, "requires", REQUIRED.get)
    return versions


def test_a_requirement_that_another_package_breaks_is_a_sentence(required: dict[str, str]) -> None:
    (conflict,) = conflicts()
    assert str(conflict) == (
        "onnxruntime 1.32.0 requires numpy>=3, and numpy 2.0.1 is installed; install what edgekit "
        "pins for both, or keep them in two environments."
    )
    assert conflict.to_json() == {
        "package": "onnxruntime 1.32.0",
        "requirement": "numpy>=3",
        "name": "numpy",
        "installed": "2.0.1",
    }


def test_a_build_of_the_same_version_and_a_version_before_release_meet_it(
    required: dict[str, str],
) -> None:
    required |= {"torch": "2.13.0+cu126", "numpy": "3.1rc1"}
    assert conflicts() == []
    required["torch"] = "2.12.0+cu126"
    assert [conflict.requirement for conflict in conflicts()] == ["torch==2.13.0"]


def test_what_is_not_installed_requires_nothing(required: dict[str, str]) -> None:
    del required["onnxruntime"]
    assert conflicts() == []


@pytest.mark.usefixtures("required")
def test_without_the_package_that_reads_requirements_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert conflicts() == []


def test_making_needs_more_than_running(versions: dict[str, str]) -> None:
    ready = Target("onnxruntime", ("fp32",), ())
    assert making(ready) == "ready"
    del versions["onnx"], versions["torch"], versions["pillow"]
    assert making(ready) == "needs onnx, torch: pip install 'edgekit-sdk[export,onnxruntime]'"


@pytest.mark.usefixtures("versions")
def test_making_needs_at_least_what_running_needs() -> None:
    missing = Target("executorch", ("fp32",), ("executorch",))
    assert making(missing) == missing.state
