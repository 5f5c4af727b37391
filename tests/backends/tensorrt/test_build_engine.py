"""build_engine.py as a Jetson runs it: a child process in a real bundle, with a fake TensorRT.

The fake speaks TensorRT 10.3's calls (that the real ones have them is tested in the conformance
suite) and its CUDA runtime is a stub in C, so pointers, copies and streams are real ones.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit_tensorrt.build_engine as script
from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.onnx_export import output_names
from edgekit.program import Reference
from edgekit.recipe import FP16
from edgekit.render import bundle_table
from edgekit.report import html_report
from edgekit.spec import Array, Arrays, Dim, TensorSpec

FAKES = Path(__file__).parent / "fake"
BATCH = Dim("batch", 1, 4)
INPUTS = (TensorSpec("x", (BATCH, 4), "float32"), TensorSpec("ids", (BATCH,), "int64"))
OUTPUTS = (
    TensorSpec("scores", (BATCH, 4), "float32"),
    TensorSpec("ids", (BATCH,), "int64"),  # ids_output in the file
    TensorSpec("positive", (BATCH,), "bool"),
)
KINDS = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}
Ship = Callable[..., Any]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stub of CUDA's runtime."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed; on Debian run: apt-get install gcc")
    folder = tmp_path_factory.mktemp("cuda")
    library, source = folder / "libcudart.so.12", FAKES / "cudart.c"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return folder


def reference() -> Reference:
    generator = np.random.default_rng(0)
    samples: list[Arrays] = []
    expected: list[dict[str, Array]] = []
    for batch in (1, 4, 2):
        x = generator.standard_normal((batch, 4), dtype=np.float32)
        ids = generator.integers(0, 1 << 40, batch)
        samples.append({"x": x, "ids": ids})
        expected.append({"scores": 2 * x, "ids": ids + 1, "positive": x[:, 0] > 0})
    return Reference(tuple(samples), tuple(expected), "random, seed 0")


def model(floats: str = "float32") -> bytes:
    """What the fake's parser reads in place of ONNX."""

    def fields(specs: tuple[TensorSpec, ...], more: str = "") -> list[dict[str, object]]:
        kinds = {**KINDS, "float32": KINDS[floats]}
        return [
            {
                "name": spec.name + (more if spec.name == "ids" else ""),
                "shape": [-1 if isinstance(dim, Dim) else dim for dim in spec.shape],
                "dtype": kinds[spec.dtype],
            }
            for spec in specs
        ]

    return json.dumps({"inputs": fields(INPUTS), "outputs": fields(OUTPUTS, "_output")}).encode()


@pytest.fixture
def jetson(ship: Ship, libraries: Path, tmp_path: Path) -> Callable[..., Any]:
    """A device with the bundle on it."""

    def make(content: bytes = b"", **environment: str) -> Any:
        files = {
            "model.onnx": content or model(),
            "plan.json": b"{}\n",
            "build_engine.py": Path(script.__file__).read_bytes(),
            "evidence.py": Path(evidence.__file__).read_bytes(),
        }
        artifact = Artifact("tensorrt", FP16, "model.onnx", files, INPUTS, OUTPUTS)
        variables = {
            "LD_LIBRARY_PATH": str(libraries),
            "FAKE_CUDA_LEDGER": str(tmp_path / "ledger"),
            **environment,
        }
        return ship(artifact, reference(), fakes=FAKES, environment=variables)

    return make


def engines(device: Any) -> list[Path]:
    return sorted(device.folder.glob("model.*.engine"))


def test_the_device_builds_proves_and_times(jetson: Ship, tmp_path: Path) -> None:
    device = jetson()
    assert device.open().standing("tensorrt-fp16") == "executed"
    done = device.run("build_engine.py", "--runs", "30")
    assert (done.returncode, done.stderr) == (0, "")
    bundle = device.open()
    (proof,) = bundle.device_proofs("tensorrt-fp16")
    assert (proof.level, proof.samples, proof.passed) == ("on-device", 3, True)
    assert [output.output for output in proof.outputs] == ["scores", "ids", "positive"]
    assert proof.host["gpu"] == "Fake Orin, sm_87"
    assert proof.host["tensorrt"] == "10.3.0"
    assert bundle.standing("tensorrt-fp16") == "on-device"
    measured = bundle.measurement("tensorrt-fp16")
    assert measured is not None
    assert measured["device"] == proof.host["processor"]
    assert len(measured["times_ms"]) == 30
    assert measured["gpu_times_ms"] == [0.25] * 30
    (engine,) = engines(device)
    added = {f"tensorrt-fp16/{name}" for name in (engine.name, "on-device.json", "perf.json")}
    assert device.added() == added
    assert (tmp_path / "ledger").read_text() == "0"  # all memory and handles were given back


