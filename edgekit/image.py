"""From an image file to a model's input, with numpy alone.

PNG and PNM are read here so that a device needs nothing installed; every other format goes
through Pillow, where it is. Images are (height, width, channels) uint8 until ``prepare``.
"""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BadInput, DamagedFile, UsageError
from edgekit.spec import TensorSpec

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]

# A file may claim any size in a few bytes; more than this is not a picture for a small model.
MAX_PIXELS = 100_000_000
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True, slots=True)
class ImageInput:
    """How an image becomes the input ``name``, float32 (1, channels, height, width).

    The image is resized to ``height`` x ``width`` (bilinear, antialiased), padded by ``pad``
    black pixels on every side, scaled to 0..1, and normalised by ``mean`` and ``std``.
    """

    name: str
    channels: Literal[1, 3]
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        if not (
            self.channels in (1, 3)
            and len(self.mean) == len(self.std) == self.channels
            and all(abs(number) < 1e30 for number in numbers)  # no NaN either
            and 0 not in self.std
            and min(self.height, self.width) > 0 <= self.pad
        ):
            raise UsageError(
                f"{self} is no preprocessing: channels is 1 or 3, mean and std hold one number "
                "for each, std is not 0, height and width are 1 or more."
            )

    def prepare(self, image: Image) -> Floats:
        """(height, width, 1, 3 or 4) uint8 to (1, channels, height + 2 pad, width + 2 pad)."""
        pixels = _as_channels(image, self.channels)
        pixels = _resize(pixels, self.height, self.width)
        edge = (self.pad, self.pad)
        pixels = np.pad(pixels, (edge, edge, (0, 0)))
        return np.ascontiguousarray(self.normalise(pixels.transpose(2, 0, 1)[None]))

    def normalise(self, pixels: NDArray[Any]) -> Floats:
        """(batch, channels, ...) of 0..255 to what the model takes."""
        mean, std = self._by_channel(self.mean), self._by_channel(self.std)
        scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return scaled.astype(np.float32)

    def pixels(self, prepared: NDArray[Any]) -> Floats:
        """The pixels that ``normalise`` made ``prepared`` of; whole ones come back whole."""
        mean, std = self._by_channel(self.mean), self._by_channel(self.std)
        pixels = (prepared * std + mean) * np.float32(255)
        whole = np.rint(pixels)
        return np.where(np.abs(pixels - whole) < 1e-2, whole, pixels).astype(np.float32)

    def feeds(self, spec: TensorSpec) -> bool:
        """Whether ``spec`` is the input that this makes, of any size."""
        channels = spec.shape[1:2] == (self.channels,)
        return (
            spec.name == self.name and spec.dtype == "float32" and len(spec.shape) == 4 and channels
        )

    def _by_channel(self, numbers: tuple[float, ...]) -> Floats:
        return np.array(numbers, np.float32).reshape(1, -1, 1, 1)

    def to_json(self) -> dict[str, object]:
        """Every field by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> ImageInput:
        """Read what ``to_json`` wrote. Raises ``DamagedFile``."""
        match value:
            case {
                "name": str(name),
                "channels": (1 | 3) as channels,
                "height": int(height),
                "width": int(width),
                "mean": [*mean],
                "std": [*std],
                "pad": int(pad),
            } if all(type(number) is int for number in (channels, height, width, pad)) and all(
                type(number) in (int, float) for number in (*mean, *std)
            ):
                with suppress(UsageError):
                    return cls(name, channels, height, width, tuple(mean), tuple(std), pad)
        raise DamagedFile(f"the preprocessing in the manifest is malformed: {value!r}")


def read_image(path: Path) -> Image:
    """Read a picture as (height, width, channels) uint8. Raises ``BadInput`` with the reason."""
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise BadInput(f"{path} cannot be read: {cause.strerror}.") from cause
    try:
        if content.startswith(_PNG):
            return _png(content)
        if content[:2] in (b"P5", b"P6"):
            return _pnm(content)
    except _Unsupported as why:
        return _with_pillow(path, str(why))
    except (ValueError, IndexError, struct.error, zlib.error) as cause:
        raise BadInput(f"{path} is a damaged image: {cause}.") from cause
    return _with_pillow(path, "not PNG, PGM or PPM")


class _Unsupported(Exception):
    """A valid file in a flavour that is left to Pillow."""


def _with_pillow(path: Path, why: str) -> Image:
    try:
        import PIL.Image  # absent on most devices, and not needed there
        import PIL.ImageOps
    except ImportError:
        raise BadInput(
            f"{path} is not an image that edgekit reads by itself ({why}). Where it is an image, "
            f"convert it to 8-bit PNG, or run: pip install 'edgekit-sdk[images]'"
        ) from None
    try:
        with PIL.Image.open(path) as opened:
            image = PIL.ImageOps.exif_transpose(opened)  # phones note how they were held
            if image.mode.startswith("I;16"):  # convert() would cut it off at 255
                return (np.asarray(image)[:, :, None] >> 8).astype(np.uint8)
            if image.mode in ("I", "F"):
                raise ValueError("its pixels are no 8-bit numbers; convert it to 8-bit PNG")
            if image.mode in ("1", "L"):
                return np.asarray(image.convert("L"))[:, :, None]
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as cause:
        raise BadInput(f"{path} cannot be read as an image: {cause}.") from cause


_PNG = b"\x89PNG\r\n\x1a\n"


def _png(content: bytes) -> Image:
    """Decode an 8-bit PNG that is not interlaced (PNG specification, sections 5 to 9)."""
    header, packed, palette = b"", b"", np.zeros((0, 3), np.uint8)
    position = len(_PNG)
    while position < len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", content, position + 8 + length)
        if checksum != zlib.crc32(kind + data):
            raise ValueError(f"chunk {kind!r} fails its checksum")
        if kind == b"IHDR":
            header = data
        elif kind == b"PLTE":
            palette = np.frombuffer(data, np.uint8).reshape(-1, 3)
        elif kind == b"IDAT":
            packed += data
        elif kind == b"IEND":
            break
        position += 12 + length
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)
    if depth != 8 or interlaced or not samples:
        raise _Unsupported(f"PNG with {depth} bits, colour type {colour}, interlace {interlaced}")
    rows = _unfilter(_unpack(packed, height, width * samples), height, width, samples)
    if colour == 3:
        return palette[rows[:, :, 0]]
    return rows[:, :, :1] if colour == 4 else rows[:, :, :3]  # alpha is dropped


def _unpack(packed: bytes, height: int, row: int) -> bytes:
    if not 0 < height * row <= MAX_PIXELS:
        raise ValueError(f"it claims {height} rows of {row} bytes")
    size = height * (row + 1)  # each row opens with the byte that names its filter
    raw = zlib.decompressobj().decompress(packed, size)
    if len(raw) < size:
        raise ValueError(f"it ends after {len(raw)} of {size} bytes")
    return raw


def _unfilter(raw: bytes, height: int, width: int, samples: int) -> Image:
    """Undo the row filters, one anti-diagonal of pixels at a time.

    A pixel needs those to its left, above, and above left: all lie on the two diagonals before,
    so numpy can do a whole diagonal at once where a loop would go pixel by pixel.
    """
    lines = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * samples)
    kinds, values = lines[:, 0], lines[:, 1:].reshape(height, width, samples)
    if kinds.max() > 4:
        raise ValueError(f"row filter {kinds.max()} does not exist")
    done = np.zeros((height + 1, width + 1, samples), np.int16)  # a border of zeros
    for diagonal in range(height + width - 1):
        y = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        x = diagonal - y
        left, up, corner = done[y + 1, x], done[y, x + 1], done[y, x]
        kind = kinds[y, None]
        guess = np.select(
            [kind == 1, kind == 2, kind == 3, kind == 4],
            [left, up, (left + up) >> 1, _paeth(left, up, corner)],
            default=0,
        )
        done[y + 1, x + 1] = (values[y, x] + guess) & 255
    return done[1:, 1:].astype(np.uint8)


def _paeth(
    left: NDArray[np.int16], up: NDArray[np.int16], corner: NDArray[np.int16]
) -> NDArray[np.int16]:
    guess = left + up - corner
    far_left, far_up, far_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
    first = (far_left <= far_up) & (far_left <= far_corner)
    return np.where(first, left, np.where(far_up <= far_corner, up, corner))


def _pnm(content: bytes) -> Image:
    """Decode binary PGM (P5) or PPM (P6) with 8 bits."""
    fields: list[bytes] = []
    position = 0
    while len(fields) < 4:
        end = position
        while end < len(content) and not content[end : end + 1].isspace():
            end += 1
        token = content[position:end]
        if token.startswith(b"#"):
            end = content.index(b"\n", position)
        elif token:
            fields.append(token)
        elif end >= len(content):
            raise ValueError("the header is cut off")
        position = end + 1
    width, height, peak = (int(field) for field in fields[1:])
    samples = 1 if fields[0] == b"P5" else 3
    if peak != 255 or not 0 < width * height * samples <= MAX_PIXELS:
        raise ValueError(f"it claims {width}x{height} pixels up to {peak}")
    pixels = np.frombuffer(content, np.uint8, height * width * samples, position)
    return pixels.reshape(height, width, samples)


def _as_channels(image: Image, channels: int) -> Floats:
    """(height, width, 1 to 4) or (height, width) to float32 (height, width, channels)."""
    pixels = image.astype(np.float32)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    pixels = pixels[:, :, :3]
    if channels == 1 and pixels.shape[2] == 3:
        return (pixels @ _LUMA)[:, :, None]
    return np.repeat(pixels, 3, axis=2) if channels > pixels.shape[2] else pixels


def _resize(pixels: Floats, height: int, width: int) -> Floats:
    """Bilinear with antialiasing: two small matrices, one for each direction."""
    if pixels.shape[:2] == (height, width):
        return pixels
    rows = _resize_matrix(pixels.shape[0], height)
    columns = _resize_matrix(pixels.shape[1], width)
    # Reduce rows first, so that a large photo becomes small at once.
    shrunk = np.tensordot(rows, pixels, 1)  # (height, old width, channels)
    resized: Floats = np.einsum("hwc,Ww->hWc", shrunk, columns)
    return resized


def _resize_matrix(size: int, wanted: int) -> Floats:
    """(wanted, size): each row the triangle filter around one output pixel's centre."""
    scale = size / wanted
    reach = max(scale, 1.0)
    centre = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / reach
    weight = np.clip(1 - distance, 0, None)
    matrix: Floats = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix
