"""Which installation of NVIDIA's bindings is taken, and what is said where none works."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.errors import MissingRuntime, RuntimeFailed
from edgekit_tensorrt import bindings

# Runs in a child: libraries once loaded stay, and a fake would be remembered.
_SAY = """
from edgekit_tensorrt.bindings import load
found = load()
print(found, found.cross_compiles, found.module.__name__, sep="|")
"""


def in_child(code: str, folder: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    before = f"import sys; sys.path.insert(0, {path!r})\n" if path else ""
    return subprocess.run(
        [sys.executable, "-c", before + code], cwd=folder, capture_output=True, text=True
    )


def test_the_libraries_of_the_provider_load_without_it(tensorrt: None, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("here is a TensorRT proper")
    code = _SAY + 'import sys; assert "onnxruntime" not in sys.modules'
    ran = in_child(code, tmp_path)
    assert ran.returncode == 0, ran.stderr
    name, cross, module = ran.stdout.strip().split("|")
    assert name.startswith("tensorrt_rtx 1.")
    assert cross == "True"
    assert module == "tensorrt_rtx_bindings"


@pytest.mark.parametrize(
    ("first", "found"), [("tensorrt", "tensorrt 10.3.0"), ("tensorrt_rtx", "tensorrt_rtx 1.9")]
)
def test_the_proper_package_goes_first(first: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("__version__ = '1.9'\n")
    (tmp_path / f"{first}.py").write_text(f"__version__ = {found.split()[1]!r}\n")
    ran = in_child(_SAY, tmp_path, str(tmp_path))
    assert ran.stdout.strip() == f"{found}|False|{first}", ran.stderr


def test_one_that_does_not_load_is_passed_over(tensorrt: None, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: not found')\n")
    ran = in_child(_SAY, tmp_path, str(tmp_path))
    assert ran.stdout.startswith("tensorrt_rtx "), ran.stderr


def _only(*names: str) -> Callable[[str], object]:
    return lambda name: object() if name in names else None


def test_without_any_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "find_spec", _only())
    assert not bindings.installed()
    with pytest.raises(MissingRuntime, match=r"pip install 'edgekit-sdk\[tensorrt\]'"):
        bindings.load()


def test_every_reason_is_told_where_none_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(name: str) -> object:
        raise OSError(f"lib{name}.so: cannot open shared object file")

    monkeypatch.setattr(bindings, "find_spec", _only("tensorrt", "tensorrt_rtx_bindings"))
    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(bindings, "library_folder", lambda: None)
    with pytest.raises(RuntimeFailed, match=r"libtensorrt\.so.*libtensorrt_rtx_bindings\.so"):
        bindings.load()
    monkeypatch.setattr(bindings, "library_folder", lambda: tmp_path)
    with pytest.raises(RuntimeFailed, match=r"has no libtensorrt_rtx\.so"):
        bindings.load()
