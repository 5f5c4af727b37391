"""The README is true: its code runs, its commands parse, its file map is whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import edgekit
from edgekit.arguments import parser
from edgekit.registry import backend_names, find_backend, recipes_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    bundle = names["bundle"]
    assert isinstance(bundle, edgekit.Bundle)
    assert bundle.proof("onnxruntime-fp32").passed


def test_its_commands_parse() -> None:
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("edgekit ")
    ]
    assert len(commands) >= 6
    for words in commands:
        parser().parse_args(words)


def test_its_file_map_names_every_file() -> None:
    mapped = set(re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE))
    folders = tuple(name for name in mapped if name.endswith("/"))
    files = [
        path.relative_to(ROOT).as_posix()
        for root in ("edgekit", "backends", "models", "apps", "tools")
        for pattern in ("*.py", "*.sh")
        for path in (ROOT / root).rglob(pattern)
    ]
    missing = [
        name
        for name in files
        if name not in mapped and not name.startswith(folders) and "__init__" not in name
    ]
    assert missing == []
    assert [name for name in mapped if not (ROOT / name).exists()] == []


def test_its_table_of_targets_is_what_the_backends_support() -> None:
    rows = ["| target | precisions |", "|---|---|"]
    for name in backend_names():
        precisions = ", ".join(recipe.precision for recipe in recipes_of(find_backend(name)))
        rows.append(f"| {name} | {precisions} |")
    assert "\n".join(rows) in README
