"""Resizes, crops of boxes and warps. Source: the MIL op reference, group image_resizing.

What the reference leaves open, and the frontends of coremltools settle: every nearest resize takes
the pixel that holds the middle of the new one, except upsample_nearest_neighbor, which takes the
pixel that holds its first edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Flag, Real, Whole, Wholes, flag, integer, ints, real
from edgekit_coreml.ops.sampling import axis_grid, grid, interpolated, nearest, sampled


def _scaled(size: int, factor: Real) -> int:
    # In float32, as the converter works out the sizes that the file declares.
    return math.floor(np.float32(real(factor)) * np.float32(size))


def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Real = 1, scale_factor_width: Real = 1
) -> Tensor:
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        count = _scaled(x.shape[axis], factor)
        x = x.index_select(axis, torch.arange(count) * x.shape[axis] // count)
    return x


def _nearest(x: Tensor, axis: int, count: int) -> Tensor:
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) * x.shape[axis] / count
    return nearest(x, axis, middles)


def resize_nearest_neighbor(
    x: Tensor, target_size_height: Whole, target_size_width: Whole
) -> Tensor:
    return _nearest(_nearest(x, -2, integer(target_size_height)), -1, integer(target_size_width))


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Real = 1,
    scale_factor_width: Real = 1,
    align_corners: Flag = True,
    half_pixel_centers: Flag | None = None,
) -> Tensor:
    """The factor sets the new size; the spacing then follows from the two sizes."""
    aligned = flag(align_corners)
    centered = not aligned if half_pixel_centers is None else flag(half_pixel_centers)
    if aligned and centered:
        raise ValueError("upsample_bilinear is either aligned to corners or to pixel centers")
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if centered else "DEFAULT"
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        positions = axis_grid(mode, x.shape[axis], _scaled(x.shape[axis], factor))
        x = interpolated(x, axis, positions)
    return x


def resize_bilinear(
    x: Tensor,
    target_size_height: Whole = 1,
    target_size_width: Whole = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    for axis, count in ((-2, target_size_height), (-1, target_size_width)):
        x = interpolated(x, axis, axis_grid(sampling_mode, x.shape[axis], integer(count)))
    return x


def resize(
    x: Tensor,
    shape: Wholes,
    resized_dims: Whole,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Resizes the last ``resized_dims`` axes to the last entries of ``shape``; 0 keeps a size.

    Of nearest resizes the reference explains no sampling mode. DEFAULT is known to be that of
    resize_nearest_neighbor; the others take the pixel nearest to the position, of two the later.
    """
    if interpolation_mode not in ("LINEAR", "NEAREST_NEIGHBOR"):
        raise ValueError(f"resize has no interpolation mode {interpolation_mode!r}")
    linear, dtype, targets = interpolation_mode == "LINEAR", x.dtype, ints(shape)
    x = x.float() if linear else x
    for axis in range(-integer(resized_dims), 0):
        count = targets[axis] or x.shape[axis]
        positions = axis_grid(sampling_mode, x.shape[axis], count)
        if linear:
            x = interpolated(x, axis, positions)
        elif sampling_mode == "DEFAULT":
            x = _nearest(x, axis, count)
        else:
            x = nearest(x, axis, positions + 0.5)
    return x.to(dtype)


