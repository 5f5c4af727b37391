"""The main job: export the trained PartialNet, prove it, classify 10,000 real images, one table.

    python tools/demo.py --data FOLDER -o FOLDER

Eager top-1 is computed here with torch; each artifact's by apps/classify, in its own process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import edgekit
from edgekit.registry import load_zoo_model
from edgekit.render import size_text, table
from edgekit_zoo import fashion_mnist

ROOT = Path(__file__).parents[1]
MODEL = "partialnet-nano"


def edgekit_command(*words: str) -> Any:
    """Run one ``edgekit`` command with --json and return its document."""
    print(f"$ edgekit {' '.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "edgekit.cli", *words, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def app_top1(bundle: Path, artifact: str, data: Path) -> float:
    """Top-1 of one artifact over the test images, as apps/classify finds it."""
    words = [str(bundle), "--artifact", artifact, "--dataset", str(data), "--json"]
    print(f"$ python apps/classify/main.py {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / "apps/classify/main.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout)["top1"])


@torch.no_grad()
def eager_top1(data: Path) -> float:
    """Top-1 of the trained form in PyTorch."""
    model = load_zoo_model(MODEL).module.eval()
    images, labels = fashion_mnist.read(data, "test")
    scores = torch.cat(
        [
            model(part)
            for part in torch.tensor_split(torch.from_numpy(fashion_mnist.prepare(images)), 20)
        ]
    )
    return float((scores.argmax(1).numpy() == labels).mean())


def main(arguments: list[str] | None = None) -> int:
    """Print each command as it runs, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=fashion_mnist.FOLDER)
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/demo"))
    asked = parser.parse_args(arguments)
    out = str(asked.output)
    shutil.rmtree(asked.output, ignore_errors=True)
    edgekit_command(
        "export",
        MODEL,
        "--target",
        "onnxruntime,executorch",
        "--precision",
        asked.precision,
        "-o",
        out,
    )
    proofs = {proof["artifact"]: proof for proof in edgekit_command("verify", out)}
    timed = {row["artifact"]: row for row in edgekit_command("profile", out, "--noisy-ok")}
    eager = eager_top1(asked.data)
    bundle = edgekit.open_bundle(asked.output)
    rows = []
    for name in bundle.artifacts:
        artifact, proof, time = bundle.artifact(name), proofs[name], timed[name]
        rows.append(
            (
                artifact.target,
                artifact.recipe.precision,
                proof["level"] if proof["passed"] else "not proven",
                f"{max(output['max_abs_error'] for output in proof['outputs']):.1e}",
                f"{max(output['max_rel_error'] for output in proof['outputs']):.1e}",
                f"{app_top1(asked.output, name, asked.data):.2%}",
                f"{eager:.2%}",
                f"{time['p50_ms']:.3f} ms" + (" (noisy)" if time["noise"] else ""),
                size_text(artifact.size),
            )
        )
    header = ("target", "precision", "proof", "max abs", "max rel", "top-1", "eager", "p50", "size")
    print(f"\n{MODEL} on the 10,000 test images of Fashion-MNIST\n\n{table(header, rows)}")
    if any(row["noise"] for row in timed.values()):
        print("\nnoisy: " + "; ".join(sorted({r["noise"] for r in timed.values() if r["noise"]})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
