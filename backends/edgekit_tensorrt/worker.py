"""The child process that loads TensorRT: ``python -m edgekit_tensorrt.worker REQUEST.json``.

A process of its own because NVIDIA's libraries keep one logger for all builders, print to stderr
and, on what they do not expect, may hang or end the process. ``processes.py`` is the other side.

The request names a job, a model file and a folder for results:

* ``parse``: ``result.json`` with every parser error, and the network as ``network.py`` writes it;
* ``build``: ``result.json`` with the log's ``Layers:`` dump, and ``engine.bin``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError
from edgekit_tensorrt.bindings import Bindings, load
from edgekit_tensorrt.dump import network_from
from edgekit_tensorrt.network import write_network


class Recorder:
    """What the libraries logged, as pairs of severity and text."""

    def __init__(self, module: Any, *, verbose: bool) -> None:
        self.lines: list[tuple[str, str]] = []
        lines, limit = self.lines, module.ILogger.VERBOSE if verbose else module.ILogger.WARNING

        class Logger(module.ILogger):  # type: ignore[misc]  # untyped base, known only now
            def __init__(self) -> None:
                module.ILogger.__init__(self)  # pybind11 wants it called by name

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(limit):
                    lines.append((severity.name, message))

        self.logger = Logger()

    def of(self, *severities: str) -> list[str]:
        """The messages of these severities, in order, each once."""
        return list(dict.fromkeys(text for severity, text in self.lines if severity in severities))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Do the job; the result is a JSON object with the key ``failed`` where it could not be."""
    try:
        bindings = load()
    except EdgekitError as error:
        return {"failed": "load", "kind": type(error).__name__, "messages": [str(error)]}
    recorder = Recorder(bindings.module, verbose=request["job"] == "build")
    return {"runtime": str(bindings)} | _parsed(bindings, recorder, request)


def _parsed(bindings: Bindings, recorder: Recorder, request: dict[str, Any]) -> dict[str, Any]:
    module = bindings.module
    builder = module.Builder(recorder.logger)
    definition = builder.create_network(_strongly_typed(module))
    parser = module.OnnxParser(definition, recorder.logger)
    accepted = parser.parse_from_file(request["model"])
    errors = [_error(parser.get_error(index)) for index in range(parser.num_errors)]
    # Before the network is read: asking a layer for what it takes from an input warns as well.
    warnings = recorder.of("WARNING")
    # The parser accepts bytes that are no model at all; they become a network of nothing.
    empty = not definition.num_layers or not definition.num_outputs
    if errors or not accepted or empty:
        messages = recorder.of("INTERNAL_ERROR", "ERROR")
        return {"failed": "parse", "errors": errors, "messages": messages, "warnings": warnings}
    if request["job"] == "build":
        return _built(bindings, recorder, request, builder, definition)
    network = network_from(module, definition)
    write_network(network, Path(request["folder"]))
    return {"warnings": warnings}


def _strongly_typed(module: Any) -> int:
    """The flag's bit differs between versions; where it is no flag any more, it is always on."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _error(error: Any) -> dict[str, str]:
    return {
        "code": error.code().name,
        "operator": error.node_operator(),
        "node": error.node_name(),
        "description": error.desc(),
    }


def _built(
    bindings: Bindings, recorder: Recorder, request: dict[str, Any], builder: Any, definition: Any
) -> dict[str, Any]:
    module = bindings.module
    if not bindings.cross_compiles:
        return {"failed": "targets", "messages": [f"{bindings} builds for the GPU it runs on"]}
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    # On by default: it rounds the inputs of float32 matrix products to 10 bits.
    config.clear_flag(module.BuilderFlag.TF32)
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    targets = request["compute_capabilities"]
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        value = getattr(module.ComputeCapability, target.upper(), None)
        if value is None or not config.set_compute_capability(value, index):
            return {"failed": "targets", "messages": [f"{bindings} has no target {target}"]}
    problem = _add_profile(builder, config, definition, request["profiles"])
    if problem:
        return {"failed": "profile", "messages": [problem]}
    start = time.perf_counter()
    engine = builder.build_serialized_network(definition, config)
    seconds = time.perf_counter() - start
    if engine is None:
        return {"failed": "build", "messages": recorder.of("INTERNAL_ERROR", "ERROR")}
    (Path(request["folder"]) / "engine.bin").write_bytes(engine)
    dump = next((text for _, text in recorder.lines if text.startswith("Layers:")), "")
    return {"seconds": seconds, "layers": dump}


def _add_profile(builder: Any, config: Any, definition: Any, profiles: dict[str, Any]) -> str:
    """Give each dynamic input its range; what is wrong with the ranges, or ""."""
    inputs = [definition.get_input(index) for index in range(definition.num_inputs)]
    dynamic = {tensor.name for tensor in inputs if -1 in tuple(tensor.shape)}
    if unknown := sorted(set(profiles) - {tensor.name for tensor in inputs}):
        names = ", ".join(tensor.name for tensor in inputs)
        return f"there is no input {', '.join(unknown)}; the model takes {names}"
    if missing := sorted(dynamic - set(profiles)):
        return f"the sizes of {', '.join(missing)} vary and no range was given"
    if not profiles:
        return ""
    profile = builder.create_optimization_profile()
    for name, (smallest, typical, largest) in profiles.items():
        try:
            profile.set_shape(name, smallest, typical, largest)
        except (TypeError, ValueError) as error:
            return f"the range of {name} is refused: {error}"
    # A contradiction raises nothing: the profile becomes false, or adding it returns -1.
    if not bool(profile) or config.add_optimization_profile(profile) < 0:
        return f"the ranges contradict each other or the model: {profiles}"
    return ""


def main(path: str) -> None:
    """Read the request at ``path``, do it, and leave ``result.json`` in its folder."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    target = Path(request["folder"]) / "result.json"
    target.write_text(json.dumps(run(request)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
