"""Calibration by torchao's PT2E, for every target whose converter starts there (needs torch)."""

from __future__ import annotations

from typing import Any

import torch

from edgekit.graph import quiet
from edgekit.program import Program
from edgekit.recipe import Method

with quiet():
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver

KEPT_PERCENT = 99.999  # what ONNX Runtime keeps by default, so that the word means one thing


class PercentileObserver(HistogramObserver):  # type: ignore[misc]  # untyped base
    """The range that holds ``KEPT_PERCENT`` of the values, as much cut off below as above."""

    def _non_linear_param_search(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest value of the range; the base class asks for these two."""
        share = torch.cumsum(self.histogram.double(), 0) / self.histogram.double().sum()
        cut = (1 - KEPT_PERCENT / 100) / 2
        width = (self.max_val - self.min_val) / self.bins
        # The bin in which the sum passes the cut, and that in which it reaches the rest.
        first = torch.searchsorted(share, torch.tensor(cut, dtype=torch.double), right=True)
        last = torch.searchsorted(share, torch.tensor(1 - cut, dtype=torch.double))
        top = self.bins - 1
        return (
            self.min_val + width * first.clamp(max=top),
            self.min_val + width * (last.clamp(max=top) + 1),
        )


# torchao has no search by divergence; its histogram search takes the range of least squared
# error, which serves the same end: to cut off rare large values where that pays.
_OBSERVERS: dict[Method, Any] = {
    "min-max": MinMaxObserver,
    "entropy": HistogramObserver,
    "percentile": PercentileObserver,
}


def observer(method: Method) -> Any:
    """The constructor of torchao's observer for ranges of activations found by ``method``.

    It goes into a ``QuantizationSpec`` as ``observer_or_fake_quant_ctr``; per tensor, any dtype.
    """
    return _OBSERVERS[method]


def calibrate(prepared: torch.nn.Module, program: Program, doing: str) -> None:
    """Run the calibration samples of ``program`` through what ``prepare_pt2e`` made of it.

    ``doing`` names the work on the progress line. Raises ``ValueError`` without calibration data.
    """
    if program.calibration is None:
        raise ValueError("a calibrated recipe was lowered without calibration data")
    for sample in program.calibration.watched(doing):
        tensors = [torch.from_numpy(sample[spec.name]) for spec in program.inputs]
        with quiet(), torch.no_grad():
            prepared(*tensors)
