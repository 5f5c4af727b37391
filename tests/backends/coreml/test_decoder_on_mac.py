"""generate_on_mac.py, with our interpreter in the place of Core ML."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from enum import Enum
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import edgekit_coreml.generate_on_mac as script
from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.decoder import Decoder
from edgekit.recipe import FP32
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_coreml import BACKEND
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.package import Package
from edgekit_zoo.llama import llama_from_weights

PROMPTS = [[5, 9, 2], list(range(1, 78))]
NAME = "coreml-fp32"


class Unit(Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


class Model:
    """What coremltools.models.MLModel is of a function."""

    def __init__(self, path: str, *, function_name: str, compute_units: Unit) -> None:
        if compute_units is Unit.CPU_AND_NE:
            raise Exception("Error compiling model for the Neural Engine.")
        folder = Path(path)
        files: dict[str, bytes | Path] = {
            str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()
        }
        self._interpreter = Interpreter(Package.read(files), function_name)

    def make_state(self) -> dict[str, Any]:
        return self._interpreter.new_state()

    def predict(self, data: dict[str, Array], state: dict[str, Any]) -> dict[str, Any]:
        return self._interpreter.run(data, state)


TOOLS = SimpleNamespace(ComputeUnit=Unit, models=SimpleNamespace(MLModel=Model))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def bundle(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a bundle that the script reads."""
    root = tmp_path_factory.mktemp("bundle")
    folder = root / NAME
    folder.mkdir()
    artifact = BACKEND.lower_decoder(decoder, FP32, folder, lambda _step: None)
    answers = [greedy(decoder, prompt, 6) for prompt in PROMPTS]
    (root / "language").mkdir()
    reference = root / "language/reference.npz"
    reference.write_bytes(packed(answers))
    _write_manifest(root, artifact, reference)
    return root


def packed(answers: list[list[int]]) -> bytes:
    content = io.BytesIO()
    held = {"prompts": PROMPTS, "continuations": answers}
    arrays = {name: np.concatenate(rows) for name, rows in held.items()}
    arrays |= {f"{name}.lengths": np.array([*map(len, rows)]) for name, rows in held.items()}
    np.savez(content, **arrays)  # type: ignore[arg-type]  # its stub: the flag first
    return content.getvalue()


def _write_manifest(root: Path, artifact: Artifact, reference: Path) -> None:
    limits = evidence.Limits(1e-4, 0.9999, 60.0, 1.0, "a test")
    (root / NAME / "proof.json").write_text(json.dumps({"limits": asdict(limits)}))
    names = [*(f"{NAME}/{name}" for name in artifact.files), f"{NAME}/proof.json"]
    names.append(str(reference.relative_to(root)))
    manifest: dict[str, Any] = {
        "artifacts": [
            {
                "target": "coreml",
                "recipe": FP32.to_json(),
                "files": [*artifact.files],
                "provenance": dict(artifact.provenance),
            }
        ],
        "inputs": [],
        "outputs": [],
        "samples": {"files": []},
        "language": {"reference": "language/reference.npz"},
        "files": {name: sha256((root / name).read_bytes()).hexdigest() for name in names},
    }
    manifest["digest"] = evidence.digest_of(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    module, tokens = llama_from_weights(decoder.spec, decoder.weights), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(module(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def run(bundle: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(script, "core_ml", lambda: TOOLS)
    monkeypatch.setattr(script, "__file__", str(bundle / NAME / "generate_on_mac.py"))
    return script.main(arguments)


def test_each_unit_decodes_and_is_compared_with_eager(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bundle, monkeypatch) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert [*lines] == list(script.UNITS)
    assert "could not load the package: Error compiling model" in lines.pop("CPU_AND_NE")
    for line in lines.values():
        assert line.startswith("2 of 2 continuations are the eager model's, 12 of 12 tokens")
        assert "first difference" not in line


def test_the_first_difference_is_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = script.continuations(evidence.open_shipped(bundle / NAME))
    answers = [list(answer) for answer in held.answers]
    answers[1][2] += 1
    changed = script.Continuations(held.prompts, answers)
    monkeypatch.setattr(script, "continuations", lambda _shipped: changed)
    assert run(bundle, monkeypatch, "--tokens", "4") == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "1 of 2 continuations are the eager model's, 6 of 8 tokens" in line
    assert line.endswith("first difference: prompt 1, token 2")


def test_elsewhere_it_says_where_to_run_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "__file__", str(bundle / NAME / "generate_on_mac.py"))
    assert script.main([]) == 3
    assert "Core ML runs on macOS and this is Linux" in capsys.readouterr().err


def test_an_altered_reference_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = bundle / "language/reference.npz"
    whole = reference.read_bytes()
    reference.write_bytes(whole + b"x")
    try:
        assert run(bundle, monkeypatch) == 4
    finally:
        reference.write_bytes(whole)
    assert "was altered or cut short" in capsys.readouterr().err
