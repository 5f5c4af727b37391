"""A ``tensorrt`` without TensorRT, for tests of build_engine.py: the calls are those of 10.3.

Its "ONNX" is JSON: names, shapes and dtypes. Every engine of it answers ``scores = 2 x``,
``ids_output = ids + 1`` and ``positive = x[:, 0] > 0``, in memory that libcudart's stub keeps.
FAKE_FAULT plants one fault; an engine's bytes tell how it was built.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__ = "10.3.0"
FAULT = os.environ.get("FAKE_FAULT", "")
if FAULT == "import":
    raise ImportError("libnvinfer.so.10: cannot open shared object file")
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "BOOL": "bool", "BF16": "int16"}


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    FP16 = 0
    TF32 = 6


class MemoryPoolType(Enum):
    WORKSPACE = 0


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8
    BOOL = 4
    BF16 = 7


class Severity(Enum):
    ERROR = 1
    INFO = 3


class ILogger:
    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Tensor:
    def __init__(self, field: dict[str, Any]) -> None:
        self.name: str = field["name"]
        self.shape = tuple(field["shape"])


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.model: dict[str, Any] = {"inputs": [], "outputs": []}

    @property
    def num_outputs(self) -> int:
        return len(self.model["outputs"])

    @property
    def num_inputs(self) -> int:
        return len(self.model["inputs"])

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.model["inputs"][index])


class ParserError:
    def __init__(self, name: str, operator: str, desc: str) -> None:
        self._name, self._operator, self._desc = name, operator, desc

    def node(self) -> int:
        return 7

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def desc(self) -> str:
        return self._desc


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        if FAULT == "parse":
            self._errors.append(ParserError("node_Det_3", "Det", "no importer registered"))
            self._errors.append(ParserError("", "Unique", "no importer registered"))
            return False
        if FAULT != "no outputs":  # as the real one: garbage is no error
            self._network.model = json.loads(model)
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        if FAULT == "range":
            raise ValueError("Shape provided for min is inconsistent with other shapes.")
        self.shapes[input] = [min, opt, max]


class Config:
    def __init__(self) -> None:
        self.flags = {"TF32"}  # on, as in the real one
        self.workspace = 0
        self.profiles: list[Profile] = []

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.workspace = pool_size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return -1 if FAULT == "profile" else 0


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        logger.log(Severity.INFO, "not an error")
        if FAULT == "builder":
            logger.log(Severity.ERROR, "createInferBuilder: CUDA initialization failure: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int = 0) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        if FAULT == "build":
            self._logger.log(Severity.ERROR, "Cuda Runtime (out of memory)")
            return None
        (shapes,) = [profile.shapes for profile in config.profiles] or [{}]
        built = {
            **network.model,
            "network flags": network.flags,
            "flags": sorted(config.flags),
            "workspace": config.workspace,
            "shapes": shapes,
        }
        return json.dumps(built).encode()


class Engine:
    def __init__(self, model: dict[str, Any]) -> None:
        self.fields = [*model["inputs"], *model["outputs"]]
        self._inputs = len(model["inputs"])
        self.num_io_tensors = len(self.fields)

    def field(self, name: str) -> dict[str, Any]:
        return next(field for field in self.fields if field["name"] == name)

    def get_tensor_name(self, index: int) -> str:
        return str(self.fields[index]["name"])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = [field["name"] for field in self.fields[: self._inputs]]
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.BF16 if FAULT == "dtype" else DataType[self.field(name)["dtype"]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if FAULT == "location" else TensorLocation.DEVICE

    def create_execution_context(self) -> Context | None:
        return None if FAULT == "context" else Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._batch = 0
        self._addresses: dict[str, int] = {}
        self._cuda = ctypes.CDLL("libcudart.so.12")  # the one that is loaded already

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._batch = shape[0]
        return FAULT != "shape"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if FAULT == "data-dependent":
            return (-1, 4)
        return (self._batch, *self._engine.field(name)["shape"][1:])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return bool(self._cuda.fake_on_device(ctypes.c_void_p(memory)))

    def _array(self, name: str) -> NDArray[Any]:
        dtype = np.dtype(_NUMPY[self._engine.field(name)["dtype"]])
        shape = self.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(self._addresses[name]))
        return np.frombuffer(memory.cast("B"), dtype).reshape(shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if FAULT == "execute":
            return False
        self._cuda.fake_flush()  # what was copied before on the stream has arrived
        self._cuda.fake_work()
        x, ids = self._array("x"), self._array("ids")
        scores = self._array("scores")
        scores[...] = 2 * x
        if FAULT == "one element":
            scores[-1, -1] += 1
        if FAULT == "nan":
            scores[0, 0] = np.nan
        self._array("ids_output")[...] = ids + 1
        self._array("positive")[...] = x[:, 0] > 0
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._log: Callable[[Severity, str], None] = logger.log

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        if FAULT == "load":
            self._log(Severity.ERROR, "IRuntime::deserializeCudaEngine: version mismatch")
            return None
        return Engine(json.loads(serialized_engine))
