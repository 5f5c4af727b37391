"""A model is captured once for each form, and what ``any`` derives is derived from one artifact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.artifact import Artifact
from edgekit.calibration import checked_calibration
from edgekit.errors import BadInput, RuntimeFailed
from edgekit.making import Captures, lowered, proven, silent
from edgekit.model import Model
from edgekit.program import Program
from edgekit.recipe import ANY, FP32, INT8, PRECISIONS, Recipe
from edgekit.selection import kept_nodes
from edgekit.source import resolve
from edgekit.spec import TensorSpec
from edgekit.testing import Outcome, QuantizingBackend, QuantizingSession, ReplayBackend
from edgekit.verify import quantized_limits
from edgekit.widths import Store

X = TensorSpec("x", (1, 4), "float32")


class Deep(nn.Module):
    """Four layers; the op of the first is that of all."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores


def samples(count: int) -> tuple[dict[str, np.ndarray], ...]:
    generator = np.random.default_rng(0)
    return tuple({"x": generator.standard_normal((1, 4), np.float32)} for _ in range(count))


@pytest.fixture(scope="module")
def captures() -> Captures:
    model = Model(Deep().eval(), (X,), samples=samples(9), samples_source="the user's files: a")
    return Captures(model)


def test_real_samples_of_the_model_are_calibration_data_too(captures: Captures) -> None:
    assert captures.calibration.source == "the model's own samples: the user's files: a"
    assert len(captures.calibration.samples) == 9
    assert captures.calibration is captures.calibration


def test_data_that_was_given_goes_before_the_models_own() -> None:
    data = checked_calibration(samples(12), "given")
    model = Model(Deep().eval(), (X,), samples=samples(9), samples_source="files")
    assert Captures(model, calibration=data).calibration is data


def test_random_samples_are_no_calibration_data() -> None:
    model = resolve(Deep().eval(), ["x=1x4"])
    with pytest.raises(
        BadInput, match=r"has no real inputs of its own, and int8 needs the ranges that real inputs"
    ):
        _ = Captures(model).calibration


def test_too_few_samples_of_the_models_own_are_counted() -> None:
    model = Model(Deep().eval(), (X,), samples=samples(3), samples_source="files")
    with pytest.raises(BadInput, match=r"the model's own samples: files holds 3 inputs; at least"):
        _ = Captures(model).calibration


def test_a_recipe_that_calibrates_gets_the_data_and_its_progress() -> None:
    heard: list[str] = []
    model = Model(Deep().eval(), (X,), samples=samples(9), samples_source="files")
    captures = Captures(model, heard.append)
    plain = captures.program(ReplayBackend(), PRECISIONS["int4"])
    calibrated = captures.program(ReplayBackend(), INT8)
    assert plain.calibration is None
    assert calibrated.exported is plain.exported
    assert calibrated.calibration is not None
    list(calibrated.calibration.watched("calibrating fake int8"))
    assert heard[-1] == "calibrating fake int8: 9 of 9 [####################]"
    assert heard.count("capturing the model") == 1


def entries(captures: Captures, recipe: Recipe) -> tuple[str, ...]:
    backend = QuantizingBackend()
    return lowered(backend, recipe, captures.program(backend, recipe)).recipe.keep_float


def test_the_first_and_last_layer_of_any_stay_float_and_no_other(captures: Captures) -> None:
    program = captures.program(ReplayBackend())
    for recipe in ANY:
        kept = replace(recipe, keep_float=entries(captures, recipe))
        assert kept_nodes(program, kept) == {"linear", "linear_3"}
    assert entries(captures, INT8) == ()


def test_what_the_user_keeps_float_is_kept_beside_the_ends(captures: Captures) -> None:
    program = captures.program(ReplayBackend())
    wanted = replace(PRECISIONS["any4"], keep_float=("layers.1",))
    kept = replace(wanted, keep_float=entries(captures, wanted))
    assert kept_nodes(program, kept) == {"linear", "linear_1", "linear_3"}


def test_of_two_layers_both_are_integers() -> None:
    two = Captures(
        resolve(Deep(2).eval(), ["x=1x4"]), calibration=checked_calibration(samples(9), "x")
    )
    assert entries(two, PRECISIONS["any"]) == ()


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_a_fixed_width_is_that_width_of_the_artifact_with_all(
    captures: Captures, bits: int
) -> None:
    backend = QuantizingBackend()
    fixed, every = (
        lowered(backend, PRECISIONS[name], captures.program(backend, PRECISIONS[name]))
        for name in (f"any{bits}", "any")
    )
    assert fixed.name == f"quantizing-any{bits}"
    assert fixed.files == Store(every).at(bits).files
    assert "codes" in every.provenance
    assert "codes" not in fixed.provenance


def test_an_artifact_is_proven_by_the_limits_given(captures: Captures) -> None:
    backend = QuantizingBackend(lambda recipe: Outcome(drift=0.05))
    for least, passes in ((20.0, True), (40.0, False)):
        limits = quantized_limits(least)
        _, proof = proven(backend, INT8, captures, silent, limits=limits)
        assert proof.passed is passes
        assert proof.limits == limits


def test_a_runtime_that_refuses_its_artifact_is_named_with_the_precision(
    captures: Captures,
) -> None:
    class Refusing(QuantizingBackend):
        def open(self, artifact: Artifact, *, threads: int | None = None) -> QuantizingSession:
            raise RuntimeFailed("no kernel for it.")

    for recipe, advice in ((INT8, r" Try --precision fp32\."), (FP32, "")):
        with pytest.raises(
            RuntimeFailed,
            match=rf"^quantizing {recipe.precision} was made, but .*: no kernel for it\.{advice}$",
        ):
            proven(Refusing(), recipe, captures, silent)


def test_a_width_that_fails_its_proof_is_a_proof_that_fails(captures: Captures) -> None:
    # What is looked into for the reason is lowered again, and no target lowers to any2.
    heard: list[Recipe] = []

    class Listening(QuantizingBackend):
        def lower(self, program: Program, recipe: Recipe) -> Artifact:
            heard.append(recipe)
            return super().lower(program, recipe)

    backend = Listening(lambda recipe: Outcome(drift=1.0))
    _, proof = proven(backend, PRECISIONS["any2"], captures, silent, limits=quantized_limits())
    assert not proof.passed
    assert all(recipe.width is None for recipe in heard)
