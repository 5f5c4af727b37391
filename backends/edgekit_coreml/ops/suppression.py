"""non_maximum_suppression. Source: the MIL op reference, group tensor_operation.

Boxes come as the center's x and y, width and height. The best boxes are kept in the order of
their best score over the classes; unused places hold zeros and the index -1. One box is returned
even where all scores are below the threshold: coremltools' own check of the device expects that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Flag, Real, Whole, flag, integer, real


def _overlaps(boxes: Tensor) -> Tensor:
    """Intersection over union of each two of ``[B, 4]`` boxes."""
    center, size = boxes[:, :2], boxes[:, 2:]
    low, high = center - size / 2, center + size / 2
    shared = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    both = shared.clamp(min=0).prod(-1)
    area = size.prod(-1)
    union = area[:, None] + area - both
    # Two boxes without an area overlap nothing.
    return torch.where(union > 0, both / union, torch.zeros_like(both))


def _kept(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, per_class: bool
) -> list[int]:
    """The boxes that stay, the best first."""
    best, classes = scores.max(-1)
    suppress = _overlaps(boxes) > iou_threshold
    if per_class:
        suppress &= classes[:, None] == classes
    order = torch.argsort(best, descending=True, stable=True).tolist()
    kept: list[int] = []
    for index in order:
        if best[index] >= score_threshold and not bool(suppress[index, kept].any()):
            kept.append(index)
    return kept or order[:1]


def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: Real,
    max_boxes: Whole,
    score_threshold: Real | None = None,
    per_class_suppression: Flag = False,
) -> tuple[Tensor, ...]:
    """To iOS16 ``[n, B, 4]``, with a score threshold, and the counts as a fourth result.

    From iOS17 ``[n, 4, B]``, and neither of the two.
    """
    older = score_threshold is not None
    rows, marks = (boxes, scores) if older else (boxes.mT, scores.mT)
    least = float("-inf") if score_threshold is None else real(score_threshold)
    limit, per_class = integer(max_boxes), flag(per_class_suppression)
    out_boxes = rows.new_zeros(len(rows), limit, 4)
    out_scores = marks.new_zeros(len(rows), limit, marks.shape[-1])
    indices = torch.full((len(rows), limit), -1, dtype=torch.int32)
    counts = torch.zeros(len(rows), dtype=torch.int32)
    for n, (image, mark) in enumerate(zip(rows, marks, strict=True)):
        kept = _kept(image, mark, real(iou_threshold), least, per_class)[:limit]
        counts[n] = len(kept)
        out_boxes[n, : len(kept)], out_scores[n, : len(kept)] = image[kept], mark[kept]
        indices[n, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    if older:
        return out_boxes, out_scores, indices, counts
    return out_boxes.mT, out_scores.mT, indices


OPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "non_maximum_suppression": non_maximum_suppression
}
