"""Finds NVIDIA's Python bindings and loads them: ``load().module`` is the ``trt`` of its manuals.

Three installations are known, and the first that works is taken:

1. ``tensorrt``, what a Jetson or a desktop has;
2. ``tensorrt_rtx``, TensorRT-RTX as NVIDIA packs it;
3. ``tensorrt_rtx_bindings`` over the libraries inside ONNX Runtime's TensorRT-RTX provider. That
   provider itself needs a GPU driver; its libraries do not, so a plain Linux machine can parse
   and build with them.

Only child processes call ``load``: the libraries keep one logger per process and print to stderr.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgekit.errors import MissingRuntime, RuntimeFailed

# Names as they stand in importlib's terms; the last one needs libraries from elsewhere.
MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
# The parser needs the symbols of the first, so the order matters.
_PATTERNS = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")


@dataclass(frozen=True)
class Bindings:
    """The loaded module, and which one it is."""

    module: Any
    name: str  # "tensorrt" or "tensorrt_rtx"
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def cross_compiles(self) -> bool:
        """Whether engines for other GPUs than the one here can be built."""
        return hasattr(self.module, "ComputeCapability")


def installed() -> bool:
    """Whether any of the bindings is installed; says nothing about whether it loads."""
    return any(find_spec(name) is not None for name in MODULES)


def load() -> Bindings:
    """The bindings of this process. Raises ``MissingRuntime`` or ``RuntimeFailed``."""
    if not installed():
        raise MissingRuntime("tensorrt", MODULES[-1])
    reasons = []
    for name in MODULES:
        if find_spec(name) is None:
            continue
        try:
            module = _LOADERS.get(name, importlib.import_module)(name)
        except (ImportError, OSError) as cause:
            reasons.append(f"{name}: {cause}")
            continue
        version = str(getattr(module, "__version__", "of unknown version"))
        return Bindings(module, name.removesuffix("_bindings"), version)
    raise RuntimeFailed(f"tensorrt is installed and does not load: {'; '.join(reasons)}")


def _import_with_libraries(name: str) -> Any:
    """Import the bindings; their libraries are loaded first, where a package carries them.

    The loader then finds them by SONAME, so no LD_LIBRARY_PATH is needed. Importing the
    package instead would write links into it and change the environment.
    """
    folder = library_folder()
    if folder is not None:
        for pattern in _PATTERNS:
            found = sorted(folder.glob(pattern))
            if not found:
                raise ImportError(f"{folder} has no {pattern}")
            ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(name)


def library_folder() -> Path | None:
    """The folder with TensorRT-RTX's libraries, found without running its package."""
    spec = find_spec(_LIBRARIES)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(folders[0]) if folders else None


_LOADERS: dict[str, Callable[[str], Any]] = {MODULES[-1]: _import_with_libraries}
