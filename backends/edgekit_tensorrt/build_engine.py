"""Builds the TensorRT engine on the device it is for, proves it there, and times it.

Run it in the artifact's folder of a bundle, on the Jetson or PC with the GPU:

    python3 build_engine.py

It needs Python 3.10, numpy and TensorRT's own Python module, all of which JetPack 6 has. It builds
``model.<device>.engine`` from ``model.onnx``, runs the bundle's samples, compares every number with
the eager model's, and writes ``on-device.json`` and ``perf.json`` beside it. An engine that answers
wrongly is not kept. Exit code: 0 proven, 1 not proven, 3 not possible here, 4 damaged bundle.
A model exported with ``--precision any`` can be built at fewer bits: ``--bits 4``, and by layer
``--bits 4,head=8``. Such an engine is kept, and how far it is off is printed and not judged.

``build`` and ``Engine`` do the same from Python, with ``tensorrt`` 10.3 to 11.4 and with
``tensorrt_rtx`` 1.7. Members of enums are used by name: their numbers differ between versions.
It is one file, long as it is, because a bundle carries it to devices that have nothing of edgekit.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import importlib
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

if sys.version_info < (3, 10):  # noqa: UP036  (the devices' Python, not the host's)
    print("build_engine.py needs Python 3.10 or newer; JetPack 6 has it.", file=sys.stderr)
    raise SystemExit(3)
if __package__:
    from edgekit import evidence
else:  # a script in a bundle: the copy beside it, whose hash the manifest holds
    sys.dont_write_bytecode = True  # a bundle holds what was exported and nothing else
    try:
        import evidence  # type: ignore[import-not-found,no-redef]
    except ImportError as missing:
        print(
            f"build_engine.py needs numpy, and evidence.py beside it ({missing}); run it in the "
            "artifact's folder of a bundle, after: sudo apt-get install python3-numpy",
            file=sys.stderr,
        )
        raise SystemExit(3) from None

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = Sequence[int]
Profiles = Mapping[str, tuple[Shape, Shape, Shape]]  # input: smallest, most usual, largest
WARM_UP = 20
# TensorRT's name of a dtype and numpy's; an engine with others at its edge is refused.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapability...
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def bindings() -> Any:
    """TensorRT's Python module, or TensorRT-RTX's. Raises ``NotPossible``."""
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as cause:  # OSError: a library of it does not load
            reasons.append(f"{name}: {cause}")
    raise evidence.NotPossible(
        f"TensorRT's Python module does not load ({'; '.join(reasons)}). On a Jetson run: sudo "
        "apt-get install python3-libnvinfer (a virtual environment sees it if it was made with "
        "--system-site-packages); elsewhere: pip install tensorrt"
    )


@cache
def _logger(trt: Any) -> Any:
    """The process's one logger (TensorRT keeps the first it is given): errors by their text."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR"):
                self.errors.append(msg.strip())

    return Logger()


def _refusal(trt: Any, what: str) -> evidence.NotPossible:
    """The error for something that TensorRT refused, with all that it said."""
    reasons = list(dict.fromkeys(_logger(trt).errors)) or ["it gave no reason"]
    return evidence.NotPossible("\n  - ".join([f"TensorRT {trt.__version__} {what}:", *reasons]))


def build(
    onnx: bytes,
    profiles: Profiles,
    *,
    workspace_mb: int | None = None,
    path: Path | None = None,
    target: str = "CURRENT",
    trt: Any = None,
) -> bytes:
    """The engine of an ONNX model, for this device. Raises ``NotPossible``.

    ``profiles`` gives the shapes of inputs with free dims; ``path`` is where the model lies, if
    its weights are in files of their own. ``target`` is for TensorRT-RTX alone, which can build
    for a GPU that is not here ("SM86"). ``trt`` is the module to use, if not the one installed.
    """
    trt = trt or bindings()
    logger = _logger(trt)
    logger.errors.clear()
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as cause:  # what a constructor that gives nothing becomes
        raise _refusal(trt, f"cannot build here ({cause})") from cause
    network = _parse(trt, builder, onnx, path)
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # else float32 convolutions keep 10 bits
    if workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    if hasattr(trt, "ComputeCapability"):  # without it, RTX builds for five GPUs at once
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, target), 0):
            raise _refusal(trt, f"cannot build for {target}")
    _add_profile(trt, builder, network, config, profiles)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refusal(trt, "could not build the engine")
    return bytes(plan)


