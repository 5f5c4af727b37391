"""Captured program to a ``.pte`` with XNNPACK delegates, and the preflight of its ops."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram

from edgekit.artifact import Artifact
from edgekit.contract import Finding
from edgekit.errors import LoweringFailed, UnsupportedModel
from edgekit.graph import node_source, op_name, operator_of, quiet
from edgekit.host import installed_version
from edgekit.program import Program
from edgekit.recipe import FP32, Recipe
from edgekit.repairs import with_pool_strides
from edgekit.widths import places_to_json
from edgekit_executorch.codes import places_of_codes
from edgekit_executorch.quantize import program_in_precision

with quiet():  # they log about hardware that is not here
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.partitioner import PartitionResult
    from executorch.runtime import Runtime

MAIN = "model.pte"
_TOOLS = ("torch", "executorch", "torchao")

# How to keep an op inside the delegate, measured in README.md here.
REMEDIES = {
    "split_with_sizes_copy": "take slices, x[:, :a] and x[:, a:], instead of split or chunk",
    "unbind_copy": "take slices, x[:, 0:1], instead of unbind",
    "select_copy": "take a slice, x[:, 0:1], instead of one index",
    "mean": "average over both image axes and keep them: x.mean((2, 3), keepdim=True).flatten(1)",
    "native_layer_norm": "its cost is small unless the maps are large; a 1x1 convolution with "
    "weights 1/channels gives the mean inside the delegate",
    "expand_copy": "use torch.bmm on 3-D tensors instead of a 4-D matmul, or let sizes broadcast",
    "avg_pool2d": "say count_include_pad=False",
    "elu": "use another activation, such as SiLU or hardswish",
    "where": "mask by multiplying or with clamp",
    "index": "take slices instead of indexing with a tensor",
    "_to_dim_order_copy": "leave type conversions to the code that runs the model",
    "embedding": "none needed: a table lookup costs little outside",
    "argmax": "return the scores and take the argmax where the model is used",
    "topk": "return the scores and choose where the model is used",
}
_ELSE = "it runs on the portable kernel, which is correct and slow"
# What the partitioner leaves because it costs nothing: bookkeeping, not computing.
_FREE = ("getitem", "sym_size", "alloc", "executorch_call_delegate", "_assert_scalar")


class _Partitioned(Exception):
    """Ends lowering once the partitioner has said what it would take."""


class _Recorder(XnnpackPartitioner):  # type: ignore[misc]  # untyped base
    """Notes what stays outside the delegate; refuses, or stops, before delegation costs time."""

    def __init__(self, *, stop: bool) -> None:
        super().__init__()
        self._stop = stop
        self.findings: list[Finding] = []

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        result = super().partition(exported_program)
        kernels = set(Runtime.get().operator_registry.operator_names)
        self.findings = [
            _finding(node, kernels)
            for node in result.tagged_exported_program.graph.nodes
            if isinstance(operator_of(node), OpOverload)  # not arithmetic on sizes
            and "delegation_tag" not in node.meta
            and not any(free in op_name(node) for free in _FREE)
        ]
        if self._stop or self.refused:
            raise _Partitioned
        return result

    @property
    def refused(self) -> list[Finding]:
        """Ops without any kernel."""
        return [finding for finding in self.findings if finding.effect == "refused"]


def findings_from_program(program: Program, recipe: Recipe) -> list[Finding]:
    """Ops outside the delegate, and those that the runtime has no kernel for at all."""
    recorder = _Recorder(stop=True)
    _edge(program_in_precision(program, recipe), recipe, recorder)
    return [_at_home(finding, program) for finding in recorder.findings]


def _edge(exported: ExportedProgram, recipe: Recipe, recorder: _Recorder) -> Any:
    """ExecuTorch's edge program with its delegates; None where the recorder stopped it."""
    try:
        with quiet():
            return to_edge_transform_and_lower(
                with_pool_strides(exported),
                partitioner=[recorder],
                # Its check of the op set would stop at the first op; the recorder lists all.
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
    except _Partitioned:
        return None
    except Exception as cause:  # the converter has no error classes of its own
        raise _failed(cause, recipe) from cause


def _finding(node: torch.fx.Node, kernels: set[str]) -> Finding:
    source, module = node_source(node)
    name = op_name(node)
    if (kernel := _kernel(node)) and kernel not in kernels:
        remedy = "the runtime has no kernel for it; write it with simpler ops, or leave it to "
        return Finding(name, "refused", source, module, remedy + "the code that runs the model")
    short = name.split(".")[1] if "." in name else name
    return Finding(name, "outside", source, module, REMEDIES.get(short, _ELSE))


# In half precision the graph was captured again, from generated code: "… gelu = torch.ops.…".
_GENERATED = re.compile(r"<eval_with_key>[^:]*:\d+: (?:(?P<node>\w+) = )?")


def _at_home(finding: Finding, program: Program) -> Finding:
    """The finding with the user's line in place of one of ours."""
    match = _GENERATED.match(finding.source)
    if not match:
        ours = str(Path(__file__).parent) in finding.source
        return replace(finding, source="") if ours else finding
    nodes = {node.name: node for node in program.exported.graph.nodes}
    node = nodes.get(match["node"] or "")
    source, module = node_source(node) if node is not None else ("", "")
    return replace(finding, source=source, module=module)


def _kernel(node: torch.fx.Node) -> str | None:
    """The name under which the runtime registers a node's kernel; None where it is not known."""
    try:
        return str(node.target.to_out_variant().name())  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None  # then the converter decides, and fails closed


def artifact_from_program(program: Program, recipe: Recipe) -> Artifact:
    """Lower through the XNNPACK partitioner. Raises ``UnsupportedModel`` or ``LoweringFailed``."""
    recorder = _Recorder(stop=False)
    exported = program_in_precision(program, recipe)
    edge = _edge(exported, recipe, recorder)
    if recorder.refused:
        refused = [_at_home(finding, program) for finding in recorder.refused]
        raise UnsupportedModel("executorch", refused)
    try:
        with quiet():
            lowered = edge.to_executorch()
    except Exception as cause:  # the converter has no error classes of its own
        raise _failed(cause, recipe) from cause
    calls = [op_name(node) for node in edge.exported_program().graph.nodes]
    content = bytes(lowered.buffer)
    return Artifact(
        target="executorch",
        recipe=recipe,
        main=MAIN,
        files={MAIN: content},
        inputs=program.inputs,
        outputs=program.outputs,
        provenance={
            "delegates": calls.count("executorch_call_delegate"),
            "outside": dict(sorted(Counter(finding.op for finding in recorder.findings).items())),
            "versions": {name: installed_version(name) for name in _TOOLS},
            **(_codes(content, exported, program) if recipe.switchable else {}),
        },
    )


def _codes(content: bytes, exported: ExportedProgram, program: Program) -> dict[str, object]:
    """Where the weights' codes lie, for artifacts whose width can be switched."""
    places, shared = places_of_codes(content, exported, program, MAIN)
    if not places:
        raise LoweringFailed(
            "none of the model's weights is made of integers, so there is no width to switch; "
            "use --precision fp32, or take names out of keep-float."
        )
    return {"codes": places_to_json(places), **({"same_codes": shared} if shared else {})}


def _failed(cause: Exception, recipe: Recipe) -> LoweringFailed:
    root = cause
    while isinstance(root.__cause__, Exception):
        root = root.__cause__
    reason = next((line for line in str(root).splitlines() if line.strip()), type(root).__name__)
    advice = "" if recipe == FP32 else " Try --precision fp32."
    return LoweringFailed(
        f"ExecuTorch could not lower the model to {recipe.precision}: {reason.strip()}{advice}"
    )
