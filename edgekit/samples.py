"""Sample inputs to prove on: the user's files, the model's own, or random ones, always said."""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgekit.errors import BadInput
from edgekit.image import ImageInput, read_image
from edgekit.spec import Array, Arrays, Dim, TensorSpec, check_arrays

RANDOM_SAMPLES = 4
IMAGES = (".png", ".pgm", ".ppm", ".jpg", ".jpeg", ".bmp", ".webp")


def draw_samples(
    inputs: Sequence[TensorSpec], image: ImageInput | None = None, *, count: int = RANDOM_SAMPLES
) -> tuple[dict[str, Array], ...]:
    """Seeded random inputs: normal floats, and 0 or 1 for integers (valid for any vocabulary).

    The input that ``image`` prepares gets random pixels, prepared: some targets take pictures.

    Named dims take their smallest, largest and middle sizes in turn, so that a proof covers
    the range and not one point of it.
    """
    generator = np.random.default_rng(0)
    choices = list(itertools.islice(itertools.cycle(_size_choices(inputs)), count))
    return tuple(
        {spec.name: _draw(generator, spec, chosen, image) for spec in inputs} for chosen in choices
    )


def _size_choices(inputs: Sequence[TensorSpec]) -> list[dict[str, int]]:
    dims = {dim.name: dim for spec in inputs for dim in spec.dims}
    picks = (
        {name: dim.minimum for name, dim in dims.items()},
        {name: dim.maximum for name, dim in dims.items()},
        {name: (dim.minimum + dim.maximum) // 2 for name, dim in dims.items()},
    )
    return list(picks)


def _draw(
    generator: np.random.Generator,
    spec: TensorSpec,
    chosen: Mapping[str, int],
    image: ImageInput | None,
) -> Array:
    sizes = spec.sizes(chosen)
    if image is not None and image.feeds(spec):
        return image.normalise(generator.integers(0, 256, sizes, dtype=np.uint8))
    if spec.dtype == "float32":
        return generator.standard_normal(sizes, dtype=np.float32)
    return generator.integers(0, 2, sizes).astype(spec.dtype)


def regroup(samples: Sequence[Arrays], inputs: Sequence[TensorSpec]) -> tuple[Arrays, ...]:
    """Samples of batch 1 as batches of the sizes that ``inputs`` name.

    Every sample is used at least once, some again to fill a batch. Samples that are no batches
    of 1, or inputs that do not share one named batch, are left as they are.
    """
    batches = {spec.shape[0] if spec.shape else 1 for spec in inputs}
    (dim,) = batches if len(batches) == 1 else (1,)
    single = all(array.shape[:1] == (1,) for sample in samples for array in sample.values())
    if not samples or not single or not isinstance(dim, Dim):
        return tuple(samples)
    sizes = itertools.cycle((dim.minimum, dim.maximum, (dim.minimum + dim.maximum) // 2))
    source = itertools.cycle(samples)
    groups: list[Arrays] = []
    used = 0
    while used < len(samples) or len(groups) < len(_size_choices(inputs)):
        taken = list(itertools.islice(source, next(sizes)))
        used += len(taken)
        groups.append(
            {spec.name: np.concatenate([sample[spec.name] for sample in taken]) for spec in inputs}
        )
    return tuple(groups)


def read_samples(
    path: Path, inputs: Sequence[TensorSpec], image: ImageInput | None
) -> tuple[dict[str, Array], ...]:
    """Samples from an ``.npz``, an image, or a folder of either. Raises ``BadInput``."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".npz", *IMAGES))
        if not files:
            raise BadInput(f"{path} holds no .npz file and no image; put samples there.")
    else:
        files = [path]
    return tuple(read_sample(file, inputs, image) for file in files)


def read_sample(
    path: Path, inputs: Sequence[TensorSpec], image: ImageInput | None
) -> dict[str, Array]:
    """One sample: arrays by input name from an ``.npz``, or a prepared image."""
    if path.suffix.lower() == ".npz":
        return _checked(inputs, read_npz(path), str(path))
    pixels = read_image(path)
    if image is None:
        raise BadInput(
            f"{path}: this model does not say how an image becomes its input; give an .npz with "
            f"{', '.join(map(str, inputs))}, or return edgekit.Model(image=...) from the factory."
        )
    return _checked(inputs, {image.name: image.prepare(pixels)}, str(path))


def _checked(inputs: Sequence[TensorSpec], arrays: Arrays, origin: str) -> dict[str, Array]:
    """Of many files, the error names the one that does not fit."""
    try:
        return check_arrays(inputs, arrays)
    except BadInput as cause:
        raise BadInput(f"{origin}: {cause}") from cause


def stacked(
    arrays: Mapping[str, Array], inputs: Sequence[TensorSpec], origin: str
) -> tuple[dict[str, Array], ...]:
    """Inputs stacked along their first axis, as samples of the batch that the model takes.

    A named batch is taken at its smallest. Raises ``BadInput``.
    """
    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise BadInput(
            f"{origin} has no array {missing[0]!r}; it holds {', '.join(arrays) or 'nothing'}, the "
            f"model takes {', '.join(map(str, inputs))}."
        )
    counts = set()
    for spec in inputs:
        array = arrays[spec.name]
        batch = spec.sizes()[0] if spec.shape else 1
        if array.ndim != len(spec.shape) or not array.ndim or array.shape[0] % batch:
            raise BadInput(
                f"{origin}: {spec.name!r} is {array.dtype} {array.shape}; the model takes {spec}, "
                "stacked along its first axis."
            )
        counts.add(array.shape[0] // batch)
    if len(counts) != 1:
        raise BadInput(f"{origin}: the inputs hold different numbers of samples: {sorted(counts)}.")
    (count,) = counts
    batches = {spec.name: spec.sizes()[0] for spec in inputs}
    return tuple(
        _checked(
            inputs,
            {
                name: arrays[name][index * batch : (index + 1) * batch]
                for name, batch in batches.items()
            },
            origin,
        )
        for index in range(count)
    )


_NOT_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError)  # RuntimeError: encrypted, or unknown
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, *_NOT_ZIP)


def read_npz(path: Path) -> dict[str, Array]:
    """Arrays by name, never a pickle. Raises ``BadInput``."""
    try:
        with path.open("rb") as file:  # numpy would leave it open where it refuses the content
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array; use np.savez with the inputs' names")
            with content:
                return {name: content[name] for name in content.files}
    except FileNotFoundError as cause:
        raise BadInput(f"there is no file {path}.") from cause
    except _UNREADABLE as cause:
        raise BadInput(f"{path} is not an .npz of arrays that can be read: {cause}.") from cause
