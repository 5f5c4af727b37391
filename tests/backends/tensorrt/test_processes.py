"""Parsing and building through a child: results, refusals, limits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekit.errors import MissingRuntime, RuntimeFailed, UsageError
from edgekit_tensorrt import processes
from edgekit_tensorrt.plan import COMPUTE_CAPABILITIES, engine_header
from edgekit_tensorrt.processes import ParserError, build_engine, parse_onnx

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops


@pytest.fixture(scope="module")
def model(ops: type[Ops]) -> bytes:
    graph = ops()
    (a,) = graph.inner("Conv", ops.normal(1, 3, 16, 16), ops.constant(ops.normal(8, 3, 3, 3)))
    graph.add("Relu", a)
    return graph.model()


@pytest.fixture(scope="module")
def varying(tensorrt: None) -> bytes:
    """Relu over a batch whose size varies."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "varying",
        [info("x", TensorProto.FLOAT, ["n", 4])],
        [info("y", TensorProto.FLOAT, ["n", 4])],
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def test_a_model_is_parsed(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a model.onnx"
    path.write_bytes(model)
    for given in (model, path):
        parsed = parse_onnx(given)
        assert parsed.runtime.split()[0] in ("tensorrt", "tensorrt_rtx")
        assert not parsed.errors
        assert not parsed.warnings
        assert parsed.network is not None
        assert [layer.kind for layer in parsed.network.layers] == ["CONVOLUTION", "ACTIVATION"]


def test_weights_beside_the_model_are_found(
    ops: type[Ops], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = ops()
    graph.add("Add", ops.normal(300), ops.constant(ops.normal(300, seed=1)))
    onnx.save(
        onnx.load_from_string(graph.model()),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    monkeypatch.chdir(tmp_path)
    assert parse_onnx(Path("model.onnx")).network is not None
    (tmp_path / "weights.bin").unlink()
    (error, *_) = parse_onnx(Path("model.onnx")).errors
    assert "initializer" in error.description


@pytest.mark.parametrize("content", [b"", b"hello", bytes(50)])
def test_bytes_that_the_parser_takes_for_an_empty_model(tensorrt: None, content: bytes) -> None:
    with pytest.raises(RuntimeFailed, match="could not load the model: it has no layers"):
        parse_onnx(content)


def test_a_model_that_is_cut_off_is_an_error_of_the_parser(model: bytes) -> None:
    (error,) = parse_onnx(model[:100]).errors
    assert error.code == "MODEL_DESERIALIZE_FAILED"


def test_refused_operators_are_all_named(ops: type[Ops]) -> None:
    graph = ops()
    graph.add("Det", ops.normal(2, 2))
    graph.add("Unique", ops.normal(4))
    parsed = parse_onnx(graph.model())
    assert parsed.network is None
    assert [error.node for error in parsed.errors] == ["Det0", "Unique1"]
    assert str(parsed.errors[0]) == (
        "Det in node 'Det0': the parser does not know it (UNSUPPORTED_NODE)"
    )
    with pytest.raises(RuntimeFailed, match=r"load the model: Det in node 'Det0'.*Unique1"):
        build_engine(graph.model(), compute_capabilities=["sm86"], profiles={})


def test_an_error_without_a_node() -> None:
    assert str(ParserError("CODE", "", "", "why")) == "why (CODE)"


def test_unsigned_weights_are_warned_about(ops: type[Ops]) -> None:
    graph = ops()
    arguments = (ops.constant(1.0), ops.constant(0, "uint8"))
    (q,) = graph.inner("QuantizeLinear", ops.normal(4), *arguments)
    graph.add("DequantizeLinear", q, *arguments)
    assert any("Defaulting to INT8" in warning for warning in parse_onnx(graph.model()).warnings)


def test_the_same_model_gives_the_same_engine(model: bytes, tmp_path: Path) -> None:
    first = build_engine(model, compute_capabilities=["sm86", "SM89", "sm86"], profiles={})
    (tmp_path / "elsewhere.onnx").write_bytes(model)
    path = tmp_path / "elsewhere.onnx"
    second = build_engine(path, compute_capabilities=["sm86", "sm89"], profiles={})
    assert first.engine == second.engine
    assert first.plan == second.plan
    header = engine_header(first.engine)
    assert header.compute_capabilities == ("sm86", "sm89")
    assert not header.later
    assert header.version in first.runtime
    assert first.plan.kinds["correlation"] == 1
    assert first.plan.constant_bytes >= 8 * 27 * 4
    assert any("Conv0" in layer.nodes for layer in first.plan.layers)
    assert all(layer.kind != "unknown" for layer in first.plan.layers)


def test_sizes_that_vary_need_their_range(varying: bytes) -> None:
    build = _builder(varying)
    built = build({"x": ((1, 4), (2, 4), (8, 4))})
    assert any(-1 in t.shape for layer in built.plan.layers for t in layer.inputs)
    with pytest.raises(UsageError, match="the sizes of x vary and no range was given"):
        build({})
    with pytest.raises(UsageError, match="there is no input z; the model takes x"):
        build({"x": ((1, 4), (2, 4), (8, 4)), "z": ((1,), (1,), (1,))})
    with pytest.raises(UsageError, match="the ranges contradict each other"):
        build({"x": ((8, 4), (2, 4), (1, 4))})
    with pytest.raises(RuntimeFailed, match=r"build the engine.*profile has min=5"):
        build({"x": ((1, 5), (2, 5), (8, 5))})


def _builder(model: bytes) -> Callable[..., processes.Built]:
    return lambda profiles: build_engine(model, compute_capabilities=["sm86"], profiles=profiles)


def test_what_a_gpu_cannot_do_is_said_with_the_node(ops: type[Ops]) -> None:
    graph = ops()
    graph.add("MatMul", ops.normal(4, 64), ops.constant(ops.normal(64, 64)))
    with pytest.raises(RuntimeFailed, match=r"could not build the engine: .*'MatMul0'.*SM75"):
        build_engine(graph.model(), compute_capabilities=["sm75"], profiles={})


def test_targets_are_checked_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"unknown compute capability 'sm99'.*sm86, sm89"):
        build_engine(b"", compute_capabilities=["sm99"], profiles={})
    for empty in ((), "sm86"):
        with pytest.raises(UsageError, match="as a list; there is: sm75"):
            build_engine(b"", compute_capabilities=empty, profiles={})


@pytest.mark.parametrize(
    ("name", "machine"),
    [("sm87", "Jetson Orin"), ("SM110", "Jetson Thor"), ("sm90", "Hopper"), ("sm100", "Blackwell")],
)
def test_what_must_be_built_elsewhere_is_told_how(name: str, machine: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_engine(b"", compute_capabilities=["sm86", name], profiles={})
    text = str(caught.value)
    assert f"has no target {name.lower()} ({machine}" in text
    assert "run: python3 build_engine.py" in text


def test_the_targets_are_those_of_the_bindings(tensorrt: None) -> None:
    code = (
        "from edgekit_tensorrt.bindings import load\n"
        "print(*getattr(load().module, 'ComputeCapability').__members__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = {name.lower() for name in ran.stdout.split()} - {"none", "current"}
    assert known == set(COMPUTE_CAPABILITIES)


def test_time_runs_out(model: bytes) -> None:
    begun = time.monotonic()
    with pytest.raises(RuntimeFailed, match=r"stopped after 0\.02 seconds, its limit\.$"):
        parse_onnx(model, seconds=0.02)
    with pytest.raises(RuntimeFailed, match=r"0\.02 seconds.*--tensorrt-build-seconds"):
        build_engine(model, compute_capabilities=["sm86"], profiles={}, seconds=0.02)
    assert time.monotonic() - begun < 5


def test_memory_runs_out(model: bytes) -> None:
    with pytest.raises(RuntimeFailed, match=r"needs more than 0\.01 GB of memory, its limit\.$"):
        parse_onnx(model, memory_gb=0.01)
    with pytest.raises(RuntimeFailed, match=r"0\.01 GB.*--tensorrt-build-memory"):
        build_engine(model, compute_capabilities=["sm86"], profiles={}, memory_gb=0.01)


def test_a_child_that_ends_early_is_one_sentence(
    model: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interpreter is replaced by one that does what a crash would."""
    for script, sentence in (
        ("echo 'Internal Error: lost' >&2; kill -SEGV $$", "signal SIGSEGV: Internal Error: lost"),
        ("kill -KILL $$", "signal SIGKILL, which Linux sends where memory runs out"),
        ("echo one; echo two; exit 3", "exit code 3: two"),
        ("exit 0", "exit code 0"),
    ):
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))
        with pytest.raises(RuntimeFailed) as caught:
            parse_onnx(model)
        expected = f"tensorrt could not load the model: its process ended with {sentence}."
        assert str(caught.value) == expected


def test_without_bindings_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "installed", lambda: False)
    with pytest.raises(MissingRuntime, match=r"pip install 'edgekit-sdk\[tensorrt\]'"):
        parse_onnx(b"")


def test_nothing_stays_on_disk(
    model: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parsed = parse_onnx(model)
    assert list(tmp_path.iterdir()) == []
    assert parsed.network is not None
    kernel = parsed.network.layers[0].weights["kernel"].values
    assert kernel is not None
    assert np.isfinite(kernel).all()
