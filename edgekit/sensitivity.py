"""Which layers a model's accuracy depends on when it is quantized, by simulation (needs torch).

The simulation rounds in PyTorch what a target would make integers: the inputs, the weights and
the result of each op, on the ranges of the calibration data. It only ranks: what a mixed recipe
made from the ranking is worth, the target's own artifact says.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgekit.evidence import sqnr_db
from edgekit.graph import node_source, quiet
from edgekit.program import Program
from edgekit.recipe import Recipe
from edgekit.selection import node_entries, short_op
from edgekit.spec import Arrays

MOST_SAMPLES = 4  # one pass over the model for each op and sample
_WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear", "addmm", "convolution", "conv_transpose2d")


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one op alone leaves of the outputs, in dB; low is guilty."""

    node: str
    op: str
    module: str
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.module or self.node!r} ({self.op}, alone {self.sqnr_db:.1f} dB)"

    def to_json(self) -> dict[str, object]:
        """Every field."""
        return asdict(self)


class Simulation:
    """The captured program with any set of its ops rounded to integers."""

    def __init__(self, program: Program, ops: frozenset[str], recipe: Recipe) -> None:
        data = program.calibration.samples if program.calibration else program.reference.samples
        # Spread over the data: its first few may be of one kind.
        step = max(1, len(data) // MOST_SAMPLES)
        self._inputs = [_tensors(program, sample) for sample in data[: step * MOST_SAMPLES : step]]
        self._bits = int(recipe.weights[-1]) if recipe.weights[-1].isdigit() else 8
        self._activations = recipe.calibrated
        with quiet():
            self._module: Any = program.exported.module()
        self._nodes = {
            node.name: node
            for node in self._module.graph.nodes
            if node.op == "call_function" and short_op(node) in ops and self._touched(node)
        }
        self._ranges: dict[str, tuple[float, float]] = {}
        self._expected = [self._run(inputs, frozenset()) for inputs in self._inputs]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The ops that would be quantized, in the order of the graph."""
        return tuple(self._nodes)

    def _touched(self, node: torch.fx.Node) -> bool:
        return self._activations or bool(_weights_of(node))

    def sqnr(self, quantized: Collection[str]) -> float:
        """The worst sample's SQNR in dB where these nodes are quantized."""
        worst = math.inf
        for inputs, expected in zip(self._inputs, self._expected, strict=True):
            for true, given in zip(expected, self._run(inputs, quantized), strict=True):
                worst = min(worst, sqnr_db(true, given))
        return worst

    def alone(self) -> list[Sensitivity]:
        """Every op quantized by itself, the worst first."""
        found = []
        for name, node in self._nodes.items():
            _, module = node_source(node)
            found.append(Sensitivity(name, short_op(node), module, self.sqnr([name])))
        return sorted(found, key=lambda each: each.sqnr_db)

    def fewest_kept(self, ranked: Sequence[Sensitivity], wanted_db: float) -> list[Sensitivity]:
        """The shortest head of ``ranked`` that, kept float, brings the rest to ``wanted_db``."""
        low, high = 0, len(ranked)
        while low < high:
            middle = (low + high) // 2
            if self.sqnr([each.node for each in ranked[middle:]]) >= wanted_db:
                high = middle
            else:
                low = middle + 1
        return list(ranked[:low])

    def _run(self, inputs: list[Tensor], quantized: Collection[str]) -> list[Any]:
        runner = _Rounding(self._module, self._ranges, quantized, self._bits, self._activations)
        with quiet(), torch.no_grad():
            leaves = pytree.tree_leaves(runner.run(*inputs))
        return [leaf.double().numpy() for leaf in leaves if leaf.is_floating_point()]


class _Rounding(torch.fx.Interpreter):
    """Runs the graph; rounds what ``quantized`` nodes take and give. With none, notes ranges."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        ranges: dict[str, tuple[float, float]],
        quantized: Collection[str],
        bits: int,
        activations: bool,
    ) -> None:
        super().__init__(module)
        self._ranges, self._quantized = ranges, frozenset(quantized)
        self._bits, self._activations = bits, activations

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.name not in self._quantized:
            result = super().run_node(n)
            if not self._quantized and isinstance(result, Tensor) and result.is_floating_point():
                low, high = self._ranges.get(n.name, (0.0, 0.0))
                bounds = float(result.min()), float(result.max())
                self._ranges[n.name] = min(low, bounds[0]), max(high, bounds[1])
            return result
        kept = {node: self.env[node] for node in n.all_input_nodes}
        weights = _weights_of(n)
        for node, value in kept.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                self.env[node] = self._rounded(node, value, weights)
        result = super().run_node(n)
        self.env.update(kept)
        if self._activations and isinstance(result, Tensor) and result.is_floating_point():
            return _affine(result, *self._ranges[n.name])
        return result

    def _rounded(self, node: torch.fx.Node, value: Tensor, weights: list[torch.fx.Node]) -> Tensor:
        if node in weights:
            return _per_channel(value, self._bits)
        # Biases stay as they are: runtimes hold them in 32 bits.
        return (
            _affine(value, *self._ranges[node.name])
            if (self._activations and node.op != "get_attr")
            else value
        )


def _weights_of(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The constant weight of a convolution or a matrix product, if it has one."""
    place = 2 if short_op(node) == "addmm" else 1
    arguments = node.args if short_op(node) in _WEIGHTED else ()
    weight = arguments[place] if len(arguments) > place else None
    return [weight] if isinstance(weight, torch.fx.Node) and weight.op == "get_attr" else []


def _affine(value: Tensor, low: float, high: float) -> Tensor:
    """Rounded to 256 steps of one range, which holds zero."""
    scale = max(high - low, 1e-12) / 255
    zero = round(-low / scale)
    return (torch.clamp(torch.round(value / scale) + zero, 0, 255) - zero) * scale


def _per_channel(weight: Tensor, bits: int) -> Tensor:
    """Rounded to signed ``bits`` with a scale for each output channel, its first axis."""
    most = 2 ** (bits - 1) - 1
    flat = weight.reshape(len(weight), -1)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / most
    rounded: Tensor = torch.clamp(torch.round(flat / scale), -most - 1, most) * scale
    return rounded.reshape(weight.shape)


def _tensors(program: Program, sample: Arrays) -> list[Tensor]:
    return [torch.from_numpy(np.array(sample[spec.name])) for spec in program.inputs]


def weighted_nodes(program: Program) -> list[str]:
    """Convolutions and matrix products with a constant weight, in the order of the graph."""
    with quiet():
        graph = program.exported.module().graph
    return [node.name for node in graph.nodes if node.op == "call_function" and _weights_of(node)]


def names_of(program: Program, kept: Collection[str], quantizable: Collection[str]) -> list[str]:
    """Node names as a user would say them: a module where all it quantizes is kept."""
    modules: dict[str, list[str]] = {}
    others: set[str] = set()  # what else a module's path would mean
    for node in program.exported.graph.nodes:
        if node.op == "call_function":
            others |= {node.name, short_op(node)}
        if node.name in quantizable:
            modules.setdefault(node_source(node)[1], []).append(node.name)
    names: list[str] = []
    for module, nodes in modules.items():
        inside = [node for node in nodes if node in kept]
        own = module and module not in others and not _has_children(module, modules)
        whole = own and len(inside) == len(nodes)
        names += [module] if whole else node_entries(program, inside)
    return names


def _has_children(module: str, modules: Collection[str]) -> bool:
    return any(other.startswith(f"{module}.") for other in modules)
