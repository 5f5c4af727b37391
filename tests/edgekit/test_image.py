"""Pictures are read as Pillow reads them, damage is a sentence, and prepare() fits the model."""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadInput, DamagedFile, UsageError
from edgekit.image import MAX_PIXELS, Image, ImageInput, read_image
from edgekit.spec import parse_spec

quick = settings(deadline=None, max_examples=40, derandomize=True)

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
MODES = {"L": 1, "RGB": 3, "LA": 2, "RGBA": 4, "P": 1}
GREY = ImageInput("x", 1, 6, 4, (0.5,), (0.25,), pad=1)
COLOUR = ImageInput("x", 3, 6, 4, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures") / "picture"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    lines: bytes,
    width: int,
    height: int,
    *,
    colour: int = 0,
    depth: int = 8,
    interlace: int = 0,
    palette: bytes = b"",
    split: int = 0,
) -> bytes:
    """A PNG whose filtered lines are given; IDAT is cut after ``split`` bytes."""
    packed = zlib.compress(lines)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", palette) if palette else b"")
        + (chunk(b"IDAT", packed[:split]) + chunk(b"IDAT", packed[split:]))
        + chunk(b"tEXt", b"Comment\0none")
        + chunk(b"IEND", b"")
    )


def as_pillow_reads(path: Path) -> Image:
    """What Pillow makes of the file, alpha dropped."""
    with PIL.Image.open(path) as image:
        grey = image.mode in ("1", "L", "LA")
        if image.mode in ("LA", "RGBA"):
            return np.asarray(image)[:, :, :-1]
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[:, :, None] if grey else pixels


