"""What the converter gets wrong is repaired; pictures and labels become part of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.artifact import Artifact
from edgekit.capture import capture, reference_from
from edgekit.image import ImageInput
from edgekit.model import Model
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, Recipe
from edgekit.source import resolve
from edgekit.spec import Array
from edgekit.verify import Proof
from edgekit_coreml.interpreter import Interpreter
from edgekit_coreml.package import Package
from edgekit_coreml.session import PREFIX

BACKEND = edgekit.backend("coreml")


@pytest.fixture(autouse=True, scope="module")
def _seeded() -> None:
    torch.manual_seed(0)


def program(module: nn.Module, *inputs: str, **described: Any) -> Program:
    torch.manual_seed(0)
    model = replace(resolve(module, list(inputs)), **described)
    return capture(model, reference_from(model))


def package_of(artifact: Artifact) -> Package:
    return Package.read(
        {
            name.removeprefix(PREFIX): content
            for name, content in artifact.files.items()
            if name.startswith(PREFIX)
        }
    )


def operations(artifact: Artifact) -> list[str]:
    package = package_of(artifact)
    return [one.type for one in package.functions[package.default_function].operations]


# Each is an op that coremltools 9 refuses, or takes and gets wrong, unless it is written out.
REPAIRED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu as a tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "RMS norm without epsilon": lambda x: F.rms_norm(x, (8,)),
    "RMS norm": lambda x: F.rms_norm(x, (8,), torch.arange(8.0), 1e-5),
    "RMS norm of two axes": lambda x: F.rms_norm(x, (2, 8), None, 1e-5),
    "RMS norm of large numbers": lambda x: F.rms_norm(x * 100, (8,), None, 1e-5),
    "triu of minus infinity": lambda x: (
        x[:, :2] + torch.triu(torch.full((2, 2), -torch.inf), 1)
    ).softmax(-1),
    "tril of minus infinity": lambda x: (
        x[:, :2] + torch.tril(torch.full((2, 2), -torch.inf), -1)
    ).softmax(-1),
    "log softmax of scores far apart": lambda x: F.log_softmax(x * 100, 1),
    "pooling without a stride": lambda x: F.max_pool2d(x[None, None], 2),
    "average without a stride": lambda x: F.avg_pool1d(x[None], 2),
    "circular edges": lambda x: F.pad(x[None, None], (1, 2, 0, 1), mode="circular"),
    "remainder like C's": lambda x: torch.fmod(x, 0.7),
    "remainder like C's of two": lambda x: torch.fmod(x, -x.flip(1).abs() - 0.5),
    "and of two conditions": lambda x: ((x > 0) & (x < 1)).float(),
    "where with a number": lambda x: torch.where(x > 0, x, 0.5),
    "where with two numbers": lambda x: torch.where(x > 0, 0.5, 1.5),
    "scatter of a number": lambda x: x.scatter(1, torch.tensor([[0], [3]]), 2.5),
    "bicubic": lambda x: F.interpolate(x[None, None], scale_factor=2.0, mode="bicubic"),
    "resize to a size": lambda x: F.interpolate(x[None, None], (3, 11), mode="bilinear"),
    "a negative index": lambda x: x.gather(-1, torch.tensor([[-1, 2], [1, -3]]) % 8),
    "an index of no axis": lambda x: x[:, torch.tensor(2)],
    "a masked softmax": lambda x: x.masked_fill(x > 0.5, -torch.inf).softmax(1),
    "attention that looks back": lambda x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], is_causal=True
    ),
}
LESS_IN_HALF = {
    # Eight squares near 1e4 pass 65504 in their sum's float16.
    "RMS norm of large numbers": "overflow",
    "remainder like C's": "a jump",
    "remainder like C's of two": "a jump",
}


class Repaired(nn.Module):
    """Every op beside the others: one conversion tells of them all."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.block = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.BatchNorm1d(4))
        nn.init.uniform_(self.block.get_parameter("2.weight"), 0.5, 1.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {name: function(x) for name, function in REPAIRED.items()}
        recurrent = {"LSTM": self.lstm(x[None])[0], "GRU": self.gru(x[None])[0]}
        return {**found, **recurrent, "a norm after ReLU": self.block(x[None])}


@pytest.fixture(scope="module")
def repaired() -> Program:
    return program(Repaired(), "x=2x8")


@pytest.fixture(scope="module")
def proofs(repaired: Program) -> dict[Recipe, Proof]:
    return {
        recipe: edgekit.verify(BACKEND, BACKEND.lower(repaired, recipe), repaired.reference)
        for recipe in (FP32, FP16)
    }


@pytest.mark.parametrize("name", [*REPAIRED, "LSTM", "GRU", "a norm after ReLU"])
def test_an_op_that_the_converter_gets_wrong_is_repaired(
    proofs: dict[Recipe, Proof], name: str
) -> None:
    (deviation,) = [each for each in proofs[FP32].outputs if each.output == name]
    assert proofs[FP32].level == "emulated"
    assert deviation.sqnr_db is not None
    assert deviation.sqnr_db > 110


@pytest.mark.parametrize("name", [name for name in REPAIRED if name not in LESS_IN_HALF])
def test_the_repair_holds_in_half_precision(proofs: dict[Recipe, Proof], name: str) -> None:
    (deviation,) = [each for each in proofs[FP16].outputs if each.output == name]
    assert deviation.sqnr_db is not None
    assert deviation.sqnr_db > 45


def test_the_norm_of_tiny_numbers_keeps_its_epsilon() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.bare = nn.RMSNorm(16, eps=1e-5), nn.RMSNorm(16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.norm(x * 1e-3), self.bare(x * 1e-3), self.norm(x * 0)

    tiny = program(Tiny(), "x=2x16")
    proof = edgekit.verify(BACKEND, BACKEND.lower(tiny, FP32), tiny.reference)
    assert proof.require().max_rel_error < 1e-5


def test_the_converter_reads_our_gelu_as_its_own_tanh_form() -> None:
    gelu = program(nn.GELU(approximate="tanh"), "input=1x4")
    found = [op for op in operations(BACKEND.lower(gelu, FP32)) if op not in ("const", "identity")]
    assert found == ["gelu"]  # one op, not eight


class Pixels(nn.Module):
    """Tells the channels apart, and each from its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        means: Tensor = self.conv(x).mean((2, 3))
        return means


RGB = ImageInput("x", 3, 6, 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = ImageInput("x", 1, 4, 4, (0.2860,), (0.3530,), pad=2)


def with_image(image: ImageInput, **described: Any) -> Program:
    height, width = image.height + 2 * image.pad, image.width + 2 * image.pad
    torch.manual_seed(0)
    inputs = (edgekit.TensorSpec("x", (1, image.channels, height, width), "float32"),)
    model = resolve(Model(Pixels(image.channels), inputs, image=image, **described))
    return capture(model, reference_from(model))


@pytest.mark.parametrize(
    ("image", "colour", "shape"),
    [(RGB, "RGB", (1, 3, 6, 8)), (GRAY, "GRAYSCALE", (1, 1, 8, 8))],
)
def test_a_picture_is_an_image_feature_and_pixels_give_the_same_answer(
    image: ImageInput, colour: str, shape: tuple[int, ...]
) -> None:
    captured = with_image(image)
    artifact = BACKEND.lower(captured, FP32)
    package = package_of(artifact)
    (feature,) = package.inputs
    assert (feature.name, feature.kind, feature.colour, feature.shape) == (
        *("x", "image", colour),
        shape,
    )
    assert "the model normalises it itself" in feature.description
    assert artifact.provenance["image"] == image.to_json()
    assert captured.reference.samples[0]["x"].min() < -0.5  # samples are normalised
    edgekit.verify(BACKEND, artifact, captured.reference).require()
    # What a Mac would feed: the pixels themselves.
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.float32)
    with torch.no_grad():
        wanted = captured.exported.module()(torch.from_numpy(image.normalise(pixels)))
    found = cast(Array, Interpreter(package).run({"x": pixels})["output"])
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_pictures_in_batches_stay_arrays() -> None:
    torch.manual_seed(0)
    batch = edgekit.TensorSpec("x", (2, 3, 6, 8), "float32")
    model = resolve(Model(Pixels(3), (batch,), image=RGB))
    captured = capture(model, reference_from(model))
    artifact = BACKEND.lower(captured, FP32)
    assert package_of(artifact).inputs[0].kind == "multiarray"
    assert artifact.provenance["image"] is None
    edgekit.verify(BACKEND, artifact, captured.reference).require()


class Scores(nn.Module):
    def __init__(self, classes: int = 3, *, softmax: bool = False) -> None:
        super().__init__()
        self.head, self.softmax = nn.Linear(4, classes), softmax

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x)
        return scores.softmax(1) if self.softmax else scores


LABELS = ("cat", "dog", "häuser 日本")


@pytest.mark.parametrize("softmax", [False, True], ids=["scores", "probabilities"])
@pytest.mark.parametrize("recipe", [FP32, FP16], ids=["fp32", "fp16"])
def test_labels_make_a_classifier_that_returns_the_scores_too(
    softmax: bool, recipe: Recipe
) -> None:
    captured = program(Scores(softmax=softmax), "x=1x4", labels=LABELS)
    artifact = BACKEND.lower(captured, recipe)
    edgekit.verify(BACKEND, artifact, captured.reference).require()
    package = package_of(artifact)
    kinds = {feature.name: feature.kind for feature in package.outputs}
    assert kinds == {
        "output": "multiarray",
        "classLabel": "string",
        "classLabel_probs": "dictionary",
    }
    sample, expected = captured.reference.samples[0]["x"], captured.reference.expected[0]["output"]
    answer = Interpreter(package).run({"x": sample})
    assert answer["classLabel"] == LABELS[int(expected.argmax())]
    probabilities = cast(dict[str, float], answer["classLabel_probs"])
    wanted = expected[0] if softmax else np.exp(expected[0]) / np.exp(expected[0]).sum()
    assert list(probabilities) == list(LABELS)
    np.testing.assert_allclose(list(probabilities.values()), wanted, rtol=2e-3)
    np.testing.assert_allclose(cast(Array, answer["output"]), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (1, ("alone",)),
        (3, ("too", "few")),
        (2, ("one", "too", "many")),
        (3, ("twice", "twice", "once")),  # a dictionary could hold only one of them
    ],
)
def test_labels_that_do_not_fit_are_left_out(classes: int, labels: tuple[str, ...]) -> None:
    captured = program(Scores(classes), "x=1x4", labels=labels)
    artifact = BACKEND.lower(captured, FP32)
    assert [feature.name for feature in package_of(artifact).outputs] == ["output"]
    edgekit.verify(BACKEND, artifact, captured.reference).require()


def test_scores_of_a_batch_are_no_classifier() -> None:
    captured = program(Scores(), "x=batch:1..4x4", labels=LABELS)
    outputs = package_of(BACKEND.lower(captured, FP32)).outputs
    assert [feature.name for feature in outputs] == ["output"]


@pytest.mark.parametrize("name", ["classLabel", "classLabel_probs", "edgekit_probabilities"])
def test_an_output_named_as_a_classifier_names_its_own_gets_another_name(name: str) -> None:
    captured = program(Scores(), "x=1x4", labels=LABELS, outputs=(name,))
    artifact = BACKEND.lower(captured, FP32)
    assert [output.name for output in artifact.outputs] == [name]
    names = [feature.name for feature in package_of(artifact).outputs]
    assert set(names) == {f"{name}_output", "classLabel", "classLabel_probs"}
    edgekit.verify(BACKEND, artifact, captured.reference).require()


def test_a_picture_classifier_is_previewed_by_xcode() -> None:
    captured = with_image(RGB, labels=("a", "b", "c", "d"))
    package = package_of(BACKEND.lower(captured, FP32))
    key = "com.apple.coreml.model.preview.type"
    assert package.metadata.user_defined[key] == "imageClassifier"
    plain = package_of(BACKEND.lower(program(Scores(), "x=1x4", labels=LABELS), FP32))
    assert key not in plain.metadata.user_defined
