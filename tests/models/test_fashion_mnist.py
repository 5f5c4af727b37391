"""The reader of IDX files: what it returns, and what it says of every damaged file."""

import gzip
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit_zoo import fashion_mnist
from edgekit_zoo.fashion_mnist import LABELS, MEAN, STD, DatasetError, prepare, read, read_idx

IMAGES = "t10k-images-idx3-ubyte"
COUNT = 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test split of six images."""
    monkeypatch.setattr(fashion_mnist, "_COUNTS", {"train": 2, "test": COUNT})
    pixels = np.arange(COUNT * 28 * 28, dtype=np.uint32).astype(np.uint8)
    write_idx(tmp_path / f"{IMAGES}.gz", pixels.reshape(COUNT, 28, 28))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(COUNT, dtype=np.uint8))
    return tmp_path


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx(array)) if path.suffix == ".gz" else idx(array))


def test_a_split_is_read_as_bytes_in_the_shapes_it_has(folder: Path) -> None:
    images, labels = read(folder, "test")
    assert images.shape == (COUNT, 28, 28)
    assert images.dtype == np.uint8
    assert images[1, 0, 5] == (28 * 28 + 5) % 256
    assert labels.tolist() == list(range(COUNT))


def test_unpacked_files_are_read_too(folder: Path) -> None:
    packed = folder / f"{IMAGES}.gz"
    (folder / IMAGES).write_bytes(gzip.decompress(packed.read_bytes()))
    expected, _ = read(folder, "test")
    packed.unlink()
    assert np.array_equal(read(folder, "test")[0], expected)


def test_preparing_pads_with_black_and_then_normalises() -> None:
    image = np.full((2, 28, 28), 255, np.uint8)
    x = prepare(image)
    assert x.shape == (2, 1, 32, 32)
    assert x.dtype == np.float32
    assert x[0, 0, 0, 0] == x[1, 0, 31, 1] == pytest.approx(-MEAN / STD)
    assert x[0, 0, 2, 2] == x[1, 0, 29, 29] == pytest.approx((1 - MEAN) / STD)
    assert len(LABELS) == 10


def test_preparing_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(n, 28, 28\), not float64 \(1, 28, 28\)"):
        prepare(np.zeros((1, 28, 28)))  # type: ignore[arg-type]


def test_an_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', not 'dev'"):
        read(folder, "dev")  # type: ignore[arg-type]


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))

    return apply


def unpack(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # in the checksum
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "there is no such file, packed or not; name the folder"),
    "a folder": (become_folder, "it cannot be read .*; check that it is a readable file"),
    "empty": (damaged(lambda data: b""), "its header ends after 0 bytes; replace it"),
    "truncated": (damaged(lambda data: data[:-1]), "it ends after 4719 bytes of 4720; replace"),
    "too long": (damaged(lambda data: data + b"x"), "it goes on after the 4720 bytes it should"),
    "wrong magic": (
        damaged(lambda data: b"\0\0\x0d\3" + data[4:]),
        "it starts with 00000d03 and an IDX file with 00000803",
    ),
    "wrong count": (
        damaged(lambda data: data[:7] + b"\7" + data[8:]),
        r"it says it holds \(7, 28, 28\), and it should hold \(6, 28, 28\)",
    ),
    "huge header": (
        damaged(lambda data: data[:4] + b"\xff" * 12 + data[16:]),
        r"it says it holds \(4294967295, 4294967295, 4294967295\)",
    ),
    "not gzip": (unpack, "not gzip or is damaged"),
    "cut gzip": (cut, "its gzip data is cut or damaged"),
    "flipped checksum": (flip_a_byte, "not gzip or is damaged .*CRC"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_with_what_is_wrong_and_what_to_do(name: str, folder: Path) -> None:
    damage, sentence = DAMAGE[name]
    path = folder / f"{IMAGES}.gz"
    damage(path)
    with pytest.raises(DatasetError, match=sentence) as caught:
        read(folder, "test")
    assert caught.value.path == path
    assert str(caught.value).startswith(str(path))


def test_a_label_beyond_nine_is_refused(folder: Path) -> None:
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.full(COUNT, 11, np.uint8))
    with pytest.raises(DatasetError, match="label 11 is not one of 0 to 9"):
        read(folder, "test")


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8)) + bytes(5_000_000)))
    tracemalloc.start()
    with pytest.raises(DatasetError, match="it goes on after the 12 bytes"):
        read_idx(path, (4,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
