"""The graph is run node by node, and rebuilt to return what it hides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.capture import capture, reference_from
from edgekit.errors import CaptureFailed
from edgekit.image import ImageInput
from edgekit.layers import positions
from edgekit.program import Program
from edgekit.source import resolve
from edgekit.spec import Dim
from edgekit.trace import layers_from_program, revealing, source_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        left, right = self.stem(x).chunk(2, 1)
        scores = self.head((left * right).mean((2, 3)))
        return {"scores": scores, "best": scores.argmax(1)}


class Masked(nn.Module):
    """Attention with a mask of minus infinity, as most write it."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((4, 4), float("-inf")).triu(1)
        return (x @ x.transpose(1, 2) + mask).softmax(-1)


class Brain(nn.Module):
    """One step in bfloat16, which numpy has not, and one in float64."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.to(torch.bfloat16) * 3
        return (half.to(torch.float64) + 1).float()


class Second(nn.Module):
    """An optional input that is left out, and one by keyword only."""

    def forward(self, a: Tensor, b: Tensor | None = None, *, c: Tensor) -> Tensor:
        return torch.relu(a - c) * 2


class Wholes(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids * 2


def captured(module: nn.Module, *inputs: str) -> Program:
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return captured(Net(), "x=batch:1..3x3x6x6")


def test_every_floating_value_is_recorded_in_order_with_its_op_and_module(
    program: Program,
) -> None:
    assert [(each.node, each.op, each.module) for each in layers_from_program(program)] == [
        ("conv2d", "aten.conv2d.default", "stem.0"),
        ("batch_norm", "aten.batch_norm.default", "stem.1"),
        ("relu", "aten.relu.default", "stem.2"),
        ("getitem", "getitem", ""),
        ("getitem_1", "getitem", ""),
        ("mul", "aten.mul.Tensor", ""),
        ("mean", "aten.mean.dim", ""),
        ("linear", "aten.linear.default", "head"),
    ]


def test_what_is_recorded_is_what_the_modules_answer_to_the_first_sample() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    program = captured(net, "x=batch:1..3x3x6x6")
    layers = {each.module: each for each in layers_from_program(program)}
    answers: dict[str, Tensor] = {}
    for name in ("stem.0", "stem.2", "head"):
        net.get_submodule(name).register_forward_hook(
            lambda module, given, result, name=name: answers.update({name: result})
        )
    net(torch.from_numpy(program.reference.samples[0]["x"]))
    for name, answer in answers.items():
        flat = answer.detach().numpy().ravel()
        assert layers[name].size == flat.size
        np.testing.assert_allclose(layers[name].values, flat[positions(flat.size)], atol=1e-6)


def test_a_mask_of_infinity_is_no_layer_and_what_follows_is() -> None:
    layers = layers_from_program(captured(Masked(), "x=1x4x4"))
    assert [each.node for each in layers] == ["transpose", "matmul", "softmax"]
    assert all(np.isfinite(each.values).all() for each in layers)


def test_every_floating_type_is_recorded() -> None:
    layers = layers_from_program(captured(Brain(), "x=1x4"))
    assert [each.op for each in layers] == [
        "aten.to.dtype",
        "aten.mul.Tensor",
        "aten.to.dtype",
        "aten.add.Tensor",
        "aten.to.dtype",
    ]
    assert all(each.values.dtype == np.float32 for each in layers)


def test_a_node_leads_to_the_users_line(program: Program) -> None:
    assert "test_trace.py:30: scores = self.head((left * right).mean" in source_of(program, "mul")
    assert source_of(program, "no_such_node") == ""


def test_a_program_is_rebuilt_to_return_its_nodes(program: Program) -> None:
    shown = revealing(program, ["linear", "relu", "no_such_node"])
    assert [str(spec) for spec in shown.outputs] == ["relu=batch:1..3x8x4x4", "linear=batch:1..3x2"]
    assert shown.outputs[0].shape[0] == Dim("batch", 1, 3)
    sample = program.reference.samples[0]
    relu, linear = shown.exported.module()(torch.from_numpy(sample["x"]))
    assert relu.min() == 0
    np.testing.assert_allclose(
        linear.detach().numpy(), program.reference.expected[0]["scores"], atol=1e-6
    )


def test_what_is_returned_is_what_it_is_held_to(program: Program) -> None:
    layers = layers_from_program(program)
    shown = revealing(program, [each.node for each in layers])
    (sample,), (expected,) = shown.reference.samples, shown.reference.expected
    assert sample is program.reference.samples[0]
    assert [*expected] == [spec.name for spec in shown.outputs] == [each.node for each in layers]
    for layer in layers:
        kept = expected[layer.node].ravel()[positions(layer.size)]
        np.testing.assert_allclose(layer.values, kept, atol=1e-6)


def test_other_floating_types_are_returned_in_float32() -> None:
    program = captured(Brain(), "x=1x4")
    names = [each.node for each in layers_from_program(program)]
    shown = revealing(program, names)
    assert {spec.dtype for spec in shown.outputs} == {"float32"}
    assert {array.dtype.name for array in shown.reference.expected[0].values()} == {"float32"}


def test_the_program_itself_stays_as_it_was_and_pictures_stay_out(program: Program) -> None:
    pictured = replace(
        program, image=ImageInput("x", 3, 6, 6, (0.5,) * 3, (0.5,) * 3), labels=("a", "b")
    )
    before = str(program.exported.graph)
    shown = revealing(pictured, ["relu"])
    assert str(program.exported.graph) == before
    assert (shown.image, shown.labels, shown.inputs) == (None, (), program.inputs)


def test_inputs_that_are_left_out_or_go_by_keyword_are_kept_in_place() -> None:
    program = captured(Second(), "a=1x3", "c=1x3")
    shown = revealing(program, ["sub"])
    sample = program.reference.samples[0]
    np.testing.assert_allclose(shown.reference.expected[0]["sub"], sample["a"] - sample["c"])


def test_a_model_of_whole_numbers_has_no_layers() -> None:
    assert layers_from_program(captured(Wholes(), "ids=1x3:int64")) == []


def test_a_rebuilt_program_that_cannot_be_captured_is_a_sentence(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(CaptureFailed, match=r"cannot be captured.*RuntimeError: no more"):
        revealing(program, ["relu"])
