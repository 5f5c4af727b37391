"""The main job: export the trained PartialNet, prove it, classify real images, one table; then a
small language model, which answers a question.

    python tools/demo.py --data FOLDER -o FOLDER

Ranges for int8 are measured on training images, and the gate judges on the first test images.
Eager answers are computed here with torch; each artifact's by apps/classify, in its own process:
10,000 images where the vendor's runtime runs, 1,000 where an interpreter stands in for it. The
language model is SmolLM2-135M, for ONNX Runtime, its answer streamed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import edgekit
from edgekit.registry import load_zoo_model
from edgekit.render import size_text, table
from edgekit_zoo import fashion_mnist

Labels = NDArray[Any]
ROOT = Path(__file__).parents[1]
MODEL = "partialnet-nano"
LANGUAGE_MODEL = "smollm2-135m"
QUESTION = "Why does the sea have tides? Answer in three sentences."
EMULATED_IMAGES = 1000  # an interpreter takes about a hundred times longer
CALIBRATION_IMAGES = 512


def edgekit_command(*words: str) -> Any:
    """Run one ``edgekit`` command with --json and return its document."""
    print(f"$ edgekit {' '.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "edgekit.cli", *words, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def app_answers(bundle: Path, artifact: str, data: Path, limit: int | None) -> Any:
    """What apps/classify makes of the test images with one artifact."""
    words = [str(bundle), "--artifact", artifact, "--dataset", str(data), "--json"]
    words += ["--limit", str(limit)] if limit else []
    print(f"$ python apps/classify/main.py {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / "apps/classify/main.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@torch.no_grad()
def eager_answers(data: Path) -> tuple[Labels, Labels]:
    """The best class of every test image by the trained form in PyTorch, and the true one."""
    model = load_zoo_model(MODEL).module.eval()
    images, labels = fashion_mnist.read(data, "test")
    scores = torch.cat(
        [
            model(part)
            for part in torch.tensor_split(torch.from_numpy(fashion_mnist.prepare(images)), 20)
        ]
    )
    return scores.argmax(1).numpy(), labels


def quantization_data(data: Path, folder: Path) -> tuple[Path, Path]:
    """Training images to calibrate on and labelled test images to judge by, as two files."""
    calibration, labelled = folder / "calibration.npz", folder / "labelled.npz"
    folder.mkdir(parents=True, exist_ok=True)
    images, _ = fashion_mnist.read(data, "train")
    np.savez(calibration, images=fashion_mnist.prepare(images[:CALIBRATION_IMAGES]))
    images, labels = (part[:EMULATED_IMAGES] for part in fashion_mnist.read(data, "test"))
    prepared = fashion_mnist.prepare(images)
    np.savez(labelled, images=prepared, labels=labels.astype(np.int64))
    return calibration, labelled


def _against_float(bundle: edgekit.Bundle, name: str) -> str:
    """How often faster than the target's float artifact, timed against each other."""
    speeds = [each.speed for each in bundle.tried() if each.artifact == name and each.speed]
    return f"{speeds[0]} {speeds[0].threads}T" if speeds else "-"


def _p50(time: Any) -> str:
    """The median here, where the vendor's runtime is here."""
    if time is None:
        return "on the device"
    return f"{time['p50_ms']:.3f} ms" + (" (noisy)" if time["noise"] else "")


def answer_a_question(out: Path) -> None:
    """Export the language model in 4 bits, and stream what it says."""
    shutil.rmtree(out, ignore_errors=True)
    (row,) = edgekit_command(
        *("export", LANGUAGE_MODEL, "--target", "onnxruntime", "--precision", "int4"),
        *("-o", str(out)),
    )
    decoding = row["proof"]["decoding"]
    print(
        f"\n{LANGUAGE_MODEL} on onnxruntime in int4, {size_text(row['size_bytes'])}, "
        f"{row['standing']}: perplexity {decoding['perplexity']:.2f}, eager's "
        f"{decoding['eager_perplexity']:.2f}\n"
    )
    words = ["generate", str(out), "--chat", "--prompt", QUESTION, "--max-tokens", "120"]
    print(f"$ edgekit {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "edgekit.cli", *words])
    if done.returncode:
        sys.exit(done.returncode)


def main(arguments: list[str] | None = None) -> int:
    """Print each command as it runs, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=fashion_mnist.FOLDER)
    parser.add_argument("--precision", default="fp32,fp16,int8")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/demo"))
    asked = parser.parse_args(arguments)
    out = str(asked.output)
    shutil.rmtree(asked.output, ignore_errors=True)
    calibration, labelled = quantization_data(asked.data, asked.output.with_name("demo-data"))
    edgekit_command(
        *("export", MODEL, "--target", "all", "--precision", asked.precision),
        *("--calibration", str(calibration), "--calibration-method", "percentile"),
        # So small a net has little to win in time: int8 is asked for its size, and the ratio shown.
        *("--labels", str(labelled), "--prefer", "size", "-o", out),
    )
    proofs = {proof["artifact"]: proof for proof in edgekit_command("verify", out)}
    timed = {row["artifact"]: row for row in edgekit_command("profile", out, "--noisy-ok")}
    eager, truth = eager_answers(asked.data)
    bundle = edgekit.open_bundle(asked.output)
    rows = []
    for name in bundle.artifacts:
        artifact, proof, time = bundle.artifact(name), proofs[name], timed.get(name)
        limit = EMULATED_IMAGES if proof["level"] == "emulated" else None
        answers = app_answers(asked.output, name, asked.data, limit)
        count = answers["images"]
        same = float((np.array(answers["predicted"]) == eager[:count]).mean())
        rows.append(
            (
                artifact.target,
                artifact.recipe.precision,
                proof["level"] if proof["passed"] else "not proven",
                f"{max(output['max_abs_error'] for output in proof['outputs']):.1e}",
                f"{max(output['max_rel_error'] for output in proof['outputs']):.1e}",
                f"{count:,}",
                f"{same:.2%}",
                f"{answers['top1']:.2%}",
                f"{float((eager[:count] == truth[:count]).mean()):.2%}",
                _p50(time),
                _against_float(bundle, name),
                size_text(artifact.size),
            )
        )
    header = (
        *("target", "precision", "proof", "max abs", "max rel", "images", "as eager"),
        *("top-1", "eager", "p50", "against float", "size"),
    )
    print(f"\n{MODEL} on the test images of Fashion-MNIST\n\n{table(header, rows)}")
    if any(row["noise"] for row in timed.values()):
        print("\nnoisy: " + "; ".join(sorted({r["noise"] for r in timed.values() if r["noise"]})))
    print()
    answer_a_question(asked.output.with_name("demo-language"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
