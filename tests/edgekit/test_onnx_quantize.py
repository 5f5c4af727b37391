"""QDQ rewriting: ranges are the library's own, names survive, codes are found to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator
from torch import Tensor, nn

from edgekit.calibration import Calibration, checked_calibration
from edgekit.capture import capture, reference_from
from edgekit.errors import LoweringFailed
from edgekit.onnx_export import Exported, onnx_from_program
from edgekit.onnx_quantize import Style, measured, quantized, rewritten, serialized_with_codes
from edgekit.onnx_ranges import ENTROPY_BINS
from edgekit.source import resolve
from edgekit.spec import Arrays

STYLE = Style("uint8")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.tiny = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.tiny(torch.relu(self.first(x)))).mean((2, 3)))
        return y


@pytest.fixture(scope="module")
def exported() -> Exported:
    torch.manual_seed(0)
    model = resolve(Small(), ["x=1x2x8x8"])
    return onnx_from_program(capture(model, reference_from(model)), "test")


@pytest.fixture(scope="module")
def data() -> Calibration:
    generator = np.random.default_rng(0)
    shapes = generator.standard_normal((12, 1, 2, 8, 8)).astype(np.float32)
    # The range grows from sample to sample, so that no histogram can keep its first ends.
    grown = [{"x": array * (1 + index)} for index, array in enumerate(shapes)]
    return checked_calibration(grown, "noise")


class _All:
    """Every sample at once, as the library reads them."""

    def __init__(self, samples: Iterator[Arrays]) -> None:
        self._samples = samples

    def get_next(self) -> Any:
        return next(self._samples, None)


@pytest.mark.parametrize("method", ["min-max", "entropy", "percentile"])
def test_ranges_measured_sample_by_sample_are_those_of_all_samples_at_once(
    exported: Exported, data: Calibration, tmp_path: Path, method: Any
) -> None:
    found = measured(exported.model, data, method=method, keep_float=(), doing="calibrating")
    onnx.save(found.model, tmp_path / "m.onnx")
    calibrator = create_calibrator(
        tmp_path / "m.onnx",
        augmented_model_path=str(tmp_path / "augmented.onnx"),
        calibrate_method={
            "min-max": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }[method],
        extra_options={"num_bins": ENTROPY_BINS} if method == "entropy" else {},
    )
    calibrator.collect_data(_All(iter(data.samples)))
    expected = calibrator.compute_data()
    assert set(found.ranges.keys()) == set(expected.keys()) >= {"x", "conv2d", "relu"}
    for name, value in expected.items():
        assert found.ranges[name].range_value == value.range_value, name
        if method != "min-max":
            np.testing.assert_array_equal(found.ranges[name].hist, value.hist)


def test_nodes_keep_their_names_and_those_kept_float_have_float_weights(
    exported: Exported, data: Calibration
) -> None:
    products = {node.name for node in exported.model.graph.node if node.op_type in ("Conv", "Gemm")}
    kept = next(name for name, node in exported.origins.items() if node.name == "conv2d_1")
    model = quantized(
        exported.model, data, STYLE, method="min-max", keep_float=[kept], doing="calibrating"
    )
    nodes = {node.name: node for node in model.graph.node}
    assert products <= set(nodes)
    floats = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    assert [name for name in products if nodes[name].input[1] in floats] == [kept]
    assert {entry.domain for entry in model.opset_import} == {""}


class NearlyConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.cat([x * 1e-7 + 1, x * 1e-44], 1))
        return y


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_values_that_hardly_differ_have_a_range_too(method: Any) -> None:
    model = resolve(NearlyConstant(), ["x=1x1x4x4"])
    exported = onnx_from_program(capture(model, reference_from(model)), "test")
    noise = np.random.default_rng(0).standard_normal((8, 1, 1, 4, 4)).astype(np.float32)
    data = checked_calibration([{"x": array} for array in noise], "noise")
    found = measured(exported.model, data, method=method, keep_float=(), doing="x")
    _, high = found.ranges["add"].range_value
    assert 0.99 < high < 1.01
    assert rewritten(found, STYLE, keep_float=()).graph.node


def test_the_progress_line_hears_of_every_sample(exported: Exported, data: Calibration) -> None:
    heard: list[str] = []
    watched = data.reporting(heard.append)
    measured(exported.model, watched, method="percentile", keep_float=(), doing="calibrating x")
    assert heard[0].startswith("calibrating x, first pass: 1 of 12")
    assert heard[-1].startswith("calibrating x, second pass: 12 of 12")


def test_codes_are_where_the_places_say_even_a_single_byte(
    exported: Exported, data: Calibration
) -> None:
    ready = measured(exported.model, data, method="min-max", keep_float=(), doing="calibrating")
    model = rewritten(ready, STYLE, keep_float=())
    content, places = serialized_with_codes(model, exported.origins, "model.onnx")
    assert [(place["layer"], place["count"]) for place in places] == [
        ("first", 8 * 2 * 9),
        ("tiny", 8 * 9),
        ("last", 4 * 8),
    ]
    assert {place["file"] for place in places} == {"model.onnx"}
    changed = bytearray(content)
    for place in places:
        changed[place["offset"] : place["offset"] + place["count"]] = bytes(place["count"])
    before, after = (onnx.load_from_string(bytes(each)) for each in (content, changed))
    # Codes alone became zero: the same file otherwise, to the byte.
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        if old.data_type == onnx.TensorProto.INT8 and old.dims and len(old.dims) > 1:
            assert old.raw_data.strip(b"\0")
            assert not new.raw_data.strip(b"\0")
            new.raw_data = old.raw_data
    assert before == after


def test_a_layer_of_one_weight_is_found_too() -> None:
    torch.manual_seed(0)
    model = resolve(nn.Conv2d(1, 1, 1), ["input=1x1x4x4"])
    exported = onnx_from_program(capture(model, reference_from(model)), "test")
    noise = np.random.default_rng(0).standard_normal((8, 1, 1, 4, 4)).astype(np.float32)
    data = checked_calibration([{"input": array} for array in noise], "noise")
    made = quantized(exported.model, data, STYLE, method="min-max", keep_float=(), doing="x")
    content, (place,) = serialized_with_codes(made, exported.origins, "model.onnx")
    assert place["count"] == 1
    assert abs(np.int8(content[place["offset"]] - 256 * (content[place["offset"]] > 127))) == 127


def test_a_weight_that_no_layer_of_the_program_owns_is_a_sentence(
    exported: Exported, data: Calibration
) -> None:
    made = quantized(exported.model, data, STYLE, method="min-max", keep_float=(), doing="x")
    with pytest.raises(LoweringFailed, match=r"no node of the captured graph.*int8 instead of any"):
        serialized_with_codes(made, {}, "model.onnx")


def test_what_the_library_trips_over_is_a_sentence(data: Calibration) -> None:
    with pytest.raises(LoweringFailed, match=r"could not measure .*--precision fp32, or int8-wei"):
        measured(onnx.ModelProto(), data, method="min-max", keep_float=(), doing="x")
