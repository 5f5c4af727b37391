"""Small models, calibrated on noise, for the integer recipes of ExecuTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import edgekit
from edgekit.calibration import checked_calibration
from edgekit.capture import capture, reference_from
from edgekit.program import Program
from edgekit.recipe import Recipe
from edgekit.source import resolve
from edgekit.spec import Array, Arrays


def calibrated(module: nn.Module, *inputs: str) -> Program:
    """The captured module with eight samples of noise to calibrate on."""
    torch.manual_seed(0)
    model = resolve(module.eval(), list(inputs))
    program = capture(model, reference_from(model))
    generator = np.random.default_rng(0)
    samples: list[Arrays] = [
        {
            spec.name: generator.standard_normal(
                [size if isinstance(size, int) else 2 for size in spec.shape]
            ).astype(np.float32)
            for spec in program.inputs
        }
        for _ in range(8)
    ]
    return replace(program, calibration=checked_calibration(samples, "noise"))


@dataclass
class Made:
    """A program, what was made of it, and both answers to its first calibration sample."""

    program: Program
    artifact: edgekit.Artifact
    sample: Arrays
    expected: Array
    output: Array

    @property
    def noise(self) -> float:
        """The difference's power by that of the expected output, in decibels, negative."""
        difference = self.output.astype(np.float64) - self.expected
        return float(10 * np.log10((difference**2).sum() / (self.expected**2).sum()))


def made(module: nn.Module, recipe: Recipe, *inputs: str) -> Made:
    """``module`` lowered and run; it takes ``x``, an image, unless ``inputs`` say otherwise."""
    program = calibrated(module, *(inputs or ("x=1x3x12x12",)))
    backend = edgekit.backend("executorch")
    artifact = backend.lower(program, recipe)
    assert program.calibration is not None
    sample = program.calibration.samples[0]
    tensors = [torch.from_numpy(array) for array in sample.values()]
    with torch.no_grad():
        expected: torch.Tensor = program.exported.module()(*tensors)
    with backend.open(artifact) as session:
        (output,) = session.run(sample).values()
    return Made(program, artifact, sample, expected.numpy(), output)
