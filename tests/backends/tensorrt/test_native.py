"""Engines on a GPU, against a fake TensorRT; the real one runs where a GPU is."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.artifact import Artifact
from edgekit.errors import RuntimeFailed
from edgekit.evidence import NotPossible
from edgekit.recipe import FP32
from edgekit.spec import Dim, TensorSpec
from edgekit_tensorrt import BACKEND, native
from edgekit_tensorrt.native import EngineSession, has_gpu
from edgekit_tensorrt.session import NetworkSession

FAKES = Path(__file__).parent / "fake"
BATCH = Dim("batch", 1, 4)
ARTIFACT = Artifact(
    "tensorrt",
    FP32,
    "model.onnx",
    {"model.onnx": b"onnx"},
    (TensorSpec("x", (BATCH, 4), "float32"),),
    (TensorSpec("x", (BATCH, 4), "float32"), TensorSpec("best", (BATCH,), "int64")),
)


@pytest.fixture
def _forgotten() -> Iterator[None]:
    has_gpu.cache_clear()
    yield
    has_gpu.cache_clear()


class Driver:
    """libcuda as far as it is asked: how many GPUs there are."""

    def __init__(self, count: int, *, broken: bool = False) -> None:
        self._count, self._broken = count, broken

    def cuInit(self, _flags: int) -> int:  # noqa: N802
        return 100 if self._broken else 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._count
        return 0


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("installed", "driver", "found"),
    [
        (True, Driver(1), True),
        (True, Driver(0), False),
        (True, Driver(1, broken=True), False),
        (True, None, False),
        (False, Driver(1), False),
    ],
)
def test_a_gpu_counts_where_its_driver_and_tensorrt_are(
    monkeypatch: pytest.MonkeyPatch, installed: bool, driver: Driver | None, found: bool
) -> None:
    def load(_name: str) -> Driver:
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(native, "find_spec", lambda _name: object() if installed else None)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert has_gpu() is found
    assert isinstance(BACKEND.open(ARTIFACT), EngineSession if found else NetworkSession)
    assert (BACKEND.emulation == "") is found


class FakeEngine:
    """Doubles x; remembers what became of it."""

    def __init__(self, plan: bytes) -> None:
        self.plan, self.open = plan, False

    def __enter__(self) -> FakeEngine:
        self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False

    def run(self, arrays: dict[str, Any]) -> dict[str, Any]:
        if arrays["x"].shape[0] == 3:
            raise NotPossible("the GPU gave up at cudaMemcpyAsync: no error")
        return {"x_output": 2 * arrays["x"], "best": arrays["x"].argmax(1)}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    made: list[FakeEngine] = []

    def build(onnx: bytes, profiles: dict[str, Any]) -> bytes:
        if onnx == b"refused":
            raise NotPossible("TensorRT cannot take the model")
        return repr((onnx, profiles)).encode()

    def engine(plan: bytes) -> FakeEngine:
        made.append(FakeEngine(plan))
        return made[-1]

    monkeypatch.setattr("edgekit_tensorrt.build_engine.build", build)
    monkeypatch.setattr("edgekit_tensorrt.build_engine.Engine", engine)
    return made


def test_the_engine_is_built_from_the_bundles_file_and_closed(
    engines: list[FakeEngine], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"onnx")
    on_disk = Artifact(
        *("tensorrt", FP32, "model.onnx", {"model.onnx": path}, ARTIFACT.inputs, ARTIFACT.outputs)
    )
    for artifact in (ARTIFACT, on_disk):
        with EngineSession(artifact) as session:
            assert (session.inputs, session.outputs) == (artifact.inputs, artifact.outputs)
            assert engines[-1].open
        assert not engines[-1].open
    assert {engine.plan for engine in engines} == {b"(b'onnx', {'x': ([1, 4], [2, 4], [4, 4])})"}


def test_outputs_come_back_under_the_models_names(engines: list[FakeEngine]) -> None:
    x = np.array([[1, 3, 2, 0]], np.float32)
    with EngineSession(ARTIFACT) as session:
        answer = session.run({"x": x})
    np.testing.assert_array_equal(answer["x"], 2 * x)
    assert answer["best"].tolist() == [1]


def test_a_model_that_tensorrt_refuses_is_a_sentence(engines: list[FakeEngine]) -> None:
    refused = Artifact("tensorrt", FP32, "m", {"m": b"refused"}, ARTIFACT.inputs, ())
    with (
        pytest.raises(RuntimeFailed, match="could not load the model: TensorRT cannot take"),
        EngineSession(refused),
    ):
        pass


def test_a_gpu_that_gives_up_is_a_sentence(engines: list[FakeEngine]) -> None:
    with (
        EngineSession(ARTIFACT) as session,
        pytest.raises(RuntimeFailed, match="could not run the model: the GPU gave up"),
    ):
        session.run({"x": np.zeros((3, 4), np.float32)})
    assert not engines[-1].open


RUN = """
import json, sys
import numpy as np
from edgekit.artifact import Artifact
from edgekit.recipe import FP32
from edgekit.spec import Dim, TensorSpec
from edgekit_tensorrt.native import EngineSession
batch = Dim("batch", 1, 4)
model = {
    "inputs": [{"name": "x", "shape": [-1, 4], "dtype": "FLOAT"},
               {"name": "ids", "shape": [-1], "dtype": "INT64"}],
    "outputs": [{"name": "scores", "shape": [-1, 4], "dtype": "FLOAT"},
                {"name": "ids_output", "shape": [-1], "dtype": "INT64"},
                {"name": "positive", "shape": [-1], "dtype": "BOOL"}],
}
artifact = Artifact(
    "tensorrt", FP32, "m", {"m": json.dumps(model).encode()},
    (TensorSpec("x", (batch, 4), "float32"), TensorSpec("ids", (batch,), "int64")),
    (TensorSpec("scores", (batch, 4), "float32"), TensorSpec("ids", (batch,), "int64"),
     TensorSpec("positive", (batch,), "bool")),
)
with EngineSession(artifact) as session:
    for size in (1, 3):
        x = np.arange(4.0 * size, dtype=np.float32).reshape(size, 4)
        answer = session.run({"x": x, "ids": np.arange(size)})
        assert np.array_equal(answer["scores"], 2 * x), answer
        assert answer["ids"].tolist() == list(range(1, size + 1)), answer
        assert answer["positive"].dtype == bool
print("ran")
"""


def test_the_whole_way_through_a_fake_tensorrt_and_a_stub_of_cuda(tmp_path: Path) -> None:
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("gcc is not installed; on Debian run: apt-get install gcc")
    library = tmp_path / "libcudart.so.12"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(FAKES / "cudart.c")]
    subprocess.run(command, check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(FAKES),
        "LD_LIBRARY_PATH": str(tmp_path),
        "FAKE_CUDA_LEDGER": str(tmp_path / "ledger"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")
    assert (tmp_path / "ledger").read_text() == "0"  # all memory and handles were given back