@quick
@given(
    mode=st.sampled_from(sorted(MODES)),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    smooth=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_pillow_writes_as_png_is_read_as_pillow_reads_it(
    scratch: Path, mode: str, size: tuple[int, int], smooth: bool, seed: int
) -> None:
    bands = MODES[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (*size, bands))
    ramp = np.add.outer(7 * np.arange(size[0]), 11 * np.arange(size[1]))[:, :, None]
    pixels = ((ramp + np.arange(bands)) if smooth else noise).astype(np.uint8)
    if mode == "P":
        picture = PIL.Image.new("P", (size[1], size[0]))
        picture.putdata((pixels.ravel() % 251).tolist())
        picture.putpalette(list(np.random.default_rng(seed).bytes(753)))
    else:
        picture = PIL.Image.fromarray(pixels[:, :, 0] if bands == 1 else pixels)
        assert picture.mode == mode
    picture.save(scratch, "png", bits=8)
    found = read_image(scratch)
    assert found.dtype == np.uint8
    assert np.array_equal(found, as_pillow_reads(scratch))


@quick
@given(
    colour=st.sampled_from([0, 2, 4, 6]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    filters=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
    split=st.integers(0, 20),
)
def test_every_row_filter_is_undone_as_pillow_undoes_it(
    scratch: Path, colour: int, size: tuple[int, int], filters: list[int], seed: int, split: int
) -> None:
    height, width = size
    generator = np.random.default_rng(seed)
    lines = b"".join(
        bytes([filters[row]]) + generator.bytes(width * SAMPLES[colour]) for row in range(height)
    )
    scratch.write_bytes(png(lines, width, height, colour=colour, split=split))
    assert np.array_equal(read_image(scratch), as_pillow_reads(scratch))


@pytest.mark.parametrize(
    ("mode", "shape"), [("1", (5, 9, 1)), ("L", (5, 9, 1)), ("RGB", (5, 9, 3)), ("CMYK", (5, 9, 3))]
)
def test_other_formats_are_read_through_pillow(
    scratch: Path, mode: str, shape: tuple[int, ...]
) -> None:
    PIL.Image.new(mode, (9, 5), 0).save(scratch, "tiff")
    assert read_image(scratch).shape == shape


def test_an_interlaced_png_is_left_to_pillow(scratch: Path) -> None:
    scratch.write_bytes(png(b"\0\x07" * 1, 1, 1, interlace=1))
    assert read_image(scratch).tolist() == [[[7]]]


def test_sixteen_bits_become_the_upper_eight(scratch: Path) -> None:
    deep = np.array([[0, 255, 256, 30000, 65535]], np.uint16)
    PIL.Image.fromarray(deep).save(scratch, "png")
    assert read_image(scratch).ravel().tolist() == [0, 0, 1, 117, 255]


def test_pixels_without_a_range_are_refused(scratch: Path) -> None:
    PIL.Image.new("F", (2, 2), 0.5).save(scratch, "tiff")
    with pytest.raises(BadInput, match="pixels are no 8-bit numbers; convert it to 8-bit PNG"):
        read_image(scratch)


def test_without_pillow_the_sentence_says_what_to_do(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PIL.Image.new("RGB", (2, 2)).save(scratch, "bmp")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(
        BadInput, match=r"\(not PNG, PGM or PPM\).*8-bit PNG.*pip install 'edgekit-sdk\[images\]'"
    ):
        read_image(scratch)


def test_without_pillow_a_png_it_would_need_is_named_by_its_flavour(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch.write_bytes(png(b"\0\0\0", 1, 1, depth=16))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BadInput, match="PNG with 16 bits, colour type 0, interlace 0"):
        read_image(scratch)


@pytest.mark.parametrize(("kind", "samples"), [(b"P5", 1), (b"P6", 3)])
def test_pnm_is_read_with_its_comments(scratch: Path, kind: bytes, samples: int) -> None:
    pixels = np.arange(6 * samples, dtype=np.uint8).reshape(2, 3, samples)
    scratch.write_bytes(kind + b"\n# made by hand\n3 2\n# more\n255\n" + pixels.tobytes())
    assert np.array_equal(read_image(scratch), pixels)


@pytest.mark.parametrize(
    "content",
    [
        b"P5",
        b"P5\n3 2",
        b"P5\n3 2\n255\n\0",
        b"P5\n3 2\n65535\n" + bytes(12),
        b"P5\n-3 -2\n255\n" + bytes(6),
        b"P6\nthree 2\n255\n",
        b"P6\n# no end",
        b"P6\n99999999 99999999\n255\n",
    ],
)
def test_a_damaged_pnm_is_refused(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    with pytest.raises(BadInput, match="is a damaged image: "):
        read_image(scratch)


def test_a_png_cut_off_anywhere_before_its_end_is_refused(scratch: Path) -> None:
    whole = png(b"".join(b"\4" + bytes(9) for _ in range(3)), 3, 3, colour=2, split=5)
    ends = {len(whole) - 12, whole.index(b"tEXt") - 4}  # all pixels are there
    for length in range(len(whole)):
        if length not in ends:
            scratch.write_bytes(whole[:length])
            with pytest.raises(BadInput, match=r"damaged image|cannot be read as an image"):
                read_image(scratch)


def test_a_flipped_bit_in_a_png_is_found_or_harmless(scratch: Path) -> None:
    whole = png(b"\1\2\3\2\4\5", 2, 2)
    scratch.write_bytes(whole)
    right = read_image(scratch)
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        scratch.write_bytes(altered)
        with suppress(BadInput):
            assert np.array_equal(read_image(scratch), right)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(b"\5\0", 1, 1), "row filter 5 does not exist"),
        (png(b"\0\0", 1, 1).replace(b"none", b"some"), "chunk b'tEXt' fails its checksum"),
        (png(b"\0", 1, 1), "it ends after 1 of 2 bytes"),
        (png(b"", 0, 1), "it claims 1 rows of 0 bytes"),
        (png(b"", 1 << 20, 1 << 20), "it claims 1048576 rows of 1048576 bytes"),
        (png(b"\0\2", 1, 1, colour=3, palette=bytes(6)), "index 2 is out of bounds"),
        (png(b"\0\0", 1, 1, colour=3, palette=bytes(7)), "cannot reshape"),
        (
            png(b"\0\0", 1, 1)[:33] + chunk(b"IDAT", b"none") + chunk(b"IEND", b""),
            "incorrect header",
        ),
    ],
)
def test_a_png_that_lies_is_refused_with_the_reason(
    scratch: Path, content: bytes, reason: str
) -> None:
    scratch.write_bytes(content)
    with pytest.raises(BadInput, match=f"is a damaged image: .*{reason}"):
        read_image(scratch)


def test_a_small_file_does_not_unpack_into_gigabytes(scratch: Path) -> None:
    assert MAX_PIXELS == 100_000_000
    scratch.write_bytes(png(bytes(10_000_000), 2, 2))
    assert read_image(scratch).shape == (2, 2, 1)


def test_a_file_that_is_no_picture_is_refused(scratch: Path) -> None:
    scratch.write_text("not a picture")
    with pytest.raises(BadInput, match="cannot be read as an image: cannot identify image file"):
        read_image(scratch)


def test_a_picture_that_is_not_there_is_said_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.png cannot be read: No such file or directory"):
        read_image(tmp_path / "none.png")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        read_image(tmp_path)


@quick
@given(
    channels=st.sampled_from([1, 3]),
    given_channels=st.sampled_from([1, 3, 4]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    wanted=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    pad=st.integers(0, 2),
    value=st.integers(0, 255),
)
def test_a_constant_picture_stays_constant_and_gets_the_shape_asked_for(
    channels: Literal[1, 3],
    given_channels: int,
    size: tuple[int, int],
    wanted: tuple[int, int],
    pad: int,
    value: int,
) -> None:
    asked = ImageInput("x", channels, *wanted, (0.5,) * channels, (0.25,) * channels, pad)
    made = asked.prepare(np.full((*size, given_channels), value, np.uint8))
    assert made.shape == (1, channels, wanted[0] + 2 * pad, wanted[1] + 2 * pad)
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    inner = made[:, :, pad : pad + wanted[0], pad : pad + wanted[1]]
    assert np.allclose(inner, (value / 255 - 0.5) / 0.25, atol=1e-5)
    if pad:
        assert np.allclose(made[:, :, 0], -2)
        assert np.allclose(made[:, :, :, -1], -2)


@quick
@given(
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    wanted=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    seed=st.integers(0, 1000),
)
def test_resizing_is_pillows_bilinear(
    size: tuple[int, int], wanted: tuple[int, int], seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    picture = PIL.Image.fromarray(pixels.astype(np.float32))
    expected = picture.resize(wanted[::-1], PIL.Image.Resampling.BILINEAR)
    made = ImageInput("x", 1, *wanted, (0.0,), (1.0,)).prepare(pixels)
    assert np.allclose(made[0, 0] * 255, np.asarray(expected), atol=0.01)


def test_channels_are_normalised_each_by_its_own_mean_and_std() -> None:
    made = COLOUR.prepare(np.full((6, 4, 3), 255, np.uint8))
    assert np.allclose(made[0, :, 0, 0], [0.9 / 0.5, 0.8, 0.7 / 2])


def test_colour_becomes_grey_by_luma_and_grey_becomes_three_equal_channels() -> None:
    red = np.zeros((6, 4, 3), np.uint8)
    red[:, :, 0] = 255
    plain = ImageInput("x", 1, 6, 4, (0.0,), (1.0,))
    assert np.allclose(plain.prepare(red), 0.299, atol=1e-4)
    tripled = ImageInput("x", 3, 6, 4, (0.0,) * 3, (1.0,) * 3).prepare(red[:, :, :1])
    assert np.array_equal(tripled, np.ones((1, 3, 6, 4)))


@pytest.mark.parametrize("image", [GREY, COLOUR, ImageInput("x", 1, 2, 2, (0,), (1,))])
def test_an_image_input_survives_json(image: ImageInput) -> None:
    assert ImageInput.from_json(json.loads(json.dumps(image.to_json()))) == image


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"channels": 2},
        {"channels": True},
        {"channels": 1.0},
        {"height": "6"},
        {"height": 0},
        {"height": True},
        {"width": -4},
        {"width": 4.0},
        {"pad": -1},
        {"pad": None},
        {"mean": 0.5},
        {"mean": "5"},
        {"mean": ["0.5"]},
        {"mean": [True]},
        {"mean": [float("nan")]},
        {"mean": [10**400]},
        {"mean": [0.5, 0.5]},
        {"std": []},
        {"std": [0.0]},
        {"std": [float("inf")]},
    ],
)
def test_a_malformed_image_input_is_damage(change: dict[str, object]) -> None:
    with pytest.raises(DamagedFile, match="the preprocessing in the manifest is malformed"):
        ImageInput.from_json(json.loads(json.dumps(GREY.to_json())) | change)