def test_what_was_found_is_shown_there_and_here(jetson: Ship) -> None:
    device = jetson()
    done = device.run("build_engine.py")
    assert re.search(r"device +proof +max abs +max rel +p50", done.stdout)
    assert re.search(r"on-device +0\.0e\+00 +0\.0e\+00 +\d+\.\d{3} ms", done.stdout)
    assert "p50 without the copies from and to numpy: 0.250 ms" in done.stdout
    bundle = device.open()
    assert re.search(r"tensorrt +fp16 +on-device .* \d+\.\d\d ms", bundle_table(bundle))
    assert "<td>on-device</td>" in html_report([bundle])


def test_the_engine_is_built_as_the_model_is_written(jetson: Ship) -> None:
    device = jetson()
    assert device.run("build_engine.py", "--workspace-mb", "64", "--runs", "1").returncode == 0
    (engine,) = engines(device)
    built = json.loads(engine.read_bytes())
    assert built["network flags"] == 0b10  # strongly typed, which is bit 1 in 10.3
    assert built["flags"] == []  # no TF32, and no precision is forced
    assert built["workspace"] == 64 << 20
    assert built["shapes"] == {"x": [[1, 4], [2, 4], [4, 4]], "ids": [[1], [2], [4]]}


def test_half_precision_at_the_edge_is_compared_in_the_manifests(jetson: Ship) -> None:
    device = jetson(model("float16"))
    assert device.run("build_engine.py", "--runs", "1").returncode == 0
    (proof,) = device.open().device_proofs("tensorrt-fp16")
    assert 0 < proof.max_abs_error < 1e-2


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("one element", r"Output 'scores': maximum relative error is \S+, the limit is 0\.1\."),
        ("nan", r"Output 'scores' on sample 0 holds NaN or infinity; eager does not\."),
    ],
)
def test_a_wrong_answer_is_written_as_failing_and_its_engine_is_not_kept(
    jetson: Ship, fault: str, sentence: str
) -> None:
    device = jetson(FAKE_FAULT=fault)
    done = device.run("build_engine.py")
    assert done.returncode == 1
    assert re.search(rf"is not proven: {sentence}", done.stderr)
    assert "not proven" in done.stdout
    assert re.search(r"model\.\S+\.engine was not kept\.", done.stderr)
    assert device.added() == {"tensorrt-fp16/on-device.json"}
    bundle = device.open()
    assert not bundle.device_proofs("tensorrt-fp16")[0].passed
    assert bundle.standing("tensorrt-fp16") == "fails on device"


def test_an_engine_alone_proves_nothing(jetson: Ship) -> None:
    device = jetson(FAKE_FAULT="one element")
    assert device.run("build_engine.py", "--engine-only").returncode == 0
    (engine,) = engines(device)
    assert device.added() == {f"tensorrt-fp16/{engine.name}"}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("import", r"does not load \(tensorrt: libnvinfer\.so\.10: .*python3-libnvinfer"),
        ("no device", r"no CUDA device that can be used here: .*no CUDA-capable device"),
        ("out of memory", r"gave up at cudaMalloc: out of memory \(error 2\); close what else"),
        ("builder", r"cannot build here \(pybind11.*\):\n  - .*CUDA initialization failure: 35"),
        (
            "parse",
            r"10\.3\.0 cannot take the model:\n  - node node_Det_3 \(Det\): no importer "
            r"registered\n  - node 7 \(Unique\): no importer registered",
        ),
        ("no outputs", r"cannot take the model:\n  - it found no outputs; the file is no ONNX"),
        ("range", r"input 'x' cannot have that range: Shape provided for min"),
        ("profile", r"refused the range of x, ids:\n  - it gave no reason"),
        ("build", r"could not build the engine:\n  - Cuda Runtime \(out of memory\)"),
        ("load", r"could not load the engine:\n  - .*version mismatch"),
        ("context", r"could not make room to run the engine"),
        ("dtype", r"'x' is BF16, which numpy does not have"),
        ("location", r"'x' decides shapes; that is not supported"),
        ("shape", r"refused input 'x' of shape \(1, 4\)"),
        ("data-dependent", r"the size of 'scores' depends on values"),
        ("execute", r"could not run the engine"),
    ],
)
def test_what_is_not_possible_is_a_sentence(
    jetson: Ship, tmp_path: Path, fault: str, sentence: str
) -> None:
    device = jetson(FAKE_FAULT=fault)
    done = device.run("build_engine.py")
    assert done.returncode == 3, done
    assert re.search(sentence, done.stderr)
    assert "Traceback" not in done.stderr
    assert device.added() == set()
    assert (tmp_path / "ledger").read_text() == "0"


