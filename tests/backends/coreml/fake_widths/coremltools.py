"""A ``coremltools`` whose model multiplies by the codes that its weight file holds at byte 2.

FAKE_FAULT=load makes every unit refuse the package.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "9.0"


class ComputeUnit(Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


class MLModel:
    def __init__(self, model: str, *, compute_units: ComputeUnit = ComputeUnit.ALL) -> None:
        if os.environ.get("FAKE_FAULT") == "load":
            raise Exception("Error compiling model.")
        content = (Path(model) / "weight.bin").read_bytes()
        self._codes = np.frombuffer(content, np.int8, 6, 2).astype(np.float32)

    def predict(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"scores": data["x"].mean() * self._codes[None], "classLabel": "label 0"}


class models:  # noqa: N801  (coremltools.models is a package; a namespace will do here)
    MLModel = MLModel
