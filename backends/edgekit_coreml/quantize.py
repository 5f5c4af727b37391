"""Recipes to the vendors' own settings: PT2E for W8A8, coremltools.optimize for weights alone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgekit.capture import export_module
from edgekit.errors import LoweringFailed, UsageError
from edgekit.graph import first_line, quiet
from edgekit.program import Program
from edgekit.recipe import Recipe

with quiet():  # it warns of every torch newer than it was tried with
    import coremltools
    from coremltools.optimize import coreml as optimize

__all__ = [
    "Quantized",
    "compression_passes",
    "compute_precision",
    "conversion_passes",
    "coremltools",
    "oldest_that_holds",
    "palette_mode",
    "quantized_program",
]

_BLOCK = 32  # weights that share a scale in int4; measured best, and what Apple's guides use
# Weights times palette entries; measured 115 s at 1.1e9 and 11 s at 2.8e8 on a busy core.
_MOST_KMEANS = 500_000_000
# It divides one scale of a sum by the other: float16 overflows where ranges differ 500 times, and
# the sum's value is then no longer that of the captured graph.
_LEFT_OUT = {"common::distributive_quantized_binary_op_scale_normalization"}


def compute_precision(recipe: Recipe) -> Any:
    """The precision of what is not quantized; inputs and outputs stay float32."""
    half = recipe.weights != "float32"
    return coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32


def oldest_that_holds(recipe: Recipe, minimum: str) -> None:
    """Raise ``UsageError`` where a package for ``minimum`` cannot hold this recipe."""
    name = recipe.precision
    if recipe.calibrated and minimum == "iOS16":
        raise UsageError(
            f"coreml {name} holds activations as integers, which iOS17 was the first to take, and "
            "--coreml-minimum is iOS16; leave --coreml-minimum out, or choose int8-weights."
        )
    if recipe.weights == "int4" and recipe.form == "linear" and minimum != "iOS18":
        raise UsageError(
            f"coreml {name} holds a scale for each {_BLOCK} weights, which iOS18 was the first to "
            f"take, and --coreml-minimum is {minimum}; add --coreml-minimum iOS18, or choose "
            "palette4 or int8-weights."
        )


def conversion_passes(recipe: Recipe) -> Any:
    """The converter's passes, without the one that a sum of integers does not survive."""
    pipeline = coremltools.PassPipeline.DEFAULT
    if recipe.calibrated:
        pipeline.remove_passes(_LEFT_OUT)
    return pipeline


def palette_mode(program: Program, recipe: Recipe) -> str:
    """``kmeans`` where that takes less than a minute, else ``uniform``: evenly spaced values."""
    weights = sum(tensor.numel() for tensor in program.exported.state_dict.values())
    return "kmeans" if weights << int(recipe.weights[3:]) <= _MOST_KMEANS else "uniform"


def compression_passes(program: Program, recipe: Recipe, keep_float: Collection[str]) -> Any:
    """Passes of coremltools.optimize for weights alone; ``keep_float`` are names of operations.

    Weights of up to 2048 values stay as they are, which is coremltools' own rule.
    """
    each: Any
    if not recipe.quantized or recipe.calibrated:
        return coremltools.PassPipeline.EMPTY
    if recipe.form == "palette":
        work = "compression::palettize_weights"
        each = optimize.OpPalettizerConfig(
            mode=palette_mode(program, recipe), nbits=int(recipe.weights[3:])
        )
    else:
        work = "compression::linear_quantize_weights"
        blocks: dict[str, Any] = {"granularity": "per_channel"}
        if recipe.weights == "int4":
            blocks = {"granularity": "per_block", "block_size": _BLOCK}
        each = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype=recipe.weights, **blocks
        )
    config = optimize.OptimizationConfig(
        global_config=each, op_name_configs=dict.fromkeys(keep_float)
    )
    pipeline = coremltools.PassPipeline([work])
    pipeline.set_options(work, {"config": config})
    return pipeline


@dataclass(frozen=True)
class Quantized:
    """A program with quantize and dequantize in its graph.

    ``folded`` are convolutions that a batch norm went into, with its name: their value is its.
    """

    program: Program
    folded: Mapping[str, str]


def quantized_program(program: Program, recipe: Recipe, keep_float: Collection[str]) -> Quantized:
    """``program`` with int8 weights and activations, calibrated on its own data.

    Raises ``LoweringFailed`` where torchao gives up on it.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from edgekit.pt2e import calibrate
    from edgekit_coreml.quantizer import Int8Quantizer

    try:
        with quiet():
            # A copy: batch norms are folded into the weights in place.
            module = copy.deepcopy(program.exported.module())
            prepared = prepare_pt2e(module, Int8Quantizer(recipe.method, keep_float))
        calibrate(prepared, program, f"calibrating coreml {recipe.precision}")
        with quiet():
            converted = convert_pt2e(prepared)
    except (RuntimeError, ValueError, AssertionError, LookupError) as cause:
        raise LoweringFailed(
            f"torchao could not quantize the model for coreml: {first_line(cause)} Try "
            "--precision int8-weights."
        ) from cause
    exported = export_module(converted, program.inputs)
    left = {node.name for node in exported.graph.nodes}
    return Quantized(replace(program, exported=exported), _folded(program, left))


def _folded(program: Program, left: Collection[str]) -> dict[str, str]:
    """By convolution, the batch norm after it that is no longer there."""
    return {
        node.args[0].name: node.name
        for node in program.exported.graph.nodes
        if node.target is torch.ops.aten.batch_norm.default and node.name not in left
    }
