"""A ``coremltools`` that predicts without Core ML, for tests of predict_on_mac.py.

The package's one file is JSON that says which arrays its features are. A model answers as the real
one does: float32 and int32 arrays, no scalars, and a classifier's label beside them. FAKE_FAULT
plants one fault on one unit: ``ALL: one element``.
"""

from __future__ import annotations

import json
import os
import time
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "9.0"
_UNIT, _, _FAULT = os.environ.get("FAKE_FAULT", "").partition(": ")
_LABELS = ("cat", "dog", "bird")


class ComputeUnit(Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


class MLModel:
    def __init__(self, model: str, *, compute_units: ComputeUnit = ComputeUnit.ALL) -> None:
        self._fault = _FAULT if compute_units.name == _UNIT else ""
        self._unit = compute_units
        self._package = json.loads((Path(model) / "Manifest.json").read_bytes())
        if self._fault == "load":
            raise Exception("Error compiling model: it is too new for this macOS.")

    def predict(self, data: dict[str, Any]) -> dict[str, Any]:
        if self._fault == "predict":
            raise RuntimeError("Error computing NN outputs.")
        if self._unit is not ComputeUnit.CPU_AND_GPU:
            time.sleep(0.0005)  # so that one of them is the fastest for sure
        x = self._input(data["x_feature"])
        scores = (x.reshape(len(x), -1).mean(axis=1, keepdims=True) * [[1, 3, 2]]).astype("float32")
        if self._fault == "one element":
            scores[0, 0] += 1
        best = int(scores[0].argmax())
        label = _LABELS[best - 1] if self._fault == "label" else _LABELS[best]
        answer = {
            "scores_feature": scores.astype(np.float16).astype(np.float32),
            "count": np.array([x.size], np.int32),
            "high": (scores > 1.5).astype(np.float32),
            "classLabel": label,
            "classLabel_probs": dict(zip(_LABELS, scores[0].tolist(), strict=True)),
        }
        if self._fault == "fraction":
            answer["high"] = answer["high"] / 2
        data.clear()  # the real one writes into what it is given
        return answer

    def _input(self, value: Any) -> np.ndarray[Any, Any]:
        """What the model computes with: an image is normalised inside of it."""
        image = self._package["image"]
        if image is None:
            if not isinstance(value, np.ndarray) or value.dtype.name not in ("float32", "int32"):
                raise RuntimeError(f"value type not convertible: {value!r}")
            return np.asarray(value)
        if isinstance(value, np.ndarray) or value.mode != {1: "L", 3: "RGB"}[image["channels"]]:
            raise RuntimeError("Input should be an image.")
        pixels = np.asarray(value, np.float32).reshape(value.height, value.width, -1)
        scaled = (pixels / 255 - np.array(image["mean"])) / np.array(image["std"])
        return np.asarray(scaled.transpose(2, 0, 1)[None], np.float32)


class models:  # noqa: N801  (coremltools.models is a package; a namespace will do here)
    MLModel = MLModel
