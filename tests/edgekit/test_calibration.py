"""Calibration data is read, counted and refused where no range could be measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgekit.calibration import FEWEST, Calibration, checked_calibration, read_calibration
from edgekit.errors import BadInput
from edgekit.image import ImageInput
from edgekit.spec import Array, Dim, TensorSpec

X = TensorSpec("x", (1, 3, 4, 4), "float32")
INPUTS = (X,)
# Each channel has a mean of its own, as of ImageNet: black is three values.
COLOUR = ImageInput("x", 3, 4, 4, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def drawn(count: int = 10) -> list[dict[str, Array]]:
    generator = np.random.default_rng(0)
    return [{"x": generator.standard_normal((1, 3, 4, 4), np.float32)} for _ in range(count)]


def write_ppm(path: Path, shade: int = 0, *, noisy: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(shade)
    pixels = generator.integers(0, 256, 27).astype(np.uint8).tobytes() if noisy else [shade] * 27
    path.write_bytes(b"P6\n3 3\n255\n" + bytes(pixels))


def test_a_folder_of_images_is_read_with_those_in_its_folders(tmp_path: Path) -> None:
    for index in range(FEWEST):
        write_ppm(tmp_path / f"{index % 2}" / f"{index}.ppm", index, noisy=True)
    (tmp_path / "notes.txt").write_text("not an image")
    found = read_calibration(tmp_path, INPUTS, COLOUR)
    assert len(found.samples) == FEWEST
    assert found.samples[0]["x"].shape == (1, 3, 4, 4)
    assert found.source == tmp_path.name


def test_a_stack_of_inputs_is_read_as_samples_of_the_models_batch(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    stack = np.random.default_rng(0).standard_normal((16, 3, 4, 4)).astype(np.float32)
    np.savez(path, x=stack, labels=np.zeros(16))
    by_two = TensorSpec("x", (2, 3, 4, 4), "float32")
    found = read_calibration(path, (by_two,), None)
    assert [sample["x"].shape[0] for sample in found.samples] == [2] * 8
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in found.samples]), stack)
    any_batch = TensorSpec("x", (Dim("batch", 1, 8), 3, 4, 4), "float32")
    assert len(read_calibration(path, (any_batch,), None).samples) == 16


def test_the_hash_is_of_the_values_and_their_order() -> None:
    samples = drawn()
    found = checked_calibration(samples, "a")
    assert len(found.sha256) == 64
    again = [{"x": sample["x"].copy(order="F")} for sample in samples]
    assert checked_calibration(again, "b").sha256 == found.sha256
    assert checked_calibration(samples[::-1], "a").sha256 != found.sha256
    changed = [dict(sample) for sample in samples]
    changed[3]["x"] = changed[3]["x"] + np.float32(1e-6)
    assert checked_calibration(changed, "a").sha256 != found.sha256
    renamed = [{"y": sample["x"]} for sample in samples]
    assert checked_calibration(renamed, "a").sha256 != found.sha256


def test_the_manifest_keeps_the_count_the_source_and_the_hash() -> None:
    found = checked_calibration(drawn(9), "photos")
    assert found.to_json() == {"samples": 9, "source": "photos", "sha256": found.sha256}


def test_the_progress_line_counts_to_the_end() -> None:
    heard: list[str] = []
    quiet = checked_calibration(drawn(8), "photos")
    loud = quiet.reporting(heard.append)
    assert list(quiet.watched("calibrating")) == list(loud.watched("calibrating"))
    assert heard[0] == "calibrating: 1 of 8 [##..................]"
    assert heard[-1] == "calibrating: 8 of 8 [####################]"
    assert len(heard) == 8
    assert quiet == loud


def test_an_empty_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(BadInput, match=r"the calibration folder .* holds no image and no \.npz"):
        read_calibration(tmp_path, INPUTS, COLOUR)


def test_one_image_is_not_enough_as_a_folder_or_as_a_file(tmp_path: Path) -> None:
    write_ppm(tmp_path / "a.ppm", noisy=True)
    with pytest.raises(
        BadInput, match=r"holds 1 input; at least 8 are needed, 100 to 500 are usual"
    ):
        read_calibration(tmp_path, INPUTS, COLOUR)
    with pytest.raises(BadInput, match=r"a\.ppm is one file; give a folder of images, or an \.npz"):
        read_calibration(tmp_path / "a.ppm", INPUTS, COLOUR)


@pytest.mark.parametrize("count", [0, 1, FEWEST - 1])
def test_too_few_inputs_are_counted(count: int) -> None:
    with pytest.raises(BadInput, match=rf"photos holds {count} inputs?; at least 8 are needed"):
        checked_calibration(drawn(count), "photos")


def test_what_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    for name in ("none", "none.npz"):
        with pytest.raises(BadInput, match=rf"there is no file .*{name}\."):
            read_calibration(tmp_path / name, INPUTS, COLOUR)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            {"x": np.zeros((9, 3, 5, 5), np.float32)},
            r"c\.npz: input 'x' has shape 1x3x5x5; the model takes x=1x3x4x4\.",
        ),
        (
            {"x": np.zeros((9, 3, 4, 4))},
            r"c\.npz: input 'x' has dtype float64; the model takes float32",
        ),
        (
            {"x": np.zeros((3, 4), np.float32)},
            r"'x' is float32 \(3, 4\); the model takes x=1x3x4x4, stacked along its first axis",
        ),
        (
            {"image": np.zeros((9, 3, 4, 4), np.float32)},
            r"has no array 'x'; it holds image, the model takes x=1x3x4x4\.",
        ),
        ({}, r"has no array 'x'; it holds nothing"),
    ],
)
def test_a_stack_that_does_not_fit_names_its_file_and_what_fits(
    tmp_path: Path, arrays: dict[str, Array], sentence: str
) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=sentence):
        read_calibration(path, INPUTS, None)


def test_of_a_folder_the_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    for index in range(FEWEST):
        np.savez(tmp_path / f"{index}.npz", x=drawn(1)[0]["x"])
    np.savez(tmp_path / "odd.npz", x=np.zeros((1, 3, 9, 9), np.float32))
    with pytest.raises(BadInput, match=r"odd\.npz: input 'x' has shape 1x3x9x9"):
        read_calibration(tmp_path, INPUTS, None)


def test_a_file_that_is_no_npz_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    path.write_text("not an archive")
    with pytest.raises(BadInput, match=r"c\.npz is not an \.npz of arrays that can be read"):
        read_calibration(path, INPUTS, None)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_names_the_file_it_is_in(tmp_path: Path, wrong: float) -> None:
    for index, sample in enumerate(drawn()):
        if index == 3:
            sample["x"][0, 1, 2, 3] = wrong
        np.savez(tmp_path / f"{index}.npz", **sample)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r": 3\.npz holds NaN or infinity in 'x'; .*Take it out"):
        read_calibration(tmp_path, INPUTS, None)


@pytest.mark.parametrize("image", [COLOUR, ImageInput("x", 3, 4, 4, (0.5,) * 3, (0.5,) * 3)])
def test_images_that_are_all_black_have_no_range(tmp_path: Path, image: ImageInput) -> None:
    for index in range(FEWEST):
        write_ppm(tmp_path / f"{index}.ppm")
    with pytest.raises(
        BadInput, match=r"every value of 'x' is the same within each sample \(black images\?\)"
    ):
        read_calibration(tmp_path, INPUTS, image)


def test_a_black_image_among_others_is_an_image(tmp_path: Path) -> None:
    for index in range(FEWEST):
        write_ppm(tmp_path / f"{index}.ppm", noisy=index > 0)
    assert len(read_calibration(tmp_path, INPUTS, COLOUR).samples) == FEWEST


def calibrated(arrays: Sequence[Array]) -> Calibration:
    return checked_calibration([{"x": array} for array in arrays], "data")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
def test_an_input_of_one_number_has_a_range_over_the_samples(shape: tuple[int, ...]) -> None:
    steps = [np.full(shape, index, np.float32) for index in range(FEWEST)]
    assert calibrated(steps)
    with pytest.raises(BadInput, match="every value of 'x' is the same"):
        calibrated([steps[3]] * FEWEST)


@pytest.mark.parametrize("shape", [(1, 5), (1, 6, 1), (1, 6, 4), (1, 6, 1, 1)])
def test_vectors_and_sequences_are_told_from_constants(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    assert calibrated([generator.random(shape, np.float32) for _ in range(FEWEST)])
    with pytest.raises(BadInput, match="every value of 'x' is the same"):
        calibrated([np.zeros(shape, np.float32)] * FEWEST)


def test_integers_have_no_range_to_measure() -> None:
    assert calibrated([np.zeros((1, 4), np.int64)] * FEWEST)
