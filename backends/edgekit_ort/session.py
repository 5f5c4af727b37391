"""Runs ONNX artifacts. The one module that imports onnxruntime to run it."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from edgekit.artifact import Artifact
from edgekit.contract import OpTime
from edgekit.errors import MissingRuntime, RuntimeFailed
from edgekit.spec import Array, Arrays, TensorSpec, check_arrays
from edgekit.widths import Bits, Store
from edgekit_ort.optimized import optimized_artifact

MAIN = "model.onnx"
# Weights that are integers in the file alone become float when it is loaded, not at every run.
FOLD_WEIGHTS = {"session.disable_quant_qdq": "1"}
_SATURATION = (
    "On a processor without VNNI, 8-bit products are added in 16 bits, where they saturate; export "
    "with --cpu avx2 for such processors."
)

# Every exception class of the runtime; a test fails when a new version adds one.
ERRORS: tuple[type[Exception], ...] = (
    state.DeviceReset,
    state.EPFail,
    state.EngineError,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.ModelLoadCanceled,
    state.ModelLoaded,
    state.ModelRequiresCompilation,
    state.NoModel,
    state.NoSuchFile,
    state.NotFound,
    state.NotImplemented,
    state.RuntimeException,
)
FATAL = 4  # its own log lines would repeat what the exception says


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn what the runtime raises into ``RuntimeFailed``."""
    try:
        yield
    except ERRORS as cause:
        reason = str(cause).strip().split("\n", 1)[0]
        raise RuntimeFailed(f"onnxruntime could not {doing}: {reason}") from cause


class OrtSession:
    """One ONNX model on the CPU provider, from entry to exit of the context."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        self._artifact, self._threads = artifact, threads
        self._session: Any = None
        self._written: Any = None  # the same without fusion, once it is asked for
        self._store: Store | None = None  # of an artifact that can switch its widths
        self._optimized: Store | None = None  # the same, as the runtime has optimized it
        self._bits: Bits | None = None
        self._names: list[str] = []

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._artifact.outputs

    def __enter__(self) -> Self:
        with translated("load the model"):
            if self._artifact.recipe.switchable and self._optimized is None:
                self._optimize()
            self._session = self._reopened()
        self._names = [output.name for output in self._session.get_outputs()]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = self._written = None

    def _options(self, *, fused: bool = True) -> Any:
        options = onnxruntime.SessionOptions()
        if not fused:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = FATAL
        # Idle threads of one session must not spin on the cores of another.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._artifact.recipe.quantized and not self._artifact.recipe.calibrated:
            for key, value in FOLD_WEIGHTS.items():
                options.add_session_config_entry(key, value)
        return options

    def _source(self) -> bytes | Path:
        """The main file, with its codes at the widths that are set."""
        if self._store is None or self._bits is None:
            return self._artifact.source
        return self._store.at(self._bits).source

    def _open(self, options: Any, source: bytes | Path | None = None) -> Any:
        source = self._source() if source is None else source
        return onnxruntime.InferenceSession(
            str(source) if isinstance(source, Path) else source,
            options,
            providers=["CPUExecutionProvider"],
        )

    def _reopened(self) -> Any:
        """The session that ``run`` uses, from the optimized file where there is one."""
        if self._optimized is None:
            return self._open(self._options())
        optimized = self._optimized.at(8 if self._bits is None else self._bits)
        return self._open(self._options(fused=False), optimized.source)

    def _optimize(self) -> None:
        """Keep the file that the runtime makes of the artifact's, so that a switch loads fast."""
        source = self._artifact.source
        content = source if isinstance(source, bytes) else source.read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MAIN

            def optimize(model: bytes) -> bytes:
                options = self._options()
                options.optimized_model_filepath = str(path)
                self._open(options, model)
                return path.read_bytes()

            found = optimized_artifact(self._artifact, content, optimize)
        self._optimized = None if found is None else Store(found)

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Outputs by name. Raises ``BadInput`` or ``RuntimeFailed``."""
        feeds = check_arrays(self.inputs, arrays)
        with translated("run the model"):
            results = self._session.run(self._names, feeds)
        return self._by_name(results)

    def _by_name(self, results: list[Any]) -> dict[str, Array]:
        return {
            spec.name: np.asarray(result)
            for spec, result in zip(self.outputs, results, strict=True)
        }

    def set_bits(self, bits: int | Mapping[str, int]) -> None:
        """Run at ``bits``, 8, 6, 4 or 2, or by layer; the file is not read again.

        Raises ``UsageError`` where the artifact has one width, or not that one.
        """
        self._store = self._store or Store(self._artifact)
        self._store.widths(bits)  # raises before anything changes
        self._bits = bits
        self._written = None
        if self._session is not None:
            self._session = None
            with translated("load the model"):
                self._session = self._reopened()

    @property
    def switches_fast(self) -> bool:
        """Whether a switch opens a file that the runtime has optimized before. After entry."""
        return self._optimized is not None

    def run_as_written(self, arrays: Arrays) -> dict[str, Array]:
        """The outputs by float arithmetic between the roundings that the file says."""
        feeds = check_arrays(self.inputs, arrays)
        with translated("run the model without fusion"):
            if self._written is None:
                self._written = self._open(self._options(fused=False))
            results = self._written.run(self._names or None, feeds)
        return self._by_name(results)

    @property
    def saturation(self) -> str:
        """What to do where the integer kernels lose; "" where they cannot."""
        recipe = self._artifact.recipe
        return _SATURATION if recipe.calibrated and recipe.cpu in ("", "vnni") else ""

    def layers(self, arrays: Arrays) -> dict[str, Array]:
        """Every value by name: the same file, each value among its outputs. Needs onnx."""
        if find_spec("onnx") is None:  # a device has the runtime alone
            raise MissingRuntime("showing layers of onnxruntime", "onnx", extra="export")
        import onnx

        feeds = check_arrays(self.inputs, arrays)
        source = self._source()
        content = source if isinstance(source, bytes) else source.read_bytes()
        model = onnx.load_from_string(content)
        known = {value.name for value in model.graph.output}
        names = [name for node in model.graph.node for name in node.output if name]
        shown = [onnx.ValueInfoProto(name=name) for name in names if name not in known]
        model.graph.output.extend(shown)
        with translated("show its layers"):
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), self._options(), providers=["CPUExecutionProvider"]
            )
            results = session.run(None, feeds)
        every = [output.name for output in session.get_outputs()]
        values = {name: np.asarray(result) for name, result in zip(every, results, strict=True)}
        ours = {
            spec.name: values[name] for spec, name in zip(self.outputs, self._names, strict=True)
        }
        return {**values, **ours}

    def op_timings(self, arrays: Arrays, runs: int) -> list[OpTime]:
        """Mean time of each node over ``runs`` runs after one to warm up, longest first."""
        feeds = check_arrays(self.inputs, arrays)
        with tempfile.TemporaryDirectory() as folder, translated("profile the model"):
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "ops")
            session = self._open(options)
            for _ in range(runs + 1):
                session.run(self._names, feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        return _op_times(events, runs)


def _op_times(events: list[dict[str, Any]], runs: int) -> list[OpTime]:
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["name"].removesuffix("_kernel_time")
            times[event["args"]["op_name"], node].append(event["dur"])
    means = [
        OpTime(op, node, sum(durations[-runs:]) / runs) for (op, node), durations in times.items()
    ]
    return sorted(means, key=lambda time: -time.microseconds)
