"""Every check in order: format, lint, types, tests. Prints the size of the core at the end.

python tools/check.py            all of it
python tools/check.py --fix      let ruff mend what it can first
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*words: str) -> None:
    """Run a module of this Python in the root, and stop at the first failure."""
    print(f"$ {' '.join(words)}", flush=True)
    # One thread for each of the test processes: two that spin would wait for each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["EDGEKIT_REQUIRED"] = "coreml,executorch,onnxruntime,tensorrt"
    code = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


def lines(folder: Path) -> int:
    """Lines of the Python files below ``folder``."""
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def main() -> int:
    """Run them all."""
    if "--fix" in sys.argv:
        run("ruff", "check", "--fix", "--quiet", ".")
        run("ruff", "format", "--quiet", ".")
    run("ruff", "format", "--check", ".")
    run("ruff", "check", ".")
    run("mypy")
    # A process for each core; a file stays in one, since what its tests share is slow to make.
    run(
        "pytest",
        "-q",
        "-n",
        "auto",
        "--dist",
        "loadfile",
        *(word for word in sys.argv[1:] if word != "--fix"),
    )
    for name in ("edgekit", "backends", "models", "tests"):
        print(f"{name}: {lines(ROOT / name)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