def test_an_image_input_without_a_field_is_damage() -> None:
    for name in GREY.to_json():
        fields = json.loads(json.dumps(GREY.to_json()))
        del fields[name]
        with pytest.raises(DamagedFile, match="the preprocessing in the manifest is malformed"):
            ImageInput.from_json(fields)


def test_jpeg_bytes_that_end_early_are_refused(scratch: Path) -> None:
    content = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), (9, 99, 200)).save(content, "jpeg")
    scratch.write_bytes(content.getvalue()[:-40])
    with pytest.raises(BadInput, match="cannot be read as an image: "):
        read_image(scratch)


def test_preprocessing_that_makes_no_sense_is_refused_when_it_is_made() -> None:
    with pytest.raises(UsageError, match=r"mean and std hold one number for each"):
        ImageInput("x", 3, 8, 8, (0.5,), (0.5,))
    with pytest.raises(UsageError, match=r"std is not 0"):
        ImageInput("x", 1, 8, 8, (0.5,), (0.0,))


@quick
@given(
    mean=st.tuples(*[st.floats(-1, 1, width=32)] * 3),
    std=st.tuples(*[st.floats(0.03125, 4, width=32)] * 3),
)
def test_every_pixel_comes_back_from_what_the_model_takes(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    image = ImageInput("x", 3, 16, 16, mean, std)
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (2, 3, 16, 16))
    prepared = image.normalise(pixels)
    assert prepared.dtype == np.float32
    back = image.pixels(prepared)
    assert (back.dtype.name, back.shape) == ("float32", pixels.shape)
    np.testing.assert_array_equal(back, pixels)


def test_what_lies_between_two_pixels_stays_between_them() -> None:
    image = ImageInput("x", 1, 1, 3, (0.5,), (0.25,))
    between = np.array([[[[0.5, 127.25, -3.0]]]], np.float32)
    np.testing.assert_allclose(image.pixels(image.normalise(between)), between, atol=1e-4)


def test_preparing_a_picture_is_normalising_its_pixels() -> None:
    image = ImageInput("x", 3, 2, 2, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    picture = np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        image.prepare(picture), image.normalise(picture.transpose(2, 0, 1)[None])
    )


@pytest.mark.parametrize(
    ("text", "feeds"),
    [
        ("x=1x3x4x4", True),
        ("x=batch:1..8x3x9x9", True),
        ("y=1x3x4x4", False),
        ("x=1x1x4x4", False),
        ("x=1x3x4x4:uint8", False),
        ("x=1x3", False),
        ("x=3", False),
        ("x=1x3x4x4x4", False),
    ],
)
def test_a_picture_feeds_the_input_of_its_name_and_channels_of_any_size(
    text: str, feeds: bool
) -> None:
    image = ImageInput("x", 3, 4, 4, (0.5,) * 3, (0.5,) * 3)
    assert image.feeds(parse_spec(text)) is feeds
