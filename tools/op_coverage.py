"""What our interpreters run of what the vendors' tools accept, as Markdown for the READMEs.

    python tools/op_coverage.py coreml
    python tools/op_coverage.py tensorrt [--cases 3]

Core ML: every op that coremltools knows, by the system that brought it. TensorRT: ONNX's own node
tests. Each is given to NVIDIA's parser; what the parser takes is interpreted, and compared with the
result that ONNX gives. ``--cases`` is how many tests of an op are run, 0 for all (a quarter of an
hour).
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx.numpy_helper import to_array

from edgekit.errors import EdgekitError
from edgekit.graph import quiet
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.network import Network
from edgekit_tensorrt.processes import parse_onnx


def coreml() -> str:
    """A row for each system: ops it brought, ops we run, and the names of the others."""
    with quiet():
        import coremltools
        from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    from edgekit_coreml.constexpr import FORMS
    from edgekit_coreml.control import CONTROL
    from edgekit_coreml.ops import OPS

    known = {*OPS, *CONTROL, *FORMS, "const", "read_state"}
    brought: dict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for system in ("iOS15", "iOS16", "iOS17", "iOS18"):
        target = getattr(coremltools.target, system)
        there = {
            name
            for name, versions in SSAOpRegistry.core_ops.items()
            if any(version.value <= target.value for version in versions)
        }
        brought[system] = there - seen
        seen |= there
    rows = [
        (system, len(names), len(names & known), ", ".join(sorted(names - known)) or "–")
        for system, names in brought.items()
    ]
    every = set().union(*brought.values())
    rows.append(("together", len(every), len(every & known), ""))
    return markdown(("since", "ops of coremltools", "run here", "not run"), rows)


@dataclass
class Tally:
    """What came of the tests of one ONNX op."""

    refused: int = 0
    lacking: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    right: int = 0


def tensorrt(cases: int) -> str:
    """Counts over ONNX's operators, and the operators that are not all right, with the reason."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    done: dict[str, int] = defaultdict(int)
    for case in _onnx_cases():
        (node,) = case.model.graph.node
        if cases and done[node.op_type] >= cases:
            continue
        done[node.op_type] += 1
        _try(case, tallies[node.op_type])
    parsed = {name: tally for name, tally in tallies.items() if tally.right + len(tally.wrong)}
    lacking = {name: tally for name, tally in tallies.items() if tally.lacking}
    wrong = {name: tally for name, tally in parsed.items() if tally.wrong}
    refused = sorted(set(tallies) - set(parsed) - set(lacking))
    rows = [
        ("ONNX operators with a node test", len(tallies), ""),
        ("refused by NVIDIA's parser in every test tried", len(refused), ", ".join(refused)),
        (
            "parsed, with a layer that is not run here",
            len(lacking),
            "; ".join(f"{name}: {', '.join(sorted(t.lacking))}" for name, t in lacking.items()),
        ),
        ("parsed and run, every result as ONNX has it", len(set(parsed) - set(wrong)), ""),
        (
            "parsed and run, another result than ONNX's",
            len(wrong),
            "; ".join(f"{name}: {', '.join(t.wrong)}" for name, t in wrong.items()),
        ),
    ]
    tests = sum(done.values())
    right = sum(tally.right for tally in tallies.values())
    return markdown(("", "operators", "which"), rows) + f"\n\n{tests} tests, {right} right."


def _onnx_cases() -> Iterable[Any]:
    """Tests of one node each, with tensors in and out."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every: list[Any] = list(load_model_tests(kind="node"))
    for case in every:
        values = [*case.model.graph.input, *case.model.graph.output]
        tensors = all(value.type.HasField("tensor_type") for value in values)
        if len(case.model.graph.node) == 1 and tensors and not case.model.graph.node[0].domain:
            yield case


def _try(case: Any, tally: Tally) -> None:
    try:
        parsed = parse_onnx(case.model.SerializeToString())
    except EdgekitError:
        tally.refused += 1
        return
    if parsed.network is None:
        tally.refused += 1
        return
    interpreter = NetworkInterpreter(parsed.network)
    if interpreter.unknown:
        tally.lacking |= set(interpreter.unknown)
        return
    names = [value.name for value in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        feeds = dict(zip(names, inputs, strict=False))
        if unknown := set(parsed.network.inputs) - feeds.keys():
            tally.wrong.append(f"{case.name} (the network asks for {', '.join(unknown)})")
            return
        try:
            answer = interpreter.run(
                {name: _fed(parsed.network, name, feeds[name]) for name in parsed.network.inputs}
            )
        except EdgekitError as reason:
            tally.wrong.append(f"{case.name} ({reason})")
            return
        expected = zip(case.model.graph.output, outputs, strict=False)
        if all(_close(answer.get(value.name), wanted) for value, wanted in expected):
            tally.right += 1
        else:
            tally.wrong.append(case.name)


def _fed(network: Network, name: str, value: Any) -> Any:
    """As the network takes it: NVIDIA reads double as float, and says so."""
    array = _array(value)
    return array.astype(np.float32) if network.tensors[name].dtype == "FLOAT" else array


def _array(value: Any) -> Any:
    """ONNX holds what numpy has no type for as its own message."""
    return to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _close(found: Any, wanted: Any) -> bool:
    wanted = _array(wanted)
    if found is None or found.shape != wanted.shape:
        return False
    coarse = 1e-2 if wanted.dtype == np.float16 else 1e-4
    both = (np.asarray(found, np.float64), np.asarray(wanted, np.float64))
    return bool(np.allclose(*both, rtol=coarse, atol=coarse, equal_nan=True))


def markdown(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", choices=("coreml", "tensorrt"))
    parser.add_argument("--cases", type=int, default=3)
    asked = parser.parse_args()
    print(coreml() if asked.target == "coreml" else tensorrt(asked.cases))


if __name__ == "__main__":
    main()
