"""``any``: where the codes lie, and other widths in a running session and on the device."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import edgekit_tensorrt.build_engine as script
from edgekit import evidence, rounding
from edgekit.artifact import Artifact
from edgekit.contract import Switchable
from edgekit.errors import UnknownName, UsageError
from edgekit.evidence import NotPossible
from edgekit.program import Program, Reference
from edgekit.recipe import INT8, PRECISIONS
from edgekit.spec import TensorSpec
from edgekit.widths import Store, places_to_json
from edgekit_tensorrt import BACKEND
from edgekit_tensorrt.native import EngineSession
from edgekit_tensorrt.session import NetworkSession

ANY = PRECISIONS["any"]
FAKES = Path(__file__).parents[1] / "fake"


@pytest.fixture(scope="module")
def artifact(tensorrt: None, mixed: Program) -> Artifact:
    return BACKEND.lower(mixed, ANY)


def outputs(artifact: Artifact, program: Program) -> list[np.ndarray[Any, Any]]:
    with BACKEND.open(artifact) as session:
        return [session.run(sample)["output"] for sample in program.reference.samples]


def test_every_code_is_found_to_the_byte(artifact: Artifact) -> None:
    assert isinstance(artifact.source, bytes)
    model = onnx.load_from_string(artifact.source)
    weights = {
        numpy_helper.to_array(tensor).tobytes()
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT8 and tensor.name.endswith("_quantized")
    }
    codes: Any = artifact.provenance["codes"]
    found = [
        artifact.source[place["offset"] : place["offset"] + place["count"]]
        for place in codes["places"]
    ]
    assert set(found) == weights
    assert len(found) == 5
    assert set(Store(artifact).layers) == {"dense", "point", "qkv", "project", "head"}
    assert {place["file"] for place in codes["places"]} == {"model.onnx"}


def test_it_is_int8_and_carries_what_derives_the_other_widths(artifact: Artifact) -> None:
    assert artifact.files["rounding.py"] == Path(rounding.__file__).read_bytes()
    assert artifact.derived == {"model.sm86.engine", "plan.json"}
    assert "variants" not in artifact.provenance


def test_another_width_is_that_of_a_fresh_session_and_8_comes_back(
    mixed: Program, artifact: Artifact
) -> None:
    before = outputs(artifact, mixed)
    four = outputs(Store(artifact).fixed(4), mixed)
    with BACKEND.open(artifact) as session:
        assert isinstance(session, Switchable)

        def run(bits: Any) -> list[np.ndarray[Any, Any]]:
            session.set_bits(bits)
            return [session.run(sample)["output"] for sample in mixed.reference.samples]

        np.testing.assert_array_equal(run(4), four)
        some = run({"*": 4, "head": 8})
        assert not np.array_equal(some, four)
        assert not np.array_equal(some, before)
        np.testing.assert_array_equal(run(8), before)
        with pytest.raises(UsageError, match="3 bits were asked for"):
            session.set_bits(3)
        with pytest.raises(UnknownName, match="layer 'neck'"):
            session.set_bits({"neck": 4})
        np.testing.assert_array_equal(
            [session.run(sample)["output"] for sample in mixed.reference.samples], before
        )


def test_a_closed_session_opens_at_the_width_it_was_set_to(
    mixed: Program, artifact: Artifact
) -> None:
    session = NetworkSession(artifact)
    session.set_bits(4)
    with session:
        found = [session.run(sample)["output"] for sample in mixed.reference.samples]
    np.testing.assert_array_equal(found, outputs(Store(artifact).fixed(4), mixed))


def test_an_artifact_of_one_width_cannot_switch(artifact: Artifact) -> None:
    plain = replace(artifact, recipe=INT8, provenance={})
    for session in (NetworkSession(plain), EngineSession(plain)):
        with pytest.raises(UsageError, match=r"has one bit-width.*--precision any"):
            session.set_bits(4)


def test_on_a_gpu_the_engine_is_built_again(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[bytes] = []
    closed: list[int] = []

    class Engine:
        def __init__(self, engine: bytes) -> None:
            built.append(engine)

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(len(built))

    monkeypatch.setattr(script, "build", lambda content, _profiles: content)
    monkeypatch.setattr(script, "Engine", Engine)
    with EngineSession(artifact) as session:
        session.set_bits(4)
    assert built == [artifact.source, Store(artifact).at(4).source]
    assert closed == [1, 2]


@pytest.mark.parametrize("text", ["4", "2,head=8", "8,qkv=4,dense=6"])
def test_the_script_makes_the_same_file_as_the_store(artifact: Artifact, text: str) -> None:
    assert isinstance(artifact.source, bytes)
    codes: Any = artifact.provenance["codes"]
    asked = {name or "*": width for name, width in script.bits(text).items()}
    assert (
        script.at_bits(artifact.source, codes, script.bits(text))
        == Store(artifact).at(asked).source
    )


def test_a_name_is_a_layer_and_those_inside_it() -> None:
    layers = ("a", "a.b", "a.bc", "ab")
    places = [
        {"layer": layer, "file": "m", "offset": index, "count": 1}
        for index, layer in enumerate(layers)
    ]
    content = bytes([0x11] * 4)
    for asked in ({"": 8, "a": 4}, {"": 4, "a": 8, "a.b": 2}):
        found = script.at_bits(content, places_to_json(places), asked)
        artifact = Artifact(
            "tensorrt", ANY, "m", {"m": content}, (), (), {"codes": places_to_json(places)}
        )
        bits = {name or "*": width for name, width in asked.items()}
        assert found == Store(artifact).at(bits).files["m"]
    with pytest.raises(NotPossible, match=r"no layer 'c' with codes; there is: a, a\.b, a\.bc, ab"):
        script.at_bits(content, places_to_json(places), {"": 8, "c": 4})


@pytest.mark.parametrize("text", ["", "3", "4,", "head=", "4,head=5", "eight"])
def test_a_text_that_is_no_width_is_told(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is no width: 8, 6, 4, 2, or head=8"):
        script.bits(text)


# What the fake's parser reads in place of ONNX; the codes are the letters behind "codes".
LETTERS = b"19AZaz"
FILE = json.dumps(
    {
        "inputs": [
            {"name": "x", "shape": [1, 4], "dtype": "FLOAT"},
            {"name": "ids", "shape": [1], "dtype": "INT64"},
        ],
        "outputs": [
            {"name": "scores", "shape": [1, 4], "dtype": "FLOAT"},
            {"name": "ids_output", "shape": [1], "dtype": "INT64"},
            {"name": "positive", "shape": [1], "dtype": "BOOL"},
        ],
        "codes": LETTERS.decode(),
    }
).encode()
INPUTS = (TensorSpec("x", (1, 4), "float32"), TensorSpec("ids", (1,), "int64"))
OUTPUTS = (
    TensorSpec("scores", (1, 4), "float32"),
    TensorSpec("ids", (1,), "int64"),
    TensorSpec("positive", (1,), "bool"),
)


@pytest.fixture
def jetson(ship: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed; on Debian run: apt-get install gcc")
    library = tmp_path / "cuda" / "libcudart.so.12"
    library.parent.mkdir()
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(FAKES / "cudart.c")]
    subprocess.run(command, check=True)

    def make(*, codes: bool = True, fault: str = "") -> Any:
        start = FILE.index(LETTERS)
        places = [
            {"layer": "body", "file": "model.onnx", "offset": start, "count": 3},
            {"layer": "head", "file": "model.onnx", "offset": start + 3, "count": 3},
        ]
        sources = (script, evidence, rounding) if codes else (script, evidence)
        files = {Path(str(each.__file__)).name: Path(str(each.__file__)) for each in sources}
        artifact = Artifact(
            "tensorrt",
            ANY if codes else INT8,
            "model.onnx",
            {"model.onnx": FILE, **{name: path.read_bytes() for name, path in files.items()}},
            INPUTS,
            OUTPUTS,
            {"codes": places_to_json(places)} if codes else {},
        )
        x, ids = np.array([[1, -2, 3, 4]], np.float32), np.array([5])
        expected = {"scores": 2 * x, "ids": ids + 1, "positive": x[:, 0] > 0}
        reference = Reference(({"x": x, "ids": ids},), (expected,), "one")
        variables = {
            "LD_LIBRARY_PATH": str(library.parent),
            "FAKE_CUDA_LEDGER": str(tmp_path / "ledger"),
            "FAKE_FAULT": fault,
        }
        return ship(artifact, reference, fakes=FAKES, environment=variables)

    return make


def engine_of(device: Any) -> tuple[str, dict[str, Any]]:
    (path,) = device.folder.glob("model.*.engine")
    return path.name, json.loads(path.read_bytes())


def test_the_device_builds_at_fewer_bits_and_tells_what_it_found(
    jetson: Callable[..., Any],
) -> None:
    """Codes 0x31, 0x39, 0x41 are 3, 4 (3.56) and 4 of 4 bits; the head keeps its 8."""
    device = jetson(fault="one element")
    done = device.run("build_engine.py", "--bits", "4,head=8", "--runs", "3")
    assert (done.returncode, done.stderr) == (0, "")
    name, engine = engine_of(device)
    assert name.endswith(".bits-4-head8.engine")
    assert engine["codes"] == "0@@Zaz"
    assert re.search(
        r"^scores: largest error 1\.0e\+00, SQNR 20\.8 dB, top-1 .* %$", done.stdout, re.M
    )
    assert re.search(r"^p50 \d+\.\d{3} ms$", done.stdout, re.M)
    assert device.added() == {f"tensorrt-any/{name}"}  # no proof and no latency of the artifact


def test_what_is_beyond_the_limits_is_told_and_not_judged(jetson: Callable[..., Any]) -> None:
    device = jetson(fault="nan")
    done = device.run("build_engine.py", "--bits", "2", "--runs", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Beyond the limits for 8 bits: Output 'scores' on sample 0 holds NaN" in done.stdout
    assert engine_of(device)[0].endswith(".bits-2.engine")


def test_at_8_bits_it_is_proven_as_ever(jetson: Callable[..., Any]) -> None:
    device = jetson()
    assert device.run("build_engine.py", "--bits", "8", "--runs", "3").returncode == 0
    name, engine = engine_of(device)
    assert engine["codes"] == LETTERS.decode()
    assert device.open().device_proofs("tensorrt-any")[0].passed
    other = {f"tensorrt-any/{each}" for each in (name, "on-device.json", "perf.json")}
    assert device.added() == other


@pytest.mark.parametrize(
    ("codes", "bits", "code", "sentence"),
    [
        (True, "5", 2, r"--bits: '5' is no width: 8, 6, 4, 2, or head=8"),
        (True, "4,neck=8", 3, r"there is no layer 'neck' with codes; there is: body, head\."),
        (False, "4", 3, r"tensorrt-int8 has one bit-width; export the model with --precision any"),
    ],
)
def test_what_cannot_be_switched_is_a_sentence(
    jetson: Callable[..., Any], codes: bool, bits: str, code: int, sentence: str
) -> None:
    device = jetson(codes=codes)
    done = device.run("build_engine.py", "--bits", bits)
    assert done.returncode == code
    assert re.search(sentence, done.stderr)
    assert device.added() == set()
