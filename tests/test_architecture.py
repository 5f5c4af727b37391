"""What may import what, what a light import loads, and what an install leaves behind."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import edgekit

ROOT = Path(__file__).parents[1]
ADAPTERS = ("edgekit_coreml", "edgekit_executorch", "edgekit_ort", "edgekit_tensorrt")
HEAVY = (
    *("torch", "onnx", "onnxscript", "onnxruntime", "executorch", "safetensors", "PIL", "sympy"),
    *("coremltools", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"),
    *("tokenizers", "jinja2", "gguf", "transformers", "huggingface_hub"),
)
BLOCK_HEAVY = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
"""
# What the host side of the core may import torch through, and nothing else may.
TORCH_MODULES = {
    *("capture.py", "graph.py", "onnx_export.py", "onnx_quantize.py", "pt2e.py", "repairs.py"),
    "language_eager.py",
    *("selection.py", "sensitivity.py", "trace.py", "weights.py"),
}


def imported(folder: Path) -> set[str]:
    """Top-level names of our packages that the Python files below ``folder`` import."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    return {name.partition(".")[0] for name in found}


def ours(folder: Path) -> set[str]:
    return {name for name in imported(folder) if name.startswith("edgekit")}


@pytest.mark.parametrize(
    "module", ["edgekit", "edgekit.cli", "edgekit.testing", "edgekit_zoo", *ADAPTERS]
)
def test_importing_is_light(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"{BLOCK_HEAVY}\nimport {module}"], check=True)


def test_importing_edgekit_loads_numpy_alone() -> None:
    code = "import sys, edgekit; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    names = set(loaded.stdout.split())
    assert "numpy" in names
    assert not names & set(HEAVY)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_knows_the_core_and_itself(adapter: str) -> None:
    assert ours(ROOT / "backends" / adapter) <= {"edgekit", adapter}


def test_the_core_knows_no_adapter_and_no_model() -> None:
    assert ours(ROOT / "edgekit") == {"edgekit"}


def test_the_core_names_no_backend_and_no_model_in_a_condition() -> None:
    names = {"onnxruntime", "executorch", "coreml", "tensorrt", "partialnet"}
    for path in (ROOT / "edgekit").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Compare, ast.Match)):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not constants & names, f"{path.name}: {ast.unparse(node)}"


def test_torch_stands_at_the_top_of_a_few_modules_of_the_core() -> None:
    for path in (ROOT / "edgekit").glob("*.py"):
        tree = ast.parse(path.read_text())
        top = [
            name
            for node in tree.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        ]
        if any(name.partition(".")[0] == "torch" for name in top):
            assert path.name in TORCH_MODULES


def test_apps_use_public_names_only() -> None:
    for path in (ROOT / "apps").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgekit."):
                pytest.fail(f"{path}:{node.lineno} imports from {node.module}")
            owner = node.value if isinstance(node, ast.Attribute) else None
            if isinstance(owner, ast.Name) and owner.id == "edgekit":
                assert ast.unparse(node).partition(".")[2] in edgekit.__all__, ast.unparse(node)


def test_public_names_are_listed_in_order_and_exist() -> None:
    names = list(edgekit.__all__)
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert len(names) < 30
    assert all(hasattr(edgekit, name) for name in names)


def test_source_roots_are_no_packages() -> None:
    for root in ("backends", "models", "apps", "tests", "tools"):
        assert not (ROOT / root / "__init__.py").exists()


def test_every_package_is_typed() -> None:
    for package in ("edgekit", "models/edgekit_zoo", *(f"backends/{name}" for name in ADAPTERS)):
        assert (ROOT / package / "py.typed").is_file()


def test_entry_points_have_extras_of_the_same_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = set(project["entry-points"]["edgekit.backends"])
    assert targets <= set(project["optional-dependencies"])
    assert targets == {"coreml", "executorch", "onnxruntime", "tensorrt"}


def test_the_wheel_holds_our_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"edgekit", "edgekit_zoo", *ADAPTERS}
    weights = [name for name in names if name.startswith("edgekit_zoo/weights/")]
    assert {Path(name).suffix for name in weights} == {".safetensors", ".md", ".npz", ".json"}
    assert wheel.stat().st_size < 4_500_000


def test_no_library_prints_or_catches_everything() -> None:
    for root in ("edgekit", "backends", "models"):
        for path in (ROOT / root).rglob("*.py"):
            assert not re.search(r"^\s*except\s*:", path.read_text(), re.MULTILINE), path
