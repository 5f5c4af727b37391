"""What every shipped backend must do, on small models that together use every seam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.capture import capture, reference_from
from edgekit.contract import OpTimings
from edgekit.errors import BadInput, RuntimeFailed, UnsupportedModel
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, Recipe
from edgekit.registry import recipes_of
from edgekit.source import resolve


class Convolutions(nn.Module):
    """(batch, 3, 8, 8) to scores (batch, 4) and the best class (batch)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = nn.functional.max_pool2d(nn.functional.gelu(self.norm(self.conv(x))), 2)
        scores = self.head(y.mean((2, 3)))
        return {"scores": scores, "best": scores.argmax(1)}


class Words(nn.Module):
    """ids (batch, length) and a mask of the same shape to features and the ids after."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(ids) * mask[:, :, None], ids + 1


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=1)[0]


def program(make: Callable[[], nn.Module], *inputs: str, form: str | None = None) -> Program:
    torch.manual_seed(0)
    model = resolve(make(), list(inputs))
    return capture(model, reference_from(model), form=form)


@pytest.fixture(scope="module")
def convolutions() -> Program:
    return program(Convolutions, "x=1x3x8x8")


@pytest.fixture(scope="module")
def batches() -> Program:
    return program(Convolutions, "x=batch:1..4x3x8x8")


# A runtime that is its vendor's, or our interpreter of the file that the vendor's tools made.
LEVELS = {
    "coreml": "emulated",
    "executorch": "executed",
    "onnxruntime": "executed",
    "tensorrt": "emulated",
}


def artifact(
    backend: edgekit.Backend, captured: Program, recipe: Recipe = FP32
) -> edgekit.Artifact:
    return backend.lower(captured, recipe)


def test_a_lowered_model_is_proven_on_its_samples(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    proof = edgekit.verify(backend, artifact(backend, convolutions), convolutions.reference)
    assert proof.require().level == LEVELS[backend.name]
    assert proof.max_rel_error < 1e-4
    assert [output.output for output in proof.outputs] == ["scores", "best"]
    assert proof.outputs[1].equal == 1.0


@pytest.mark.parametrize("recipe", [FP32, FP16])
def test_every_recipe_said_to_be_supported_is_proven(
    backend: edgekit.Backend, convolutions: Program, recipe: Recipe
) -> None:
    assert recipe in recipes_of(backend)
    edgekit.verify(
        backend, artifact(backend, convolutions, recipe), convolutions.reference
    ).require()


def test_half_precision_shows_in_the_numbers_and_keeps_float32_at_the_edge(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    made = artifact(backend, convolutions, FP16)
    proof = edgekit.verify(backend, made, convolutions.reference)
    assert 1e-5 < proof.max_rel_error < 1e-1
    assert {spec.dtype for spec in (*made.inputs, *made.outputs)} == {"float32", "int64"}


def test_lowering_in_half_precision_leaves_the_program_as_it_was(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    before = artifact(backend, convolutions).files
    artifact(backend, convolutions, FP16)
    assert artifact(backend, convolutions).files == before


def test_the_same_program_gives_the_same_bytes(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    again = program(Convolutions, "x=1x3x8x8")
    assert artifact(backend, convolutions).files == artifact(backend, again).files


def test_no_path_of_the_maker_is_in_the_artifact(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    for content in artifact(backend, convolutions).files.values():
        assert isinstance(content, bytes)
        assert b"test_backends.py" not in content


def test_a_named_batch_is_proven_over_its_range(backend: edgekit.Backend, batches: Program) -> None:
    sizes = [sample["x"].shape[0] for sample in batches.reference.samples]
    assert {1, 4} <= set(sizes)
    edgekit.verify(backend, artifact(backend, batches), batches.reference).require()


def test_a_size_beyond_the_range_is_refused(backend: edgekit.Backend, batches: Program) -> None:
    with (
        backend.open(artifact(backend, batches)) as session,
        pytest.raises(BadInput, match=r"shape 5x3x8x8; the model takes x=batch:1\.\.4x3x8x8"),
    ):
        session.run({"x": np.zeros((5, 3, 8, 8), np.float32)})


def test_several_inputs_and_integer_outputs_come_back_by_name(backend: edgekit.Backend) -> None:
    words = program(Words, "ids=2x5:int64", "mask=2x5")
    with backend.open(artifact(backend, words)) as session:
        sample = words.reference.samples[0]
        swapped = {"mask": sample["mask"], "ids": sample["ids"]}  # the order must not matter
        outputs = session.run(swapped)
    assert list(outputs) == ["output_0", "output_1"]
    np.testing.assert_array_equal(outputs["output_1"], sample["ids"] + 1)
    np.testing.assert_allclose(outputs["output_0"], words.reference.expected[0]["output_0"])


def test_what_a_run_returned_is_not_changed_by_the_next(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    first, second = convolutions.reference.samples[:2]
    with backend.open(artifact(backend, convolutions)) as session:
        outputs = session.run(first)
        kept = {name: array.copy() for name, array in outputs.items()}
        session.run(second)
    for name, array in kept.items():
        np.testing.assert_array_equal(outputs[name], array)


def test_a_transposed_view_is_read_as_what_it_shows(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    x = convolutions.reference.samples[0]["x"]
    view = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with backend.open(artifact(backend, convolutions)) as session:
        np.testing.assert_array_equal(
            session.run({"x": view})["scores"], session.run({"x": x})["scores"]
        )


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.zeros((1, 3, 8, 9), np.float32)}, r"shape 1x3x8x9; the model takes x=1x3x8x8"),
        ({"x": np.zeros((1, 3, 8, 8))}, r"dtype float64; the model takes float32.*astype"),
        ({"y": np.zeros((1, 3, 8, 8), np.float32)}, r"no input 'y'; the model takes: x=1x3x8x8"),
        ({}, r"input 'x' is missing; the model takes: x=1x3x8x8"),
    ],
)
def test_wrong_input_is_a_sentence(
    backend: edgekit.Backend,
    convolutions: Program,
    arrays: dict[str, np.ndarray],
    sentence: str,
) -> None:
    with (
        backend.open(artifact(backend, convolutions)) as session,
        pytest.raises(BadInput, match=sentence),
    ):
        session.run(arrays)


def test_a_truncated_artifact_is_a_sentence(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    whole = artifact(backend, convolutions)
    content = whole.source
    assert isinstance(content, bytes)
    cut = replace(whole, files={whole.main: content[: len(content) // 2]})
    with (
        pytest.raises(RuntimeFailed, match=rf"{backend.name} could not load"),
        backend.open(cut),
    ):
        pass


def test_one_thread_and_two_give_close_results(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    made, sample = artifact(backend, convolutions), convolutions.reference.samples[0]
    answers = []
    for threads in (1, 2):
        with backend.open(made, threads=threads) as session:
            answers.append(session.run(sample)["scores"])
    one, two = answers
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.upstream("executorch", raises=UnsupportedModel)  # no kernel in the wheel
def test_sorting_lowers(backend: edgekit.Backend) -> None:
    sorting = program(Sorting, "x=1x4")
    edgekit.verify(backend, artifact(backend, sorting), sorting.reference).require()


def test_check_names_a_refused_op_with_its_source_line(backend: edgekit.Backend) -> None:
    findings = backend.check(program(Sorting, "x=1x4"), FP32)
    if backend.name == "executorch":
        (finding,) = findings
        assert finding.effect == "refused"
        assert "test_backends.py" in finding.source
        assert "x.sort(dim=1)" in finding.source
    else:
        assert findings == []


@pytest.mark.never("coreml", raises=AssertionError)  # the time of an interpreter says nothing
@pytest.mark.never("tensorrt", raises=AssertionError)  # the same, where no GPU is
@pytest.mark.upstream("executorch", raises=AssertionError)  # the wheel is built without ETDump
def test_the_runtime_tells_the_time_of_each_op(
    backend: edgekit.Backend, convolutions: Program
) -> None:
    with backend.open(artifact(backend, convolutions), threads=1) as session:
        assert isinstance(session, OpTimings)
        times = session.op_timings(convolutions.reference.samples[0], 3)
    assert {"Conv", "MaxPool"} <= {time.op for time in times}
    assert all(time.microseconds >= 0 for time in times)
