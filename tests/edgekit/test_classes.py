"""Labels come from the output that has as many classes as there are labels."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.classes import top_labels
from edgekit.spec import Array

LABELS = ("cat", "dog", "fox")


def test_the_best_labels_come_first_with_their_share() -> None:
    scores = np.log(np.array([[0.2, 0.5, 0.3]], np.float32))
    best = top_labels({"scores": scores}, LABELS, 2)
    assert [label for label, _ in best] == ["dog", "fox"]
    assert [share for _, share in best] == pytest.approx([0.5, 0.3])


def test_shares_of_all_labels_sum_to_one_however_large_the_scores() -> None:
    best = top_labels({"scores": np.array([[1e4, 0, -1e4]], np.float32)}, LABELS, 9)
    assert len(best) == 3
    assert sum(share for _, share in best) == pytest.approx(1)


def test_the_output_with_as_many_classes_is_taken() -> None:
    outputs = {"features": np.ones((1, 8)), "scores": np.array([[0, 0, 1]])}
    assert top_labels(outputs, LABELS, 1)[0][0] == "fox"


@pytest.mark.parametrize("scores", [np.ones((1, 4)), np.ones(3), np.ones((1, 3, 1))])
def test_an_output_that_is_no_scores_gives_no_labels(scores: Array) -> None:
    assert top_labels({"scores": scores}, LABELS, 1) == []


def test_a_model_without_labels_gives_none() -> None:
    assert top_labels({"scores": np.ones((1, 3))}, (), 1) == []
    assert top_labels({"scores": np.ones((1, 0))}, (), 1) == []
