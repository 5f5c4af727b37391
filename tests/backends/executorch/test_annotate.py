"""What becomes integers, and that every way of moving them still loads and is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.graph import op_name
from edgekit.program import Program
from edgekit.recipe import FP32, INT8
from edgekit_executorch.quantize import program_in_precision
from tests.backends.executorch.made import calibrated, made


class Net(nn.Module):
    """Two convolutions, a pointwise one and a linear layer; ``body`` says how they meet."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def _slices(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    z: Tensor = net.b(torch.cat([y[:, :4], net.c(y)[:, 4:]], 1))
    return z


def _padded(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.b(F.pad(net.a(x), (1, 2, 1, 0)))
    return y


def _moved(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.linear(F.max_pool2d(F.relu6(net.a(x)), 2).permute(0, 2, 3, 1))
    return y


def _averaged(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.linear(F.relu(net.a(x)).mean((2, 3), keepdim=True).flatten(1))
    return y


def _shifted(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.b(net.a(x) + net.shift)
    return y


def _twice(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.b(net.b(net.a(x)))
    return y


MOVING = [_slices, _padded, _moved, _averaged, _shifted, _twice]


@pytest.mark.parametrize("body", MOVING, ids=lambda body: body.__name__)
def test_integers_that_are_moved_stay_inside_one_delegate_and_right(
    body: Callable[[Net, Tensor], Tensor],
) -> None:
    one = made(Net(body), INT8)
    assert one.artifact.provenance["delegates"] == 1
    assert one.artifact.provenance["outside"] == {}
    assert one.noise < -30


def test_a_layer_whose_bias_is_computed_stays_float_and_loads() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = F.conv2d(x, net.a.weight, net.shift.flatten() * 2, padding=1)
        z: Tensor = net.b(y + net.a(x))
        return z

    assert made(Net(body), INT8).noise < -30


def _integer_ops(program: Program, *keep: str) -> dict[str, str]:
    """Names of nodes whose result is an integer, and their ops."""
    exported = program_in_precision(program, replace(INT8, keep_float=keep))
    return {
        node.args[0].name: op_name(node.args[0])
        for node in exported.graph.nodes
        if "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target)
    }


def _has_codes(program: Program, name: str, *keep: str) -> bool:
    """Whether the weight of the node called ``name`` is integers."""
    exported = program_in_precision(program, replace(INT8, keep_float=keep))
    (node,) = (each for each in exported.graph.nodes if each.name == name)
    return any("dequantize_per_channel" in str(each.target) for each in node.all_input_nodes)


def test_a_sum_of_integers_and_floats_stays_float() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        both: Tensor = net.b(y + net.c(y)) + F.gelu(y)
        return both

    found = _integer_ops(calibrated(Net(body), "x=1x3x12x12"))
    assert "add" in found
    assert "add_1" not in found


def test_a_product_with_one_number_stays_float() -> None:
    found = _integer_ops(calibrated(Net(lambda net, x: net.a(x) * 0.5), "x=1x3x12x12"))
    assert "mul" not in found


def test_an_addition_and_its_relu_are_one_kernel() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        z: Tensor = net.b(F.relu(y + net.c(y)))
        return z

    found = _integer_ops(calibrated(Net(body), "x=1x3x12x12"))
    assert "relu" in found
    assert "add" not in found


@pytest.mark.parametrize("keep", ["b", "conv2d_1", "relu"])
def test_what_is_kept_computes_in_float(keep: str) -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        z: Tensor = net.c(F.relu(net.b(net.a(x))))
        return z

    program = calibrated(Net(body), "x=1x3x12x12")
    assert _has_codes(program, "conv2d_1")
    # A ReLU takes the layer before it along: they are one kernel.
    assert not _has_codes(program, "conv2d_1", keep)
    assert "conv2d_1" not in _integer_ops(program, keep)
    assert _has_codes(program, "conv2d", keep)


def test_a_kept_concatenation_has_no_range_of_its_own() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return torch.cat([y, net.c(y)], 1)

    program = calibrated(Net(body), "x=1x3x12x12")
    assert "cat" in _integer_ops(program)
    assert "cat" not in _integer_ops(program, "cat")


def test_a_batch_norm_that_is_kept_keeps_the_layer_it_is_folded_into() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(self.first(x)))
            return y

    program = calibrated(Normed(), "x=1x3x12x12")
    assert _has_codes(program, "conv2d")
    assert not _has_codes(program, "conv2d", "norm")
    assert _has_codes(program, "conv2d_1", "norm")


def test_without_calibration_data_the_float_program_is_checked() -> None:
    program = replace(calibrated(Net(_slices), "x=1x3x12x12"), calibration=None)
    assert program_in_precision(program, INT8) is program_in_precision(program, FP32)
