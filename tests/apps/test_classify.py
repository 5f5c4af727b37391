"""The classify app runs with numpy and one runtime, in an environment that has nothing else."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import os
import struct
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit_zoo import fashion_mnist

ROOT = Path(__file__).parents[2]
APP = ROOT / "apps/classify/main.py"
# What a device has: the runtime, numpy, and edgekit itself.
DEVICE = ("numpy", "onnxruntime")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "nano"
    edgekit.export("partialnet-nano", targets=["onnxruntime"], out=out)
    return out


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a fresh environment with links to the device's packages; no torch."""
    folder = tmp_path_factory.mktemp("device")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in DEVICE:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        (site / name).symlink_to(package)
        libraries = package.with_name(f"{name}.libs")
        if libraries.exists():
            (site / libraries.name).symlink_to(libraries)
    for name in ("edgekit-sdk", *DEVICE):
        (metadata,) = {
            Path(str(importlib.metadata.distribution(name).locate_file(file))).parent
            for file in importlib.metadata.files(name) or []
            if file.name == "METADATA"
        }
        (site / metadata.name).symlink_to(metadata)
    roots = (ROOT, ROOT / "backends", ROOT / "models")
    (site / "edgekit.pth").write_text("\n".join(map(str, roots)))
    return folder / "bin/python"


def run(python: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [python, *map(str, words)], capture_output=True, text=True, env=environment
    )


def png(path: Path, image: np.ndarray) -> Path:
    from PIL import Image

    Image.fromarray(image).save(path)
    return path


def shipped() -> tuple[np.ndarray, np.ndarray]:
    weights = ROOT / "models/edgekit_zoo/weights/samples.npz"
    with np.load(weights) as content:
        return content["images"], content["labels"]


def test_the_device_has_no_torch(device: Path) -> None:
    for module in ("torch", "onnx", "executorch", "PIL"):
        assert "ModuleNotFoundError" in run(device, "-c", f"import {module}").stderr


def test_it_names_real_images_there(device: Path, bundle: Path, tmp_path: Path) -> None:
    images, labels = shipped()
    paths = [png(tmp_path / f"{index}.png", images[index]) for index in range(12)]
    done = run(device, APP, bundle, *paths)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    named = [line.split(": ", 1)[1].rsplit(" ", 1)[0] for line in lines]
    truth = [fashion_mnist.LABELS[label] for label in labels[:12]]
    right = sum(label in line.split(",")[0] for label, line in zip(truth, lines, strict=True))
    assert right >= 9, list(zip(truth, named, strict=True))


def test_the_command_line_runs_and_verifies_there(
    device: Path, bundle: Path, tmp_path: Path
) -> None:
    images, _ = shipped()
    done = run(device, "-m", "edgekit.cli", "run", bundle, png(tmp_path / "a.png", images[0]))
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout
    assert run(device, "-m", "edgekit.cli", "verify", bundle).returncode == 0


def test_making_an_artifact_there_says_what_to_install(device: Path, tmp_path: Path) -> None:
    words = ("export", "partialnet-nano", "--target", "onnxruntime", "-o", tmp_path / "b")
    done = run(device, "-m", "edgekit.cli", *words)
    assert done.returncode == 3
    assert "needs the module 'torch'" in done.stderr
    assert "pip install 'edgekit-sdk[export]'" in done.stderr


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header + array.tobytes())


def test_it_evaluates_a_folder_of_the_data_set(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = shipped()
    repeat = np.resize(np.arange(len(images)), 10_000)
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", images[repeat])
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels[repeat])
    done = run(Path(sys.executable), APP, bundle, "--dataset", tmp_path, "--json")
    result = json.loads(done.stdout)
    assert result["images"] == 10_000
    assert result["top1"] > 0.8


def test_bad_input_is_a_sentence(bundle: Path, tmp_path: Path) -> None:
    python = Path(sys.executable)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    for words, sentence in (
        ((bundle, tmp_path / "a.png"), "damaged"),
        ((tmp_path / "absent", tmp_path / "a.png"), "there is no bundle folder"),
        ((bundle, "--dataset", tmp_path), "there is no such file"),
        ((bundle,), "give image files, or --dataset FOLDER"),
    ):
        done = run(python, APP, *words)
        assert done.returncode in (2, 4)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
