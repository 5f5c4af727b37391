"""Findings as SARIF: a rule for each target and effect, a place in the user's source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.contract import Finding
from edgekit.sarif import sarif_from_findings

SORT = Finding("aten.sort.default", "refused", "net.py:3: x.sort()", "head", "Leave it out.")
CHUNK = Finding("aten.chunk.default", "outside", "", "", "Take slices.")


def run_of(**found: list[Finding]) -> dict[str, Any]:
    """The one run; a name is written with _ for -."""
    named = {name.replace("_", "-"): findings for name, findings in found.items()}
    document: dict[str, Any] = json.loads(json.dumps(sarif_from_findings(named)))
    assert document["version"] == "2.1.0"
    assert document["$schema"].endswith("sarif-2.1.0.json")
    (run,) = document["runs"]
    assert isinstance(run, dict)
    return run


def uri_of(source: str) -> Any:
    (result,) = run_of(coreml_fp16=[Finding("op", "refused", source, "", "")])["results"]
    place = result["locations"][0]["physicalLocation"]
    return place["artifactLocation"]["uri"], place["region"]["startLine"]


def test_a_finding_is_a_result_with_its_level_words_and_place() -> None:
    refused, outside = run_of(coreml_fp16=[SORT], onnxruntime_fp32=[CHUNK])["results"]
    assert refused == {
        "ruleId": "coreml/refused",
        "level": "error",
        "message": {"text": f"coreml-fp16: {SORT}"},
        "properties": {"op": "aten.sort.default", "module": "head", "artifact": "coreml-fp16"},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": "net.py"},
                    "region": {"startLine": 3},
                }
            }
        ],
    }
    assert (outside["ruleId"], outside["level"]) == ("onnxruntime/outside", "warning")


def test_what_has_no_line_has_no_place() -> None:
    (result,) = run_of(coreml_fp16=[CHUNK])["results"]
    assert "locations" not in result


def test_each_rule_is_listed_once_and_says_what_it_means() -> None:
    run = run_of(coreml_fp16=[SORT, CHUNK, SORT], coreml_fp32=[SORT], executorch_fp32=[CHUNK])
    assert run["tool"]["driver"] == {
        "name": "edgekit",
        "version": edgekit.__version__,
        "rules": [
            {
                "id": "coreml/outside",
                "shortDescription": {"text": "coreml does not accelerate an op of the model"},
            },
            {
                "id": "coreml/refused",
                "shortDescription": {"text": "coreml cannot take an op of the model"},
            },
            {
                "id": "executorch/outside",
                "shortDescription": {"text": "executorch does not accelerate an op of the model"},
            },
        ],
    }
    assert len(run["results"]) == 5


def test_without_findings_there_is_a_run_without_results() -> None:
    run = run_of(coreml_fp16=[])
    assert run["results"] == run["tool"]["driver"]["rules"] == []


def test_a_file_below_the_working_folder_is_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert uri_of(f"{tmp_path}/nets/net.py:12: x: int = 3") == ("nets/net.py", 12)


def test_a_file_elsewhere_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert uri_of(f"{tmp_path}/my net.py:1: x") == (f"file://{tmp_path}/my%20net.py", 1)


@pytest.mark.parametrize(
    ("path", "uri"),
    [("my net.py", "my%20net.py"), ("été/n.py", "%C3%A9t%C3%A9/n.py"), ("50%.py", "50%25.py")],
)
def test_a_name_that_is_no_uri_becomes_one(
    path: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for written in (path, f"{tmp_path}/{path}"):
        assert uri_of(f"{written}:7: y = x") == (uri, 7)
