"""Accuracy is counted on labels that are the model's own, and never on a model that guesses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.accuracy import (
    Accuracy,
    Labelled,
    accuracy,
    answers,
    check_labelled,
    classes_of,
    read_labelled,
)
from edgekit.artifact import Artifact
from edgekit.errors import BadInput, NotProven
from edgekit.image import ImageInput
from edgekit.recipe import FP32
from edgekit.spec import Array, TensorSpec
from edgekit.testing import ReplayBackend, example_reference, replay_file

X = TensorSpec("x", (1, 4), "float32")
PICTURE = TensorSpec("x", (1, 1, 4, 4), "float32")
GREY = ImageInput("x", 1, 4, 4, (0.5,), (0.5,))


def labelled(count: int = 1000, *, classes: int = 4) -> Labelled:
    truth = np.arange(count) % classes
    return Labelled(tuple({"x": np.zeros((1, 4), np.float32)} for _ in truth), truth, "val.npz")


def scored(classes: Array, width: int = 4) -> list[dict[str, Array]]:
    """The outputs of a model that gives each of ``classes`` as its answer."""
    return [{"scores": np.eye(width, dtype=np.float32)[[each]]} for each in classes]


def write(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_a_stack_with_labels_is_read(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    truth = np.array([0, 1, 2, 3, 0, 1], np.uint8)
    found = read_labelled(write(tmp_path / "val.npz", x=stack, labels=truth), (X,), None)
    assert len(found) == 6
    assert found.labels.tolist() == truth.tolist()
    assert found.labels.dtype == np.int64
    assert found.source == "val.npz"
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in found.samples]), stack)


def test_a_batch_has_a_label_for_each_of_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "v.npz", x=np.zeros((6, 4), np.float32), labels=np.arange(6))
    found = read_labelled(path, (TensorSpec("x", (2, 4), "float32"),), None)
    assert (len(found.samples), len(found)) == (3, 6)


def write_pgm(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P5\n2 2\n255\n" + bytes(4))


def test_class_folders_go_by_the_models_labels_else_by_number(tmp_path: Path) -> None:
    for name in ("dog/a.pgm", "dog/b.pgm", "cat/a.pgm", "2/a.pgm"):
        write_pgm(tmp_path / name)
    (tmp_path / "dog/notes.txt").write_text("not an image")
    (tmp_path / "readme.txt").write_text("not a folder")
    found = read_labelled(tmp_path, (PICTURE,), GREY, ("cat", "dog", "bird"))
    assert found.labels.tolist() == [2, 0, 1, 1]
    assert found.source == tmp_path.name


@pytest.mark.parametrize(
    ("labels", "known"), [(("cat", "dog"), "cat, dog"), ((), "numbers from 0")]
)
def test_a_folder_named_after_no_class_is_answered_with_those_there_are(
    tmp_path: Path, labels: tuple[str, ...], known: str
) -> None:
    write_pgm(tmp_path / "cats/a.pgm")
    with pytest.raises(
        BadInput, match=rf"cats is named after no class of the model; there is: {known}\."
    ):
        read_labelled(tmp_path, (PICTURE,), GREY, labels)


def test_a_folder_whose_name_only_looks_like_a_number_is_no_class(tmp_path: Path) -> None:
    write_pgm(tmp_path / "²/a.pgm")
    with pytest.raises(BadInput, match="is named after no class"):
        read_labelled(tmp_path, (PICTURE,), GREY)


def test_images_without_class_folders_hold_no_labels(tmp_path: Path) -> None:
    write_pgm(tmp_path / "a.pgm")
    with pytest.raises(BadInput, match=r"holds no labels: accuracy needs a folder for each class"):
        read_labelled(tmp_path, (PICTURE,), GREY)


def test_labels_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "val.npz", x=np.zeros((6, 4), np.float32))
    with pytest.raises(
        BadInput, match=r"has no array 'labels', and accuracy needs .*it holds x\. .*--metric sqnr"
    ):
        read_labelled(path, (X,), None)


@pytest.mark.parametrize("wrong", [np.zeros(5, int), np.zeros(6), np.zeros((6, 1), int)])
def test_labels_that_are_no_whole_number_each_are_refused(tmp_path: Path, wrong: Array) -> None:
    path = write(tmp_path / "val.npz", x=np.zeros((6, 4), np.float32), labels=wrong)
    with pytest.raises(BadInput, match=r"give one whole number for each of the 6 inputs"):
        read_labelled(path, (X,), None)


def test_no_input_at_all_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "v.npz", x=np.zeros((0, 4), np.float32), labels=np.zeros(0, int))
    with pytest.raises(BadInput, match="holds no input"):
        read_labelled(path, (X,), None)


def test_the_first_output_that_is_class_scores_answers() -> None:
    outputs: dict[str, Array] = {
        "boxes": np.array([[9, 1]]),
        "features": np.zeros((1, 3, 2), np.float32),
        "value": np.ones((1, 1), np.float32),
        "scores": np.array([[0.1, 0.9, 0.3]], np.float32),
    }
    assert classes_of(outputs).tolist() == [1]
    del outputs["scores"]
    with pytest.raises(
        BadInput, match=r"top-1 needs class scores of shape \(batch, classes\).*boxes \(1, 2\)"
    ):
        classes_of(outputs)


def test_a_session_is_asked_every_labelled_input() -> None:
    reference = example_reference(3)
    specs = (X,), (TensorSpec("scores", (1, 4), "float32"),)
    artifact = Artifact(
        "replay", FP32, "replay.npz", {"replay.npz": replay_file(reference)}, *specs
    )
    truth = np.array([expected["scores"].argmax() for expected in reference.expected])
    with ReplayBackend().open(artifact) as session:
        given = answers(session, Labelled(reference.samples, truth, "val"))
    assert given.tolist() == truth.tolist()


def test_a_drop_is_what_the_float_model_gets_right_and_the_artifact_does_not() -> None:
    data = labelled(200)
    eager, given = data.labels.copy(), data.labels.copy()
    eager[:10] += 1
    given[:13] += 1
    found = accuracy(given, eager, data)
    assert found == Accuracy("top1", 93.5, 95.0, 200, "val.npz")
    assert found.drop == 1.5
    assert found.to_json()["drop"] == 1.5
    assert accuracy(eager, given, data).drop == -1.5


def test_labels_that_the_model_answers_come_back_as_its_answers() -> None:
    data = labelled()
    given = data.labels.copy()
    given[:100] = 0
    assert check_labelled(data, scored(given), 0.5).tolist() == given.tolist()


@pytest.mark.parametrize(("wrong", "named"), [(4, "4"), (1000, "1000"), (-1, "-1"), (-7, "-7")])
def test_a_label_that_is_no_class_is_named(wrong: int, named: str) -> None:
    data = labelled()
    outputs = scored(data.labels)
    data.labels[5] = wrong
    with pytest.raises(
        BadInput, match=rf"val\.npz has the label {named}, and the model has classes 0 to 3\."
    ):
        check_labelled(data, outputs, 0.5)


def test_classes_are_counted_on_the_output_that_answers() -> None:
    data = labelled()
    outputs = [{"boxes": np.zeros((1, 2), int), **each} for each in scored(data.labels)]
    assert len(check_labelled(data, outputs, 0.5)) == 1000


@pytest.mark.parametrize(("count", "drop", "least"), [(199, 0.5, 200), (10, 5.0, 20), (9, 3, 34)])
def test_too_few_labels_to_tell_the_drop_are_counted(count: int, drop: float, least: int) -> None:
    data = labelled(count)
    with pytest.raises(
        BadInput, match=rf"a drop of {drop:g} cannot be told\. Give at least {least}, or a larger"
    ):
        check_labelled(data, scored(data.labels), drop)
    enough = labelled(least)
    assert len(check_labelled(enough, scored(enough.labels), drop)) == least


def test_no_drop_at_all_can_be_told_with_any_number_of_labels() -> None:
    data = labelled(40)
    assert len(check_labelled(data, scored(data.labels), 0.0)) == 40


def test_a_model_that_guesses_is_never_called_accurate() -> None:
    data = labelled()
    guesses = np.random.default_rng(0).integers(0, 4, len(data))
    with pytest.raises(
        NotProven, match=r"the float model gets 2\d\.\d% of val\.npz right, and guessing 25\.0%: it"
    ):
        check_labelled(data, scored(guesses), 0.5)
    lucky = np.where(np.arange(len(data)) < 40, data.labels, guesses)  # within chance, above it
    assert float((lucky == data.labels).mean()) > 0.25
    with pytest.raises(NotProven, match="it is untrained"):
        check_labelled(data, scored(lucky), 0.5)
    always_one = np.zeros(len(data), int)
    with pytest.raises(NotProven, match="it is untrained, or the labels are not its own"):
        check_labelled(data, scored(always_one), 0.5)
