"""Calibration data: the inputs on which the ranges of activations are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgekit.errors import BadInput
from edgekit.image import ImageInput
from edgekit.samples import IMAGES, read_npz, read_sample, stacked
from edgekit.spec import Array, Arrays, TensorSpec

FEWEST = 8  # below, a range is that of a few inputs, not of the data; 100 to 500 are usual


def _silent(_step: str) -> None:
    return


@dataclass(frozen=True)
class Calibration:
    """Inputs as the model takes them; ``sha256`` is of their values, so that a run can be redone.

    ``source`` says in words where they come from.
    """

    samples: tuple[Arrays, ...]
    source: str
    sha256: str
    report: Callable[[str], None] = field(default=_silent, compare=False, repr=False)

    def watched(self, doing: str) -> Iterator[Arrays]:
        """The samples one by one, the progress line kept up to date."""
        for index, sample in enumerate(self.samples):
            self.report(f"{doing}: {index + 1} of {len(self.samples)} {_bar(index, self.samples)}")
            yield sample

    def reporting(self, report: Callable[[str], None]) -> Calibration:
        """The same data, whose progress goes to ``report``."""
        return replace(self, report=report)

    def to_json(self) -> dict[str, object]:
        """What the manifest keeps of it."""
        return {"samples": len(self.samples), "source": self.source, "sha256": self.sha256}


def _bar(index: int, samples: Sequence[Arrays], cells: int = 20) -> str:
    done = (index + 1) * cells // len(samples)
    return f"[{'#' * done}{'.' * (cells - done)}]"


def read_calibration(
    path: Path, inputs: Sequence[TensorSpec], image: ImageInput | None
) -> Calibration:
    """From a folder of images or ``.npz`` files, or one ``.npz`` of stacked inputs.

    Raises ``BadInput`` with the file's name.
    """
    named = _named_samples(path, inputs, image)
    return checked_calibration(
        [sample for _, sample in named], path.name, names=[name for name, _ in named]
    )


def checked_calibration(
    samples: Sequence[Arrays], source: str, *, names: Sequence[str] = ()
) -> Calibration:
    """``samples`` as calibration data, if ranges can be measured on them. Raises ``BadInput``."""
    labels = names or [f"sample {index}" for index in range(len(samples))]
    for label, sample in zip(labels, samples, strict=True):
        for name, array in sample.items():
            if not np.isfinite(array).all():
                raise BadInput(
                    f"calibration data {source}: {label} holds NaN or infinity in {name!r}; a "
                    "range measured on it would be wrong. Take it out, or repair it."
                )
    if len(samples) < FEWEST:
        raise BadInput(
            f"calibration data {source} holds {len(samples)} "
            f"input{'s' * (len(samples) != 1)}; at least {FEWEST} are needed, 100 to 500 are "
            "usual, as they come in use."
        )
    floating = [name for name, array in samples[0].items() if array.dtype.kind == "f"]
    for name in floating:
        if _is_flat([sample[name] for sample in samples]):
            raise BadInput(
                f"calibration data {source}: every value of {name!r} is the same within each "
                "sample (black images?), so there is no range to measure. Give real inputs."
            )
    digest = hashlib.sha256()
    for sample in samples:
        for name, array in sample.items():
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return Calibration(tuple(samples), source, digest.hexdigest())


def _is_flat(arrays: Sequence[Array]) -> bool:
    """Whether each array holds one value, or an image one in each channel, as a black one does.

    Of arrays that hold one number each, whether all hold the same.
    """
    if all(array.size == 1 for array in arrays):
        return len({array.item() for array in arrays}) == 1
    return all(bool((each == each[..., :1]).all()) for each in map(_by_channel, arrays))


def _by_channel(array: Array) -> Array:
    """(channels, values): each channel has a mean of its own, so black is another value in each."""
    picture = array.ndim == 4 and array.shape[2] * array.shape[3] > 1
    return array.reshape(array.shape[0] * array.shape[1] if picture else 1, -1)


def _named_samples(
    path: Path, inputs: Sequence[TensorSpec], image: ImageInput | None
) -> list[tuple[str, Arrays]]:
    if path.is_dir():
        kinds = (".npz", *IMAGES)
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in kinds)
        if not files:
            raise BadInput(f"the calibration folder {path} holds no image and no .npz file.")
        return [(file.name, read_sample(file, inputs, image)) for file in files]
    if path.suffix.lower() != ".npz" and path.is_file():
        raise BadInput(f"{path} is one file; give a folder of images, or an .npz of inputs.")
    samples = stacked(read_npz(path), inputs, str(path))
    return [(f"{path.name}[{index}]", sample) for index, sample in enumerate(samples)]