def _parse(trt: Any, builder: Any, onnx: bytes, path: Path | None) -> Any:
    """The network, in the precisions that are written in the model."""
    flag = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, _logger(trt))
    parsed = parser.parse(onnx, str(path)) if path else parser.parse(onnx)
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = [
        f"node {error.node_name() or error.node()} ({error.node_operator() or 'unknown op'}): "
        f"{error.desc()}"
        for error in errors
    ]
    # Bytes that are no ONNX at all parse without an error, to an empty network.
    if not lines and not (parsed and network.num_outputs):
        lines = _logger(trt).errors or ["it found no outputs; the file is no ONNX model"]
    if lines:
        _logger(trt).errors[:] = lines
        raise _refusal(trt, "cannot take the model")
    return network


def _add_profile(trt: Any, builder: Any, network: Any, config: Any, profiles: Profiles) -> None:
    """One profile over the whole range: each more would hold the weights once again."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    names = [tensor.name for tensor in tensors if -1 in tuple(tensor.shape)]
    if not names:
        return
    profile = builder.create_optimization_profile()
    for name in names:
        if name not in profiles:
            raise evidence.NotPossible(f"input {name!r} has free dims and no range for them.")
        low, usual, high = (tuple(shape) for shape in profiles[name])
        try:
            profile.set_shape(name, low, usual, high)
        except ValueError as cause:
            raise evidence.NotPossible(f"input {name!r} cannot have that range: {cause}") from cause
    if config.add_optimization_profile(profile) < 0:
        raise _refusal(trt, f"refused the range of {', '.join(names)}")


def profiles_of(inputs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, middle and largest shape of each input of a manifest."""
    return {
        spec["name"]: (
            [dim["min"] if isinstance(dim, dict) else dim for dim in spec["shape"]],
            [
                (dim["min"] + dim["max"]) // 2 if isinstance(dim, dict) else dim
                for dim in spec["shape"]
            ],
            [dim["max"] if isinstance(dim, dict) else dim for dim in spec["shape"]],
        )
        for spec in inputs
    }


def renamed(answer: Mapping[str, Array], manifest: Mapping[str, Any]) -> dict[str, Array]:
    """An engine's outputs under the manifest's names.

    ONNX has one space of names: an output called like an input has ``_output`` after it there.
    """
    inputs = {spec["name"] for spec in manifest["inputs"]}
    names = [spec["name"] for spec in manifest["outputs"]]
    known = {f"{name}_output" if name in inputs else name: name for name in names}
    return {known[name]: array for name, array in answer.items() if name in known}


class Cuda:
    """The CUDA runtime, called as C: no device need have cuda-python."""

    def __init__(self) -> None:
        refusals: list[str] = []
        for name in _cudart_names():
            try:
                self._library = ctypes.CDLL(name)
            except OSError:  # most of the places have none
                continue
            try:
                count = self.integer("cudaGetDeviceCount")
                self("cudaSetDevice", 0)
            except evidence.NotPossible as cause:
                refusals.append(str(cause))
                continue
            if count:
                return
        why = " ".join(dict.fromkeys(refusals)) or "libcudart was not found, nor a device by it."
        raise evidence.NotPossible(f"There is no CUDA device that can be used here: {why}")

    def __call__(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = self._library.cudaGetErrorString
            text.restype = ctypes.c_char_p
            more = "; close what else uses its memory" if code == OUT_OF_MEMORY else ""
            raise evidence.NotPossible(
                f"the GPU gave up at {name}: {text(code).decode()} (error {code}){more}."
            )

    def integer(self, name: str, *arguments: object) -> int:
        """What a function writes to its first argument, an int."""
        self(name, ctypes.byref(value := ctypes.c_int()), *arguments)
        return value.value

    def handle(self, name: str, *arguments: object) -> int:
        """The same for a pointer: memory, a stream or an event."""
        self(name, ctypes.byref(value := ctypes.c_void_p()), *arguments)
        return value.value or 0

    def release(self, name: str, handle: int) -> None:
        """Give back; a failure is no news, for a broken device refuses everything."""
        getattr(self._library, name)(_pointer(handle))

    def device_name(self) -> str:
        """As CUDA calls it: ``Orin``. In every version the name opens the properties."""
        properties = ctypes.create_string_buffer(1 << 14)
        self("cudaGetDeviceProperties", properties, 0)
        return properties.raw[:256].split(b"\0")[0].decode()

    def milliseconds(self, start: int, end: int) -> float:
        """Between two events that have passed."""
        value = ctypes.c_float()
        self("cudaEventElapsedTime", ctypes.byref(value), _pointer(start), _pointer(end))
        return value.value


def _cudart_names() -> list[str]:
    """Where a CUDA runtime may be: known to the loader, in CUDA's folder, in a package."""
    names = [f"libcudart.so{version}" for version in (".13", ".12", "")]
    folders = ["/usr/local/cuda/lib64", *(os.path.join(p, "nvidia", "*", "lib") for p in sys.path)]
    for folder in folders:
        names += sorted(glob.glob(os.path.join(folder, "libcudart.so.*")), reverse=True)
    return names


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)  # a bare int would be cut to 32 bits


