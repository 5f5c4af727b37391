"""Fetches TensorRT's Python bindings of several versions, for the test that compares their calls.

python tools/fetch_tensorrt_bindings.py FOLDER

They are a few megabytes each and need neither TensorRT nor a GPU to be looked at. pip fetches them
as it is configured here, for this Python; a version that is there already is left alone. Then run
the test with TENSORRT_BINDINGS=FOLDER.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# What edgekit_tensorrt/build_engine.py must run on: JetPack 6, today's Linux, and the newest.
VERSIONS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}


def is_there(folder: Path) -> bool:
    """Whether ``folder`` holds bindings for this Python; their library does not say itself."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-"
    wheels = [path.read_text() for path in folder.glob("*.dist-info/WHEEL")]
    return (folder / "tensorrt_bindings").is_dir() and any(f"Tag: {tag}" in text for text in wheels)


def fetch(folder: Path, distribution: str, version: str) -> bool:
    """Let pip put one version into ``folder``: whole, or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--only-binary", ":all:", "--target", str(partial), f"{distribution}=={version}"]
    if subprocess.run(command, check=False).returncode:
        shutil.rmtree(partial, ignore_errors=True)
        print(f"pip has no {distribution} {version} for this Python.", file=sys.stderr)
        return False
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True


def main() -> int:
    """Fetch what is missing; the exit code is 0 if all are there."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    missing = {v: d for v, d in VERSIONS.items() if not is_there(root / v)}
    fetched = [fetch(root / version, name, version) for version, name in missing.items()]
    return 0 if all(fetched) else 1


if __name__ == "__main__":
    sys.exit(main())
