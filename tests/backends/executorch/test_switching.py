"""One file at many bit-widths: where the codes lie, and that a switched session is a fresh one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.errors import LoweringFailed, UnknownName, UsageError
from edgekit.graph import quiet
from edgekit.recipe import INT8, PRECISIONS
from edgekit.spec import Array
from edgekit.widths import Store
from edgekit_executorch import codes
from tests.backends.executorch.made import Made, made

with quiet():
    from executorch.exir._serialize._program import deserialize_pte_binary

ANY = PRECISIONS["any"]


class Layers(nn.Module):
    """Every kind of layer whose codes are written in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.grouped(self.depthwise(self.full(x))))
        z: Tensor = self.head(self.pointwise(y).mean((2, 3), keepdim=True).flatten(1))
        return z


@pytest.fixture(scope="module")
def one() -> Made:
    return made(Layers(), ANY)


def places(artifact: edgekit.Artifact) -> list[dict[str, Any]]:
    found: Any = artifact.provenance["codes"]
    return list(found["places"])


def answer(artifact: edgekit.Artifact, one: Made) -> Array:
    with edgekit.backend("executorch").open(artifact) as session:
        (output,) = session.run(one.sample).values()
    return output


def test_every_weight_is_found_once_and_none_overlaps(one: Made) -> None:
    found = places(one.artifact)
    assert [each["layer"] for each in found] == [
        *("full", "depthwise", "grouped", "pointwise", "head")
    ]
    assert [each["count"] for each in found] == [216, 72, 288, 64, 40]
    ranges = sorted((each["offset"], each["offset"] + each["count"]) for each in found)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    content = one.artifact.source
    assert isinstance(content, bytes)
    held = deserialize_pte_binary(content).named_data
    assert held is not None
    for each in found:
        assert content[each["offset"] :][: each["count"]] in [bytes(each) for each in held.buffers]


def test_the_codes_are_those_of_the_weights(one: Made) -> None:
    (head,) = (each for each in places(one.artifact) if each["layer"] == "head")
    content = one.artifact.source
    assert isinstance(content, bytes)
    weights = one.program.exported.state_dict["head.weight"].detach().numpy()
    scales = np.abs(weights).max(1, keepdims=True) / 127
    stored = np.frombuffer(content, np.int8, head["count"], head["offset"]).reshape(5, 8)
    assert np.abs(stored - weights / scales).max() <= 0.51


def test_it_answers_as_int8_does(one: Made) -> None:
    backend = edgekit.backend("executorch")
    with backend.open(backend.lower(one.program, INT8)) as session:
        (output,) = session.run(one.sample).values()
    assert (one.output == output).all()


def test_a_switched_session_answers_as_a_fresh_one_of_that_width(one: Made) -> None:
    store = Store(one.artifact)
    with edgekit.backend("executorch").open(one.artifact, threads=1) as session:
        answers = {}
        for bits in (8, 4, 2, 6, 8):
            session.set_bits(bits)  # type: ignore[attr-defined]
            (answers[bits],) = session.run(one.sample).values()
            assert (answers[bits] == answer(store.fixed(bits), one)).all()
        assert (answers[8] == one.output).all()
        assert len({answers[bits].tobytes() for bits in answers}) == 4
        session.set_bits({"*": 4, "head": 8})  # type: ignore[attr-defined]
        (mixed,) = session.run(one.sample).values()
        assert mixed.tobytes() not in {each.tobytes() for each in answers.values()}


def test_the_width_may_be_set_before_the_session_is_opened(one: Made) -> None:
    session = edgekit.backend("executorch").open(one.artifact)
    session.set_bits(4)  # type: ignore[attr-defined]
    with session:
        (output,) = session.run(one.sample).values()
    assert (output == answer(Store(one.artifact).fixed(4), one)).all()


def test_a_width_that_is_not_there_leaves_the_session_as_it_was(one: Made) -> None:
    with edgekit.backend("executorch").open(one.artifact) as session:
        with pytest.raises(UsageError, match="3 bits"):
            session.set_bits(3)  # type: ignore[attr-defined]
        with pytest.raises(UnknownName, match="neck"):
            session.set_bits({"neck": 4})  # type: ignore[attr-defined]
        (output,) = session.run(one.sample).values()
    assert (output == one.output).all()


def test_an_artifact_of_one_width_says_so() -> None:
    one = made(Layers(), INT8)
    session = edgekit.backend("executorch").open(one.artifact)
    with pytest.raises(UsageError, match="--precision any"):
        session.set_bits(4)  # type: ignore[attr-defined]


def test_layers_with_the_same_codes_are_named_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.second.load_state_dict(self.first.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    one = made(Twice(), ANY, "x=1x4x6x6")
    assert [each["layer"] for each in places(one.artifact)] == ["first"]
    assert one.artifact.provenance["same_codes"] == {"second": "first"}


def test_codes_that_the_file_does_not_hold_end_the_lowering(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codes, "_orders", lambda held: iter([held.contiguous()]))
    with pytest.raises(LoweringFailed, match=r"codes of full were not found.*--precision int8"):
        made(Layers(), ANY)


def test_a_model_kept_float_throughout_has_no_width_to_switch() -> None:
    with pytest.raises(LoweringFailed, match="no width to switch"):
        made(nn.Conv2d(3, 4, 1), replace(ANY, keep_float=("conv2d",)), "input=1x3x4x4")