@pytest.mark.parametrize(
    "name",
    [
        "tensorrt-fp16/model.onnx",
        "tensorrt-fp16/build_engine.py",
        "tensorrt-fp16/evidence.py",
        "tensorrt-fp16/proof.json",
        "samples/0001.npz",
    ],
)
def test_an_altered_file_is_refused_before_anything_is_built(jetson: Ship, name: str) -> None:
    device = jetson()
    path = device.bundle / name
    path.write_bytes(path.read_bytes() + b"\n")
    done = device.run("build_engine.py")
    assert done.returncode == 4
    assert f"{name} was altered or cut short; copy the bundle again, whole." in done.stderr
    assert not engines(device)


def test_without_numpy_or_its_other_half_it_says_what_to_install(jetson: Ship) -> None:
    device = jetson()
    done = device.run("build_engine.py", absent=("numpy",))
    assert done.returncode == 3
    assert re.fullmatch(r"build_engine\.py needs numpy, .*python3-numpy\n", done.stderr)
    (device.folder / "evidence.py").unlink()
    done = device.run("build_engine.py")
    assert done.returncode == 3
    assert "No module named 'evidence'" in done.stderr


def test_an_old_python_is_told(jetson: Ship) -> None:
    device = jetson()
    done = device.run("build_engine.py", before="sys.version_info = (3, 8, 10, 'final', 0)")
    assert done.returncode == 3
    assert done.stderr == "build_engine.py needs Python 3.10 or newer; JetPack 6 has it.\n"


def test_what_cannot_be_written_is_a_sentence(jetson: Ship) -> None:
    device = jetson()
    (device.folder / "on-device.json").mkdir()
    done = device.run("build_engine.py", "--runs", "1")
    assert done.returncode == 3
    assert re.search(r"on-device\.json could not be written: Is a directory", done.stderr)


@pytest.mark.parametrize("option", ["--runs", "--workspace-mb"])
def test_an_option_without_sense_is_told(jetson: Ship, option: str) -> None:
    done = jetson().run("build_engine.py", option, "0")
    assert done.returncode == 2
    assert "'0' is no whole number above 0" in done.stderr


def test_the_largest_shape_of_a_range_is_in_the_profile() -> None:
    inputs = [spec.to_json() for spec in INPUTS]
    assert script.profiles_of(inputs) == {
        "x": ([1, 4], [2, 4], [4, 4]),
        "ids": ([1], [2], [4]),
    }


def test_an_output_called_like_an_input_has_the_name_that_the_export_gives_it() -> None:
    x = TensorSpec("x", (1,), "float32")
    manifest = {"inputs": [x.to_json()], "outputs": [x.to_json()]}
    array = np.zeros(1, np.float32)
    (name,) = output_names([x], [x])
    assert script.renamed({name: array}, manifest) == {"x": array}


def test_an_integer_that_the_engine_cannot_hold_is_refused() -> None:
    ids = {"ids": np.array([1 << 40])}
    with pytest.raises(evidence.NotPossible, match="'ids' holds values that int32 cannot"):
        script._feed("ids", ids, "int32")
    np.testing.assert_array_equal(script._feed("ids", ids, "int64"), ids["ids"])
    assert script._feed("x", {"x": np.array(2.0, np.float32)}, "float32").shape == ()


def test_the_engine_serves_python_too(libraries: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys, numpy as np\n"
        "from edgekit_tensorrt.build_engine import Engine, build\n"
        "shapes = {'x': ((1, 4), (2, 4), (4, 4)), 'ids': ((1,), (2,), (4,))}\n"
        "plan = build(sys.argv[1].encode(), shapes)\n"
        "with Engine(plan) as engine:\n"
        "    for batch in (2, 4, 1):\n"  # memory grows, and is used again
        "        x = np.arange(4 * batch, dtype=np.float32).reshape(4, batch).T\n"
        "        ids = np.arange(batch)\n"
        "        answer = engine.run({'x': x, 'ids': ids})\n"
        "        assert (answer['scores'] == 2 * x).all(), answer\n"
        "        assert (answer['ids_output'] == ids + 1).all(), answer\n"
        "    times = engine.time({'x': x, 'ids': ids}, runs=3)\n"
        "    assert len(times.with_copies) == len(times.gpu) == 3\n"
    )
    ledger = tmp_path / "ledger"
    environment = {
        "PYTHONPATH": str(FAKES),
        "LD_LIBRARY_PATH": str(libraries),
        "FAKE_CUDA_LEDGER": str(ledger),
    }
    command = [sys.executable, "-c", code, model().decode()]
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert ledger.read_text() == "0"
