"""Decoder to one ``.pte``: one method, ``forward``, that takes any number of tokens.

One method, because each packs all weights again when it is loaded; and with its number of tokens
left open, because XNNPACK takes sizes from its arguments anyway: README.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgekit.artifact import Artifact
from edgekit.decoder import Decoder
from edgekit.errors import LoweringFailed, UnsupportedRecipe
from edgekit.graph import first_line, quiet
from edgekit.host import installed_version
from edgekit.recipe import Recipe
from edgekit_executorch.decoder_delegates import (
    Delegates,
    Matrix,
    in_channels,
    in_floats,
    in_groups,
)
from edgekit_executorch.decoder_module import Steps
from edgekit_executorch.stepper import MAIN, SPAN, WIDEST

with quiet():
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge

PRODUCTS: dict[str, Matrix] = {
    "int8-weights": in_channels,
    "int4": in_groups,
    "fp32": in_floats,
}


def artifact_from_decoder(
    decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None]
) -> Artifact:
    """Write ``model.pte`` into ``folder``. Raises ``UnsupportedRecipe`` or ``LoweringFailed``."""
    matrix = PRODUCTS.get(recipe.precision)
    if matrix is None:
        raise UnsupportedRecipe("executorch", recipe.precision, tuple(PRODUCTS))
    slots = -(-decoder.capacity // SPAN) * SPAN
    if not recipe.quantized:
        weights = {name: decoder.floats(name) for name in decoder.weights}
        decoder = Decoder(decoder.spec, weights, decoder.capacity)
    try:
        steps = Steps(decoder, Delegates(decoder, matrix), slots, report).eval()
        report("joining the layers")
        with quiet():
            program = _program(steps, slots)
        report("writing")
        with (folder / MAIN).open("wb") as file:
            program.write_to_file(file)
    except OSError:
        raise
    except Exception as cause:  # the converter has no error classes of its own
        raise LoweringFailed(
            f"ExecuTorch could not lower the decoder to {recipe.precision}: {first_line(cause)}"
        ) from cause
    return Artifact(
        target="executorch",
        recipe=recipe,
        main=MAIN,
        files={MAIN: folder / MAIN},
        inputs=(),
        outputs=(),
        provenance={
            "decoder": {
                "spec": decoder.spec.to_json(),
                "capacity": decoder.capacity,
                "slots": slots,
            },
            "delegates": decoder.spec.layers + 2,
            "versions": {name: installed_version(name) for name in ("torch", "executorch")},
        },
    )


def _program(steps: Steps, slots: int) -> Any:
    """ExecuTorch's program. Sizes are open: tokens, rows and visible slots."""
    spec, tokens, rows, seen = steps.spec, 3, 2, SPAN
    group = spec.heads // spec.kv_heads
    # Each a tensor of its own: the capture takes one that is given twice for one input.
    cos, sin = (torch.zeros(tokens, 1, spec.head_dim) for _ in range(2))
    mask = torch.zeros(group * tokens, seen)
    fed, slots_of = (torch.zeros(tokens, dtype=torch.int64) for _ in range(2))
    inputs = (fed, cos, sin, mask, slots_of, torch.arange(rows))
    # From 2, as the capture takes 1 for a size that is always 1; at run time 1 is as good as any.
    n, r = (torch.export.Dim(name, min=2, max=WIDEST) for name in "nr")
    s = torch.export.Dim("s", min=2, max=slots)
    open_sizes = {
        **{name: {0: n} for name in ("tokens", "cos", "sin", "slots")},
        "mask": {0: group * n, 1: s},
        "rows": {0: r},
    }
    exported = torch.export.export(steps, inputs, dynamic_shapes=open_sizes)
    # The delegates' insides are no ATen ops, which the check of the op set would look for.
    edge = to_edge(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    # In place: else each pass would copy the cache as a whole.
    config = ExecutorchBackendConfig(run_reinplace_pass=True, emit_mutable_buffer_names=True)
    return edge.to_executorch(config)
