"""The child process alone: a request file in, files out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgekit_tensorrt.network import duplicate_names, lost_inputs, read_network, topological_order
from edgekit_tensorrt.worker import _add_profile, _strongly_typed

if TYPE_CHECKING:
    from tests.backends.tensorrt.conftest import Ops

Work = Callable[..., dict[str, Any]]


@pytest.fixture
def work(tensorrt: None, tmp_path: Path) -> Work:
    """Run one job on a model; what ``result.json`` holds."""

    def run(job: str, model: bytes, **more: object) -> dict[str, Any]:
        (tmp_path / "model.onnx").write_bytes(model)
        request = {"job": job, "model": str(tmp_path / "model.onnx"), "folder": str(tmp_path)}
        common = {"profiles": {}, "workspace_bytes": 1 << 30}
        (tmp_path / "request.json").write_text(json.dumps({**request, **common, **more}))
        command = [sys.executable, "-m", "edgekit_tensorrt.worker", str(tmp_path / "request.json")]
        subprocess.run(command, check=True, cwd=tmp_path)
        result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
        return result

    return run


def test_a_parsed_network_is_left_as_files(ops: type[Ops], work: Work, tmp_path: Path) -> None:
    graph = ops()
    weight = ops.constant(ops.normal(4, 3, 3, 3))
    (a,) = graph.inner("Conv", ops.normal(1, 3, 8, 8), weight, strides=[2, 1])
    (b,) = graph.inner("Relu", a)
    graph.add("MaxPool", b, kernel_shape=[2, 2])
    result = work("parse", graph.model())
    assert result["runtime"].startswith("tensorrt")
    assert result["warnings"] == []
    network = read_network(tmp_path)
    convolution, activation, pooling = topological_order(network)
    assert convolution.attributes["stride_nd"] == [2, 1]
    kernel = convolution.weights["kernel"]
    assert (kernel.dtype, kernel.count) == ("FLOAT", 108)
    assert kernel.values is not None
    np.testing.assert_array_equal(kernel.values, weight.value.ravel())
    # These two classes reuse "type"; the layer's kind must not be lost over it.
    assert (activation.kind, activation.attributes["type"]) == ("ACTIVATION", "RELU")
    assert (pooling.kind, pooling.attributes["type"]) == ("POOLING", "MAX")
    assert "[ONNX Layer: Conv0]" in convolution.metadata
    assert lost_inputs(network) == duplicate_names(network) == ()


def test_reading_the_network_adds_no_warnings(ops: type[Ops], work: Work) -> None:
    """Asking a layer for what it takes from an input makes the libraries warn."""
    graph = ops()
    graph.add("Trilu", ops.normal(3, 3))
    assert work("parse", graph.model())["warnings"] == []


def test_an_input_that_the_parser_drops(ops: type[Ops], work: Work, tmp_path: Path) -> None:
    """Attention-24 knows the lengths of keys and values; the parser ignores them."""
    graph = ops(24)
    query = ops.normal(1, 2, 4, 8)
    lengths = np.array([3])
    graph.add("Attention", query, query, query, None, None, None, lengths)
    work("parse", graph.model())
    assert lost_inputs(read_network(tmp_path)) == ("Attention0_in6",)


def test_every_unknown_operator_is_reported(ops: type[Ops], work: Work) -> None:
    graph = ops()
    graph.add("Det", ops.normal(2, 2))
    graph.add("Unique", ops.normal(4))
    result = work("parse", graph.model())
    assert result["failed"] == "parse"
    found = [(error["code"], error["operator"], error["node"]) for error in result["errors"]]
    assert found == [("UNSUPPORTED_NODE", "Det", "Det0"), ("UNSUPPORTED_NODE", "Unique", "Unique1")]


def test_a_build_leaves_an_engine_and_its_kernels(
    ops: type[Ops], work: Work, tmp_path: Path
) -> None:
    graph = ops()
    graph.add("Relu", ops.normal(2, 3))
    result = work("build", graph.model(), compute_capabilities=["sm86", "sm120"])
    assert result["seconds"] > 0
    assert result["layers"].startswith("Layers:\nName: ")
    assert (tmp_path / "engine.bin").read_bytes()[:4] == b"vtrt"


def test_a_target_that_these_bindings_lack(ops: type[Ops], work: Work) -> None:
    graph = ops()
    graph.add("Relu", ops.normal(2, 3))
    result = work("build", graph.model(), compute_capabilities=["sm999"])
    assert result["failed"] == "targets"
    assert "has no target sm999" in result["messages"][0]


def test_a_profile_that_is_false_is_refused() -> None:
    """Contradicting ranges raise nothing in any version."""

    class Profile:
        def set_shape(self, *shapes: object) -> None: ...

        def __bool__(self) -> bool:
            return False

    varying = SimpleNamespace(name="x", shape=(-1, 4))
    definition = SimpleNamespace(num_inputs=1, get_input=lambda index: varying)
    builder = SimpleNamespace(create_optimization_profile=Profile)
    config = SimpleNamespace(add_optimization_profile=lambda profile: 0)
    ranges = {"x": [[3, 4], [2, 4], [1, 4]]}
    assert "contradict" in _add_profile(builder, config, definition, ranges)


def test_the_flag_of_strong_types_is_a_bit_that_versions_disagree_on() -> None:
    for bit in (0, 1):
        flags = SimpleNamespace(STRONGLY_TYPED=bit)
        module = SimpleNamespace(NetworkDefinitionCreationFlag=flags)
        assert _strongly_typed(module) == 1 << bit
    assert _strongly_typed(SimpleNamespace(NetworkDefinitionCreationFlag=None)) == 0
