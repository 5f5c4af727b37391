"""One package at many bit-widths: where its codes lie, and a session that switches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit import rounding
from edgekit.artifact import Artifact
from edgekit.calibration import checked_calibration
from edgekit.capture import capture, reference_from
from edgekit.contract import Switchable
from edgekit.errors import LoweringFailed, UsageError
from edgekit.program import Program
from edgekit.recipe import PRECISIONS, customised
from edgekit.source import resolve
from edgekit.widths import Store
from edgekit_coreml import BACKEND, codes
from edgekit_coreml.lower import MAIN, WEIGHTS


class Small(nn.Module):
    """Large weights in their own file, one of 6 values in the program itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.few, self.head = nn.Linear(8, 3), nn.Linear(3, 2), nn.Linear(2, 40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.few(torch.tanh(self.first(x)))))
        return y


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = resolve(Small().eval(), ["x=2x8"])
    captured = capture(model, reference_from(model))
    generator = np.random.default_rng(0)
    samples = [{"x": generator.standard_normal((2, 8), np.float32)} for _ in range(8)]
    return replace(captured, calibration=checked_calibration(samples, "random"))


@pytest.fixture(scope="module", params=["iOS17", "iOS18"])
def artifact(request: Any, program: Program) -> Artifact:
    backend = BACKEND.with_options({"minimum": request.param})
    return backend.lower(program, PRECISIONS["any"])


def run(artifact: Artifact, program: Program) -> np.ndarray:
    with BACKEND.open(artifact) as session:
        return session.run(program.reference.samples[0])["output"]


def places(artifact: Artifact) -> list[dict[str, Any]]:
    found: Any = artifact.provenance["codes"]
    return list(found["places"])


def test_every_weights_codes_are_found_wherever_they_lie(
    artifact: Artifact, program: Program
) -> None:
    found = {place["layer"]: place for place in places(artifact)}
    assert list(found) == ["first", "few", "head"]
    assert [place["count"] for place in found.values()] == [24, 6, 80]
    assert {place["file"] for place in found.values()} == {MAIN, WEIGHTS}
    assert found["few"]["file"] == MAIN
    for name, place in found.items():
        weight = program.exported.state_dict[f"{name}.weight"].detach().numpy()
        content = artifact.files[place["file"]]
        assert isinstance(content, bytes)
        lying = np.frombuffer(content, np.int8, place["count"], place["offset"])
        scale = np.abs(weight).max(1, keepdims=True) / 127
        np.testing.assert_array_equal(lying.reshape(weight.shape), np.rint(weight / scale))


def test_a_session_switches_as_a_package_of_that_width_runs(
    artifact: Artifact, program: Program
) -> None:
    sample = program.reference.samples[0]
    store = Store(artifact)
    with BACKEND.open(artifact) as session:
        assert isinstance(session, Switchable)
        eight = session.run(sample)["output"]
        for bits in (4, 2, 6):
            session.set_bits(bits)
            np.testing.assert_array_equal(
                session.run(sample)["output"], run(store.fixed(bits), program)
            )
        session.set_bits(4)
        four = session.run(sample)["output"]
        session.set_bits({"*": 4, "head": 8})
        mixed = session.run(sample)["output"]
        session.set_bits(8)
        np.testing.assert_array_equal(session.run(sample)["output"], eight)
    assert not np.array_equal(eight, four)
    assert not np.array_equal(mixed, four)
    assert not np.array_equal(mixed, eight)


def test_the_inline_codes_change_with_the_others(artifact: Artifact, program: Program) -> None:
    store = Store(artifact)
    few = run(store.at({"few": 2}), program)
    assert not np.array_equal(few, run(artifact, program))


def test_a_closed_session_may_be_switched_before_it_opens(
    artifact: Artifact, program: Program
) -> None:
    session = BACKEND.open(artifact)
    assert isinstance(session, Switchable)
    session.set_bits(4)
    with session:
        switched = session.run(program.reference.samples[0])["output"]
    np.testing.assert_array_equal(switched, run(Store(artifact).fixed(4), program))


def test_a_package_of_one_width_is_not_switched(program: Program) -> None:
    plain = BACKEND.lower(program, PRECISIONS["int8"])
    assert "rounding.py" not in plain.files
    with BACKEND.open(plain) as session:
        assert isinstance(session, Switchable)
        with pytest.raises(UsageError, match="one bit-width"):
            session.set_bits(4)


def test_the_rounding_goes_to_the_mac(artifact: Artifact) -> None:
    content = artifact.files["rounding.py"]
    assert isinstance(content, bytes)
    assert content == Path(rounding.__file__).read_bytes()


def test_a_kept_layer_has_no_codes(program: Program) -> None:
    recipe = customised(PRECISIONS["any"], keep_float=("first", "head"))
    assert [place["layer"] for place in places(BACKEND.lower(program, recipe))] == ["few"]


def test_a_model_without_a_layer_left_is_refused(program: Program) -> None:
    recipe = customised(PRECISIONS["any"], keep_float=("linear",))
    with pytest.raises(LoweringFailed, match="no layer of the model becomes int8"):
        BACKEND.lower(program, recipe)


def test_codes_that_are_not_where_they_should_be_are_refused(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "_RECORD", 128)
    with pytest.raises(LoweringFailed, match="the codes of 'first' were not found"):
        BACKEND.lower(program, PRECISIONS["any"])


class Twice(nn.Module):
    """One layer that is called twice, and one parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
        return y


def test_weights_that_are_used_twice_change_together(program: Program) -> None:
    torch.manual_seed(0)
    model = resolve(Twice().eval(), ["x=2x8"])
    captured = capture(model, reference_from(model))
    artifact = BACKEND.lower(replace(captured, calibration=program.calibration), PRECISIONS["any"])
    offsets = [(place["file"], place["offset"]) for place in places(artifact)]
    assert len(set(offsets)) == len(offsets)
    layers = Store(artifact).layers
    assert len(set(layers)) == len(layers)
    sample = captured.reference.samples[0]
    with BACKEND.open(artifact) as session:
        before = session.run(sample)["output"]
        assert isinstance(session, Switchable)
        session.set_bits(4)
        assert not np.array_equal(session.run(sample)["output"], before)
