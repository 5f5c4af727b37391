"""A ``tensorrt`` for tests of decoding: the calls of 10.3, the work done by ONNX Runtime.

An "engine" is JSON: where the model lies, and the profile it was built with. A context reads its
inputs from the addresses it was given and writes its outputs there, as on a device, whose memory
the stub of CUDA's runtime keeps. A shape outside the profile is refused.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__version__ = "10.3.0"
_NAMES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int32)": "INT32"}
_DTYPES = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int32)": "i4"}


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    TF32 = 6


class MemoryPoolType(Enum):
    WORKSPACE = 0


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3


class ILogger:
    pass


def _opened(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Tensor:
    def __init__(self, value: Any) -> None:
        self.name = value.name
        self.shape = tuple(-1 if isinstance(size, str) else size for size in value.shape)


class Network:
    path = ""

    def _inputs(self) -> Any:
        return _opened(self.path).get_inputs()

    @property
    def num_inputs(self) -> int:
        return len(self._inputs())

    @property
    def num_outputs(self) -> int:
        return len(_opened(self.path).get_outputs())

    def get_input(self, index: int) -> Tensor:
        return Tensor(self._inputs()[index])


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network

    def parse(self, model: bytes, path: str) -> bool:
        self._network.path = path
        return Path(path).read_bytes() == model


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [min, opt, max]


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []

    def clear_flag(self, flag: BuilderFlag) -> None:
        pass

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        pass

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return 0


class Builder:
    def __init__(self, logger: ILogger) -> None:
        pass

    def create_network(self, flags: int = 0) -> Network:
        assert flags == 2, "strongly typed"
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        (profile,) = config.profiles
        return json.dumps({"path": network.path, "shapes": profile.shapes}).encode()


class Engine:
    def __init__(self, path: str, shapes: dict[str, Any]) -> None:
        self.session, self.shapes = _opened(path), shapes
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.values = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return str([*self.values][index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_NAMES[self.values[name].type]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._cuda = ctypes.CDLL("libcudart.so.12")  # the one that is loaded already

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.shapes[name]
        self._shapes[name] = shape
        return len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return bool(self._cuda.fake_on_device(ctypes.c_void_p(memory)))

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_DTYPES[self._engine.values[name].type])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(self._addresses[name]))
        return np.frombuffer(memory.cast("B"), dtype).reshape(shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._cuda.fake_flush()  # what was copied before on the stream has arrived
        feeds = {name: self._array(name, self._shapes[name]) for name in self._engine.inputs}
        names = [*self._engine.outputs]
        answers = self._engine.session.run(names, feeds)
        for name, answer in zip(names, answers, strict=True):
            self._array(name, answer.shape)[...] = answer
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine:
        return Engine(**json.loads(serialized_engine))
