"""Fashion-MNIST from its four IDX files: reads, checks and prepares images with numpy alone.

The data set is Zalando Research's, MIT licence: 60,000 training and 10,000 test images of 28x28
grey pixels in ten classes. Nothing is downloaded; Debian packages it as dataset-fashion-mnist.

n images
"""

import gzip
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DamagedFile

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Of the 60,000 training images, unpadded, as fractions of 255.
MEAN = 0.2860
STD = 0.3530

SIDE = 28
PADDING = 2  # black pixels on every side: 32 halves four times

_PREFIXES = {"train": "train", "test": "t10k"}
_COUNTS = {"train": 60_000, "test": 10_000}


class DatasetError(DamagedFile):
    """A data file is missing or not what it should be. The sentence names it and says what to do.

    ``path`` is the file.
    """

    def __init__(self, path: Path, found: str, advice: str) -> None:
        self.path = path
        super().__init__(f"{path}: {found}; {advice}")


def read(
    folder: str | Path = FOLDER, split: Literal["train", "test"] = "train"
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images, uint8 (n, 28, 28), and the labels, uint8 (n,), of one split.

    ``folder`` holds the four files under their usual names, with or without ``.gz``.
    DatasetError if a file is missing, damaged or another file; ValueError for another split.
    """
    if split not in _PREFIXES:
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    prefix, count = _PREFIXES[split], _COUNTS[split]
    images = read_idx(_find(Path(folder), f"{prefix}-images-idx3-ubyte"), (count, SIDE, SIDE))
    path = _find(Path(folder), f"{prefix}-labels-idx1-ubyte")
    labels = read_idx(path, (count,))
    if labels.max() >= len(LABELS):
        raise DatasetError(path, f"label {labels.max()} is not one of 0 to 9", _REPLACE)
    return images, labels


def prepare(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the network's input, float32 (n, 1, 32, 32), of uint8 images (n, 28, 28).

    Pads with black first, then scales to 0..1, then normalises by MEAN and STD.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f"images must be uint8 (n, {SIDE}, {SIDE}), not {images.dtype} {images.shape}"
        )
    margin = (PADDING, PADDING)
    padded = np.pad(images, ((0, 0), margin, margin)).astype(np.float32)
    scaled = (padded / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return scaled[:, np.newaxis]


_REPLACE = "replace it with the file of the original data set"


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in an IDX file, gzip if it ends in .gz.

    DatasetError unless the file holds exactly an array of ``shape``.
    """
    header = 4 + 4 * len(shape)
    size = header + int(np.prod(shape))
    # One byte more than expected tells a longer file, and no file can make us read without end.
    data = _bytes(path, size + 1)
    _check_header(path, data[:header], shape)
    if len(data) < size:
        raise DatasetError(path, f"it ends after {len(data)} bytes of {size}", _REPLACE)
    if len(data) > size:
        raise DatasetError(path, f"it goes on after the {size} bytes it should have", _REPLACE)
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _check_header(path: Path, header: bytes, shape: tuple[int, ...]) -> None:
    if len(header) < 4 + 4 * len(shape):
        raise DatasetError(path, f"its header ends after {len(header)} bytes", _REPLACE)
    magic = bytes((0, 0, 8, len(shape)))  # 8 is IDX for unsigned bytes
    if header[:4] != magic:
        raise DatasetError(
            path, f"it starts with {header[:4].hex()} and an IDX file with {magic.hex()}", _REPLACE
        )
    found = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
    if found != shape:
        raise DatasetError(path, f"it says it holds {found}, and it should hold {shape}", _REPLACE)


def _bytes(path: Path, limit: int) -> bytes:
    try:
        if path.suffix != ".gz":
            with path.open("rb") as plain:
                return plain.read(limit)
        with gzip.open(path, "rb") as packed:
            return packed.read(limit)
    except gzip.BadGzipFile as cause:
        raise DatasetError(
            path, f"it is not gzip or is damaged ({cause})", "drop the .gz if it is unpacked"
        ) from cause
    except (EOFError, zlib.error) as cause:
        raise DatasetError(path, f"its gzip data is cut or damaged ({cause})", _REPLACE) from cause
    except OSError as cause:
        raise DatasetError(
            path, f"it cannot be read ({cause.strerror})", "check that it is a readable file"
        ) from cause


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return path
    raise DatasetError(
        folder / f"{name}.gz",
        "there is no such file, packed or not",
        "name the folder with the four IDX files, or run: apt-get install dataset-fashion-mnist",
    )