def _corners(boxes: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[N, 4]`` boxes as the first row, first column, last row and last column."""
    a, b, c, d = boxes.float().unbind(1)
    if mode.startswith("CENTER_SIZE"):
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    elif not mode.startswith("CORNERS"):
        raise ValueError(f"there is no box coordinate mode {mode!r}")
    return (b, a, d, c) if mode.endswith("WIDTH_FIRST") else (a, b, c, d)


def crop_resize(
    x: Tensor,
    boxes: Tensor | None = None,
    box_indices: Tensor | None = None,
    target_height: Whole = 1,
    target_width: Whole = 1,
    normalized_coordinates: Flag = False,
    spatial_scale: Real = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: Real = 0.0,
    roi: Tensor | None = None,
) -> Tensor:
    """From iOS17 ``boxes [N, 4]`` and their images give ``[N, C, h, w]``.

    Before, ``roi [N, 1, 4, 1, 1]`` crops every image, and with 5 entries the first is the image;
    the result is ``[N, B, C, h, w]``. A point outside of the image has the pad value.
    """
    given = roi if boxes is None else boxes
    if given is None:
        raise ValueError("crop_resize needs boxes, or roi as before iOS17")
    rows = given.flatten(1)
    every = boxes is None and rows.shape[1] == 4
    if rows.shape[1] == 5:
        rows, box_indices = rows[:, 1:], rows[:, 0]
    image = torch.arange(len(rows)) if box_indices is None else box_indices.long()
    if every:
        image = torch.arange(len(x)).repeat(len(rows))
        rows = rows.repeat_interleave(len(x), 0)
    size = (integer(target_height), integer(target_width))
    scales = [real(spatial_scale)] * 2
    if flag(normalized_coordinates):
        scales = [scale * (n - 1) for scale, n in zip(scales, x.shape[-2:], strict=True)]
    top, left, bottom, right = _corners(rows, box_coordinate_mode)
    down = grid(sampling_mode, top * scales[0], bottom * scales[0], size[0])
    across = grid(sampling_mode, left * scales[1], right * scales[1], size[1])
    y = _crops(x[image], down, across, real(pad_value))
    return y if boxes is not None else y.reshape(-1, len(x) if every else 1, *y.shape[1:])


def _crops(x: Tensor, down: Tensor, across: Tensor, pad_value: float) -> Tensor:
    """Reads ``[N, C, H, W]`` at rows ``[N, h]`` and columns ``[N, w]``, padded outside."""
    row = down.unsqueeze(2).expand(-1, -1, across.shape[1])
    column = across.unsqueeze(1).expand_as(row)
    height, width = x.shape[-2:]
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    y = sampled(x, (column, row), "bilinear", "border", 0.0)
    return torch.where(inside.unsqueeze(1), y, pad_value)


def _pixel(coordinate: Tensor, size: int, mode: str, aligned: bool) -> Tensor:
    """A coordinate in pixels, of which the first center is 0."""
    if mode == "unnormalized":
        return coordinate
    if mode == "normalized_minus_one_to_one":
        unit = (coordinate + 1) / 2
    elif mode == "normalized_zero_to_one":
        unit = coordinate
    else:
        raise ValueError(f"there is no coordinates mode {mode!r}")
    return unit * (size - 1) if aligned else unit * size - 0.5


def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Real,
    coordinates_mode: str,
    align_corners: Flag,
) -> Tensor:
    """Reads ``x`` at ``coordinates [B, h, w, 2]``, of which the first is along the width."""
    aligned = flag(align_corners)
    points = [
        _pixel(coordinates[..., i].float(), x.shape[-1 - i], coordinates_mode.lower(), aligned)
        for i in (0, 1)
    ]
    return sampled(x, points, sampling_mode.lower(), padding_mode.lower(), real(padding_value))


def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: Whole,
    output_width: Whole,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Real,
    coordinates_mode: str,
    align_corners: Flag,
) -> Tensor:
    """Resamples where ``[a0, a1, a2, b0, b1, b2]`` takes the points of the new image."""
    count, mode, aligned = len(x), coordinates_mode.lower(), flag(align_corners)
    height, width = integer(output_height), integer(output_width)
    across, down = _span(width, mode, aligned), _span(height, mode, aligned).unsqueeze(1)
    a, b = transform_matrix.expand(count, -1).reshape(count, 2, 3, 1, 1).unbind(1)
    warped = [m[:, 0] * across + m[:, 1] * down + m[:, 2] for m in (a, b)]
    points = torch.stack(warped, -1)
    return resample(
        x, points, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners
    )


def _span(count: int, mode: str, aligned: bool) -> Tensor:
    """The coordinates of ``count`` pixels: the inverse of ``_pixel``."""
    index = torch.arange(count, dtype=torch.float32)
    if mode == "unnormalized":
        return index
    unit = index / max(count - 1, 1) if aligned else (index + 0.5) / count
    return unit * 2 - 1 if mode == "normalized_minus_one_to_one" else unit


OPS: dict[str, Callable[..., Tensor]] = {
    "affine": affine,
    "crop_resize": crop_resize,
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
