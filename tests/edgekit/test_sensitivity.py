"""The layer that quantization breaks is found first, and keeping it float repairs the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.calibration import checked_calibration
from edgekit.making import Captures
from edgekit.program import Program
from edgekit.recipe import INT8, PRECISIONS, Recipe
from edgekit.selection import kept_nodes
from edgekit.sensitivity import Sensitivity, Simulation, names_of, weighted_nodes
from edgekit.source import resolve
from edgekit.testing import ReplayBackend

OPS = frozenset({"conv2d", "linear", "relu", "sigmoid", "mul", "softmax", "mean", "add"})
WEIGHT_ONLY = PRECISIONS["int8-weights"]


class Outlier(nn.Module):
    """Four convolutions; of the second's channels, one is 1000 times larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.loud = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.after, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        with torch.no_grad():
            self.loud.weight[0] *= 1000
            self.loud.bias *= torch.tensor([1000.0, *[1.0] * 7])  # type: ignore[operator]
            self.after.weight[:, 0] /= 1000

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.after(self.loud(x))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


class Functional(nn.Module):
    """Ops of the root module itself: no module names them alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x)) * torch.sigmoid(self.other(x))


def captured(module: nn.Module, shape: Sequence[int], recipe: Recipe = INT8) -> Program:
    generator = np.random.default_rng(0)
    samples = [{"x": generator.standard_normal(shape, np.float32)} for _ in range(9)]
    data = checked_calibration(samples, "drawn")
    model = resolve(module.eval(), torch.from_numpy(samples[0]["x"]))
    return Captures(model, calibration=data).program(ReplayBackend(), recipe)


@pytest.fixture(scope="module")
def outlier() -> Program:
    return captured(Outlier(), (1, 3, 6, 6))


@pytest.fixture(scope="module")
def broken(outlier: Program) -> Simulation:
    return Simulation(outlier, OPS, INT8)


@pytest.fixture(scope="module")
def ranked(broken: Simulation) -> list[Sensitivity]:
    return broken.alone()


def test_the_channel_that_is_larger_than_the_rest_is_found_first(
    ranked: list[Sensitivity],
) -> None:
    guilty = {ranked[0].module, ranked[1].module}
    assert guilty == {"loud", "after"}  # its result, and what takes it
    assert ranked[2].sqnr_db > ranked[1].sqnr_db + 15
    assert [each.sqnr_db for each in ranked] == sorted(each.sqnr_db for each in ranked)
    assert str(ranked[2]).endswith(f"({ranked[2].op}, alone {ranked[2].sqnr_db:.1f} dB)")
    assert ranked[0].to_json()["module"] in guilty


def test_to_keep_it_float_repairs_the_outputs(
    broken: Simulation, ranked: list[Sensitivity]
) -> None:
    all_of_them = broken.sqnr(broken.nodes)
    assert all_of_them < 20
    kept = broken.fewest_kept(ranked, 25)
    assert {each.module for each in kept} == {"loud", "after"}
    rest = [node for node in broken.nodes if node not in {each.node for each in kept}]
    assert broken.sqnr(rest) >= 25
    assert broken.sqnr([]) == np.inf


def test_nothing_is_kept_where_all_of_it_is_good_enough_and_all_where_nothing_is(
    broken: Simulation, ranked: list[Sensitivity]
) -> None:
    assert broken.fewest_kept(ranked, broken.sqnr(broken.nodes)) == []
    assert broken.fewest_kept(ranked, 500) == ranked


def test_only_the_ops_that_the_target_quantizes_are_simulated(outlier: Program) -> None:
    assert Simulation(outlier, frozenset({"linear"}), INT8).nodes == ("linear",)
    assert Simulation(outlier, frozenset({"gelu"}), INT8).alone() == []


def test_a_weight_only_recipe_ranks_weights_only(outlier: Program) -> None:
    simulation = Simulation(outlier, OPS, WEIGHT_ONLY)
    assert simulation.nodes == tuple(weighted_nodes(outlier))
    # A scale for each output channel: one that is larger costs its neighbours nothing.
    by_module = {each.module: each.sqnr_db for each in simulation.alone()}
    assert by_module["loud"] > 40
    assert by_module["after"] < 30  # the weights that take it are 1000 times smaller


def test_fewer_bits_cost_more() -> None:
    program = captured(Functional(), (1, 6))
    found = {}
    for name in ("int8-weights", "int4", "palette2", "int8", "any4"):
        simulation = Simulation(program, OPS, PRECISIONS[name])
        found[name] = simulation.sqnr(simulation.nodes)
    assert found["int8-weights"] > found["int4"] + 15
    assert found["int4"] > found["palette2"] + 5
    assert found["int8-weights"] > found["int8"] > found["any4"]


def test_the_same_simulation_gives_the_same_again(
    outlier: Program, ranked: list[Sensitivity]
) -> None:
    assert Simulation(outlier, OPS, INT8).alone() == ranked


def test_weighted_nodes_are_in_the_order_of_the_graph(outlier: Program) -> None:
    assert weighted_nodes(outlier) == ["conv2d", "conv2d_1", "conv2d_2", "linear"]


def test_a_module_is_named_where_all_that_it_quantizes_is_kept(outlier: Program) -> None:
    quantizable = ("conv2d", "relu", "conv2d_1", "conv2d_2", "mean", "linear")
    kept = {"conv2d_1", "linear", "mean"}
    names = names_of(outlier, kept, quantizable)
    assert names == ["%mean", "loud", "head"]
    assert kept_nodes(outlier, recipe_that_keeps(names)) == kept


def recipe_that_keeps(names: Sequence[str]) -> Recipe:
    return Recipe("int8", "int8", keep_float=tuple(names))


def test_a_name_never_takes_more_than_what_was_chosen() -> None:
    program = captured(Functional(), (1, 6))
    quantizable = ("linear", "sigmoid", "linear_1", "sigmoid_1", "mul")
    for node in quantizable:
        names = names_of(program, {node}, quantizable)
        assert kept_nodes(program, recipe_that_keeps(names)) == {node}, names


def test_a_gate_near_zero_is_told_from_what_does_no_harm() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.gate = nn.Linear(6, 6), nn.Linear(6, 6)
            with torch.no_grad():
                self.gate.bias[:] = torch.tensor([-9.0, -9.0, -9.0, -9.0, -9.0, 9.0])

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(self.gate(x))
            gated: Tensor = self.body(x) * gate
            return gated[:, :5]

    simulation = Simulation(captured(Gate(), (1, 6)), OPS, INT8)
    worst = simulation.alone()[0]
    assert worst.op in ("sigmoid", "mul")
    assert worst.sqnr_db < 10
