"""Findings as SARIF 2.1.0, the form in which code review tools take remarks on lines of source."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import edgekit
from edgekit.contract import Finding

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {"refused": "error", "outside": "warning"}
_PLACE = re.compile(r"(?P<file>.*?):(?P<line>\d+): ", re.DOTALL)


def sarif_from_findings(found: Mapping[str, Sequence[Finding]]) -> dict[str, object]:
    """One run with a result for each finding; ``found`` is by artifact name, as ``check`` gives."""
    results = [_result(name, finding) for name, findings in found.items() for finding in findings]
    rules = sorted({str(result["ruleId"]) for result in results})
    driver = {
        "name": "edgekit",
        "version": edgekit.__version__,
        "rules": [{"id": rule, "shortDescription": {"text": _rule(rule)}} for rule in rules],
    }
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _rule(rule: str) -> str:
    target, effect = rule.split("/")
    what = "cannot take" if effect == "refused" else "does not accelerate"
    return f"{target} {what} an op of the model"


def _result(name: str, finding: Finding) -> dict[str, object]:
    result: dict[str, object] = {
        "ruleId": f"{name.rpartition('-')[0]}/{finding.effect}",
        "level": _LEVELS[finding.effect],
        "message": {"text": f"{name}: {finding}"},
        "properties": {"op": finding.op, "module": finding.module, "artifact": name},
    }
    if match := _PLACE.match(finding.source):
        region = {"startLine": int(match["line"])}
        place = {"artifactLocation": {"uri": _uri(Path(match["file"]))}, "region": region}
        result["locations"] = [{"physicalLocation": place}]
    return result


def _uri(path: Path) -> str:
    """Relative to where the command runs, as review tools want it; else absolute."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return quote(path.relative_to(Path.cwd()).as_posix())
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
