"""Resizes, crops of boxes and warps against loops from the reference, and against torch's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from edgekit_coreml import ops

# Any, because most ops return one tensor and some a tuple.
OPS: dict[str, Any] = {**ops.OPS}
few = settings(max_examples=30, deadline=None, derandomize=True)
MODES = ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]
sizes = st.integers(1, 6)
seeds = st.integers(0, 99)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _number(value: float) -> Tensor:
    return torch.tensor(value)


def _point(mode: str, i: int, size: float, count: int) -> float:
    """The grid of the reference, in its own words, before it is clamped to the axis."""
    if mode == "ALIGN_CORNERS" and count == 1:
        return (size - 1) / 2
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        spacing = (size - 1) / (count - 1) if count > 1 else 0.0
        return i * spacing
    if mode == "DEFAULT":
        spacing = (size - size / count) / (count - 1) if count > 1 else 0.0
        return i * spacing
    if mode == "OFFSET_CORNERS":
        delta = max(1.0, size - 1) / count
        return 0.5 * delta + i * delta
    spacing = size / count
    return i * spacing + 0.5 * spacing - 0.5


def _read(line: Any, point: float) -> float:
    low = math.floor(point)
    high = min(low + 1, len(line) - 1)
    return float(line[low] * (1 - (point - low)) + line[high] * (point - low))


def _resized(x: Any, axis: int, count: int, mode: str) -> Any:
    def line(values: Any) -> list[float]:
        last = len(values) - 1
        points = [_point(mode, i, len(values), count) for i in range(count)]
        return [_read(values, min(last, max(0.0, point))) for point in points]

    return np.apply_along_axis(line, axis, x)


@few
@given(sizes, sizes, sizes, sizes, st.sampled_from(MODES), seeds)
def test_resize_bilinear(h: int, w: int, new_h: int, new_w: int, mode: str, seed: int) -> None:
    x = _random(seed, 2, h, w)
    expected = _resized(_resized(x.double().numpy(), 1, new_h, mode), 2, new_w, mode)
    y = OPS["resize_bilinear"](
        x=x,
        target_size_height=_number(new_h),
        target_size_width=_number(new_w),
        sampling_mode=mode,
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "points"),
    [
        ("UNALIGN_CORNERS", [0, 0.1, 0.5, 0.9, 1]),
        ("STRICT_ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1]),
        ("ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1]),
        ("DEFAULT", [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
    ],
)
def test_the_grids_that_the_reference_prints(mode: str, points: list[float]) -> None:
    x = torch.tensor([[[0.0, 1.0]]])
    y = OPS["resize_bilinear"](x=x, target_size_width=_number(5), sampling_mode=mode)
    torch.testing.assert_close(y, torch.tensor([[points]], dtype=torch.float32))


@few
@given(sizes, sizes, sizes, sizes, st.booleans(), seeds)
def test_bilinear_is_torchs(
    h: int, w: int, new_h: int, new_w: int, aligned: bool, seed: int
) -> None:
    x = _random(seed, 1, 2, h, w)
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS"
    y = OPS["resize_bilinear"](
        x=x,
        target_size_height=_number(new_h),
        target_size_width=_number(new_w),
        sampling_mode=mode,
    )
    expected = F.interpolate(x, (new_h, new_w), mode="bilinear", align_corners=aligned)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@few
@given(sizes, sizes, st.sampled_from([(2.0, 3.0), (2.5, 1.0), (0.7, 1.5)]), st.booleans(), seeds)
def test_upsample_bilinear_spaces_by_its_sizes(
    h: int, w: int, factors: tuple[float, float], aligned: bool, seed: int
) -> None:
    new = [int(np.floor(np.float32(f) * np.float32(n))) for f, n in zip(factors, (h, w))]  # noqa: B905
    if not all(new):
        return
    x = _random(seed, 1, 2, h, w)
    y = OPS["upsample_bilinear"](
        x=x,
        scale_factor_height=_number(factors[0]),
        scale_factor_width=_number(factors[1]),
        align_corners=torch.tensor(aligned),
    )
    expected = F.interpolate(x, new, mode="bilinear", align_corners=aligned)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_upsample_bilinear_off_the_pixel_centers() -> None:
    x = torch.tensor([[[[1.0, 2.0]]]])
    y = OPS["upsample_bilinear"](
        x=x,
        scale_factor_width=_number(3),
        align_corners=torch.tensor(False),
        half_pixel_centers=torch.tensor(False),
    )
    expected = torch.tensor([[[[1, 1.3333334, 1.6666666, 2, 2, 2]]]])
    torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match="either"):
        OPS["upsample_bilinear"](x=x, half_pixel_centers=torch.tensor(True))


def test_a_factor_is_multiplied_in_float32() -> None:
    """0.7 in float32 is below 0.7: ten of it are seven there, and six in float64."""
    x = _random(0, 1, 1, 1, 10)
    y = OPS["upsample_nearest_neighbor"](x=x, scale_factor_width=torch.tensor(0.7))
    assert y.shape == (1, 1, 1, 7)


@few
@given(sizes, sizes, st.integers(1, 4), st.integers(1, 4), seeds)
def test_upsample_nearest_is_torchs_nearest(
    h: int, w: int, up: int, across: int, seed: int
) -> None:
    x = _random(seed, 1, 2, h, w)
    y = OPS["upsample_nearest_neighbor"](
        x=x, scale_factor_height=_number(up), scale_factor_width=_number(across)
    )
    torch.testing.assert_close(y, F.interpolate(x, scale_factor=(up, across), mode="nearest"))


@few
@given(sizes, sizes, sizes, sizes, seeds)
def test_resize_nearest_is_torchs_nearest_exact(
    h: int, w: int, new_h: int, new_w: int, seed: int
) -> None:
    x = _random(seed, 1, 2, h, w)
    expected = F.interpolate(x, (new_h, new_w), mode="nearest-exact")
    y = OPS["resize_nearest_neighbor"](
        x=x, target_size_height=_number(new_h), target_size_width=_number(new_w)
    )
    torch.testing.assert_close(y, expected)
    arguments = {"x": x, "resized_dims": _number(2), "interpolation_mode": "NEAREST_NEIGHBOR"}
    y = OPS["resize"](**arguments, shape=torch.tensor([new_h, new_w]))
    torch.testing.assert_close(y, expected)
    # The middle of a new pixel is where this grid puts it: the same pixels again.
    y = OPS["resize"](
        **arguments, shape=torch.tensor([new_h, new_w]), sampling_mode="UNALIGN_CORNERS"
    )
    torch.testing.assert_close(y, expected)


def test_resize_takes_the_last_entries_of_its_shape() -> None:
    x = _random(0, 2, 3, 4, 5)
    y = OPS["resize"](
        x=x, shape=torch.tensor([9, 1, 0, 7]), resized_dims=_number(2),
        sampling_mode="STRICT_ALIGN_CORNERS",
    )  # fmt: skip
    expected = F.interpolate(x, (4, 7), mode="bilinear", align_corners=True)
    torch.testing.assert_close(y, expected)
    whole = torch.tensor([[0, 10]], dtype=torch.int32)
    y = OPS["resize"](x=whole, shape=torch.tensor([4]), resized_dims=_number(1))
    assert y.tolist() == [[0, 5, 10, 10]]
    # Cut at the end: after each axis, the 3 between 1.5 and 4.5 would be the 2 between 1 and 4.
    whole = torch.tensor([[0, 3], [3, 6]], dtype=torch.int32)
    y = OPS["resize"](x=whole, shape=torch.tensor([4, 4]), resized_dims=_number(2))
    assert y[1].tolist() == [1, 3, 4, 4]
    with pytest.raises(ValueError, match="CUBIC"):
        OPS["resize"](x=x, shape=[1], resized_dims=_number(1), interpolation_mode="CUBIC")


def _cropped(image: Any, box: list[float], count: tuple[int, int], mode: str, pad: float) -> Any:
    """One crop ``[C, h, w]``: the grids of a resize, begun at the box, and the pad outside."""
    height, width = image.shape[1:]
    y = np.full((len(image), *count), pad)
    for i in range(count[0]):
        row = box[0] + _point(mode, i, box[2] - box[0] + 1, count[0])
        for j in range(count[1]):
            column = box[1] + _point(mode, j, box[3] - box[1] + 1, count[1])
            if 0 <= row <= height - 1 and 0 <= column <= width - 1:
                for c, plane in enumerate(image):
                    y[c, i, j] = _read([_read(line, column) for line in plane], row)
    return y


@st.composite
def _crops(draw: st.DrawFn) -> dict[str, Any]:
    quarter = st.integers(-4, 24).map(lambda n: n / 4)  # exact, so no point lies on an edge by luck
    return {
        "boxes": draw(st.lists(st.lists(quarter, min_size=4, max_size=4), min_size=1, max_size=3)),
        "count": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "mode": draw(st.sampled_from(MODES)),
        "seed": draw(seeds),
    }


@few
@given(_crops())
def test_crop_resize_reads_its_boxes(case: dict[str, Any]) -> None:
    x, boxes, count = _random(case["seed"], 2, 2, 4, 5), case["boxes"], case["count"]
    images = [index % 2 for index in range(len(boxes))]
    y = OPS["crop_resize"](
        x=x,
        boxes=torch.tensor(boxes),
        box_indices=torch.tensor(images, dtype=torch.int32),
        target_height=_number(count[0]),
        target_width=_number(count[1]),
        sampling_mode=case["mode"],
        pad_value=_number(7.0),
    )
    expected = [
        _cropped(x[image].double().numpy(), box, count, case["mode"], 7.0)
        for image, box in zip(images, boxes, strict=True)
    ]
    near = np.abs(y.numpy() - np.stack(expected)) < 1e-4
    # A point that rounding moves over the edge of the image is one or the other.
    assert near.mean() > 0.8
    assert near.all() or case["mode"] not in ("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS")


@pytest.mark.parametrize(
    ("mode", "box"),
    [
        ("CORNERS_HEIGHT_FIRST", [0.5, 1.0, 2.5, 3.0]),
        ("CORNERS_WIDTH_FIRST", [1.0, 0.5, 3.0, 2.5]),
        ("CENTER_SIZE_HEIGHT_FIRST", [1.5, 2.0, 2.0, 2.0]),
        ("CENTER_SIZE_WIDTH_FIRST", [2.0, 1.5, 2.0, 2.0]),
    ],
)
def test_crop_resize_takes_every_form_of_a_box(mode: str, box: list[float]) -> None:
    x = _random(0, 1, 2, 4, 5)
    expected = _cropped(x[0].double().numpy(), [0.5, 1, 2.5, 3], (2, 2), "ALIGN_CORNERS", 0.0)
    arguments = {
        "x": x,
        "target_height": _number(2),
        "target_width": _number(2),
        "sampling_mode": "ALIGN_CORNERS",
        "box_coordinate_mode": mode,
    }
    y = OPS["crop_resize"](**arguments, boxes=torch.tensor([box]))
    np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-5)
    half = torch.tensor([box]) * 2
    y = OPS["crop_resize"](**arguments, boxes=half, spatial_scale=_number(0.5))
    np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-5)
    by_width = mode.endswith("WIDTH_FIRST")
    unit = torch.tensor([box]) / torch.tensor([4, 3, 4, 3] if by_width else [3, 4, 3, 4])
    y = OPS["crop_resize"](**arguments, boxes=unit, normalized_coordinates=torch.tensor(True))
    np.testing.assert_allclose(y[0], expected, rtol=1e-3, atol=1e-4)


def test_crop_resize_before_ios17_takes_regions() -> None:
    x = _random(0, 2, 3, 4, 5)
    box = [0.5, 1.0, 2.5, 3.0]
    arguments = {"x": x, "target_height": _number(2), "sampling_mode": "ALIGN_CORNERS"}
    every = OPS["crop_resize"](**arguments, roi=torch.tensor([box, box]).reshape(2, 1, 4, 1, 1))
    assert every.shape == (2, 2, 3, 2, 1)
    one = OPS["crop_resize"](**arguments, roi=torch.tensor([[1, *box]]).reshape(1, 1, 5, 1, 1))
    assert one.shape == (1, 1, 3, 2, 1)
    for image in (0, 1):
        expected = _cropped(x[image].double().numpy(), box, (2, 1), "ALIGN_CORNERS", 0.0)
        np.testing.assert_allclose(every[1, image], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[0, 0], every[0, 1])
    with pytest.raises(ValueError, match="boxes"):
        OPS["crop_resize"](x=x)


PADDINGS = {"constant": "zeros", "border": "border", "reflection": "reflection"}


@few
@given(
    st.sampled_from(["bilinear", "nearest"]),
    st.sampled_from(["constant", "border", "reflection", "symmetric"]),
    st.booleans(),
    st.integers(1, 4),
    seeds,
)
def test_resample_is_grid_sample(
    mode: str, padding: str, aligned: bool, width: int, seed: int
) -> None:
    # Torch has one reflection, about the centers when aligned and about the edges when not.
    if padding in ("reflection", "symmetric"):
        aligned = padding == "reflection"
    x, points = _random(seed, 2, 3, 4, width), _random(seed + 1, 2, 3, 5, 2) * 1.5
    y = OPS["resample"](
        x=x,
        coordinates=points,
        sampling_mode=mode,
        padding_mode=padding,
        padding_value=_number(0.0),
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=torch.tensor(aligned),
    )
    expected = F.grid_sample(
        x, points, mode, PADDINGS.get(padding, "reflection"), align_corners=aligned
    )
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def test_resample_pads_with_its_value_and_takes_pixels_or_units() -> None:
    x = torch.tensor([[[[11.0, 22.0], [33.0, 44.0]]]])
    arguments = {
        "x": x, "sampling_mode": "bilinear", "padding_mode": "constant",
        "padding_value": _number(6.17), "align_corners": torch.tensor(True),
    }  # fmt: skip
    points = torch.tensor([[[[0.0, 0.0], [1.0, 0.5], [-0.5, 0.0], [5.0, 5.0]]]])
    y = OPS["resample"](**arguments, coordinates=points, coordinates_mode="unnormalized")
    torch.testing.assert_close(y[0, 0, 0], torch.tensor([11, 33, (11 + 6.17) / 2, 6.17]))
    unit = OPS["resample"](
        **arguments, coordinates=points, coordinates_mode="normalized_zero_to_one"
    )
    torch.testing.assert_close(unit, y)  # two pixels: one step is one unit
    with pytest.raises(ValueError, match="'polar'"):
        OPS["resample"](**arguments, coordinates=points, coordinates_mode="polar")


@few
@given(sizes, sizes, sizes, sizes, st.integers(1, 2), st.booleans(), seeds)
def test_affine_is_affine_grid(
    h: int, w: int, new_h: int, new_w: int, matrices: int, aligned: bool, seed: int
) -> None:
    x, matrix = _random(seed, 2, 3, h, w), _random(seed + 1, matrices, 6)
    theta = matrix.reshape(matrices, 2, 3).expand(2, 2, 3)
    # Torch puts a single pixel in the middle; the reference's first coordinate is -1.
    if 1 in (new_h, new_w):
        return
    points = F.affine_grid(theta, [2, 3, new_h, new_w], align_corners=aligned)
    y = OPS["affine"](
        x=x,
        transform_matrix=matrix,
        output_height=_number(new_h),
        output_width=_number(new_w),
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=_number(0.0),
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=torch.tensor(aligned),
    )
    expected = F.grid_sample(x, points, align_corners=aligned)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def test_what_the_reference_lacks_is_refused() -> None:
    x = _random(0, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="sampling mode 'MIDDLE'"):
        OPS["resize_bilinear"](x=x, sampling_mode="MIDDLE")
    rest = {
        "x": x, "coordinates": torch.zeros(1, 1, 1, 2), "padding_value": _number(0.0),
        "coordinates_mode": "unnormalized", "align_corners": torch.tensor(True),
    }  # fmt: skip
    with pytest.raises(ValueError, match="sampling mode 'cubic'"):
        OPS["resample"](**rest, sampling_mode="cubic", padding_mode="border")
    with pytest.raises(ValueError, match="padding mode 'wrap'"):
        OPS["resample"](**rest, sampling_mode="nearest", padding_mode="wrap")
    with pytest.raises(ValueError, match="box coordinate mode 'XYXY'"):
        OPS["crop_resize"](x=x, boxes=torch.zeros(1, 4), box_coordinate_mode="XYXY")
