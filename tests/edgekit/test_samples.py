"""Samples are drawn over the whole range of sizes, and files that do not fit are explained."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import BadInput
from edgekit.image import ImageInput
from edgekit.samples import draw_samples, read_npz, read_sample, read_samples, regroup, stacked
from edgekit.spec import Array, Dim, TensorSpec, check_arrays

BATCH = Dim("batch", 1, 8)
X = TensorSpec("x", (BATCH, 3), "float32")
IDS = TensorSpec("ids", (BATCH, 2), "int64")
PICTURE = TensorSpec("x", (1, 1, 4, 4), "float32")
GREY = ImageInput("x", 1, 4, 4, (0.5,), (0.5,))


def write_pgm(path: Path) -> None:
    path.write_bytes(b"P5\n2 2\n255\n" + bytes(4))


def test_drawn_samples_cover_the_smallest_the_largest_and_the_middle_size() -> None:
    drawn = draw_samples((X, IDS))
    assert [sample["x"].shape[0] for sample in drawn] == [1, 8, 4, 1]
    assert all(sample["ids"].shape[0] == sample["x"].shape[0] for sample in drawn)


@pytest.mark.parametrize("dtype", ["float32", "int64", "int32", "int8", "uint8", "bool"])
def test_drawn_samples_fit_the_specs_and_integers_fit_any_vocabulary(dtype: str) -> None:
    spec = TensorSpec("x", (2, BATCH), dtype)
    for sample in draw_samples([spec]):
        assert check_arrays([spec], sample)["x"].dtype.name == dtype
        if dtype != "float32":
            assert set(sample["x"].ravel().tolist()) <= {0, 1}


def test_the_same_samples_are_drawn_each_time_and_no_two_are_equal() -> None:
    fixed = TensorSpec("x", (1, 5), "float32")
    first, again = draw_samples([fixed]), draw_samples([fixed])
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, again, strict=True))
    assert len({sample["x"].tobytes() for sample in first}) == len(first) == 4


def test_samples_of_one_become_batches_of_the_smallest_largest_and_middle_size() -> None:
    spec = TensorSpec("x", (Dim("batch", 1, 4), 3), "float32")
    singles = tuple({"x": np.full((1, 3), index, np.float32)} for index in range(8))
    groups = regroup(singles, [spec])
    assert [group["x"].shape[0] for group in groups] == [1, 4, 2, 1]
    assert np.array_equal(np.concatenate([group["x"] for group in groups])[:, 0], np.arange(8))


def test_samples_of_a_fixed_batch_stay_as_they_are() -> None:
    samples = ({"x": np.zeros((1, 1, 4, 4), np.float32)},)
    assert regroup(samples, [PICTURE]) == samples
    assert regroup((), [X]) == ()


def test_an_npz_is_read_by_input_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones((2, 3), np.float32))
    assert np.array_equal(read_sample(path, [X], None)["x"], np.ones((2, 3)))


def test_an_npz_with_other_names_is_answered_with_the_models(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, image=np.ones((2, 3), np.float32))
    with pytest.raises(BadInput, match=r"no input 'image'; the model takes: x=batch:1\.\.8x3"):
        read_sample(path, [X], None)


def test_a_picture_is_prepared_for_the_input_it_becomes(tmp_path: Path) -> None:
    write_pgm(tmp_path / "a.pgm")
    assert np.array_equal(
        read_sample(tmp_path / "a.pgm", [PICTURE], GREY)["x"], np.full((1, 1, 4, 4), -1)
    )


def test_a_picture_for_a_model_that_takes_none_says_what_to_give(tmp_path: Path) -> None:
    write_pgm(tmp_path / "a.pgm")
    with pytest.raises(BadInput, match=r"give an \.npz with x=batch.*or return edgekit\.Model\(im"):
        read_sample(tmp_path / "a.pgm", [X], None)


def test_a_folder_gives_its_samples_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, value in (("b.npz", 2), ("a.npz", 1)):
        np.savez(tmp_path / name, x=np.full((1, 1, 4, 4), value, np.float32))
    write_pgm(tmp_path / "c.PGM")
    (tmp_path / "notes.txt").write_text("not a sample")
    found = read_samples(tmp_path, [PICTURE], GREY)
    assert [float(sample["x"].flat[0]) for sample in found] == [1, 2, -1]


def test_one_file_gives_one_sample(tmp_path: Path) -> None:
    write_pgm(tmp_path / "a.pgm")
    assert len(read_samples(tmp_path / "a.pgm", [PICTURE], GREY)) == 1


def test_a_folder_without_samples_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no \.npz file and no image; put samples there"):
        read_samples(tmp_path, [X], None)


def test_an_npz_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no file .*none\.npz"):
        read_npz(tmp_path / "none.npz")


def test_a_single_array_is_answered_with_the_call_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(BadInput, match=r"single array; use np\.savez with the inputs' names"):
        read_npz(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([object()], dtype=object))
    (tmp_path / "b.npz").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for name in ("a.npz", "b.npz"):
        with pytest.raises(BadInput, match=r"is not an \.npz of arrays that can be read"):
            read_npz(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", b"\x93NUMPY\x01\x00"])
def test_what_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"is not an \.npz of arrays that can be read: "):
        read_npz(path)
    with pytest.raises(BadInput, match=r"is not an \.npz of arrays that can be read: "):
        read_npz(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_an_npz_is_refused_or_harmless(tmp_path: Path, method: int) -> None:
    path = tmp_path / "a.npz"
    right: Array = np.arange(8, dtype=np.float32)
    (np.savez_compressed if method else np.savez)(path, x=right)
    whole = path.read_bytes()
    for position in range(0, len(whole), 1 if method else 3):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with suppress(BadInput):
            assert all(np.array_equal(array, right) for array in read_npz(path).values())


def test_an_npz_that_is_packed_in_a_way_unknown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros(9))
    whole = bytearray(path.read_bytes())
    whole[8] = whole[whole.index(b"PK\x01\x02") + 10] = 99  # the method, in both headers
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="compression method is not supported"):
        read_npz(path)


def test_regrouping_uses_every_sample_and_reaches_the_largest_batch() -> None:
    inputs = (TensorSpec("x", (Dim("batch", 1, 8), 2), "float32"),)
    samples = [{"x": np.full((1, 2), number, np.float32)} for number in range(3)]
    groups = regroup(samples, inputs)
    assert [group["x"].shape[0] for group in groups] == [1, 8, 4]
    assert {float(value) for group in groups for value in group["x"].ravel()} == {0, 1, 2}


def test_inputs_that_share_no_batch_are_not_regrouped() -> None:
    inputs = (TensorSpec("x", (Dim("batch", 1, 8), 2), "float32"), TensorSpec("y", (3,), "float32"))
    samples = ({"x": np.zeros((1, 2), np.float32), "y": np.zeros(3, np.float32)},)
    assert regroup(samples, inputs) == samples


def test_the_input_that_is_a_picture_is_drawn_in_whole_pixels() -> None:
    other = TensorSpec("y", (1, 1, 4, 4), "float32")
    drawn = draw_samples([PICTURE, other], GREY)
    for sample in drawn:
        pixels = GREY.pixels(sample["x"])
        np.testing.assert_array_equal(pixels, np.rint(pixels))
        assert 0 <= pixels.min() < pixels.max() <= 255
        assert sample["x"].dtype == np.float32
        beside = GREY.pixels(sample["y"])
        assert not np.array_equal(beside, np.rint(beside))
    assert len({sample["x"].tobytes() for sample in drawn}) == len(drawn)
    again = draw_samples([PICTURE, other], GREY)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(drawn, again, strict=True))


def test_pictures_are_drawn_in_every_size_of_the_batch() -> None:
    spec = TensorSpec("x", (BATCH, 1, 5, 5), "float32")
    assert [sample["x"].shape for sample in draw_samples([spec], GREY)] == [
        (size, 1, 5, 5) for size in (1, 8, 4, 1)
    ]


def test_a_stack_is_cut_into_samples_of_the_models_batch() -> None:
    x, ids = np.arange(18, dtype=np.float32).reshape(6, 3), np.zeros((6, 2), np.int64)
    samples = stacked({"ids": ids, "x": x, "labels": np.zeros(6)}, (X, IDS), "s.npz")
    assert len(samples) == 6  # a named batch is taken at its smallest
    assert list(samples[0]) == ["x", "ids"]
    assert [sample["x"].shape for sample in samples] == [(1, 3)] * 6
    np.testing.assert_array_equal(np.concatenate([sample["x"] for sample in samples]), x)
    by_three = stacked({"x": x}, (TensorSpec("x", (3, 3), "float32"),), "s.npz")
    assert [sample["x"].shape for sample in by_three] == [(3, 3)] * 2
    assert stacked({"x": x[:0]}, (X,), "s.npz") == ()


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.zeros((4, 3), np.float32)}, r"^s\.npz has no array 'ids'; it holds x, the model"),
        (
            {"x": np.zeros((4, 3), np.float32), "ids": np.zeros((5, 2), np.int64)},
            r"^s\.npz: the inputs hold different numbers of samples: \[4, 5\]\.",
        ),
        (
            {"x": np.zeros(3, np.float32), "ids": np.zeros((4, 2), np.int64)},
            r"^s\.npz: 'x' is float32 \(3,\); the model takes x=batch:1\.\.8x3, stacked along its",
        ),
        (
            {"x": np.zeros((4, 3), np.float32), "ids": np.zeros((4, 3), np.int64)},
            r"^s\.npz: input 'ids' has shape 1x3; the model takes ids=batch:1\.\.8x2:int64\.",
        ),
    ],
)
def test_a_stack_that_does_not_fit_names_its_file(arrays: dict[str, Array], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        stacked(arrays, (X, IDS), "s.npz")


def test_a_stack_that_does_not_fill_its_last_batch_is_refused() -> None:
    three = TensorSpec("x", (3, 3), "float32")
    with pytest.raises(BadInput, match=r"'x' is float32 \(7, 3\); the model takes x=3x3, stacked"):
        stacked({"x": np.zeros((7, 3), np.float32)}, (three,), "s.npz")


def test_a_scalar_input_cannot_be_stacked() -> None:
    scalar = TensorSpec("t", (), "float32")
    with pytest.raises(BadInput, match="'t' is float32"):
        stacked({"t": np.zeros(4, np.float32)}, (scalar,), "s.npz")


def test_of_many_files_the_one_that_does_not_fit_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.ones((2, 3), np.float32))
    np.savez(tmp_path / "odd.npz", x=np.ones((2, 4), np.float32))
    with pytest.raises(BadInput, match=r"odd\.npz: input 'x' has shape 2x4; the model takes x="):
        read_samples(tmp_path, [X], None)
