"""Ranges of every value of an ONNX model on calibration data, by onnxruntime.quantization."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekit.calibration import Calibration
from edgekit.graph import quiet
from edgekit.spec import Array, Arrays

with quiet():
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import HistogramCollector, create_calibrator

# The library's default for entropy, 128 bins for 128 codes, leaves one range to choose from,
# the whole of it: min-max, made symmetric. With 512 the range can shrink to a quarter.
ENTROPY_BINS = 512
# Samples whose smallest and largest values are held before they are merged: two small arrays for
# each value of the graph. (The library's own option for this drops what it holds.)
_AT_ONCE = 16


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
    def __init__(self, samples: Iterator[Arrays]) -> None:
        self._samples = samples

    def get_next(self) -> Any:
        return next(self._samples, None)


def measured_ranges(
    model: onnx.ModelProto,
    calibration: Calibration,
    method: CalibrationMethod,
    doing: str,
    folder: Path,
) -> Any:
    """The library's ``TensorsData`` of ``model``; ``folder`` is for its files.

    The library keeps every value of every sample before it makes a histogram: gigabytes for a
    few hundred images. Here the samples go by twice, for the ends of each histogram and to fill
    it, one in memory at a time. The histograms are the same.
    """
    path = folder / "measured.onnx"
    onnx.save(model, path)
    calibrator = create_calibrator(
        path,
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=method,
        extra_options={"num_bins": ENTROPY_BINS} if method == CalibrationMethod.Entropy else {},
    )
    if method == CalibrationMethod.MinMax:
        samples = calibration.watched(doing)
        while part := list(islice(samples, _AT_ONCE)):
            calibrator.collect_data(_Reader(iter(part)))
        return calibrator.compute_data()
    ends = _Ends()
    _collect(calibrator, ends, calibration, f"{doing}, first pass")
    filled = _Filled(calibrator, ends)
    _collect(calibrator, filled, calibration, f"{doing}, second pass")
    return calibrator.compute_data()


def _collect(calibrator: Any, collector: Any, calibration: Calibration, doing: str) -> None:
    calibrator.collector = collector
    for sample in calibration.watched(doing):
        calibrator.collect_data(_Reader(iter([sample])))


class _Ends:
    """The smallest and largest value of each tensor, and the same of the magnitudes."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[Any, Any]] = {}
        self.magnitudes: dict[str, tuple[Any, Any]] = {}

    def collect(self, tensors: dict[str, list[Array]]) -> None:
        """What the library calls with the values of one sample."""
        for name, (array,) in tensors.items():
            if array.size:
                _widen(self.values, name, array)
                _widen(self.magnitudes, name, np.absolute(array))


def _widen(ends: dict[str, tuple[Any, Any]], name: str, array: Array) -> None:
    low, high = np.nanmin(array), np.nanmax(array)
    before = ends.get(name, (low, high))
    ends[name] = (min(before[0], low), max(before[1], high))


class _Filled(HistogramCollector):  # type: ignore[misc]  # untyped base
    """The library's histograms over ends that are known, to which each sample adds its counts.

    Counts over equal bins add up exactly, so this is what one call with all data gives.
    """

    def __init__(self, calibrator: Any, ends: _Ends) -> None:
        super().__init__(
            calibrator.method,
            calibrator.symmetric,
            calibrator.num_bins,
            calibrator.num_quantized_bins,
            calibrator.percentile,
            calibrator.scenario,
        )
        self._ends = ends
        self._magnitudes = calibrator.method == "percentile" and calibrator.symmetric

    def collect(self, tensors: dict[str, list[Array]]) -> None:
        """What the library calls with the values of one sample."""
        for name, (array,) in tensors.items():
            if array.size:
                self._add(name, array.flatten())

    def _add(self, name: str, array: Array) -> None:
        low, high = self._ends.values[name]
        bound = np.array(max(abs(low), abs(high)), dtype=array.dtype)
        if self._magnitudes:
            array, span = np.absolute(array), self._ends.magnitudes[name]
        else:
            span = (-bound, bound)
        if not _has_room(span, self.num_bins):
            span = (0.0, bound) if self._magnitudes and bound > 1e-30 else (-1.0, 1.0)
        counts, edges = np.histogram(array, self.num_bins, range=span)
        if name in self.histogram_dict:
            counts = counts + self.histogram_dict[name][0]
        edges = edges.astype(array.dtype)
        self.histogram_dict[name] = (counts, edges, low, high, bound)


def _has_room(span: tuple[Any, Any], bins: int) -> bool:
    """Whether that many numbers lie in ``span``: values that are almost one constant have none.

    The library fails there.
    """
    try:
        np.histogram_bin_edges(np.array(span), bins)
    except ValueError:
        return False
    return True
