"""Accuracy on labelled data: how many answers an artifact gets right, against the float model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.contract import Session
from edgekit.errors import BadInput, NotProven
from edgekit.image import ImageInput
from edgekit.samples import IMAGES, read_npz, read_sample, stacked
from edgekit.spec import Arrays, TensorSpec

Metric = Literal["auto", "top1", "sqnr"]
METRICS: tuple[Metric, ...] = ("auto", "top1", "sqnr")
LABELS = "labels"  # the array of an .npz that holds them
Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """Inputs with the true class of each of their rows, (rows,)."""

    samples: tuple[Arrays, ...]
    labels: Classes
    source: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers in percent, of an artifact and of the eager float32 model."""

    metric: str
    percent: float
    float_percent: float
    images: int
    source: str

    @property
    def drop(self) -> float:
        """Points lost against the float model; below 0 where it gained."""
        return self.float_percent - self.percent

    def to_json(self) -> dict[str, object]:
        """Every field, and the drop."""
        return {**asdict(self), "drop": self.drop}


def read_labelled(
    path: Path,
    inputs: Sequence[TensorSpec],
    image: ImageInput | None,
    labels: Sequence[str] = (),
) -> Labelled:
    """From an ``.npz`` of stacked inputs and ``labels``, or a folder with a folder a class.

    Class folders go by the model's labels, else by number. Raises ``BadInput``.
    """
    if path.is_dir():
        return _from_folders(path, inputs, image, labels)
    arrays = read_npz(path)
    if LABELS not in arrays:
        raise BadInput(
            f"{path} has no array {LABELS!r}, and accuracy needs the true classes; it holds "
            f"{', '.join(arrays) or 'nothing'}. Add them, or judge by --metric sqnr."
        )
    truth = arrays.pop(LABELS)
    samples = stacked(arrays, inputs, str(path))
    rows = sum(len(next(iter(sample.values()))) for sample in samples)
    if truth.ndim != 1 or truth.dtype.kind not in "iu" or len(truth) != rows:
        raise BadInput(
            f"{path}: {LABELS!r} is {truth.dtype} {truth.shape}; give one whole number for each "
            f"of the {rows} inputs."
        )
    if not rows:
        raise BadInput(f"{path} holds no input.")
    return Labelled(samples, truth.astype(np.int64), path.name)


def _from_folders(
    path: Path, inputs: Sequence[TensorSpec], image: ImageInput | None, labels: Sequence[str]
) -> Labelled:
    samples, truth = [], []
    folders = sorted(part for part in path.iterdir() if part.is_dir())
    names: Mapping[str, int] = {name: index for index, name in enumerate(labels)}
    for folder in folders:
        if folder.name in names:
            index = names[folder.name]
        elif folder.name.isdecimal():
            index = int(folder.name)
        else:
            known = ", ".join(labels) or "numbers from 0"
            raise BadInput(f"{folder} is named after no class of the model; there is: {known}.")
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in (".npz", *IMAGES):
                samples.append(read_sample(file, inputs, image))
                truth += [index] * len(next(iter(samples[-1].values())))
    if not samples:
        raise BadInput(
            f"{path} holds no labels: accuracy needs a folder for each class with its images in "
            "it, or an .npz with an array 'labels'. Or judge by --metric sqnr."
        )
    return Labelled(tuple(samples), np.array(truth, np.int64), path.name)


def classes_of(outputs: Arrays) -> Classes:
    """The best class of each row, (rows,), of the first output that is class scores.

    Raises ``BadInput`` where none is.
    """
    best: Classes = _scores(outputs).argmax(axis=1).astype(np.int64)
    return best


def _scores(outputs: Arrays) -> NDArray[Any]:
    """The first output that is class scores, (rows, classes)."""
    for scores in outputs.values():
        if scores.ndim == 2 and scores.shape[1] > 1 and scores.dtype.kind == "f":
            return scores
    shapes = ", ".join(f"{name} {array.shape}" for name, array in outputs.items())
    raise BadInput(
        f"top-1 needs class scores of shape (batch, classes), and the model returns {shapes}; "
        "judge it by --metric sqnr."
    )


def answers(session: Session, labelled: Labelled) -> Classes:
    """What an open session makes of every labelled input, (rows,)."""
    return np.concatenate([classes_of(session.run(sample)) for sample in labelled.samples])


def accuracy(given: Classes, eager: Classes, labelled: Labelled) -> Accuracy:
    """Top-1 of ``given`` answers and of the ``eager`` model's, both (rows,)."""
    return Accuracy(
        metric="top1",
        percent=_percent(given, labelled),
        float_percent=_percent(eager, labelled),
        images=len(labelled),
        source=labelled.source,
    )


def _percent(given: Classes, labelled: Labelled) -> float:
    return 100.0 * float((given == labelled.labels).mean())


def check_labelled(
    labelled: Labelled, eager_outputs: Sequence[Mapping[str, NDArray[Any]]], max_drop: float
) -> Classes:
    """The eager answers, (rows,), where a drop of ``max_drop`` points can be told with them.

    Raises ``BadInput`` for labels that are no class of the model or too few, ``NotProven`` where
    the float model itself only guesses: nothing made from it could be called accurate.
    """
    eager = np.concatenate([classes_of(outputs) for outputs in eager_outputs])
    classes = _scores(eager_outputs[0]).shape[1]
    lowest, highest = int(labelled.labels.min()), int(labelled.labels.max())
    if lowest < 0 or highest >= classes:
        raise BadInput(
            f"{labelled.source} has the label {lowest if lowest < 0 else highest}, and the model "
            f"has classes 0 to {classes - 1}."
        )
    if 0 < max_drop < 100.0 / len(labelled):  # 0: no answer less, of however many
        raise BadInput(
            f"{labelled.source} holds {len(labelled)} labelled inputs, of which one is "
            f"{100 / len(labelled):.2g} points; a drop of {max_drop:g} cannot be told. Give at "
            f"least {math.ceil(100 / max_drop)}, or a larger --max-drop."
        )
    right, chance = _percent(eager, labelled) / 100, 1 / classes
    if right <= chance + 3 * math.sqrt(chance * (1 - chance) / len(labelled)):
        raise NotProven(
            f"the float model gets {right:.1%} of {labelled.source} right, and guessing "
            f"{chance:.1%}: it is untrained, or the labels are not its own. What quantization "
            "costs in accuracy cannot be measured with it."
        )
    return eager