class Times(NamedTuple):
    """Milliseconds of each run: as seen from numpy, and on the GPU without the copies."""

    with_copies: list[float]
    gpu: list[float]


class Engine:
    """An engine opened for running: numpy in, numpy out. Raises ``NotPossible``."""

    def __init__(self, engine: bytes, trt: Any = None) -> None:
        self._bytes = engine
        self._trt = trt or bindings()
        self._memory: dict[str, tuple[int, int]] = {}  # name: address, size
        self._handles: list[tuple[str, int]] = []  # function that frees it, handle

    def __enter__(self) -> Engine:
        trt = self._trt
        self._cuda = Cuda()
        logger = _logger(trt)
        logger.errors.clear()
        # Kept, since TensorRT wants the runtime to outlive its engine.
        self._runtime = runtime = trt.Runtime(logger)
        self._engine = engine = runtime.deserialize_cuda_engine(self._bytes)
        if engine is None:
            raise _refusal(trt, "could not load the engine")
        self._context = engine.create_execution_context()
        if self._context is None:
            raise _refusal(trt, "could not make room to run the engine")
        self.inputs, self.outputs = self._edges(trt, engine)
        try:
            self._stream = self._make("cudaStreamCreate", "cudaStreamDestroy")
            self._start = self._make("cudaEventCreate", "cudaEventDestroy")
            self._end = self._make("cudaEventCreate", "cudaEventDestroy")
        except BaseException:
            self._free()
            raise
        return self

    def _edges(self, trt: Any, engine: Any) -> tuple[dict[str, str], dict[str, str]]:
        """Names and numpy dtypes of what goes in and what comes out."""
        inputs: dict[str, str] = {}
        outputs: dict[str, str] = {}
        for name in [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]:
            kind = engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise evidence.NotPossible(f"{name!r} is {kind}, which numpy does not have.")
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise evidence.NotPossible(f"{name!r} decides shapes; that is not supported.")
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = DTYPES[kind]
        return inputs, outputs

    def _make(self, maker: str, destroyer: str) -> int:
        handle = self._cuda.handle(maker)
        self._handles.append((destroyer, handle))
        return handle

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._free()

    def _free(self) -> None:
        self._context = self._engine = self._runtime = None  # in this order
        for address, _ in self._memory.values():
            self._cuda.release("cudaFree", address)
        for destroyer, handle in reversed(self._handles):
            self._cuda.release(destroyer, handle)
        self._memory, self._handles = {}, []

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in the engine's dtypes; they belong to the caller."""
        feeds, outputs = self._bind(arrays)
        self._run(feeds, outputs)
        return outputs

    def time(self, arrays: Mapping[str, Array], runs: int = 100) -> Times:
        """Run again and again, after a warm-up, with and without the copies."""
        feeds, outputs = self._bind(arrays)
        for _ in range(WARM_UP):
            self._run(feeds, outputs)
        times = Times([], [])
        for _ in range(runs):
            began = time.perf_counter()
            self._run(feeds, outputs)
            times.with_copies.append(1e3 * (time.perf_counter() - began))
        for _ in range(runs):
            self._cuda("cudaEventRecord", _pointer(self._start), _pointer(self._stream))
            self._execute()
            self._cuda("cudaEventRecord", _pointer(self._end), _pointer(self._stream))
            self._cuda("cudaEventSynchronize", _pointer(self._end))
            times.gpu.append(self._cuda.milliseconds(self._start, self._end))
        return times

    def _bind(self, arrays: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Inputs as the engine wants them, arrays for its outputs, memory for both set up."""
        context = self._context
        feeds = {name: _feed(name, arrays, dtype) for name, dtype in self.inputs.items()}
        for name, array in feeds.items():
            if not context.set_input_shape(name, tuple(array.shape)):
                raise _refusal(self._trt, f"refused input {name!r} of shape {array.shape}")
        outputs = {}
        for name, dtype in self.outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            if -1 in shape:
                raise evidence.NotPossible(f"the size of {name!r} depends on values.")
            outputs[name] = np.empty(shape, dtype)
        for name, array in {**feeds, **outputs}.items():
            if not context.set_tensor_address(name, self._allocate(name, array.nbytes)):
                raise _refusal(self._trt, f"refused the memory of {name!r}")
        return feeds, outputs

    def _allocate(self, name: str, size: int) -> int:
        address, held = self._memory.get(name, (0, -1))
        if held < size:
            if name in self._memory:
                self._cuda("cudaFree", _pointer(self._memory.pop(name)[0]))
            wanted = max(size, 1)  # CUDA gives no address for nothing
            address = self._cuda.handle("cudaMalloc", ctypes.c_size_t(wanted))
            self._memory[name] = address, wanted
        return address

    def _run(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        stream = _pointer(self._stream)
        for name, array in feeds.items():
            source, size = _pointer(array.ctypes.data), ctypes.c_size_t(array.nbytes)
            place = _pointer(self._memory[name][0])
            self._cuda("cudaMemcpyAsync", place, source, size, TO_DEVICE, stream)
        self._execute()
        for name, array in outputs.items():
            target, size = _pointer(array.ctypes.data), ctypes.c_size_t(array.nbytes)
            place = _pointer(self._memory[name][0])
            self._cuda("cudaMemcpyAsync", target, place, size, TO_HOST, stream)
        self._cuda("cudaStreamSynchronize", stream)

    def _execute(self) -> None:
        context = self._context
        if not context.execute_async_v3(self._stream):
            raise _refusal(self._trt, "could not run the engine")


def _feed(name: str, arrays: Mapping[str, Array], dtype: str) -> Array:
    if name not in arrays:
        raise evidence.NotPossible(f"input {name!r} of the engine is not among the samples'.")
    array = np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
    cast = array.astype(dtype)
    if cast.dtype.kind != "f" and not np.array_equal(cast, array):
        raise evidence.NotPossible(f"input {name!r} holds values that {dtype} cannot.")
    return cast


def describe(cuda: Cuda, trt: Any) -> dict[str, object]:
    """This device, for the proof: what decides which kernels TensorRT picks, and how fast."""
    gpu, board = cuda.device_name(), _text("/proc/device-tree/model")
    capability = [cuda.integer("cudaDeviceGetAttribute", which, 0) for which in (MAJOR, MINOR)]
    return {
        **evidence.this_machine(),
        "processor": board or gpu,
        "gpu": f"{gpu}, sm_{capability[0]}{capability[1]}",
        trt.__name__: str(trt.__version__),
        "cuda_runtime": cuda.integer("cudaRuntimeGetVersion"),
        "cuda_driver": cuda.integer("cudaDriverGetVersion"),
        # Jetsons: the release of their Linux, and the power mode, which sets the clocks.
        "release": _text("/etc/nv_tegra_release").split("\n")[0],
        "power_mode": _text("/var/lib/nvpmodel/status"),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:  # no Jetson
        return ""


def bits(text: str) -> dict[str, int]:
    """An option's value: ``4``, or ``4,head=8``; "" are the layers that are not named."""
    asked = {"": 8}
    for part in text.split(","):
        name, _, width = part.rpartition("=")
        if width not in ("8", "6", "4", "2"):
            raise argparse.ArgumentTypeError(f"{part!r} is no width: 8, 6, 4, 2, or head=8")
        asked[name] = int(width)
    return asked


def at_bits(onnx: bytes, codes: Mapping[str, Any], asked: Mapping[str, int]) -> bytes:
    """The model with its 8-bit codes rounded to other widths, at the scales they have.

    ``codes`` is what the manifest says of them. A name in ``asked`` means a layer and those
    inside it. Raises ``NotPossible``.
    """
    rounding = importlib.import_module("edgekit.rounding" if __package__ else "rounding")
    widths = {}
    for layer in dict.fromkeys(place["layer"] for place in codes["places"]):
        names = [name for name in asked if not name or f"{layer}.".startswith(f"{name}.")]
        widths[layer] = asked[max(names, key=len)]
    for name in asked:
        if name and not any(f"{layer}.".startswith(f"{name}.") for layer in widths):
            known = ", ".join(widths)
            raise evidence.NotPossible(f"there is no layer {name!r} with codes; there is: {known}.")
    files = {place["file"]: onnx for place in codes["places"]}
    changed: dict[str, bytes] = rounding.rewritten(
        files, codes["places"], widths, codes["rounding"]
    )
    return changed.popitem()[1]


def _build_and_prove(folder: Path, options: argparse.Namespace) -> int:
    shipped = evidence.open_shipped(folder)
    model = folder / shipped.entry["main"]
    content = model.read_bytes()
    if options.bits:
        if "codes" not in shipped.entry["provenance"]:
            raise evidence.NotPossible(
                f"{folder.name} has one bit-width; export the model with --precision any for more."
            )
        content = at_bits(content, shipped.entry["provenance"]["codes"], options.bits)
    cuda, trt = Cuda(), bindings()
    device = describe(cuda, trt)
    began = time.perf_counter()
    plan = build(
        content,
        profiles_of(shipped.manifest["inputs"]),
        workspace_mb=options.workspace_mb,
        path=model,
        trt=trt,
    )
    print(f"Built in {time.perf_counter() - began:.1f} s for {device['processor']}.")
    slug = re.sub(r"[^a-z0-9]+", "-", str(device["processor"]).lower()).strip("-")
    narrow = [f"{name}{width}" for name, width in (options.bits or {}).items()]
    slug += f".bits-{'-'.join(narrow)}" if narrow else ""
    place = model.with_name(f"{model.stem}.{slug}.engine")
    judged = set((options.bits or {"": 8}).values()) == {8}
    code = 0
    if not options.engine_only:
        code = _prove(shipped, plan, device, trt, options.runs, judged=judged)
    if code:
        print(f"{place.name} was not kept.", file=sys.stderr)
    else:
        evidence.write_beside(place, plan)
        print(f"{place.name}: {len(plan) / 1e6:.2f} MB")
    return code


def _prove(
    shipped: evidence.Shipped,
    plan: bytes,
    device: Mapping[str, object],
    trt: Any,
    runs: int,
    *,
    judged: bool,
) -> int:
    """Run the samples, compare, time; write what was found, if it is to be judged, and print it."""
    began = time.perf_counter()
    with Engine(plan, trt) as opened:
        load_ms = 1e3 * (time.perf_counter() - began)
        answers = [renamed(opened.run(sample), shipped.manifest) for sample in shipped.samples]
        got = [shipped.as_declared(answer) for answer in answers]
        proof = shipped.prove(got, device)
        times = Times([], [])
        if proof["passed"] or not judged:
            times = opened.time(shipped.samples[0], runs)
    name = str(device["processor"])
    trial = evidence.Trial(name, proof, times.with_copies, load_ms, {"gpu_times_ms": times.gpu})
    code = evidence.conclude(shipped, [trial]) if judged else _show(trial)
    if times.gpu:
        print(
            f"p50 without the copies from and to numpy: {evidence.percentile(times.gpu, 50):.3f} ms"
        )
    return code


def _show(trial: evidence.Trial) -> int:
    """Print how far an engine of fewer bits is off. Limits are for the widest one."""
    for output in trial.proof["outputs"]:
        noise, same = output["sqnr_db"], output["top1_agreement"]
        told = [f"largest error {output['max_abs_error']:.1e}"]
        told += [] if noise is None else [f"SQNR {noise:.1f} dB"]
        told += [] if same is None else [f"top-1 agreement {100 * same:.1f} %"]
        print(f"{output['output']}: {', '.join(told)}")
    for failure in trial.proof["failures"]:
        print(f"Beyond the limits for 8 bits: {failure}")
    print(f"p50 {evidence.percentile(trial.times_ms, 50):.3f} ms")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and do the work; every failure is a sentence and an exit code."""
    command = argparse.ArgumentParser(
        description="Build, prove and time the engine on this device."
    )
    command.add_argument(
        "--workspace-mb", type=evidence.positive, help="most memory that building may take"
    )
    command.add_argument(
        "--runs", type=evidence.positive, default=100, help="timed runs (default: 100)"
    )
    command.add_argument(
        "--bits", type=bits, help="of a model exported with any: 8, 6, 4 or 2, or 4,head=8"
    )
    command.add_argument("--engine-only", action="store_true", help="build, and prove nothing")
    options = command.parse_args(arguments)
    return evidence.run_script(lambda: _build_and_prove(Path(__file__).resolve().parent, options))


if __name__ == "__main__":
    sys.exit(main())
