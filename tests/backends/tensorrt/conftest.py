"""Models of many small ops, run by ONNX Runtime and by the interpreter of NVIDIA's network.

One child process parses them all: that costs far more than the ops themselves.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import ArrayLike, NDArray
from onnx import helper, numpy_helper

from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.network import Network
from edgekit_tensorrt.processes import parse_onnx

Array = NDArray[Any]
MODULES = ("tensorrt", "tensorrt_rtx_bindings")


@dataclass(frozen=True)
class Constant:
    """An argument that is part of the model."""

    value: Array


Argument = Array | Constant | str | None  # a name is another op's output


class Ops:
    """One model of ops side by side; each argument is an input, a constant or left out."""

    def __init__(self, opset: int = 20) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, Array] = {}
        self.constants: dict[str, Array] = {}
        self.outputs: list[str] = []

    def add(
        self, operator: str, *arguments: Argument, outputs: int = 1, **attributes: Any
    ) -> list[str]:
        """Add one op; returns the names of its outputs, which are outputs of the model."""
        names = self.inner(operator, *arguments, outputs=outputs, **attributes)
        self.outputs += names
        return names

    def inner(
        self, operator: str, *arguments: Argument, outputs: int = 1, **attributes: Any
    ) -> list[str]:
        """Add one op whose outputs stay inside."""
        number = len(self.nodes)
        names = []
        for index, argument in enumerate(arguments):
            name = f"{operator}{number}_in{index}"
            if argument is None:
                name = ""
            elif isinstance(argument, str):
                name = argument
            elif isinstance(argument, Constant):
                self.constants[name] = argument.value
            else:
                self.inputs[name] = argument
            names.append(name)
        results = [f"{operator}{number}_out{index}" for index in range(outputs)]
        node = helper.make_node(operator, names, results, name=f"{operator}{number}", **attributes)
        self.nodes.append(node)
        return results

    @staticmethod
    def constant(value: ArrayLike, dtype: str = "float32") -> Constant:
        return Constant(np.asarray(value, dtype=dtype))

    @staticmethod
    def normal(*shape: int, seed: int = 0) -> Array:
        """Float32 numbers, the same for the same shape and seed."""
        generator = np.random.default_rng([seed, *shape])
        return generator.standard_normal(shape).astype(np.float32)

    def model(self) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "ops",
            [_value_info(name, array) for name, array in self.inputs.items()],
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        for output in inferred.graph.output:  # of some functions nothing is inferred
            kind = output.type.tensor_type
            kind.elem_type = kind.elem_type or onnx.TensorProto.FLOAT
        content: bytes = inferred.SerializeToString()
        return content

    def check(self, tolerance: float = 1e-5) -> Network:
        """Both runs agree on every output; the parsed network, for a closer look."""
        assert self.outputs
        return same_as_onnxruntime(self.model(), self.inputs, tolerance)


def _value_info(name: str, array: Array) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, dtype, array.shape)


def network_of(model: bytes) -> Network:
    """What the parser makes of a model that it must accept."""
    parsed = parse_onnx(model)
    assert not parsed.errors, [str(error) for error in parsed.errors]
    assert parsed.network is not None
    return parsed.network


def onnxruntime_run(model: bytes, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The reference, without any fusion."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def same_as_onnxruntime(
    model: bytes, feeds: Mapping[str, Array], tolerance: float = 1e-5
) -> Network:
    network = network_of(model)
    same(NetworkInterpreter(network), feeds, onnxruntime_run(model, feeds), tolerance)
    return network


def same(
    interpreter: NetworkInterpreter,
    feeds: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: float,
) -> None:
    """Every output has the dtype and the shape expected, and values within the tolerance."""
    assert interpreter.unknown == ()
    found = interpreter.run(feeds)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(
            found[name].astype(np.float64),
            value.astype(np.float64),
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )


@pytest.fixture(scope="session")
def tensorrt() -> None:
    """Skips where NVIDIA's bindings are missing, unless they must be there."""
    required = "tensorrt" in os.environ.get("EDGEKIT_REQUIRED", "").split(",")
    if not required and not any(importlib.util.find_spec(name) for name in MODULES):
        pytest.skip("NVIDIA's bindings are not installed")


@pytest.fixture(scope="session")
def ops(tensorrt: None) -> type[Ops]:
    return Ops


@pytest.fixture(scope="session")
def check_model(tensorrt: None) -> Callable[..., Network]:
    return same_as_onnxruntime


@pytest.fixture(scope="session")
def parse_network(tensorrt: None) -> Callable[[bytes], Network]:
    return network_of
