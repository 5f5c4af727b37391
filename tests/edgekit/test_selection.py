"""A name in ``keep_float`` means a node, a module or an op, and one that means nothing is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from edgekit.errors import UnknownName
from edgekit.making import Captures
from edgekit.program import Program
from edgekit.recipe import INT8
from edgekit.selection import kept_nodes, node_entries, short_op
from edgekit.source import resolve
from edgekit.testing import ReplayBackend


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point(torch.relu_(self.conv(x) + 0.0))
        return x + y


class Net(nn.Module):
    """Two blocks and a tenth, whose path begins as that of the first does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"1": Block(), "10": Block()})
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return torch.softmax(self.head(x.mean((2, 3))), 1)


@pytest.fixture(scope="module")
def program() -> Program:
    model = resolve(Net().eval(), torch.ones(1, 2, 4, 4))
    return Captures(model).program(ReplayBackend())


def kept(program: Program, *names: str) -> set[str]:
    return set(kept_nodes(program, replace(INT8, keep_float=names)))


def test_nothing_named_is_nothing_kept(program: Program) -> None:
    assert kept(program) == set()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("conv2d_1",), {"conv2d_1"}),  # a node
        (("head",), {"linear"}),  # a module
        (("blocks.1.conv",), {"conv2d"}),
        (("blocks.1",), {"conv2d", "add", "relu_", "conv2d_1", "add_1"}),  # not blocks.10
        (("softmax",), {"softmax"}),  # an op
        (("conv2d",), {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"}),
        (("relu",), {"relu_", "relu__1"}),  # in place or not
        (("%conv2d",), {"conv2d"}),  # the node that has the op's name
        (("%conv2d_1",), {"conv2d_1"}),
        (("head", "softmax"), {"linear", "softmax"}),
        (("head", "linear"), {"linear"}),
    ],
)
def test_a_name_is_a_node_a_module_with_all_in_it_or_every_call_of_an_op(
    program: Program, names: tuple[str, ...], found: set[str]
) -> None:
    assert kept(program, *names) == found


@pytest.mark.parametrize("name", ["heda", "block", "conv", "aten.conv2d.default", "x", "%relu", ""])
def test_a_name_that_matches_nothing_is_answered_with_what_there_is(
    program: Program, name: str
) -> None:
    with pytest.raises(
        UnknownName, match=r"unknown layer to keep in float '.*blocks\.1\.conv.*modules by path and"
    ):
        kept(program, "head", name)


def test_an_entry_for_a_node_means_that_node_alone(program: Program) -> None:
    nodes = ["conv2d", "conv2d_1", "softmax", "linear"]
    entries = node_entries(program, nodes)
    assert entries == ["%conv2d", "conv2d_1", "%softmax", "%linear"]
    for node, entry in zip(nodes, entries, strict=True):
        assert kept(program, entry) == {node}


def test_ops_go_by_their_short_names(program: Program) -> None:
    calls = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    assert {short_op(node) for node in calls} == {
        *("conv2d", "add", "relu", "mean", "linear", "softmax")
    }
