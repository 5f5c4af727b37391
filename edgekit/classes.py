"""From class scores to labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgekit.spec import Array


def top_labels(
    outputs: Mapping[str, Array], labels: Sequence[str], count: int
) -> list[tuple[str, float]]:
    """The ``count`` best labels of the first row with their softmax share; [] if not scores.

    Scores are the output of shape (batch, classes) with as many classes as there are labels.
    """
    for scores in outputs.values():
        if scores.ndim == 2 and labels and scores.shape[1] == len(labels):
            row = scores[0].astype(np.float64)
            share = np.exp(row - row.max())
            share /= share.sum()
            return [(labels[index], float(share[index])) for index in np.argsort(-row)[:count]]
    return []
