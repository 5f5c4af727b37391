"""Capturing: eager truth, named outputs, and the sentence for each model that cannot be taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.capture import capture, reference_from
from edgekit.errors import BadInput, BadModel, CaptureFailed, EdgekitError, NotProven
from edgekit.model import Model
from edgekit.program import Program
from edgekit.source import resolve
from edgekit.spec import Dim


def captured(module: nn.Module, *inputs: str) -> Program:
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


class Nested(nn.Module):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"a": x + 1, "rest": (x.sum(1), None, x > 0)}


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Divide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Restless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class Overwrite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) * 2


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // 2, -1)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, -1)


class Number(nn.Module):
    def forward(self, x: Tensor) -> int:
        return 3


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, self.weight


class Found(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero()


class Optional(nn.Module):
    def forward(self, first: Tensor, second: Tensor | None = None, *, third: Tensor) -> Tensor:
        return first + third if second is None else first + second + third


def test_outputs_are_named_after_their_place() -> None:
    program = captured(Nested(), "x=2x3")
    assert [str(spec) for spec in program.outputs] == ["a=2x3", "rest_0=2", "rest_2=2x3:bool"]


def test_a_lone_output_is_called_output() -> None:
    assert captured(nn.Linear(3, 2), "input=1x3").outputs[0].name == "output"


def test_named_dims_reach_the_outputs() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.cat([x, x])

    first, second = captured(Halves(), "x=batch:1..4x3").outputs
    assert first.shape == (Dim("batch", 1, 4), 3)
    assert second.shape == (Dim("2*batch", 2, 8), 3)


def test_a_bare_sequential_gets_names_that_converters_take() -> None:
    program = captured(nn.Sequential(nn.Linear(3, 2)), "input=1x3")
    assert all(not name[0].isdigit() for name in program.exported.state_dict)


def test_inputs_may_skip_optional_ones_and_be_keyword_only() -> None:
    program = captured(Optional(), "first=1x2", "third=1x2")
    sample, expected = program.reference.samples[0], program.reference.expected[0]
    np.testing.assert_allclose(expected["output"], sample["first"] + sample["third"])


def test_the_users_module_keeps_its_mode_and_its_weights() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    captured(module, "input=2x3")
    assert (module.training, module[1].training, module[2].training) == (True, False, True)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_two_captures_in_one_process_are_independent() -> None:
    first, second = (captured(nn.Linear(3, 2), "input=1x3") for _ in range(2))
    assert first.reference.expected[0]["output"].tolist() != (
        second.reference.expected[0]["output"].tolist()
    )


@pytest.mark.parametrize(
    ("module", "spec", "error", "sentence"),
    [
        (
            Branch(),
            "x=1x4",
            CaptureFailed,
            r"cannot be captured at .*test_capture\.py:\d+: if x\.sum\(\) > 0:.*torch\.where",
        ),
        (Divide(), "x=1x4", NotProven, r"'output' holds NaN or infinity on sample 0"),
        (Restless(), "x=1x64", NotProven, r"changes from run to run \(dropout"),
        (Counter(), "x=1", CaptureFailed, r"changes its own buffer 'count'.*as an input"),
        (Overwrite(), "x=1x4", CaptureFailed, r"writes into its input 'x'.*copy"),
        (Weight(), "x=2", CaptureFailed, r"'output_1' is a weight of the model"),
        (Found(), "x=4", CaptureFailed, r"size depends on the values.*return a mask"),
        (Number(), "x=2", BadModel, r"output 'output' is int; return tensors"),
        (Silent(), "x=2", BadModel, r"returns nothing; return at least one tensor"),
        (Pairs(), "x=n:1..4x3", BadModel, r"raised RuntimeError at .*reshape.*shape '\[0, -1\]'"),
        (Fixed(), "x=n:3..6x3", CaptureFailed, r"cannot be captured|does not allow every size"),
        (nn.Linear(3, 2), "y=1x3", BadInput, r"no input 'y'; forward takes: input"),
        (nn.Linear(3, 2), "input=1x4", BadModel, r"raised RuntimeError.*1x4"),
    ],
)
def test_a_model_that_cannot_be_taken_is_a_sentence(
    module: nn.Module, spec: str, error: type[EdgekitError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        captured(module, spec)


def test_a_model_with_state_is_given_back_as_it_was() -> None:
    counter = Counter()
    with pytest.raises(CaptureFailed):
        captured(counter, "x=1")
    assert float(counter.count) == 0


def test_a_dim_that_the_model_fixes_is_named_with_what_it_asks_for() -> None:
    class Five(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(5)

    with pytest.raises(EdgekitError, match=r"length"):
        captured(Five(), "x=1xlength:1..5")


def test_output_names_must_be_as_many_as_the_outputs() -> None:
    model = resolve(nn.Linear(3, 2), ["input=1x3"])
    named = Model(model.module, model.inputs, outputs=("a", "b"), samples=model.samples)
    with pytest.raises(BadModel, match=r"2 output names were given \(a, b\).*returns 1"):
        reference_from(named)
